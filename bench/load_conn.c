/*
 * One thread of the load generator: its sockets from connect to close, and the accounting of what arrives.
 *
 * Level-triggered epoll, one large receive per event; of a frame only the header and the stamp are looked
 * at. What one turn completes is answered in one write per publisher, as a pipelining client does.
 */
#define _GNU_SOURCE
#include "load.h"

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <unistd.h>

#define RECEIVE (256 * 1024)
#define SCRATCH (1024 * 1024)
#define PROBE_EVERY 100000000u
#define PORTS_PER_SOURCE 20000

static const uint8_t KEY[4] = {0x5a, 0xc3, 0x17, 0x9e};
static _Atomic int complaints;

static void complain(const char *what, const char *text, size_t n) {
    if (atomic_fetch_add(&complaints, 1) < 3) fprintf(stderr, "load: %s: %.*s\n", what, (int)(n < 160 ? n : 160), text);
}

static void watch(struct thread *t, struct conn *c, bool out, int operation) {
    struct epoll_event event = {.events = EPOLLIN | (out ? EPOLLOUT : 0), .data.u32 = (uint32_t)(c - conns)};
    if (epoll_ctl(t->epoll, operation, c->fd, &event) != 0) die("epoll_ctl");
    c->wants_out = out;
}

static void conn_close(struct thread *t, struct conn *c) {
    if (c->state == CLOSED || c->state == IDLE) return;
    if (c->state == READY) {
        if (atomic_load(&phase) < STOP) bump(t->closed, 1);
    } else {
        bump(t->failed, 1);
        t->in_flight--;
    }
    c->state = CLOSED;
    close(c->fd);
}

static void conn_open(struct thread *t, struct conn *c) {
    int on = 1, id = (int)(c - conns);
    c->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (c->fd < 0) die("socket");
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    if (id >= PORTS_PER_SOURCE) { /* one source address has 28,000 ports */
        struct sockaddr_in from = {.sin_family = AF_INET};
        from.sin_addr.s_addr = htonl(0x7f000001u + (uint32_t)(id / PORTS_PER_SOURCE));
        setsockopt(c->fd, IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, &on, sizeof on);
        if (bind(c->fd, (struct sockaddr *)&from, sizeof from) != 0) die("bind");
    }
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons((uint16_t)opt.port)};
    inet_pton(AF_INET, opt.host, &to.sin_addr);
    c->state = CONNECTING;
    t->in_flight++;
    if (connect(c->fd, (struct sockaddr *)&to, sizeof to) != 0 && errno != EINPROGRESS) {
        complain("connect", strerror(errno), 99);
        return conn_close(t, c);
    }
    watch(t, c, true, EPOLL_CTL_ADD);
}

static void conn_write(struct thread *t, struct conn *c, const uint8_t *data, size_t n) {
    if (c->state == CLOSED) return;
    if (c->out_len == 0) {
        ssize_t sent = send(c->fd, data, n, MSG_NOSIGNAL);
        if (sent < 0 && errno != EAGAIN) return conn_close(t, c);
        if (sent > 0) data += sent, n -= (size_t)sent;
        if (n == 0) return;
    }
    if (c->out_len + n > c->out_cap) {
        c->out_cap = (c->out_len + n) * 2;
        c->out = realloc(c->out, c->out_cap);
        if (!c->out) die("realloc");
    }
    memcpy(c->out + c->out_len, data, n);
    c->out_len += n;
    if (!c->wants_out) watch(t, c, true, EPOLL_CTL_MOD);
}

static void conn_text(struct thread *t, struct conn *c, int opcode, const char *text, size_t n) {
    uint8_t frame[1024];
    if (n > sizeof frame - 16) n = sizeof frame - 16;
    size_t header = frame_header(frame, opcode, n, KEY);
    memcpy(frame + header, text, n);
    mask_bytes(frame + header, n, KEY, 0);
    conn_write(t, c, frame, header + n);
}

static void conn_flush(struct thread *t, struct conn *c) {
    size_t gone = 0;
    while (gone < c->out_len) {
        ssize_t sent = send(c->fd, c->out + gone, c->out_len - gone, MSG_NOSIGNAL);
        if (sent < 0 && errno == EAGAIN) break;
        if (sent < 0) return conn_close(t, c);
        gone += (size_t)sent;
    }
    memmove(c->out, c->out + gone, c->out_len - gone);
    c->out_len -= gone;
    if (c->out_len == 0 && c->wants_out) watch(t, c, false, EPOLL_CTL_MOD);
}

/* --- publishing --- */

void publisher_prepare(struct publisher *p) {
    char text[512];
    const char *topic = groups[p->group].topic;
    int n = 0;
    if (opt.dialect == PLAIN) n = snprintf(text, sizeof text, "{\"type\":\"send\",\"topic\":\"%s\",", topic);
    if (opt.dialect == SOCKETIO) n = snprintf(text, sizeof text, "42[\"%s\",{\"topic\":\"%s\",", opt.event, topic);
    if (opt.dialect == RAW || opt.dialect == NCHAN) n = snprintf(text, sizeof text, "{");
    n += snprintf(text + n, sizeof text - (size_t)n, "\"m\":\"");
    size_t stamp = (size_t)n;
    n += snprintf(text + n, sizeof text - (size_t)n, "%08x-%010x-%016x\",\"p\":\"", (unsigned)(p - pubs), 0u, 0u);
    const char *end = opt.dialect == SOCKETIO ? "\"}]" : "\"}";
    int fixed = 1 + 5 + STAMP + 7 + 2; /* {"m":"…","p":"…"} without p's text: what a subscriber reads */
    size_t pad = opt.size > fixed ? (size_t)(opt.size - fixed) : 0;
    size_t length = (size_t)n + pad + strlen(end);
    p->frame = malloc(length + 14);
    if (!p->frame) die("malloc");
    memcpy(p->key, KEY, 4);
    p->header = frame_header(p->frame, OP_TEXT, length, KEY);
    memcpy(p->frame + p->header, text, (size_t)n);
    for (size_t i = 0; i < pad; i++) p->frame[p->header + (size_t)n + i] = (uint8_t)('a' + i % 26);
    memcpy(p->frame + p->header + (size_t)n + pad, end, strlen(end));
    mask_bytes(p->frame + p->header, length, KEY, 0);
    p->frame_len = p->header + length;
    p->stamp_at = stamp;
}

static inline void put_hex(uint8_t *at, uint64_t value, int digits) {
    for (int i = digits - 1; i >= 0; i--, value >>= 4) at[i] = (uint8_t)"0123456789abcdef"[value & 15];
}

static inline size_t stamp(struct publisher *p, uint8_t *out, uint64_t seq, uint64_t time) {
    memcpy(out, p->frame, p->frame_len);
    uint8_t *at = out + p->header + p->stamp_at;
    put_hex(at + STAMP_SEQ, seq, 10);
    mask_bytes(at + STAMP_SEQ, 10, p->key, p->stamp_at + STAMP_SEQ);
    put_hex(at + STAMP_TIME, time, 16);
    mask_bytes(at + STAMP_TIME, 16, p->key, p->stamp_at + STAMP_TIME);
    return p->frame_len;
}

static void publish_one(struct thread *t, struct publisher *p, uint64_t seq, uint64_t time) {
    conn_write(t, p->conn, t->buffer + RECEIVE, stamp(p, t->buffer + RECEIVE, seq, time));
}

/* Closed loop: send until `outstanding` messages are under way, joined in as few writes as possible. */
static void pump(struct thread *t, struct publisher *p) {
    uint8_t *out = t->buffer + RECEIVE;
    size_t n = 0;
    uint64_t time = now_ns(), completed = atomic_load_explicit(&p->completed, memory_order_acquire), before = p->sent;
    while (p->sent - completed < (uint64_t)opt.outstanding) {
        if (n + p->frame_len > SCRATCH && n > 0) {
            conn_write(t, p->conn, out, n);
            n = 0;
        }
        n += stamp(p, out + n, ++p->sent, time);
    }
    bump(t->sent, p->sent - before);
    if (n) conn_write(t, p->conn, out, n);
}

static bool running(void) {
    int now = atomic_load_explicit(&phase, memory_order_relaxed);
    return now == RUN || now == MEASURE;
}

static void pump_dirty(struct thread *t) {
    bool run = running();
    for (int i = 0; i < t->dirty_count; i++) {
        pubs[t->dirty[i]].dirty = false;
        if (run && opt.rate <= 0) pump(t, &pubs[t->dirty[i]]);
    }
    t->dirty_count = 0;
}

static void arm(struct thread *t, uint64_t at) {
    struct itimerspec when = {.it_value = {(time_t)(at / 1000000000u), (long)(at % 1000000000u)}};
    timerfd_settime(t->timer, TFD_TIMER_ABSTIME, &when, NULL);
}

/* Fixed rate: what is due goes out stamped with the time it was due, so that a stall is not left out. */
static void publish_due(struct thread *t) {
    if (!running()) return;
    uint64_t interval = (uint64_t)(1e9 * pub_count / opt.rate), next = UINT64_MAX, now = now_ns();
    for (int i = 0; i < t->pub_count; i++) {
        struct publisher *p = &pubs[t->pubs[i]];
        if (!p->due) p->due = now + interval * (uint64_t)t->pubs[i] / (uint64_t)pub_count;
        while (p->due <= now && p->sent - atomic_load(&p->completed) < ring) {
            publish_one(t, p, ++p->sent, p->due);
            bump(t->sent, 1);
            p->due += interval;
        }
        if (p->due < next) next = p->due;
    }
    if (next != UINT64_MAX) arm(t, next > now ? next : now + 100000);
}

/* --- receiving --- */

static inline int hex(uint8_t c) { return c <= '9' ? c - '0' : (c | 32) - 'a' + 10; }

static inline uint64_t get_hex(const uint8_t *at, int digits) {
    uint64_t value = 0;
    for (int i = 0; i < digits; i++) value = value << 4 | (uint64_t)hex(at[i]);
    return value;
}

static inline int bucket(uint64_t v) {
    if (v < 64) return (int)v;
    int e = 63 - __builtin_clzll(v);
    return (e - 5) * 64 + (int)((v >> (e - 6)) & 63);
}

static void completed_everywhere(struct thread *t, struct publisher *p) {
    atomic_fetch_add_explicit(&p->completed, 1, memory_order_release);
    if (!p->conn) return;
    if (p->conn->thread == t->index) {
        if (!p->dirty) {
            p->dirty = true;
            t->dirty[t->dirty_count++] = (int)(p - pubs);
        }
    } else {
        uint64_t one = 1;
        if (write(threads[p->conn->thread].wake, &one, 8) < 0) die("eventfd");
    }
}

static void deliver(struct thread *t, struct conn *c, uint64_t now) {
    struct publisher *p = &pubs[c->have_publisher];
    if (c->have_publisher >= (uint32_t)pub_count || p->group != c->group || !c->subscribes) {
        bump(t->stray, 1);
        return;
    }
    if (c->have_seq == 0) { /* a probe: the subscription is in force */
        if (!c->probed) {
            bump(t->probed, 1);
            atomic_fetch_add(&groups[c->group].probed, 1);
        }
        c->probed = true;
        return;
    }
    uint64_t *last = &c->last[p->slot];
    if (c->have_seq <= *last) {
        bump(t->repeats, 1);
        return;
    }
    if (c->have_seq != *last + 1) bump(t->gaps, c->have_seq - *last - 1);
    *last = c->have_seq;
    bump(t->delivered, 1);
    if (!atomic_load_explicit(&t->first_delivery, memory_order_relaxed)) atomic_store(&t->first_delivery, now);
    atomic_store_explicit(&t->last_delivery, now, memory_order_relaxed);
    if (atomic_load_explicit(&phase, memory_order_relaxed) == MEASURE)
        t->histogram[bucket(now > c->have_time ? now - c->have_time : 0)]++;
    if (!c->counts) return;
    struct group *g = &groups[c->group];
    uint32_t place = (uint32_t)c->have_seq & (ring - 1);
    uint32_t *count = &p->counts[(uint32_t)g->share_of[t->index] * ring + place];
    if (++*count < (uint32_t)g->local[t->index]) return;
    *count = 0;
    if (g->shares > 1) {
        if (atomic_fetch_add(&p->done[place], 1) + 1 < (uint32_t)g->shares) return;
        atomic_store(&p->done[place], 0);
    }
    completed_everywhere(t, p);
}

static void greeted(struct thread *t, struct conn *c, uint64_t now) {
    c->state = READY;
    t->in_flight--;
    bump(t->connected, 1);
    atomic_store(&t->last_ready, now);
}

/* A frame without a stamp: an answer, an identifier, Socket.IO's packets. */
static void other_frame(struct thread *t, struct conn *c, const char *text, size_t n, uint64_t now) {
    bump(t->other, 1);
    if (opt.dialect == SOCKETIO && n > 0) {
        if (text[0] == '0') conn_text(t, c, OP_TEXT, "40", 2);
        if (text[0] == '2') conn_text(t, c, OP_TEXT, "3", 1);
        if (n > 1 && text[0] == '4' && text[1] == '0' && c->state == GREETING) greeted(t, c, now);
        return;
    }
    if (opt.ack && c->subscribes && !c->subscribed && memmem(text, n, "\"ack\"", 5)) {
        c->subscribed = true;
        bump(t->subscribed, 1);
    } else if (memmem(text, n, "\"error\"", 7)) {
        complain("the server says", text, n);
    }
}

/* `at` holds the frame's header and the first `PREFIX` bytes of its payload, or all of it. */
static void frame_begins(struct thread *t, struct conn *c, const struct frame *f, const uint8_t *at, uint64_t now) {
    size_t n = f->length < PREFIX ? (size_t)f->length : PREFIX;
    const char *text = (const char *)at + f->header;
    c->have = false;
    if (f->opcode == OP_PING) {
        conn_text(t, c, OP_PONG, text, n);
    } else if (f->opcode == OP_TEXT) {
        const char *mark = memmem(text, n, "\"m\":", 4);
        if (mark) mark = memchr(mark + 4, '"', n - (size_t)(mark + 4 - text)); /* some write a space */
        if (mark && (size_t)(mark + 1 - text) + STAMP <= n) {
            const uint8_t *s = (const uint8_t *)mark + 1;
            c->have = true;
            c->have_publisher = (uint32_t)get_hex(s, 8);
            c->have_seq = get_hex(s + STAMP_SEQ, 10);
            c->have_time = get_hex(s + STAMP_TIME, 16);
            if (f->length < (uint64_t)opt.size) complain("a message was cut", text, n);
        } else {
            other_frame(t, c, text, n, now);
        }
    } else if (f->opcode == OP_CLOSE) {
        complain("closed by the server", text + (n > 2 ? 2 : 0), n > 2 ? n - 2 : 0);
        conn_close(t, c);
    }
}

static void consume(struct thread *t, struct conn *c, const uint8_t *data, size_t n, uint64_t now) {
    struct frame f;
    while (n > 0 && c->state != CLOSED) {
        if (c->skip) {
            size_t take = c->skip < n ? (size_t)c->skip : n;
            c->skip -= take, data += take, n -= take;
            if (c->skip == 0 && c->have) deliver(t, c, now);
            continue;
        }
        const uint8_t *at = data;
        size_t held = c->part_len, have = n;
        if (held) { /* the beginning of a frame is already here */
            size_t add = PREFIX + 14 - held < n ? PREFIX + 14 - held : n;
            memcpy(c->part + held, data, add);
            at = c->part, have = held + add;
        }
        if (!frame_parse(at, have, &f) || have < f.header + (f.length < PREFIX ? f.length : PREFIX)) {
            if (!held) memcpy(c->part, data, n);
            c->part_len = have;
            return;
        }
        c->part_len = 0;
        frame_begins(t, c, &f, at, now);
        uint64_t rest = f.header + f.length - held; /* of this frame, beginning at data */
        size_t take = rest < n ? (size_t)rest : n;
        data += take, n -= take, c->skip = rest - take;
        if (c->skip == 0 && c->have) deliver(t, c, now);
    }
}

static void handshake_read(struct thread *t, struct conn *c, uint64_t now) {
    ssize_t n = recv(c->fd, c->part + c->part_len, PART_SIZE - c->part_len, 0);
    if (n <= 0) {
        if (n < 0 && errno == EAGAIN) return;
        complain("handshake", n ? strerror(errno) : "closed", 99);
        return conn_close(t, c);
    }
    c->part_len += (size_t)n;
    uint8_t *end = memmem(c->part, c->part_len, "\r\n\r\n", 4);
    if (!end) {
        if (c->part_len == PART_SIZE) conn_close(t, c);
        return;
    }
    if (memcmp(c->part + 8, " 101", 4) != 0 || !memmem(c->part, c->part_len, WS_ACCEPT, sizeof WS_ACCEPT - 1)) {
        complain("refused", (char *)c->part, c->part_len);
        return conn_close(t, c);
    }
    uint8_t rest[PART_SIZE];
    size_t left = c->part_len - (size_t)(end + 4 - c->part);
    memcpy(rest, end + 4, left);
    c->part_len = 0;
    c->state = GREETING;
    if (opt.dialect != SOCKETIO) greeted(t, c, now);
    consume(t, c, rest, left, now);
}

static void request(struct thread *t, struct conn *c) {
    char path[256], text[512];
    const char *topic = group_count && c->group >= 0 ? groups[c->group].topic : "none", *from = opt.path;
    if (opt.publish_path && c->publisher >= 0 && !c->subscribes) from = opt.publish_path;
    const char *mark = strstr(from, "%t");
    if (mark)
        snprintf(path, sizeof path, "%.*s%s%s", (int)(mark - from), from, topic, mark + 2);
    else
        snprintf(path, sizeof path, "%s", from);
    int n = snprintf(text, sizeof text,
                     "GET %s HTTP/1.1\r\nHost: %s:%d\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                     "Sec-WebSocket-Key: " WS_KEY "\r\nSec-WebSocket-Version: 13\r\n\r\n",
                     path, opt.host, opt.port);
    c->state = HANDSHAKE;
    watch(t, c, false, EPOLL_CTL_MOD);
    conn_write(t, c, (uint8_t *)text, (size_t)n);
}

static void conn_event(struct thread *t, struct conn *c, uint32_t events) {
    if (c->state == CLOSED) return;
    if (c->state == CONNECTING) {
        int error = 0;
        socklen_t size = sizeof error;
        getsockopt(c->fd, SOL_SOCKET, SO_ERROR, &error, &size);
        if (error) {
            complain("connect", strerror(error), 99);
            conn_close(t, c);
        } else {
            request(t, c);
        }
        return;
    }
    if (events & EPOLLOUT) conn_flush(t, c);
    if (c->state == HANDSHAKE) return handshake_read(t, c, now_ns());
    if (!(events & (EPOLLIN | EPOLLHUP | EPOLLERR)) || c->state == CLOSED) return;
    ssize_t n = recv(c->fd, t->buffer, RECEIVE, 0);
    if (n > 0) {
        bump(t->bytes, (uint64_t)n);
        consume(t, c, t->buffer, (size_t)n, now_ns());
    } else if (n == 0 || errno != EAGAIN) {
        conn_close(t, c);
    }
}

/* --- the thread --- */

static void subscribe_all(struct thread *t) {
    char text[256];
    for (int i = 0; i < t->own_count; i++) {
        struct conn *c = &conns[t->own[i]];
        if (!c->subscribes || c->state != READY) continue;
        int n = 0;
        if (opt.dialect == PLAIN)
            n = snprintf(text, sizeof text, "{\"type\":\"subscribe\",\"topic\":\"%s\"%s}", groups[c->group].topic,
                         opt.ack ? ",\"ack\":1" : "");
        if (opt.dialect == SOCKETIO)
            n = snprintf(text, sizeof text, "42[\"subscribe\",{\"topic\":\"%s\"}]", groups[c->group].topic);
        if (n) conn_text(t, c, OP_TEXT, text, (size_t)n);
        if (!opt.ack) bump(t->subscribed, 1);
    }
}

static void turn(struct thread *t) {
    enum phase now = (enum phase)atomic_load(&phase);
    bool changed = (int)now != atomic_load(&t->seen);
    atomic_store(&t->seen, (int)now);
    if (now == CONNECT)
        while (t->in_flight < opt.concurrency && t->first < t->own_count) conn_open(t, &conns[t->own[t->first++]]);
    if (now == SUBSCRIBE && changed) subscribe_all(t);
    if (now == PROBE && now_ns() >= t->next_probe) {
        t->probe_every += PROBE_EVERY; /* ever rarer: a slow server must not drown in them */
        t->next_probe = now_ns() + t->probe_every;
        for (int i = 0; i < t->pub_count; i++) {
            struct publisher *p = &pubs[t->pubs[i]];
            if (p->slot == 0 && atomic_load(&groups[p->group].probed) < groups[p->group].subscribers)
                publish_one(t, p, 0, now_ns());
        }
    }
    if (now == RUN && changed) {
        for (int i = 0; i < t->pub_count; i++)
            if (opt.rate <= 0) pump(t, &pubs[t->pubs[i]]);
        if (opt.rate > 0) publish_due(t);
    }
}

void *thread_main(void *argument) {
    struct thread *t = argument;
    struct epoll_event events[512], extra = {.events = EPOLLIN, .data.u32 = UINT32_MAX};
    t->buffer = malloc(RECEIVE + SCRATCH + (size_t)opt.size + 1024);
    t->epoll = epoll_create1(0);
    t->timer = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK);
    if (!t->buffer || t->epoll < 0 || t->timer < 0) die("thread");
    epoll_ctl(t->epoll, EPOLL_CTL_ADD, t->wake, &extra);
    extra.data.u32 = UINT32_MAX - 1;
    epoll_ctl(t->epoll, EPOLL_CTL_ADD, t->timer, &extra);
    while (atomic_load(&phase) != STOP) {
        turn(t);
        int n = epoll_wait(t->epoll, events, 512, 5);
        for (int i = 0; i < n; i++) {
            uint64_t count;
            if (events[i].data.u32 == UINT32_MAX) {
                if (read(t->wake, &count, 8) == 8 && running() && opt.rate <= 0)
                    for (int j = 0; j < t->pub_count; j++) pump(t, &pubs[t->pubs[j]]);
            } else if (events[i].data.u32 == UINT32_MAX - 1) {
                if (read(t->timer, &count, 8) == 8) publish_due(t);
            } else {
                conn_event(t, &conns[events[i].data.u32], events[i].events);
            }
        }
        pump_dirty(t);
    }
    return NULL;
}
