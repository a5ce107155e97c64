/*
 * The practical limit: a server that does nothing but send the same bytes to every socket of a topic.
 *
 *   limit PORT each|joined
 *
 * "each" calls send once per message and socket; "joined" gathers what one turn of the loop brought for a
 * topic and sends it once per socket. It understands exactly what the load generator says (one topic a
 * connection, whole text frames, one fixed handshake key) and is no server for anything else.
 */
#define _GNU_SOURCE
#include "../wire.h"

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdbool.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#define RECEIVE (256 * 1024)
#define TOPICS 4096
#define REQUEST_END "\r\n\r\n"

struct bytes {
    uint8_t *at;
    size_t n, cap;
};

struct topic {
    char *name;
    struct conn **members;
    int count, cap;
    struct bytes pending;
    bool dirty;
};

struct conn {
    int fd, topic, place; /* place among the topic's members */
    bool open, echo, closed;
    struct bytes part, backlog;
};

static struct topic topics[TOPICS];
static int dirty[TOPICS], dirty_count, loop;
static bool joined;
static struct conn *dead; /* freed at the end of the turn: an event may still name it */
static uint8_t buffer[RECEIVE];

static void append(struct bytes *b, const void *data, size_t n) {
    if (b->n + n > b->cap) {
        b->cap = (b->n + n) * 2;
        b->at = realloc(b->at, b->cap);
        if (!b->at) die("realloc");
    }
    memcpy(b->at + b->n, data, n);
    b->n += n;
}

static void drop(struct bytes *b, size_t n) {
    memmove(b->at, b->at + n, b->n - n);
    b->n -= n;
    if (b->n == 0) {
        free(b->at);
        *b = (struct bytes){0};
    }
}

static void watch(struct conn *c, bool out, int operation) {
    struct epoll_event event = {.events = EPOLLIN | (out ? EPOLLOUT : 0), .data.ptr = c};
    epoll_ctl(loop, operation, c->fd, &event);
}

static void conn_close(struct conn *c) {
    if (c->closed) return;
    c->closed = true;
    if (c->topic >= 0) {
        struct topic *t = &topics[c->topic];
        t->members[c->place] = t->members[--t->count];
        t->members[c->place]->place = c->place;
    }
    close(c->fd);
    free(c->part.at);
    free(c->backlog.at);
    c->part.at = (uint8_t *)dead; /* the list of the dead goes through here */
    dead = c;
}

static void conn_send(struct conn *c, const uint8_t *data, size_t n) {
    if (c->closed) return;
    if (c->backlog.n == 0) {
        ssize_t sent = send(c->fd, data, n, MSG_NOSIGNAL);
        if (sent == (ssize_t)n) return;
        if (sent < 0 && errno != EAGAIN) return; /* its end will be read */
        if (sent > 0) data += sent, n -= (size_t)sent;
        watch(c, true, EPOLL_CTL_MOD);
    }
    append(&c->backlog, data, n);
}

static void conn_writable(struct conn *c) {
    ssize_t sent = send(c->fd, c->backlog.at, c->backlog.n, MSG_NOSIGNAL);
    if (sent > 0) drop(&c->backlog, (size_t)sent);
    if (c->backlog.n == 0) watch(c, false, EPOLL_CTL_MOD);
}

static int find_topic(const uint8_t *name, size_t n) {
    uint32_t hash = 2166136261u;
    for (size_t i = 0; i < n; i++) hash = (hash ^ name[i]) * 16777619u;
    for (int i = 0; i < TOPICS; i++) {
        struct topic *t = &topics[(hash + (uint32_t)i) % TOPICS];
        if (!t->name) t->name = strndup((const char *)name, n);
        if (strlen(t->name) == n && memcmp(t->name, name, n) == 0) return (int)(t - topics);
    }
    fprintf(stderr, "limit: more than %d topics\n", TOPICS);
    exit(1);
}

static void subscribe(struct conn *c, int topic) {
    struct topic *t = &topics[topic];
    if (c->topic >= 0) return;
    if (t->count == t->cap) {
        t->cap = t->cap ? t->cap * 2 : 4;
        t->members = realloc(t->members, (size_t)t->cap * sizeof *t->members);
        if (!t->members) die("realloc");
    }
    c->topic = topic;
    c->place = t->count;
    t->members[t->count++] = c;
}

static void publish(int topic, const uint8_t *frame, size_t n) {
    struct topic *t = &topics[topic];
    if (!joined) {
        for (int i = 0; i < t->count; i++) conn_send(t->members[i], frame, n);
        return;
    }
    append(&t->pending, frame, n);
    if (!t->dirty) dirty[dirty_count++] = topic;
    t->dirty = true;
}

static void end_of_turn(void) {
    for (int i = 0; i < dirty_count; i++) {
        struct topic *t = &topics[dirty[i]];
        for (int j = 0; j < t->count; j++) conn_send(t->members[j], t->pending.at, t->pending.n);
        t->pending.n = 0;
        t->dirty = false;
    }
    dirty_count = 0;
    while (dead) {
        struct conn *next = (struct conn *)dead->part.at;
        free(dead);
        dead = next;
    }
}

/* {"type":"subscribe","topic":"T"…} or {"type":"send","topic":"T",REST: what leaves is {REST. */
static void on_message(struct conn *c, uint8_t *text, size_t n) {
    static const char SUBSCRIBE[] = "{\"type\":\"subscribe\",\"topic\":\"", SEND[] = "{\"type\":\"send\",\"topic\":\"";
    static uint8_t frame[RECEIVE + 16];
    uint8_t head[16];
    bool send = n > sizeof SEND && memcmp(text, SEND, sizeof SEND - 1) == 0;
    if (c->echo) {
        size_t header = frame_header(frame, OP_TEXT, n, NULL);
        memcpy(frame + header, text, n);
        conn_send(c, frame, header + n);
        return;
    }
    if (!send && (n < sizeof SUBSCRIBE || memcmp(text, SUBSCRIBE, sizeof SUBSCRIBE - 1) != 0)) return;
    uint8_t *name = text + (send ? sizeof SEND : sizeof SUBSCRIBE) - 1, *end = memchr(name, '"', (size_t)(text + n - name));
    if (!end) return;
    int topic = find_topic(name, (size_t)(end - name));
    if (!send) {
        subscribe(c, topic);
        return;
    }
    uint8_t *rest = end + 1; /* the comma becomes the brace */
    size_t length = (size_t)(text + n - rest), header = frame_header(head, OP_TEXT, length, NULL);
    memcpy(frame, head, header);
    memcpy(frame + header, rest, length);
    frame[header] = '{';
    publish(topic, frame, header + length);
}

static size_t handshake(struct conn *c, uint8_t *data, size_t n) {
    static const char answer[] = "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                                 "Sec-WebSocket-Accept: " WS_ACCEPT REQUEST_END;
    static const char other[] = "HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
    uint8_t *end = memmem(data, n, REQUEST_END, 4);
    if (!end) return 0;
    if (memmem(data, n, WS_KEY, sizeof WS_KEY - 1)) {
        c->open = true;
        c->echo = n > 10 && memcmp(data, "GET /echo ", 10) == 0;
        conn_send(c, (const uint8_t *)answer, sizeof answer - 1);
    } else {
        conn_send(c, (const uint8_t *)other, sizeof other - 1);
    }
    return (size_t)(end + 4 - data);
}

static size_t frames(struct conn *c, uint8_t *data, size_t n) {
    size_t used = 0;
    struct frame f;
    while (frame_parse(data + used, n - used, &f) && n - used >= f.header + f.length) {
        uint8_t *text = data + used + f.header;
        if (f.masked) mask_bytes(text, (size_t)f.length, f.key, 0);
        if (f.opcode == OP_TEXT) on_message(c, text, (size_t)f.length);
        if (f.opcode == OP_CLOSE) conn_close(c);
        used += f.header + (size_t)f.length;
        if (c->closed) break;
    }
    return used;
}

static void conn_readable(struct conn *c) {
    ssize_t n = recv(c->fd, buffer, sizeof buffer, 0);
    if (n <= 0) {
        if (n == 0 || errno != EAGAIN) conn_close(c);
        return;
    }
    if (c->part.n == 0) {
        size_t used = 0;
        if (!c->open) used = handshake(c, buffer, (size_t)n);
        if (c->open) used += frames(c, buffer + used, (size_t)n - used);
        if (!c->closed && used < (size_t)n) append(&c->part, buffer + used, (size_t)n - used);
        return;
    }
    append(&c->part, buffer, (size_t)n);
    if (!c->open) drop(&c->part, handshake(c, c->part.at, c->part.n));
    if (c->open && c->part.n) {
        size_t used = frames(c, c->part.at, c->part.n);
        if (!c->closed) drop(&c->part, used);
    }
}

static void accept_all(int listener) {
    int fd, on = 1;
    while ((fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)) >= 0) {
        struct conn *c = calloc(1, sizeof *c);
        if (!c) die("calloc");
        c->fd = fd;
        c->topic = -1;
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
        watch(c, false, EPOLL_CTL_ADD);
    }
}

int main(int argc, char **argv) {
    if (argc != 3) {
        fprintf(stderr, "usage: limit PORT each|joined\n");
        return 2;
    }
    joined = strcmp(argv[2], "joined") == 0;
    raise_descriptors(20000);
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0), on = 1;
    struct sockaddr_in at = {.sin_family = AF_INET, .sin_port = htons((uint16_t)atoi(argv[1]))};
    at.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (bind(listener, (struct sockaddr *)&at, sizeof at) != 0 || listen(listener, 4096) != 0) die("limit: bind");
    loop = epoll_create1(EPOLL_CLOEXEC);
    struct epoll_event events[256], first = {.events = EPOLLIN, .data.ptr = NULL};
    epoll_ctl(loop, EPOLL_CTL_ADD, listener, &first);
    for (;;) {
        int n = epoll_wait(loop, events, 256, -1);
        for (int i = 0; i < n; i++) {
            struct conn *c = events[i].data.ptr;
            if (!c) {
                accept_all(listener);
                continue;
            }
            if (!c->closed && (events[i].events & EPOLLOUT)) conn_writable(c);
            if (!c->closed && (events[i].events & (EPOLLIN | EPOLLHUP | EPOLLERR))) conn_readable(c);
        }
        end_of_turn();
    }
}
