// SPDX-License-Identifier: Apache-2.0
// One piece of work a call, for about SECONDS; prints how much of it was done in a second.
//
//   work int|float|copy|chase|syscall|switch|fork SECONDS
//   work write|read SECONDS FILE                  all of it
//   work read-random|write-random SECONDS FILE AT-ONCE
//   work serve                                    echo on port 7, discard on 9, chargen on 19
//   work requests|send|receive SECONDS ADDRESS CONNECTIONS
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define MEMORY (64UL << 20)
#define FILE_SIZE (128UL << 20)
#define PAGE 4096UL
#define CHUNK (1UL << 20)
#define REQUEST 64
#define CONNECTIONS 64

static double limit;
static char *buffer;
static volatile uint64_t sink; // so that no loop is thrown away

static void fail(const char *what) {
    fprintf(stderr, "work: %s: %s\n", what, strerror(errno));
    exit(1);
}

static double now(void) {
    struct timespec at;
    clock_gettime(CLOCK_MONOTONIC, &at);
    return at.tv_sec + at.tv_nsec / 1e9;
}

static inline uint64_t next_random(uint64_t *state) {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state;
}

// Repeat `once`, which does `amount`, until the time is over.
static double rate(double amount, void (*once)(void)) {
    once(); // what the first time costs, of page faults and of translation, is not the question
    double start = now(), end;
    unsigned long count = 0;
    do {
        once();
        count++;
        end = now();
    } while (end - start < limit);
    return amount * count / (end - start);
}

static void integers(void) {
    uint64_t a = 88172645463325252UL, b = a + 1, c = a + 2, d = a + 3, sum = 0;
    // Chains that don't wait for each other: a processor does them side by side.
    for (int i = 0; i < 250000; i++) {
        sum += next_random(&a) % 1000003 ^ next_random(&b) % 1000003;
        sum += next_random(&c) % 1000003 ^ next_random(&d) % 1000003;
    }
    sink = sum;
}

static void floats(void) {
    enum { N = 96 };
    static double a[N][N], b[N][N], c[N][N];
    for (int i = 0; i < N; i++)
        for (int j = 0; j < N; j++) {
            a[i][j] = i + j;
            b[i][j] = i - j;
            c[i][j] = 0;
        }
    for (int i = 0; i < N; i++)
        for (int k = 0; k < N; k++)
            for (int j = 0; j < N; j++) c[i][j] += a[i][k] * b[k][j];
    sink = (uint64_t)c[N / 2][N / 3];
}

static void copy(void) {
    memcpy(buffer, buffer + MEMORY / 2, MEMORY / 2);
    sink = buffer[sink % 100];
}

static void chase(void) {
    static size_t *ring;
    size_t count = MEMORY / 64, at = 0;
    if (!ring) { // a cycle through one word of each cache line, by Sattolo
        uint64_t state = 88172645463325252UL;
        size_t *order = malloc(count * sizeof *order);
        ring = (size_t *)buffer;
        for (size_t i = 0; i < count; i++) order[i] = i;
        for (size_t i = count - 1; i > 0; i--) {
            size_t j = next_random(&state) % i, kept = order[i];
            order[i] = order[j];
            order[j] = kept;
        }
        for (size_t i = 0; i < count; i++) ring[order[i] * 8] = order[(i + 1) % count] * 8;
        free(order);
    }
    for (int i = 0; i < 100000; i++) at = ring[at];
    sink = at;
}

static void system_calls(void) {
    for (int i = 0; i < 1000; i++) syscall(SYS_getppid);
}

static int there[2], back[2];

static void switches(void) {
    char byte = 0;
    for (int i = 0; i < 100; i++)
        if (write(there[1], &byte, 1) != 1 || read(back[0], &byte, 1) != 1) fail("pipe");
}

static void forks(void) {
    pid_t pid = fork();
    if (pid < 0) fail("fork");
    if (!pid) _exit(0);
    waitpid(pid, 0, 0);
}

static double switch_rate(void) {
    if (pipe(there) || pipe(back)) fail("pipe");
    pid_t pid = fork();
    if (!pid) {
        char byte;
        while (read(there[0], &byte, 1) == 1 && write(back[1], &byte, 1) == 1) continue;
        _exit(0);
    }
    double found = rate(100, switches);
    kill(pid, SIGKILL);
    waitpid(pid, 0, 0);
    return found;
}

static int open_file(const char *path) {
    int fd = open(path, O_RDWR | O_CREAT, 0600);
    if (fd < 0) fail(path);
    // What this kernel has cached is not the disk; whoever asks empties the host's cache.
    posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
    return fd;
}

static void move(int fd, int writes, off_t at, size_t size) {
    ssize_t done = writes ? pwrite(fd, buffer, size, at) : pread(fd, buffer, size, at);
    if (done != (ssize_t)size) fail("file");
}

static double sequential_rate(int writes, const char *path) {
    int fd = open_file(path);
    double start = now();
    for (unsigned long at = 0; at < FILE_SIZE; at += CHUNK) move(fd, writes, at, CHUNK);
    if (writes && fsync(fd)) fail("fsync");
    return FILE_SIZE / (now() - start) / 1e6;
}

// Pages of `count`, a power of two, that begin at `first`, until the time is over or none is left.
static double random_rate(int writes, const char *path, unsigned long first, unsigned long count) {
    int fd = open_file(path);
    posix_fadvise(fd, 0, 0, POSIX_FADV_RANDOM);
    unsigned long page = count / 3, calls = 0;
    double start = now();
    while (calls < count && now() - start < limit) {
        page = (page * 1664525 + 1013904223) % count; // of full period: no page comes twice
        move(fd, writes, (first + page) * PAGE, PAGE);
        if (writes && fdatasync(fd)) fail("fdatasync");
        calls++;
    }
    return calls / (now() - start);
}

// Each of `at_once` processes, a power of two, has its own part of the file.
static double parallel_rate(int writes, const char *path, int at_once) {
    int results[2];
    double sum = 0, found;
    unsigned long count = FILE_SIZE / PAGE / at_once;
    if (pipe(results)) fail("pipe");
    for (int i = 0; i < at_once; i++) {
        pid_t pid = fork();
        if (pid < 0) fail("fork");
        if (pid) continue;
        found = random_rate(writes, path, i * count, count);
        _exit(write(results[1], &found, sizeof found) != sizeof found);
    }
    close(results[1]);
    for (int i = 0; i < at_once; i++, sum += found)
        if (read(results[0], &found, sizeof found) != sizeof found) fail("a process");
    while (wait(0) > 0) continue;
    return sum;
}

static int listen_on(int port) {
    int on = 1, fd = socket(AF_INET, SOCK_STREAM, 0);
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(port)};
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (bind(fd, (void *)&address, sizeof address) || listen(fd, CONNECTIONS)) fail("listen");
    return fd;
}

static void serve_one(int which, int fd) {
    ssize_t size = 1;
    int on = 1;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    if (which == 2)
        while (size > 0) size = write(fd, buffer, CHUNK / 4);
    while (size > 0) {
        size = read(fd, buffer, CHUNK / 4);
        if (which == 0 && size > 0) size = write(fd, buffer, size);
    }
    shutdown(fd, SHUT_WR); // the end of what was discarded is the answer to it
    _exit(0);
}

static void serve(void) {
    struct pollfd ports[3] = {{listen_on(7), POLLIN, 0}, {listen_on(9), POLLIN, 0},
                              {listen_on(19), POLLIN, 0}};
    signal(SIGCHLD, SIG_IGN);
    puts("ready");
    fflush(stdout);
    while (poll(ports, 3, -1) > 0)
        for (int i = 0; i < 3; i++)
            if (ports[i].revents) {
                int fd = accept(ports[i].fd, 0, 0);
                if (fd >= 0 && !fork()) serve_one(i, fd);
                close(fd);
            }
}

static int connect_to(const char *host, int port) {
    int on = 1, fd = socket(AF_INET, SOCK_STREAM, 0);
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(port)};
    if (inet_pton(AF_INET, host, &address.sin_addr) != 1) fail(host);
    if (connect(fd, (void *)&address, sizeof address)) fail("connect");
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    return fd;
}

static double request_rate(const char *host, int count) {
    struct pollfd fds[CONNECTIONS];
    int missing[CONNECTIONS];
    unsigned long done = 0;
    if (count < 1 || count > CONNECTIONS) count = 1;
    for (int i = 0; i < count; i++) fds[i] = (struct pollfd){connect_to(host, 7), POLLIN, 0};
    double start = now();
    for (int i = 0; i < count; i++) {
        if (write(fds[i].fd, buffer, REQUEST) != REQUEST) fail("write");
        missing[i] = REQUEST;
    }
    while (now() - start < limit) {
        if (poll(fds, count, 5000) <= 0) fail("no answer in 5 s");
        for (int i = 0; i < count; i++) {
            if (!fds[i].revents) continue;
            ssize_t size = read(fds[i].fd, buffer, missing[i]);
            if (size <= 0) fail("read");
            missing[i] -= size;
            if (missing[i]) continue;
            done++;
            missing[i] = REQUEST;
            if (write(fds[i].fd, buffer, REQUEST) != REQUEST) fail("write");
        }
    }
    return done / (now() - start);
}

static double stream_rate(const char *host, int port) {
    int fd = connect_to(host, port);
    double start = now();
    uint64_t size = 0;
    while (now() - start < limit) {
        ssize_t step = port == 9 ? write(fd, buffer, CHUNK / 4) : read(fd, buffer, CHUNK / 4);
        if (step <= 0) fail("stream");
        size += step;
    }
    if (port == 9) { // all of it has arrived when the other side has seen the end
        shutdown(fd, SHUT_WR);
        if (read(fd, buffer, 1)) fail("end");
    }
    return size / (now() - start) / 1e6;
}

int main(int argc, char **argv) {
    const char *kind = argc > 1 ? argv[1] : "";
    // A fork copies the page tables of all that is there.
    size_t memory = !strcmp(kind, "copy") || !strcmp(kind, "chase") ? MEMORY : CHUNK;
    buffer = malloc(memory);
    memset(buffer, 1, memory);
    signal(SIGPIPE, SIG_IGN);
    if (!strcmp(kind, "serve")) {
        serve();
        fail("serve");
    }
    limit = argc > 2 ? atof(argv[2]) : 0;
    const char *place = argc > 3 ? argv[3] : "";
    double found = -1;
    if (!strcmp(kind, "int")) found = rate(1, integers);
    else if (!strcmp(kind, "float")) found = rate(2.0 * 96 * 96 * 96 / 1e6, floats);
    else if (!strcmp(kind, "copy")) found = rate(MEMORY / 2 / 1e6, copy);
    else if (!strcmp(kind, "chase")) found = rate(0.1, chase);
    else if (!strcmp(kind, "syscall")) found = rate(1000, system_calls);
    else if (!strcmp(kind, "switch")) found = switch_rate();
    else if (!strcmp(kind, "fork")) found = rate(1, forks);
    else if (!strcmp(kind, "requests")) found = request_rate(place, argc > 4 ? atoi(argv[4]) : 1);
    else if (!strcmp(kind, "send")) found = stream_rate(place, 9);
    else if (!strcmp(kind, "receive")) found = stream_rate(place, 19);
    else if (!strcmp(kind, "read") || !strcmp(kind, "write"))
        found = sequential_rate(kind[0] == 'w', place);
    else if (!strcmp(kind, "read-random") || !strcmp(kind, "write-random"))
        found = parallel_rate(kind[0] == 'w', place, argc > 4 ? atoi(argv[4]) : 1);
    if (found < 0) {
        fprintf(stderr, "work: unknown work '%s'\n", kind);
        return 2;
    }
    printf("%.6g\n", found);
    return 0;
}
