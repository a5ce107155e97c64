/*
 * The load generator's data: connections, publishers, groups (a topic and who is on it), threads.
 *
 * A connection belongs to one thread and is touched by no other. What threads share is atomic: the phase,
 * the counters the coordinator reads, and how many threads have seen a message everywhere.
 */
#ifndef BENCH_LOAD_H
#define BENCH_LOAD_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>

#include "wire.h"

#define PART_SIZE 2048   /* a partial frame's beginning, or the handshake's answer */
#define PREFIX 192       /* so much of a payload is looked at: the stamp stands before */
#define STAMP 36         /* pppppppp-ssssssssss-tttttttttttttttt, hexadecimal */
#define STAMP_SEQ 9
#define STAMP_TIME 20
#define BUCKETS 4096     /* log-linear histogram, 64 buckets per power of two: 1.6 % */
#define MAX_THREADS 16

enum dialect { PLAIN, NCHAN, SOCKETIO, RAW };
enum phase { CONNECT, PAUSE, SUBSCRIBE, PROBE, RUN, MEASURE, DRAIN, STOP };
enum state { IDLE, CONNECTING, HANDSHAKE, GREETING, READY, CLOSED };

struct options {
    const char *host, *path, *publish_path, *event, *mode, *pids;
    int port, connections, publishers, size, outstanding, rooms, topics, threads, concurrency, expect;
    double rate, warmup, window;
    bool assign, ack;
    enum dialect dialect;
};

struct group {
    char topic[48];
    int subscribers, publishers, shares; /* shares: threads that hold subscribers that count */
    _Atomic int probed;
    int local[MAX_THREADS], share_of[MAX_THREADS];
};

struct publisher {
    struct conn *conn; /* NULL: another program publishes (listen) */
    int group, slot;   /* slot: which of the group's publishers */
    uint64_t sent, due;
    _Atomic uint64_t completed;
    uint8_t *frame, key[4];
    size_t frame_len, stamp_at, header;
    uint32_t *counts;      /* [share][ring]: local subscribers that have the message */
    _Atomic uint32_t *done; /* [ring]: shares in which all have it */
    bool dirty;
};

struct conn {
    int fd, group, publisher, thread;
    enum state state;
    bool subscribes, subscribed, probed, wants_out, have;
    bool counts; /* the closed loop waits for it */
    uint32_t have_publisher;
    uint64_t have_seq, have_time, skip;
    uint64_t *last; /* per publisher of the group: the newest sequence seen */
    uint8_t *out;
    size_t out_len, out_cap, part_len;
    uint8_t part[PART_SIZE];
};

struct thread {
    int index, epoll, wake, timer, first, in_flight;
    pthread_t id;
    _Atomic int seen; /* the phase it works in */
    uint64_t next_probe, probe_every;
    uint8_t *buffer;
    int *own, own_count;       /* connections */
    int *pubs, pub_count;      /* publishers */
    int *dirty, dirty_count;
    _Atomic uint64_t connected, failed, subscribed, probed, delivered, bytes, sent, gaps, repeats, stray, closed,
        other, last_ready, first_delivery, last_delivery;
    uint64_t histogram[BUCKETS];
};

extern struct options opt;
extern struct conn *conns;
extern struct publisher *pubs;
extern struct group *groups;
extern int group_count, pub_count;
extern uint32_t ring;
extern struct thread threads[MAX_THREADS];
extern _Atomic int phase;

void *thread_main(void *argument);
void publisher_prepare(struct publisher *p);

#define bump(counter, n) \
    atomic_store_explicit(&(counter), atomic_load_explicit(&(counter), memory_order_relaxed) + (n), memory_order_relaxed)

#endif
