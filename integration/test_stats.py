# SPDX-License-Identifier: Apache-2.0
"""Statistics against a workload that knows what it used: within 5 %."""

from __future__ import annotations

import json
import re
import socket
import threading
from pathlib import Path
from typing import Any

import pytest

from integration.lib import cni, programs
from integration.lib.cri import CriNode
from integration.lib.crictl import CrictlError
from integration.lib.disks import loop_device
from integration.lib.kata import wait_until
from shimv2.monitor.sandboxes import sandboxes

_SECONDS = 2.0
_MEMORY = 96 << 20
_SENT = 24 << 20
_CHILDREN = 5
_WRITTEN = 32 << 20

_WORKLOAD = r"""
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>
/* Waits for SIGUSR1; then uses so much CPU, memory, network and processes, says how much CPU it
   was, and keeps the rest. */
static double used(void) {
    struct timespec t;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return t.tv_sec + t.tv_nsec / 1e9;
}
int main(int argc, char **argv) {
    double seconds = atof(argv[1]);
    size_t memory = atol(argv[2]), bytes = atol(argv[3]);
    int children = atoi(argv[4]);
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(atoi(argv[6]))};
    inet_pton(AF_INET, argv[5], &address.sin_addr);
    sigset_t set;
    int signal;
    sigemptyset(&set);
    sigaddset(&set, SIGUSR1);
    sigprocmask(SIG_BLOCK, &set, 0);
    puts("ready");
    fflush(stdout);
    sigwait(&set, &signal);
    double before = used();
    char *held = malloc(memory);
    memset(held, 1, memory);
    for (int i = 0; i < children; i++)
        if (!fork()) for (;;) pause();
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    if (connect(fd, (struct sockaddr *)&address, sizeof address)) { perror("connect"); return 1; }
    for (size_t sent = 0; sent < bytes;) {
        ssize_t step = write(fd, held + sent % memory, 65536);
        if (step < 0) { perror("write"); return 1; }
        sent += step;
    }
    shutdown(fd, SHUT_WR);
    int disk = open("/dev/disk", O_WRONLY | O_DIRECT);
    void *block = aligned_alloc(4096, 1 << 20);
    memset(block, 2, 1 << 20);
    for (long written = 0; written < atol(argv[7]); written += 1 << 20)
        if (write(disk, block, 1 << 20) != 1 << 20) { perror("/dev/disk"); return 1; }
    char end;
    if (read(fd, &end, 1)) return 1;
    volatile unsigned long count = 0;
    while (used() - before < seconds) for (int i = 0; i < 1000; i++) count++;
    printf("used %f\n", used() - before);
    fflush(stdout);
    for (;;) pause();
}
"""


@pytest.mark.parametrize("cri_node", ["debian", "go-shim"], indirect=True)
def test_what_is_told_is_what_was_used(node: CriNode, tmp_path: Path) -> None:
    pod = node.run_pod(handler="kata-alone", linux={"cgroup_parent": f"/{node.mark}pods"})
    file = tmp_path / "disk"
    with file.open("wb") as empty:
        empty.truncate(_WRITTEN)
    with _Sink(node) as sink, loop_device(file) as disk:
        program = str(programs.build("workload", _WORKLOAD))
        container = node.start_container(
            pod,
            *("/workload", str(_SECONDS), str(_MEMORY), str(_SENT), str(_CHILDREN)),
            *(cni.GATEWAY_4, str(sink.port), str(_WRITTEN)),
            devices=[{"host_path": disk, "container_path": "/dev/disk", "permissions": "rw"}],
            mounts=[{"host_path": program, "container_path": "/workload", "readonly": True}],
        )
        wait_until(lambda: "ready" in node.logs(container), 20, "it is ready")
        before, cri_before, pod_before = (
            _task_metrics(node, container),
            _cri_stats(node, container),
            _pod_stats(node, pod),
        )
        # Not by an exec: that would be the container's work too.
        node.containerd.ctr("task", "kill", "-s", "SIGUSR1", container, namespace="k8s.io")
        wait_until(lambda: "used" in node.logs(container), 60, "it has done its work")
        after, cri_after, pod_after = (
            _task_metrics(node, container),
            _cri_stats(node, container),
            _pod_stats(node, pod),
        )
        (labels,) = [sandbox.labels for sandbox in sandboxes() if sandbox.id == pod]
        said = node.logs(container)
        name = node.inspect_pod(pod)["status"]["metadata"]["name"]
        node.remove_pod(pod)
    match = re.search(r"used ([\d.]+)", said)
    assert match
    cpu = float(match[1])
    assert (after["cpu"] - before["cpu"]) / 1e9 == pytest.approx(cpu, rel=0.05)
    assert (cri_after["cpu"] - cri_before["cpu"]) / 1e9 == pytest.approx(cpu, rel=0.05)
    for told in (after["memory"] - before["memory"], cri_after["memory"] - cri_before["memory"]):
        assert told == pytest.approx(_MEMORY, rel=0.05)
    assert after["pids"] == before["pids"] + _CHILDREN == 1 + _CHILDREN
    assert after["written"] - before["written"] == pytest.approx(_WRITTEN, rel=0.05)
    assert after["sent"] - before["sent"] == pytest.approx(_SENT, rel=0.05)
    pod_labels = {"cri_name": name, "cri_namespace": "default", "cri_uid": name}
    assert labels == {"sandbox_id": pod, **pod_labels}
    if pod_before is not None and pod_after is not None:
        assert pod_after["sent"] - pod_before["sent"] == pytest.approx(_SENT, rel=0.05)
        if node.sandboxer == "shim":  # the sum of the containers', as the guest counts it
            assert (pod_after["cpu"] - pod_before["cpu"]) / 1e9 == pytest.approx(cpu, rel=0.05)
            assert pod_after["memory"] - pod_before["memory"] == pytest.approx(_MEMORY, rel=0.05)
        else:  # what the VM takes from the host: of CPU only what this host had left for it
            assert pod_after["cpu"] > pod_before["cpu"]
            assert pod_after["memory"] > _MEMORY


class _Sink:
    """Takes what is sent to it, on the host network."""

    def __init__(self, node: CriNode) -> None:
        self._listener = node.host.call(lambda: socket.create_server(("0.0.0.0", 0)))
        self.port = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:
            return
        with connection:
            while connection.recv(1 << 18):
                pass

    def __enter__(self) -> _Sink:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()


def _task_metrics(node: CriNode, container: str) -> dict[str, int]:
    """`ctr task metrics`: nanoseconds of CPU, bytes of working set, eth0 and disks, processes."""
    done = node.containerd.ctr("task", "metrics", "--format", "json", container, namespace="k8s.io")
    found = json.loads(done.stdout)
    data = found.get("data", found)
    written = [
        int(entry["value"])
        for entry in data.get("blkio", {}).get("io_service_bytes_recursive", [])
        if entry["op"].lower() == "write"
    ]
    (eth0,) = [link for link in data["network"] if link["name"] == "eth0"]
    memory = data["memory"]
    return {
        "cpu": int(data["cpu"]["usage"]["total"]),
        "memory": int(memory["usage"]["usage"]) - int(memory.get("total_inactive_file", 0)),
        "pids": int(data["pids"]["current"]),
        "sent": int(eth0["tx_bytes"]),
        "written": sum(written),
    }


def _cri_stats(node: CriNode, container: str) -> dict[str, int]:
    """`crictl stats`."""
    (stats,) = json.loads(node.crictl("stats", "-o", "json", container))["stats"]
    return {
        "cpu": int(stats["cpu"]["usageCoreNanoSeconds"]["value"]),
        "memory": int(stats["memory"]["workingSetBytes"]["value"]),
    }


def _pod_stats(node: CriNode, pod: str) -> dict[str, int] | None:
    """`crictl statsp`; None where containerd does not have it yet."""
    try:
        text = node.crictl("statsp", "-o", "json", "--id", pod)
    except CrictlError as error:
        if "not implemented" in str(error) or "Unimplemented" in str(error):
            return None
        raise
    (stats,) = json.loads(text)["stats"]
    linux: dict[str, Any] = stats["linux"]
    return {
        "cpu": int(linux["cpu"]["usageCoreNanoSeconds"]["value"]),
        "memory": int(linux["memory"]["workingSetBytes"]["value"]),
        "sent": int(linux["network"]["defaultInterface"]["txBytes"]["value"]),
    }
