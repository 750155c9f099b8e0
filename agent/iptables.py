# SPDX-License-Identifier: Apache-2.0
"""GetIPTables and SetIPTables, by the guest's own iptables-save and iptables-restore."""

from __future__ import annotations

import os

from agent.waiting import Command
from ttrpc.errors import Code, RpcError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from agent.waiting import CommandResult, Work

_DIRECTORIES = ("/usr/sbin", "/sbin", "/usr/bin", "/bin")


def get_iptables(is_ipv6: bool) -> Work[bytes]:
    """The rules in iptables-save's format. Raises UNIMPLEMENTED, INTERNAL."""
    done = yield Command([_program("ip6tables-save" if is_ipv6 else "iptables-save")])
    return _checked(done).stdout


def set_iptables(is_ipv6: bool, rules: bytes) -> Work[bytes]:
    """Replace the rules by those given; what the program printed is the answer.

    Waits for the tables' lock, as containers may be using it. Raises UNIMPLEMENTED, INTERNAL.
    """
    program = _program("ip6tables-restore" if is_ipv6 else "iptables-restore")
    done = yield Command([program, "--wait", "5"], rules)
    return _checked(done).stdout


def _program(name: str) -> str:
    for directory in _DIRECTORIES:
        path = f"{directory}/{name}"
        if os.access(path, os.X_OK):
            return path
    raise RpcError(Code.UNIMPLEMENTED, f"the guest image has no {name}")


def _checked(done: CommandResult | None) -> CommandResult:
    assert done is not None
    if done.status != 0:
        detail = done.stderr.decode(errors="replace").strip()
        raise RpcError(Code.INTERNAL, f"iptables: status {done.status}: {detail}")
    return done
