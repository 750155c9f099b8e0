# SPDX-License-Identifier: Apache-2.0
"""Runs in the guest, first of all: imports come out of one file.

The usual importer looks through folders and checks times for each module, in Python code that an
emulated guest runs slowly. The index tells where in the file the bytecode of each known module
lies; anything else is found in the usual way. See startup.py for how this is put together; the
names in capitals come from collect.py.
"""

import posix
import sys
from _frozen_importlib import ModuleSpec
from marshal import loads

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import ModuleType


class Loader:
    """A finder and loader in one, used as a class: there is only one index."""

    # Name: is a package, path of the source, place and length in the file.
    index: "dict[str, tuple[bool, str, int, int]]" = globals()["INDEX"]
    path: str = globals()["FILE"]

    @classmethod
    def find_spec(
        cls, name: str, path: "Sequence[str] | None" = None, target: "ModuleType | None" = None
    ) -> "ModuleSpec | None":
        entry = cls.index.get(name)
        if entry is None:
            return None
        is_package, origin, _, _ = entry
        spec = ModuleSpec(name, cls, origin=origin, is_package=is_package)  # type: ignore[arg-type]
        spec.has_location = True
        if is_package:
            spec.submodule_search_locations = [origin.rpartition("/")[0]]
        return spec

    @staticmethod
    def create_module(spec: ModuleSpec) -> None:
        """The usual kind of module will do."""

    @classmethod
    def exec_module(cls, module: "ModuleType") -> None:
        _, _, offset, length = cls.index[module.__name__]
        file = posix.open(cls.path, posix.O_RDONLY | posix.O_CLOEXEC)
        try:
            code = loads(posix.pread(file, length, offset))
        finally:
            posix.close(file)
        exec(code, module.__dict__)


sys.meta_path.insert(0, Loader)
sys.path.append(globals()["LIBRARY"])
_module, _function = globals()["ENTRY"]
__import__(_module)
getattr(sys.modules[_module], _function)()
