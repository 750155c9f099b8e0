# SPDX-License-Identifier: Apache-2.0
"""Saving a paused VM and starting another from it.

A snapshot is a directory with two files: ``state``, QEMU's migration stream without the
guest's memory (capability x-ignore-shared), and ``memory``, the guest's memory with its
holes.  Both go through descriptors: ``exec:`` would need what ``-sandbox spawn=deny`` forbids,
and ``file:`` exists from QEMU 8.2 only.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import trio

from vmm.errors import VmmConfigError, VmmError
from vmm.qemu import memory
from vmm.qemu.qmp_client import QmpClient

STATE_FILE = "state"
MEMORY_FILE = "memory"
TIMEOUT = 30.0
_LOOK_AGAIN = 0.05  # seconds, should QEMU not say that it is done
_FD_NAME = "snapshot"


async def save(qmp: QmpClient, pid: int, directory: Path, moved: trio.Event) -> None:
    """Write both files of a paused VM.

    Args:
        moved: as for `load_state`.

    Raises:
        VmmError: the VM runs, QEMU refused, or the disk is full.
    """
    status = await qmp.execute("query-status")
    if status.get("running"):
        raise VmmError("a VM must be paused before it is saved")
    source = memory.find_memory_file(pid)
    if source is None:
        raise VmmError("the guest's memory is not a file that could be saved")
    try:
        # Memory first, as in a migration: saving the rest may touch pages, and fill holes.
        with source.open("rb") as memory_file, _open_new(directory / MEMORY_FILE) as target:
            await trio.to_thread.run_sync(memory.save_sparse, memory_file.fileno(), target.fileno())
        await _capability(qmp)
        with _open_new(directory / STATE_FILE) as state:
            await qmp.execute("getfd", {"fdname": _FD_NAME}, fds=(state.fileno(),))
        await qmp.execute("migrate", {"uri": f"fd:{_FD_NAME}"})
        await _await_migration(qmp, moved)
    except OSError as error:
        raise VmmError(f"cannot save to {directory}: {error.strerror}") from error


@contextlib.contextmanager
def open_memory(directory: Path, mib: int) -> Iterator[int]:
    """The saved memory, open for reading.

    Raises:
        VmmConfigError: the file is missing or of another size.
    """
    path = directory / MEMORY_FILE
    try:
        source = path.open("rb")
    except OSError as error:
        raise VmmConfigError(f"snapshot {path}: {error.strerror}") from error
    with source:
        size = os.fstat(source.fileno()).st_size
        if size != mib << 20:
            raise VmmConfigError(f"{path} has {size} bytes, this VM {mib << 20}")
        yield source.fileno()


async def copy_memory(source: int, target: int) -> None:
    """Fill a clone's memory file.

    Raises:
        VmmError: the saved file shrank meanwhile, or there is no memory left.
    """
    size = os.fstat(source).st_size
    try:
        await trio.to_thread.run_sync(memory.copy_sparse, source, target)
    except OSError as error:
        raise VmmError(f"the saved memory can't be copied: {error.strerror}") from error
    if os.fstat(source).st_size != size:
        raise VmmError("the saved memory was changed while it was copied")


async def load_state(qmp: QmpClient, directory: Path, moved: trio.Event) -> None:
    """Feed the device state to a QEMU that waits for it; the VM is paused afterwards.

    Args:
        moved: set by the owner of `qmp` when QEMU says that its state has moved, or has not.
    """
    path = directory / STATE_FILE
    await _capability(qmp)
    try:
        with path.open("rb") as state:
            await qmp.execute("getfd", {"fdname": _FD_NAME}, fds=(state.fileno(),))
    except OSError as error:
        raise VmmConfigError(f"snapshot {path}: {error.strerror}") from error
    await qmp.execute("migrate-incoming", {"uri": f"fd:{_FD_NAME}"})
    await _await_migration(qmp, moved)


def _open_new(path: Path) -> BinaryIO:
    return open(path, "wb", opener=lambda name, flags: os.open(name, flags, 0o600))


async def _capability(qmp: QmpClient) -> None:
    wanted = [{"capability": name, "state": True} for name in ("x-ignore-shared", "events")]
    await qmp.execute("migrate-set-capabilities", {"capabilities": wanted})


async def _await_migration(qmp: QmpClient, moved: trio.Event) -> None:
    with trio.move_on_after(TIMEOUT):
        while True:
            with trio.move_on_after(_LOOK_AGAIN):
                await moved.wait()
            answer = await qmp.execute("query-migrate")
            status = answer.get("status", "")
            if status == "completed":
                return
            if status in ("failed", "cancelled"):
                raise VmmError(f"snapshot {status}: {answer.get('error-desc', 'no reason given')}")
    raise VmmError(f"the snapshot took more than {TIMEOUT:g} s")
