# SPDX-License-Identifier: Apache-2.0
"""What can go wrong below the shim, as exceptions that name the thing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TypeVar

_ErrorT = TypeVar("_ErrorT", bound=BaseException)


class VmmError(Exception):
    """A virtual machine, or a helper it needs, could not do what was asked.

    The message is one sentence for a user: it names the program, file or value at
    fault.  Where a helper process ended, its last lines of stderr follow it.
    """


def single_error(group: BaseExceptionGroup[_ErrorT]) -> _ErrorT:
    """The one error of a nursery that says what went wrong; Cancelled only if there is no other."""
    flat: list[_ErrorT] = []
    for error in group.exceptions:
        flat.append(single_error(error) if isinstance(error, BaseExceptionGroup) else error)
    return next((error for error in flat if type(error).__name__ != "Cancelled"), flat[0])


@contextlib.contextmanager
def ungrouped() -> Iterator[None]:
    """What a nursery in the block lets out comes out as it is, not in a group."""
    try:
        yield
    except BaseExceptionGroup as group:
        raise single_error(group) from None


class VmmConfigError(VmmError):
    """The configuration names something that cannot work (a missing kernel, an absurd size)."""


class CapacityError(VmmError):
    """The VM has no slot, port or address space left for the device or size asked for."""


class UnsupportedError(VmmError):
    """This VMM, in this version or machine type, cannot do what was asked."""


class VmmGoneError(VmmError):
    """The VMM process ended, or its control socket closed, while it was needed."""
