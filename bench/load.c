/*
 * The load generator's coordinator: options, who talks to whom, the phases, and the JSON lines of the result.
 *
 *   load --mode fanout|rooms|idle|listen --port P [options]
 *
 * Phases: connect, subscribe, probe until every subscriber has read something, run (warm-up), measure,
 * drain until nothing is under way. Processor time of the servers named by --pids is read from /proc at
 * the very edges of the measured window, next to the counters.
 */
#define _GNU_SOURCE
#include "load.h"

#include <getopt.h>
#include <netinet/in.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#define MAX_PIDS 256

struct options opt = {.host = "127.0.0.1", .path = "/ws", .event = "send", .mode = "fanout", .pids = "", .port = 8000,
                      .connections = 1000, .publishers = 1, .size = 128, .outstanding = 16, .rooms = 2, .topics = 1, .threads = 1,
                      .concurrency = 256, .warmup = 0.3, .window = 1.0, .dialect = PLAIN};
struct conn *conns;
struct publisher *pubs;
struct group *groups;
int group_count, pub_count;
uint32_t ring = 64;
struct thread threads[MAX_THREADS];
_Atomic int phase = CONNECT;

static int pids[MAX_PIDS], pid_count, total;

#define sum(field)                                                                     \
    ({                                                                                 \
        uint64_t all = 0;                                                              \
        for (int i_ = 0; i_ < opt.threads; i_++) all += atomic_load(&threads[i_].field); \
        all;                                                                           \
    })

static void nap(double seconds) {
    struct timespec ts = {(time_t)seconds, (long)((seconds - (double)(time_t)seconds) * 1e9)};
    nanosleep(&ts, NULL);
}

static void give_up(const char *why) {
    printf("{\"event\":\"failed\",\"why\":\"%s\",\"connected\":%lu,\"failed\":%lu,\"probed\":%lu,\"closed\":%lu}\n", why,
           sum(connected), sum(failed), sum(probed), sum(closed));
    fflush(stdout);
    _exit(1);
}

/* --- processor time --- */

static uint64_t pid_cpu_us(int pid) {
    char path[64], text[1024];
    unsigned long user = 0, system = 0;
    snprintf(path, sizeof path, "/proc/%d/stat", pid);
    FILE *file = fopen(path, "r");
    if (!file) return 0;
    size_t n = fread(text, 1, sizeof text - 1, file);
    fclose(file);
    text[n] = 0;
    char *after = strrchr(text, ')'); /* the name may hold anything, spaces too */
    if (after) sscanf(after + 2, "%*c %*d %*d %*d %*d %*d %*u %*u %*u %*u %*u %lu %lu", &user, &system);
    return (user + system) * (1000000u / (unsigned long)sysconf(_SC_CLK_TCK));
}

static uint64_t self_cpu_us(void) {
    struct rusage u;
    getrusage(RUSAGE_SELF, &u);
    return (uint64_t)(u.ru_utime.tv_sec + u.ru_stime.tv_sec) * 1000000u + (uint64_t)(u.ru_utime.tv_usec + u.ru_stime.tv_usec);
}

static void parse_pids(void) {
    for (const char *at = opt.pids; *at && pid_count < MAX_PIDS;) {
        pids[pid_count++] = atoi(at);
        at += strcspn(at, ",");
        at += *at == ',';
    }
}

/* --- who talks to whom --- */

static void make_conns(int count) {
    total = count;
    conns = calloc((size_t)count, sizeof *conns);
    if (!conns) die("calloc");
    for (int i = 0; i < count; i++) conns[i].group = conns[i].publisher = -1;
}

static struct group *make_groups(int count) {
    groups = calloc((size_t)count, sizeof *groups);
    if (!groups) die("calloc");
    for (int g = 0; g < count; g++) snprintf(groups[g].topic, sizeof groups[g].topic, "bench/%d", g);
    group_count = count;
    return groups;
}

static void join(int conn, int group, bool publishes, bool subscribes) {
    struct conn *c = &conns[conn];
    c->group = group;
    c->subscribes = c->counts = subscribes;
    groups[group].subscribers += subscribes;
    if (publishes) c->publisher = pub_count++, groups[group].publishers++;
}

static void assign_modes(void) {
    if (!strcmp(opt.mode, "fanout")) {
        int publishers = opt.publishers * opt.topics; /* that many to each topic */
        make_conns(opt.connections + publishers);
        make_groups(opt.topics);
        for (int i = 0; i < total; i++) join(i, i % opt.topics, i < publishers, i >= publishers);
    } else if (!strcmp(opt.mode, "rooms")) {
        make_conns(opt.connections);
        make_groups(opt.connections / opt.rooms);
        for (int i = 0; i < group_count * opt.rooms; i++) join(i, i / opt.rooms, true, true);
    } else if (!strcmp(opt.mode, "listen")) {
        make_conns(opt.connections);
        make_groups(1);
        for (int i = 0; i < total; i++) join(i, 0, false, true);
        groups[0].publishers = pub_count = 1; /* the other program is publisher 0 */
    } else {
        make_conns(opt.connections);
    }
}

/* Roles come from standard input, one word a connection: "p3" publishes to group 3, "s3" subscribes, "b3" both;
 * "l3" listens: it must get everything, but the closed loop does not wait for it. */
static void assign_roles(void) {
    printf("{\"event\":\"ports\",\"ports\":[");
    for (int i = 0; i < total; i++) {
        struct sockaddr_in name = {0};
        socklen_t size = sizeof name;
        getsockname(conns[i].fd, (struct sockaddr *)&name, &size);
        printf("%s%d", i ? "," : "", ntohs(name.sin_port));
    }
    printf("]}\n");
    fflush(stdout);
    int *of = calloc((size_t)total, sizeof *of), most = -1;
    char *role = calloc((size_t)total, 1), word[32];
    if (!of || !role) die("calloc");
    for (int i = 0; i < total; i++) {
        if (scanf("%31s", word) != 1) give_up("roles are missing");
        role[i] = word[0];
        of[i] = atoi(word + 1);
        if (role[i] != '-' && of[i] > most) most = of[i];
    }
    make_groups(most + 1);
    for (int i = 0; i < total; i++)
        if (role[i] != '-') {
            join(i, of[i], role[i] == 'p' || role[i] == 'b', role[i] != 'p');
            conns[i].counts = role[i] != 'l' && role[i] != 'p';
        }
    free(of);
    free(role);
}

/* Groups of many are spread over the threads; a small one stays on one, so that nothing need be shared. */
static void place_threads(void) {
    int spread = !strcmp(opt.mode, "rooms") ? opt.rooms : 1;
    for (int i = 0; i < total; i++) conns[i].thread = (i / spread) % opt.threads;
    for (int k = 0; k < opt.threads; k++) {
        struct thread *t = &threads[k];
        t->index = k;
        t->own = calloc((size_t)total + 1, sizeof(int));
        if (!t->own) die("calloc");
        for (int i = 0; i < total; i++)
            if (conns[i].thread == k) t->own[t->own_count++] = i;
    }
}

static void prepare_publishers(void) {
    int *next_slot = calloc((size_t)group_count + 1, sizeof(int));
    pubs = calloc((size_t)pub_count + 1, sizeof *pubs);
    if (!pubs || !next_slot) die("calloc");
    for (int i = 0; i < total; i++)
        if (conns[i].counts) groups[conns[i].group].local[conns[i].thread]++;
    for (int g = 0; g < group_count; g++)
        for (int k = 0; k < opt.threads; k++)
            if (groups[g].local[k]) groups[g].share_of[k] = groups[g].shares++;
    while (ring < 2u * (uint32_t)opt.outstanding || (opt.rate > 0 && ring < 16384) || ring < (uint32_t)opt.expect) ring *= 2;
    for (int k = 0; k < opt.threads; k++) {
        threads[k].pubs = calloc((size_t)pub_count + 1, sizeof(int));
        threads[k].dirty = calloc((size_t)pub_count + 1, sizeof(int));
        if (!threads[k].pubs || !threads[k].dirty) die("calloc");
    }
    bool listen = !strcmp(opt.mode, "listen");
    for (int i = 0; i < total; i++) {
        struct conn *c = &conns[i];
        if (c->group < 0) continue;
        if (c->subscribes) c->last = calloc((size_t)groups[c->group].publishers + 1, sizeof(uint64_t));
        if (c->publisher < 0) continue;
        struct publisher *p = &pubs[c->publisher];
        struct thread *t = &threads[c->thread];
        p->conn = c;
        p->group = c->group;
        p->slot = next_slot[c->group]++;
        t->pubs[t->pub_count++] = c->publisher;
        publisher_prepare(p);
    }
    for (int i = 0; i < pub_count; i++) {
        size_t shares = (size_t)groups[listen ? 0 : pubs[i].group].shares;
        pubs[i].counts = calloc((shares + 1) * ring, sizeof(uint32_t));
        pubs[i].done = calloc(ring, sizeof(uint32_t));
        if (!pubs[i].counts || !pubs[i].done) die("calloc");
    }
    free(next_slot);
}

/* --- phases --- */

static bool wait_until(uint64_t (*value)(void), uint64_t wanted, double seconds) {
    uint64_t deadline = now_ns() + (uint64_t)(seconds * 1e9);
    while (value() < wanted) {
        if (now_ns() > deadline) return false;
        nap(0.001);
    }
    return true;
}

static uint64_t connected_or_failed(void) { return sum(connected) + sum(failed); }
static uint64_t subscribed(void) { return sum(subscribed); }
static uint64_t probed(void) { return sum(probed); }
static uint64_t delivered(void) { return sum(delivered); }

static uint64_t draining(void) {
    uint64_t all = 0;
    for (int k = 0; k < opt.threads; k++) all += atomic_load(&threads[k].seen) == DRAIN;
    return all;
}

static uint64_t expected_deliveries(void) {
    uint64_t all = 0;
    for (int i = 0; i < pub_count; i++) all += pubs[i].sent * (uint64_t)groups[pubs[i].group].subscribers;
    return all;
}

static void wake_all(void) {
    uint64_t one = 1;
    for (int k = 0; k < opt.threads; k++)
        if (write(threads[k].wake, &one, 8) < 0) die("eventfd");
}

static void enter(enum phase next) {
    atomic_store(&phase, next);
    wake_all();
}

static uint64_t connect_all(void) {
    uint64_t start = now_ns(), last = 0;
    for (int k = 0; k < opt.threads; k++)
        if (pthread_create(&threads[k].id, NULL, thread_main, &threads[k]) != 0) die("pthread_create");
    if (!wait_until(connected_or_failed, (uint64_t)total, 120)) give_up("connections did not open in time");
    for (int k = 0; k < opt.threads; k++)
        if (atomic_load(&threads[k].last_ready) > last) last = atomic_load(&threads[k].last_ready);
    printf("{\"event\":\"connected\",\"connections\":%lu,\"failed\":%lu,\"seconds\":%.6f}\n", sum(connected), sum(failed),
           last > start ? (double)(last - start) / 1e9 : 0.0);
    fflush(stdout);
    return last - start;
}

static double quantile(const uint64_t *histogram, uint64_t count, double q) {
    uint64_t rank = (uint64_t)(q * (double)count), seen = 0;
    for (int i = 0; i < BUCKETS; i++) {
        seen += histogram[i];
        if (seen <= rank) continue;
        if (i < 64) return (double)i / 1000;
        int e = i / 64 + 5;
        return (double)((64u + (uint64_t)(i % 64)) << (e - 6)) * (1 + 1.0 / 128) / 1000;
    }
    return 0;
}

static void print_latency(void) {
    static uint64_t all[BUCKETS];
    uint64_t count = 0;
    double total_us = 0;
    for (int k = 0; k < opt.threads; k++)
        for (int i = 0; i < BUCKETS; i++) all[i] += threads[k].histogram[i], count += threads[k].histogram[i];
    for (int i = 0; i < BUCKETS; i++)
        if (all[i]) total_us += (double)all[i] * (i < 64 ? i : (double)((64u + (uint64_t)(i % 64)) << (i / 64 - 1))) / 1000;
    printf("\"latency_us\":{\"count\":%lu,\"mean\":%.1f,\"p50\":%.1f,\"p90\":%.1f,\"p99\":%.1f,\"p999\":%.1f,\"max\":%.1f},",
           count, count ? total_us / (double)count : 0.0, quantile(all, count, 0.5), quantile(all, count, 0.9),
           quantile(all, count, 0.99), quantile(all, count, 0.999), count ? quantile(all, count, 1 - 1e-12) : 0.0);
}

struct reading {
    uint64_t at, deliveries, bytes, sent, self, cpu[MAX_PIDS];
};

static void read_all(struct reading *r) {
    for (int i = 0; i < pid_count; i++) r->cpu[i] = pid_cpu_us(pids[i]);
    r->self = self_cpu_us();
    r->deliveries = delivered();
    r->bytes = sum(bytes);
    r->sent = sum(sent);
    r->at = now_ns();
}

static void print_result(const struct reading *a, const struct reading *b, bool stalled) {
    uint64_t cpu = 0, expected = expected_deliveries(), got = delivered();
    if (!strcmp(opt.mode, "listen")) expected = (uint64_t)opt.expect * (uint64_t)groups[0].subscribers;
    printf("{\"event\":\"result\",\"mode\":\"%s\",\"connections\":%lu,\"seconds\":%.6f,\"sent\":%lu,\"deliveries\":%lu,\"bytes\":%lu,",
           opt.mode, sum(connected), (double)(b->at - a->at) / 1e9, b->sent - a->sent, b->deliveries - a->deliveries,
           b->bytes - a->bytes);
    printf("\"cpu_us\":{");
    for (int i = 0; i < pid_count; i++) {
        printf("%s\"%d\":%lu", i ? "," : "", pids[i], b->cpu[i] - a->cpu[i]);
        cpu += b->cpu[i] - a->cpu[i];
    }
    printf("},\"cpu_total_us\":%lu,\"generator_cpu_us\":%lu,", cpu, b->self - a->self);
    print_latency();
    printf("\"expected_all\":%lu,\"delivered_all\":%lu,\"lost\":%ld,\"gaps\":%lu,\"repeats\":%lu,\"stray\":%lu,\"closed\":%lu,"
           "\"other_frames\":%lu,\"stalled\":%s}\n",
           expected, got, (long)(expected - got), sum(gaps), sum(repeats), sum(stray), sum(closed), sum(other),
           stalled ? "true" : "false");
    fflush(stdout);
}

static bool measure(struct reading *a, struct reading *b) {
    enter(RUN);
    nap(opt.warmup);
    read_all(a);
    atomic_store(&phase, MEASURE);
    bool stalled = false;
    uint64_t end = a->at + (uint64_t)(opt.window * 1e9), moved = now_ns(), seen = delivered();
    while (now_ns() < end && !stalled) {
        uint64_t left = end - now_ns();
        nap(left < 100000000u ? (double)left / 1e9 : 0.1);
        if (delivered() != seen) seen = delivered(), moved = now_ns();
        stalled = now_ns() - moved > 3000000000u;
    }
    read_all(b);
    enter(DRAIN);
    /* A thread that lost its processor in the middle of a turn still sends; what is expected is known after that. */
    if (!wait_until(draining, (uint64_t)opt.threads, 30)) return false;
    return !stalled && wait_until(delivered, expected_deliveries(), 5);
}

static bool listen_for(struct reading *a, struct reading *b) {
    uint64_t wanted = (uint64_t)opt.expect * (uint64_t)groups[0].subscribers;
    atomic_store(&phase, MEASURE);
    read_all(a);
    printf("{\"event\":\"listening\"}\n");
    fflush(stdout);
    bool all = wait_until(delivered, wanted, opt.window);
    read_all(b);
    uint64_t first = UINT64_MAX, last = 0;
    for (int k = 0; k < opt.threads; k++) {
        uint64_t f = atomic_load(&threads[k].first_delivery), l = atomic_load(&threads[k].last_delivery);
        if (f && f < first) first = f;
        if (l > last) last = l;
    }
    if (last) a->at = first, b->at = last;
    return all;
}

static void idle(void) {
    char line[64];
    atomic_store(&phase, PAUSE);
    while (fgets(line, sizeof line, stdin))
        if (strncmp(line, "count", 5) == 0) {
            printf("{\"event\":\"count\",\"closed\":%lu}\n", sum(closed));
            fflush(stdout);
        } else {
            break;
        }
}

static void usage(void) {
    fprintf(stderr, "usage: load --mode fanout|rooms|idle|listen --port P [--host H] [--path /ws] [--publish-path /ws] "
                    "[--dialect plain|nchan|socketio|raw] [--connections N] [--publishers N] [--topics N] [--rooms MEMBERS] [--event NAME] [--size BYTES] "
                    "[--outstanding K | --rate PER_SECOND] [--warmup S] [--window S] [--pids P,P] [--threads N] "
                    "[--concurrency N] [--expect MESSAGES] [--assign] [--ack]\n");
    exit(2);
}

static void parse(int argc, char **argv) {
    static const struct option names[] = {
        {"mode", 1, 0, 'm'}, {"host", 1, 0, 'h'}, {"port", 1, 0, 'p'}, {"path", 1, 0, 'u'},
        {"publish-path", 1, 0, 'v'}, {"dialect", 1, 0, 'd'},
        {"connections", 1, 0, 'n'}, {"publishers", 1, 0, 'q'}, {"size", 1, 0, 's'}, {"outstanding", 1, 0, 'k'},
        {"rate", 1, 0, 'r'}, {"rooms", 1, 0, 'g'}, {"topics", 1, 0, 'o'}, {"event", 1, 0, 'y'}, {"warmup", 1, 0, 'w'}, {"window", 1, 0, 'l'}, {"pids", 1, 0, 'i'},
        {"threads", 1, 0, 't'}, {"concurrency", 1, 0, 'c'}, {"expect", 1, 0, 'e'}, {"assign", 0, 0, 'a'},
        {"ack", 0, 0, 'x'}, {0, 0, 0, 0}};
    for (int c; (c = getopt_long(argc, argv, "", names, NULL)) != -1;) switch (c) {
            case 'm': opt.mode = optarg; break;
            case 'h': opt.host = optarg; break;
            case 'p': opt.port = atoi(optarg); break;
            case 'u': opt.path = optarg; break;
            case 'v': opt.publish_path = optarg; break;
            case 'n': opt.connections = atoi(optarg); break;
            case 'q': opt.publishers = atoi(optarg); break;
            case 's': opt.size = atoi(optarg); break;
            case 'k': opt.outstanding = atoi(optarg); break;
            case 'r': opt.rate = atof(optarg); break;
            case 'o': opt.topics = atoi(optarg); break;
            case 'y': opt.event = optarg; break;
            case 'g': opt.rooms = atoi(optarg); break;
            case 'w': opt.warmup = atof(optarg); break;
            case 'l': opt.window = atof(optarg); break;
            case 'i': opt.pids = optarg; break;
            case 't': opt.threads = atoi(optarg); break;
            case 'c': opt.concurrency = atoi(optarg); break;
            case 'e': opt.expect = atoi(optarg); break;
            case 'a': opt.assign = true; break;
            case 'x': opt.ack = true; break;
            case 'd':
                opt.dialect = *optarg == 'n' ? NCHAN : *optarg == 's' ? SOCKETIO : *optarg == 'r' ? RAW : PLAIN;
                break;
            default: usage();
        }
    if (opt.threads < 1 || opt.threads > MAX_THREADS || opt.connections < 1 || opt.rooms < 1 || opt.topics < 1 || opt.outstanding < 1) usage();
}

int main(int argc, char **argv) {
    parse(argc, argv);
    parse_pids();
    if (opt.assign)
        make_conns(opt.connections);
    else
        assign_modes();
    raise_descriptors((rlim_t)total + 100);
    for (int k = 0; k < opt.threads; k++) {
        threads[k].wake = eventfd(0, EFD_NONBLOCK);
        threads[k].seen = CONNECT;
    }
    place_threads();
    if (!opt.assign) prepare_publishers();
    connect_all();
    if (sum(failed) && strcmp(opt.mode, "idle")) give_up("some connections were refused");
    if (!strcmp(opt.mode, "idle")) {
        idle();
        return 0;
    }
    if (opt.assign) {
        atomic_store(&phase, PAUSE);
        assign_roles();
        prepare_publishers();
    }
    uint64_t subscribers = 0;
    for (int g = 0; g < group_count; g++) subscribers += (uint64_t)groups[g].subscribers;
    enter(SUBSCRIBE);
    if (!wait_until(subscribed, subscribers, 30)) give_up("subscriptions were not confirmed");
    struct reading before = {0}, after = {0};
    bool complete;
    if (!strcmp(opt.mode, "listen")) {
        complete = listen_for(&before, &after);
    } else {
        enter(PROBE);
        if (!wait_until(probed, subscribers, 30)) give_up("the probes did not reach every subscriber");
        nap(0.05);
        complete = measure(&before, &after);
    }
    print_result(&before, &after, !complete);
    enter(STOP);
    for (int k = 0; k < opt.threads; k++) pthread_join(threads[k].id, NULL);
    return 0;
}
