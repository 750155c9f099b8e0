# SPDX-License-Identifier: Apache-2.0
"""Namespaces of their own for tests that mount, rename hosts or set up networks."""

from __future__ import annotations

import os
import pickle
import traceback
from collections.abc import Callable
from typing import Any

import pytest

from agent import syscalls


@pytest.fixture
def namespaces() -> Callable[..., Any]:
    """`namespaces(function, *arguments)`: call it in a child with mount, net, uts namespaces.

    Returns what it returned; an exception fails the test with the child's traceback.
    """
    if os.geteuid() != 0:
        pytest.skip("needs root")

    def call(function: Callable[..., Any], *arguments: Any) -> Any:
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                syscalls.unshare(
                    syscalls.CLONE_NEWNS | syscalls.CLONE_NEWNET | syscalls.CLONE_NEWUTS
                )
                syscalls.mount("none", "/", "", syscalls.MS_REC | syscalls.MS_PRIVATE)
                answer = (True, function(*arguments))
            except BaseException:
                answer = (False, traceback.format_exc())
            with os.fdopen(writer, "wb") as file:
                pickle.dump(answer, file)
            os._exit(0)
        os.close(writer)
        with os.fdopen(reader, "rb") as file:
            data = file.read()
        os.waitpid(pid, 0)
        good, value = pickle.loads(data)
        if not good:
            pytest.fail(value)
        return value

    return call
