# SPDX-License-Identifier: Apache-2.0
"""From the exceptions of every room to the gRPC status that containerd expects."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from shimv2.cgroups import CgroupError
from shimv2.config import ConfigError
from shimv2.drives import DriveError
from shimv2.hooks import HookError
from shimv2.rootfs import RootfsError
from shimv2.share import ShareError
from shimv2.spec import SpecError
from shimv2.stdio import StdioError
from ttrpc.errors import Code, RpcError
from vmm.errors import CapacityError, UnsupportedError, VmmConfigError, VmmError, VmmGoneError

# The first that fits counts, so subclasses stand before their bases.
_CODES: tuple[tuple[type[Exception], Code], ...] = (
    (ConfigError, Code.INVALID_ARGUMENT),
    (SpecError, Code.INVALID_ARGUMENT),
    (StdioError, Code.INVALID_ARGUMENT),
    (RootfsError, Code.FAILED_PRECONDITION),
    (ShareError, Code.FAILED_PRECONDITION),
    (DriveError, Code.FAILED_PRECONDITION),
    (HookError, Code.FAILED_PRECONDITION),
    (CgroupError, Code.FAILED_PRECONDITION),
    (VmmConfigError, Code.FAILED_PRECONDITION),
    (CapacityError, Code.RESOURCE_EXHAUSTED),
    (UnsupportedError, Code.UNIMPLEMENTED),
    (VmmGoneError, Code.UNAVAILABLE),
    (VmmError, Code.INTERNAL),
    (OSError, Code.INTERNAL),
)


def to_rpc_error(error: Exception) -> RpcError | None:
    """The status for an error of ours; None for one that nobody foresaw."""
    if isinstance(error, RpcError):
        return error
    for kind, code in _CODES:
        if isinstance(error, kind):
            return RpcError(code, str(error))
    return None


@contextlib.contextmanager
def as_rpc_error() -> Iterator[None]:
    """Turn what the body raises into an `RpcError`; of a group, the first."""
    try:
        yield
    except RpcError:
        raise
    except Exception as error:
        cause: BaseException = error
        while isinstance(cause, BaseExceptionGroup):
            cause = cause.exceptions[0]
        found = to_rpc_error(cause) if isinstance(cause, Exception) else None
        if found is None:
            raise
        raise found from error
