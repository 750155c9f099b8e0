# SPDX-License-Identifier: Apache-2.0
"""Small static C programs for what a shell can't do: mmap, many descriptors, file locks."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path

from integration.lib.images import cache_dir

SHARED_MMAP = r"""
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>
/* A child writes through a shared mapping of a file; the parent and read(2) must see it. */
int main(int argc, char **argv) {
    int fd = open(argv[1], O_RDWR | O_CREAT | O_TRUNC, 0644);
    if (fd < 0 || ftruncate(fd, 8192)) { perror(argv[1]); return 1; }
    char *map = mmap(0, 8192, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (map == MAP_FAILED) { perror("mmap"); return 2; }
    if (!fork()) { strcpy(map + 4096, "seen"); _exit(msync(map, 8192, MS_SYNC) != 0); }
    int status; wait(&status);
    char buffer[5] = {0};
    if (status || strcmp(map + 4096, "seen")) { puts("mapping differs"); return 3; }
    if (pread(fd, buffer, 4, 4096) != 4 || strcmp(buffer, "seen")) { puts("file differs"); return 4; }
    puts("same");
    return 0;
}
"""

OPEN_FILES = r"""
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/resource.h>
/* Holds so many open files at once, of so many names. */
int main(int argc, char **argv) {
    int count = atoi(argv[2]), names = atoi(argv[3]);
    char path[256];
    struct rlimit limit = {count + 100, count + 100};
    if (setrlimit(RLIMIT_NOFILE, &limit)) { perror("setrlimit"); return 1; }
    for (int i = 0; i < count; i++) {
        snprintf(path, sizeof path, "%s/f%d", argv[1], i % names);
        if (open(path, O_RDWR | O_CREAT, 0644) < 0) { perror(path); printf("%d\n", i); return 2; }
    }
    printf("%d\n", count);
    return 0;
}
"""

ECHO_SERVER = r"""
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>
/* Sends back what comes in, on any number of connections, by IPv4 and IPv6; with one more
   argument on ::1 only. */
static char buffer[1 << 18];
int main(int argc, char **argv) {
    int server = socket(AF_INET6, SOCK_STREAM, 0), all = epoll_create1(0);
    struct sockaddr_in6 address = {.sin6_family = AF_INET6, .sin6_port = htons(atoi(argv[1]))};
    struct epoll_event event = {.events = EPOLLIN, .data.fd = server}, ready[64];
    if (argc > 2) address.sin6_addr = in6addr_loopback;
    if (bind(server, (void *)&address, sizeof address) || listen(server, 1024)) {
        perror("listen");
        return 1;
    }
    epoll_ctl(all, EPOLL_CTL_ADD, server, &event);
    for (;;) {
        int count = epoll_wait(all, ready, 64, -1);
        for (int i = 0; i < count; i++) {
            int fd = ready[i].data.fd;
            if (fd == server) {
                event.data.fd = accept(server, 0, 0);
                epoll_ctl(all, EPOLL_CTL_ADD, event.data.fd, &event);
                continue;
            }
            ssize_t size = read(fd, buffer, sizeof buffer), done = 0;
            while (done < size) {
                ssize_t step = write(fd, buffer + done, size - done);
                if (step < 0) break;
                done += step;
            }
            if (size <= 0) close(fd);
        }
    }
}
"""

VOLUME = r"""
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/inotify.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/xattr.h>
#include <unistd.h>
/* VERB PATH [TEXT]: what a shell can't do with files. */
static char buffer[8192] __attribute__((aligned(4096)));
static int fail(const char *what) { perror(what); return 1; }
static int lock(int fd) {
    struct flock whole = {.l_type = F_WRLCK, .l_whence = SEEK_SET};
    return fcntl(fd, F_SETLK, &whole);
}
int main(int argc, char **argv) {
    const char *verb = argv[1], *path = argv[2], *text = argc > 3 ? argv[3] : "";
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int fd;
    setvbuf(stdout, 0, _IOLBF, 0);
    strncpy(address.sun_path, path, sizeof address.sun_path - 1);
    if (!strcmp(verb, "set-xattr"))
        return setxattr(path, "user.test", text, strlen(text), 0) ? fail(path) : 0;
    if (!strcmp(verb, "get-xattr")) {
        if (getxattr(path, "user.test", buffer, sizeof buffer - 1) < 0) return fail(path);
        return puts(buffer) < 0;
    }
    if (!strcmp(verb, "direct")) {
        fd = open(path, O_RDWR | O_CREAT | O_DIRECT, 0644);
        memset(buffer, 'd', 4096);
        if (fd < 0 || pwrite(fd, buffer, 4096, 4096) != 4096) return fail(path);
        memset(buffer, 0, 4096);
        if (pread(fd, buffer, 4096, 4096) != 4096 || buffer[4095] != 'd') return fail("pread");
        return puts("direct") < 0;
    }
    if (!strcmp(verb, "hold") || !strcmp(verb, "lock")) {
        fd = open(path, O_RDWR | O_CREAT, 0644);
        if (fd < 0) return fail(path);
        puts(lock(fd) ? "busy" : "locked");
        if (*verb == 'h') pause();
        return 0;
    }
    if (!strcmp(verb, "listen")) {
        int server = socket(AF_UNIX, SOCK_STREAM, 0);
        if (bind(server, (void *)&address, sizeof address) || listen(server, 8)) return fail(path);
        while ((fd = accept(server, 0, 0)) >= 0) {
            ssize_t size = read(fd, buffer, sizeof buffer);
            if (size > 0 && write(fd, buffer, size) != size) return fail("write");
            close(fd);
        }
    }
    if (!strcmp(verb, "send")) {
        fd = socket(AF_UNIX, SOCK_STREAM, 0);
        if (connect(fd, (void *)&address, sizeof address)) return fail(path);
        if (write(fd, text, strlen(text)) < 0 || read(fd, buffer, sizeof buffer - 1) < 0)
            return fail("socket");
        return puts(buffer) < 0;
    }
    if (!strcmp(verb, "watch")) {
        fd = inotify_init();
        if (inotify_add_watch(fd, path, IN_MOVED_TO | IN_CREATE | IN_MODIFY) < 0) return fail(path);
        puts("watching");
        for (;;) {
            ssize_t size = read(fd, buffer, sizeof buffer);
            for (char *at = buffer; at < buffer + size;) {
                struct inotify_event *event = (void *)at;
                puts(event->len ? event->name : ".");
                at += sizeof *event + event->len;
            }
        }
    }
    return 2;
}
"""


def build(name: str, source: str) -> Path:
    """The static program; built once and kept.

    Raises:
        RuntimeError: the compiler's complaint.
    """
    digest = hashlib.sha256(source.encode()).hexdigest()[:16]
    path = cache_dir() / "programs" / f"{name}-{digest}"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(
            ["cc", "-O1", "-static", "-x", "c", "-", "-o", path.with_suffix(".new")],
            input=source,
            text=True,
            capture_output=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"cc: {done.stderr}")
        path.with_suffix(".new").rename(path)
    return path
