# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest

from shimv2.errors import as_rpc_error
from shimv2.spec import SpecError
from ttrpc.errors import Code, RpcError
from vmm.errors import VmmGoneError


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (SpecError("process.cwd: missing"), Code.INVALID_ARGUMENT),
        (VmmGoneError("killed"), Code.UNAVAILABLE),
        (ExceptionGroup("", [SpecError("x")]), Code.INVALID_ARGUMENT),
        # All streams of a process fail at once when the VM goes.
        (ExceptionGroup("", [VmmGoneError("a"), VmmGoneError("b")]), Code.UNAVAILABLE),
        (RpcError(Code.NOT_FOUND, "no"), Code.NOT_FOUND),
    ],
)
def test_status_of(error: Exception, code: Code) -> None:
    with pytest.raises(RpcError) as caught, as_rpc_error():
        raise error
    assert caught.value.code == code


def test_what_nobody_foresaw_stays_as_it_is() -> None:
    with pytest.raises(ZeroDivisionError), as_rpc_error():
        raise ZeroDivisionError
