# SPDX-License-Identifier: Apache-2.0
"""OCI hooks that run on the host, in the host's mount namespace.

prestart and createRuntime run once the sandbox has its network namespace and before the
container is made; poststart after its start; poststop after its end (runtime-spec,
config.md#posix-platform-hooks).
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import trio

from shimv2.host_process import HostProcess
from shimv2.spec import Hook, HookKind

_DEFAULT_LIMIT = 120.0  # seconds for a hook that sets no timeout
_TAIL_BYTES = 4096  # kept of what a hook prints
_TAIL_LINES = 5

_STATUS = {
    HookKind.PRESTART: "creating",
    HookKind.CREATE_RUNTIME: "creating",
    HookKind.POSTSTART: "running",
    HookKind.POSTSTOP: "stopped",
}
# Failing ones of these are only logged: the container runs, or has run, already.
_FORGIVEN = (HookKind.POSTSTART, HookKind.POSTSTOP)

NETNS_ANNOTATION = "nerdctl/network-namespace"  # where nerdctl's hook looks first

log = logging.getLogger(__name__)


class HookError(Exception):
    """A hook failed; the message names it and ends with its last lines of output."""


@dataclass(frozen=True, slots=True)
class ContainerState:
    """What a hook gets on stdin.

    Args:
        pid: of the process that lives in the pod's network namespace.
        netns: path of that namespace, or "".
    """

    id: str
    pid: int
    bundle: Path
    oci_version: str = "1.0.2"
    annotations: Mapping[str, str] = field(default_factory=dict)
    netns: str = ""

    def to_json(self, kind: HookKind) -> bytes:
        """The state of runtime-spec, runtime.md#state."""
        annotations = dict(self.annotations)
        if self.netns:
            annotations[NETNS_ANNOTATION] = self.netns
        status = _STATUS[kind]
        state: dict[str, object] = {
            "ociVersion": self.oci_version,
            "id": self.id,
            "status": status,
            "bundle": str(self.bundle),
        }
        if status != "stopped":
            state["pid"] = self.pid
        if annotations:
            state["annotations"] = annotations
        return json.dumps(state).encode()


async def run_hooks(
    kind: HookKind,
    hooks: Sequence[Hook],
    state: ContainerState,
    *,
    mount_namespace: int | None,
) -> None:
    """Run hooks one after the other.

    Args:
        kind: one of the four that run on the host.
        mount_namespace: descriptor of the host's.

    Raises:
        HookError: a prestart or createRuntime hook failed; those after it do not run.
    """
    for index, hook in enumerate(hooks):
        try:
            await _run(kind, hook, state, mount_namespace)
        except HookError as error:
            message = f"{kind.value} hook {index} ({hook.path}) of {state.id}: {error}"
            if kind not in _FORGIVEN:
                raise HookError(message) from error.__cause__
            log.warning("%s", message)


async def _run(
    kind: HookKind, hook: Hook, state: ContainerState, mount_namespace: int | None
) -> None:
    stdin = os.memfd_create("hook-state", os.MFD_CLOEXEC)
    output, output_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    os.set_blocking(output_write, True)
    try:
        os.write(stdin, state.to_json(kind))
        os.lseek(stdin, 0, os.SEEK_SET)
        try:
            process = HostProcess.start(
                hook.path,
                hook.args,
                hook.env,
                descriptors={0: stdin, 1: output_write, 2: output_write},
                mount_namespace=mount_namespace,
                cwd=state.bundle,
                die_with_parent=True,
            )
        except OSError as error:
            raise HookError(error.strerror) from error
        finally:
            os.close(output_write)
            os.close(stdin)
        await _finish(process, output, float(hook.timeout or _DEFAULT_LIMIT))
    finally:
        trio.lowlevel.notify_closing(output)
        os.close(output)


async def _finish(process: HostProcess, output: int, limit: float) -> None:
    tail = bytearray()
    status: int | None = None
    try:
        with trio.move_on_after(limit):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_keep_tail, output, tail)
                status = await process.wait()
                nursery.cancel_scope.cancel()  # a daemon it left may keep the pipe open
    finally:
        if status is None:
            process.kill(group=True)
            with trio.CancelScope(shield=True):
                await process.wait()
        process.close()
    _take(output, tail)
    lines = [line for line in tail.decode(errors="replace").splitlines() if line.strip()]
    text = ": " + " / ".join(lines[-_TAIL_LINES:]) if lines else ""
    if status is None:
        raise HookError(f"not done within {limit:g} s, killed{text}")
    if status:
        how = f"signal {-status}" if status < 0 else f"status {status}"
        raise HookError(f"ended with {how}{text}")


async def _keep_tail(output: int, tail: bytearray) -> None:
    while _take(output, tail):
        await trio.lowlevel.wait_readable(output)


def _take(output: int, tail: bytearray) -> bool:
    """Move what is there into `tail`; False at the end of the pipe."""
    for _ in range(16):
        try:
            data = os.read(output, 65536)
        except BlockingIOError:
            return True
        if not data:
            return False
        tail += data
        del tail[:-_TAIL_BYTES]
    return True
