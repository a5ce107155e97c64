/*
 * What the load generator and the limit server both need of RFC 6455: frame headers, masking, a clock.
 *
 * Everything is static: each program is one or two translation units and nothing is shared at run time.
 */
#ifndef BENCH_WIRE_H
#define BENCH_WIRE_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <time.h>

#define OP_TEXT 1
#define OP_CLOSE 8
#define OP_PING 9
#define OP_PONG 10

/* The key of RFC 6455 section 1.3 and its answer: every handshake uses it, so nothing is hashed. */
#define WS_KEY "dGhlIHNhbXBsZSBub25jZQ=="
#define WS_ACCEPT "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="

struct frame {
    int opcode;
    int final;
    int masked;
    uint8_t key[4];
    size_t header; /* bytes before the payload */
    uint64_t length;
};

static inline uint64_t now_ns(void) {
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
}

static inline void die(const char *words) {
    perror(words);
    exit(1);
}

/* Ten thousand sockets need more descriptors than the usual soft limit; root may raise the hard one too. */
static inline void raise_descriptors(rlim_t wanted) {
    struct rlimit limit;
    if (getrlimit(RLIMIT_NOFILE, &limit) != 0 || limit.rlim_cur >= wanted) return;
    struct rlimit more = {wanted, limit.rlim_max > wanted ? limit.rlim_max : wanted};
    if (setrlimit(RLIMIT_NOFILE, &more) == 0) return;
    more.rlim_cur = more.rlim_max = limit.rlim_max;
    setrlimit(RLIMIT_NOFILE, &more);
}

/* Read a frame header; 0 when more bytes are needed. */
static inline int frame_parse(const uint8_t *at, size_t n, struct frame *f) {
    if (n < 2) return 0;
    size_t need = 2;
    f->final = at[0] >> 7;
    f->opcode = at[0] & 15;
    f->masked = at[1] >> 7;
    f->length = at[1] & 127;
    if (f->length == 126) {
        need = 4;
        if (n < need) return 0;
        f->length = (uint64_t)at[2] << 8 | at[3];
    } else if (f->length == 127) {
        need = 10;
        if (n < need) return 0;
        f->length = 0;
        for (int i = 2; i < 10; i++) f->length = f->length << 8 | at[i];
    }
    if (f->masked) {
        if (n < need + 4) return 0;
        memcpy(f->key, at + need, 4);
        need += 4;
    }
    f->header = need;
    return 1;
}

/* Write a frame header (with the key, when there is one) and return its size. */
static inline size_t frame_header(uint8_t *out, int opcode, uint64_t length, const uint8_t *key) {
    size_t n = 2;
    out[0] = (uint8_t)(0x80 | opcode);
    if (length < 126) {
        out[1] = (uint8_t)length;
    } else if (length < 65536) {
        out[1] = 126;
        out[2] = (uint8_t)(length >> 8);
        out[3] = (uint8_t)length;
        n = 4;
    } else {
        out[1] = 127;
        for (int i = 0; i < 8; i++) out[2 + i] = (uint8_t)(length >> (56 - 8 * i));
        n = 10;
    }
    if (key) {
        out[1] |= 0x80;
        memcpy(out + n, key, 4);
        n += 4;
    }
    return n;
}

/* XOR `n` bytes that begin `from` bytes into the payload. */
static inline void mask_bytes(uint8_t *at, size_t n, const uint8_t *key, size_t from) {
    size_t i = 0;
    for (; i < n && ((from + i) & 3); i++) at[i] ^= key[(from + i) & 3];
    uint32_t word, keys;
    memcpy(&keys, key, 4);
    for (; i + 4 <= n; i += 4) {
        memcpy(&word, at + i, 4);
        word ^= keys;
        memcpy(at + i, &word, 4);
    }
    for (; i < n; i++) at[i] ^= key[(from + i) & 3];
}

#endif
