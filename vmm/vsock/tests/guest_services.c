/* SPDX-License-Identifier: Apache-2.0
 *
 * PID 1 of a guest that is nothing but vsock services; linked statically it is the whole
 * initrd.  Each connection has a process of its own.
 *
 *   1000 echo    returns what comes; its end of stream answers the host's
 *   1001 sink    checks what comes against the pattern, answers "<bytes> ok|bad\n"
 *   1002 source  reads "<bytes>\n", sends that much of the pattern, ends the stream
 *   1003 dial    reads "<port>\n", connects to that port of the host and sends it "hello\n";
 *                answers "ok\n" or "errno <n>\n"
 *   1004 flood   sends for ever
 */
#include <errno.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/poll.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <linux/vm_sockets.h>

enum { PERIOD = 1000003, CHUNK = 256 << 10, FIRST = 1000, SERVICES = 5 };

static unsigned char pattern[PERIOD + CHUNK];
static unsigned char buffer[CHUNK];

static void make_pattern(void)
{
    uint64_t x = 88172645463325252ULL;
    for (size_t i = 0; i < PERIOD; i++) {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        pattern[i] = (unsigned char)(x >> 32);
    }
    memcpy(pattern + PERIOD, pattern, CHUNK);
}

static int write_all(int fd, const void *data, size_t size)
{
    const char *at = data;
    while (size) {
        ssize_t n = write(fd, at, size);
        if (n <= 0)
            return -1;
        at += n;
        size -= (size_t)n;
    }
    return 0;
}

static unsigned long long read_number(int fd)
{
    char line[32];
    size_t used = 0;
    while (used < sizeof line - 1 && read(fd, line + used, 1) == 1 && line[used] != '\n')
        used++;
    line[used] = 0;
    return strtoull(line, NULL, 10);
}

static void until_end(int fd)
{
    shutdown(fd, SHUT_WR);
    while (read(fd, buffer, sizeof buffer) > 0)
        ;
}

static void echo(int fd)
{
    ssize_t n;
    while ((n = read(fd, buffer, sizeof buffer)) > 0)
        if (write_all(fd, buffer, (size_t)n))
            return;
    shutdown(fd, SHUT_WR);
}

static void sink(int fd)
{
    unsigned long long total = 0;
    int bad = 0;
    ssize_t n;
    while ((n = read(fd, buffer, sizeof buffer)) > 0) {
        bad |= memcmp(buffer, pattern + total % PERIOD, (size_t)n) != 0;
        total += (unsigned long long)n;
    }
    int size = snprintf((char *)buffer, sizeof buffer, "%llu %s\n", total, bad ? "bad" : "ok");
    write_all(fd, buffer, (size_t)size);
    until_end(fd);
}

static void source(int fd)
{
    unsigned long long left = read_number(fd), at = 0;
    while (left) {
        size_t size = left < CHUNK ? (size_t)left : CHUNK;
        if (write_all(fd, pattern + at % PERIOD, size))
            return;
        at += size;
        left -= size;
    }
    until_end(fd);
}

static void dial(int fd)
{
    struct sockaddr_vm host = {
        .svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_HOST, .svm_port = (unsigned)read_number(fd)};
    int out = socket(AF_VSOCK, SOCK_STREAM, 0), size;
    if (connect(out, (struct sockaddr *)&host, sizeof host))
        size = snprintf((char *)buffer, sizeof buffer, "errno %d\n", errno);
    else {
        write_all(out, "hello\n", 6);
        until_end(out);
        size = snprintf((char *)buffer, sizeof buffer, "ok\n");
    }
    close(out);
    write_all(fd, buffer, (size_t)size);
    until_end(fd);
}

static void flood(int fd)
{
    while (!write_all(fd, pattern, CHUNK))
        ;
}

int main(void)
{
    static void (*const services[SERVICES])(int) = {echo, sink, source, dial, flood};
    struct pollfd listeners[SERVICES];

    make_pattern();
    signal(SIGCHLD, SIG_IGN);
    for (int i = 0; i < SERVICES; i++) {
        struct sockaddr_vm any = {
            .svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_ANY, .svm_port = (unsigned)(FIRST + i)};
        listeners[i].fd = socket(AF_VSOCK, SOCK_STREAM, 0);
        listeners[i].events = POLLIN;
        if (bind(listeners[i].fd, (struct sockaddr *)&any, sizeof any) ||
            listen(listeners[i].fd, 256)) {
            perror("vsock listener");
            return 1;
        }
    }
    for (;;) {
        if (poll(listeners, SERVICES, -1) < 0)
            continue;
        for (int i = 0; i < SERVICES; i++) {
            if (!(listeners[i].revents & POLLIN))
                continue;
            int fd = accept(listeners[i].fd, NULL, NULL);
            if (fd >= 0 && fork() == 0) {
                signal(SIGCHLD, SIG_DFL);
                signal(SIGPIPE, SIG_IGN);
                services[i](fd);
                _exit(0);
            }
            close(fd);
        }
    }
}
