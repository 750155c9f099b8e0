# SPDX-License-Identifier: Apache-2.0
"""A ttrpc service whose calls are counted, and whose log lines name what they are about."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from shimv2.log import about
from shimv2.metrics.durations import Durations


class Observed:
    """Stands before a service of containerd's.

    What a call starts in the background keeps the call's fields in the log.

    Args:
        service: has a coroutine function for each method.
        durations: gets each call by its method's name, as Kata spells it.
    """

    def __init__(self, service: object, durations: Durations) -> None:
        self._service = service
        self._durations = durations

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._service, name)
        action = snake_case(name)

        async def observed(request: Any, context: Any) -> Any:
            fields = {"container": request.id} if hasattr(request, "id") else {}
            if getattr(request, "exec_id", ""):
                fields["exec"] = request.exec_id
            with self._durations.of(action), about(**fields):
                return await method(request, context)

        return observed


def snake_case(name: str) -> str:
    """``ResizePty`` as ``resize_pty``, ``CloseIO`` as ``close_io``."""
    letters: list[str] = []
    for before, letter in zip(" " + name, name, strict=False):
        if letter.isupper() and before.islower():
            letters.append("_")
        letters.append(letter.lower())
    return "".join(letters)
