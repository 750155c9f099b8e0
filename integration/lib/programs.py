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
