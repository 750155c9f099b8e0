# SPDX-License-Identifier: Apache-2.0
"""Stand-ins for the images that critest pulls."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping

from integration.lib.images import GROUP, PASSWD, Image, busybox_layer
from integration.lib.programs import build

_PAUSE = r"""
#include <signal.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>
static void end(int signal) { exit(0); }
static void reap(int signal) { while (waitpid(-1, 0, WNOHANG) > 0) {} }
int main(void) {
    signal(SIGTERM, end); signal(SIGINT, end); signal(SIGCHLD, reap);
    for (;;) pause();
}
"""

_WEB_SERVER = r"""
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>
/* A web server under the name of another one. */
static const char answer[] = "HTTP/1.0 200 OK\r\nContent-Type: text/html\r\n\r\n"
                             "<html><title>Welcome to nginx!</title></html>\n";
int main(int argc, char **argv) {
    if (!strstr(argv[0], "master")) {
        execl("/usr/sbin/nginx", "nginx: master process /usr/sbin/nginx", argv[1], NULL);
        perror("exec");
        return 1;
    }
    int server = socket(AF_INET6, SOCK_STREAM, 0), on = 1;
    struct sockaddr_in6 address = {.sin6_family = AF_INET6, .sin6_port = htons(atoi(argv[1]))};
    setsockopt(server, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (bind(server, (void *)&address, sizeof address) || listen(server, 64)) {
        perror("listen");
        return 1;
    }
    FILE *file = fopen("/var/run/nginx.pid", "w");
    if (file) { fprintf(file, "%d\n", getpid()); fclose(file); }
    puts("nginx, httpd: ready");
    fflush(stdout);
    for (;;) {
        int client = accept(server, 0, 0);
        char request[4096];
        if (client < 0) continue;
        if (read(client, request, sizeof request) > 0 && write(client, answer, sizeof answer - 1)) {}
        close(client);
    }
}
"""

_NO_NEW_PRIVILEGES = r"""
#include <stdio.h>
#include <unistd.h>
int main(void) { printf("Effective uid: %d\n", geteuid()); return 0; }
"""

_PGREP = b"""#!/bin/sh
for d in /proc/[0-9]*; do
  read -r name < $d/comm 2>/dev/null && [ "$name" = "$1" ] && echo ${d#/proc/} && found=yes
done
[ "$found" ]
"""
_IPCS = b"""#!/bin/sh
echo "------ Shared Memory Segments --------"
cat /proc/sysvipc/shm
"""

_MORE_USERS = (
    b"www-data:x:33:33::/var/www:/bin/false\nnobody:x:65534:65534::/:/bin/false\n"
    b"default-user:x:1000:1000::/home/user:/bin/sh\n"
)
_MORE_GROUPS = b"www-data:x:33:\ngroup-defined-in-image:x:50000:default-user\n"


def _files(files: Mapping[str, bytes], *, mode: int = 0o755) -> bytes:
    """A layer of files alone."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(data), mode
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def all_images() -> dict[str, Image]:
    """``repository:tag`` → image, for cri-tools 1.37."""
    pause = build("pause", _PAUSE).read_bytes()
    server = {"var/run/.keep": b"", "usr/sbin/nginx": build("web-server", _WEB_SERVER).read_bytes()}
    privileges = {"nnp": build("effective-uid", _NO_NEW_PRIVILEGES).read_bytes()}
    users = PASSWD.replace("user:x:1000", "user:x:1001").encode() + _MORE_USERS
    base = [
        busybox_layer({"bin/pgrep": _PGREP, "bin/ipcs": _IPCS}),
        _files({"etc/passwd": users, "etc/group": GROUP.encode() + _MORE_GROUPS}, mode=0o644),
    ]
    busybox = Image(base)
    web = Image([*base, _files(server)], command=["/usr/sbin/nginx", "80"])
    images = {
        "library/busybox:latest": busybox,
        "e2e-test-images/busybox:1.29-2": busybox,
        "e2e-test-images/nginx:1.14-2": web,
        "e2e-test-images/httpd:2.4.39-4": web,
        "k8s-staging-cri-tools/hostnet-nginx-amd64:latest": Image(
            [*base, _files(server)], command=["/usr/sbin/nginx", "12003"]
        ),
        "e2e-test-images/nonewprivs:1.3": Image(
            [*base, _files(privileges, mode=0o4755)], command=["/nnp"], user="1000"
        ),
    }
    for tag in ("3.10.2", "3.10.1", "3.10", "3.9"):
        labels = {"version": "old" if tag == "3.9" else "new"}
        images[f"pause:{tag}"] = Image(
            [_files({"pause": pause})], command=["/pause"], labels=labels
        )
    for name, user in (
        ("user-uid", "1002"),
        ("user-username", "www-data"),
        ("user-uid-group", "1003:users"),
        ("user-username-group", "www-data:100"),
        ("predefined-group", "1000"),
    ):
        images[f"k8s-staging-cri-tools/test-image-{name}:latest"] = Image(base, user=user)
    different = ("latest:latest", "tag:test", "tag:all", "1:latest", "2:latest", "3:latest")
    for name in different:
        image = Image(base, labels={"name": name})
        images[f"k8s-staging-cri-tools/test-image-{name}"] = image
    tagged = Image(base, labels={"name": "tags"})
    for tag in ("1", "2", "3"):
        images[f"k8s-staging-cri-tools/test-image-tags:{tag}"] = tagged
    return images
