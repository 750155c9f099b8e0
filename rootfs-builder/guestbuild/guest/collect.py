# SPDX-License-Identifier: Apache-2.0
"""Runs once, when an image is built, by the guest's Python: writes the file that PID 1 starts from.

Arguments: the library's folder, the loader's source, the result, MODULE:FUNCTION and a
comma-separated list of the agent's packages. The file begins with a marshalled (loader's code, names
that it runs with), and goes on with the modules' bytecode.
"""

import marshal
import os
import sys

library, loader, result, entry, packages = sys.argv[1:]
with open(loader, encoding="utf-8") as source:
    loader_code = compile(source.read(), "loader.py", "exec", dont_inherit=True, optimize=2)
sys.path.append(library)
module, function = entry.split(":")
__import__(module)
# What the agent imports only when it is needed is worth having in the file as well.
for package in packages.split(","):
    top = os.path.join(library, *package.split("."))
    for folder, folders, files in os.walk(top):
        folders.sort()
        prefix = os.path.relpath(folder, library).replace("/", ".")
        for name in sorted(files):
            if name.endswith(".py") and name != "__init__.py":
                try:
                    __import__(f"{prefix}.{name[:-3]}")
                except ModuleNotFoundError:
                    continue  # made for the host: it imports what the guest doesn't have
protobuf = sys.modules.get("google.protobuf.internal.api_implementation")
if protobuf is not None and protobuf.Type() == "python":
    sys.exit("protobuf fell back to its slow implementation in pure Python")

chunks: "list[bytes]" = []
index: "dict[str, tuple[bool, str, int, int]]" = {}
length = 0
for name, found in list(sys.modules.items()):
    spec = getattr(found, "__spec__", None)
    if spec is None or spec.cached is None or not (spec.origin or "").endswith(".py"):
        continue
    is_package = spec.submodule_search_locations is not None
    with open(spec.cached, "rb") as compiled:
        code = compiled.read()[16:]  # magic, flags and hash of the source come first
    index[name] = (is_package, spec.origin, length, len(code))
    chunks.append(code)
    length += len(code)


def head(start: int) -> bytes:
    """The first part of the file, when the modules begin at `start`."""
    places = {
        name: (is_package, origin, start + offset, size)
        for name, (is_package, origin, offset, size) in index.items()
    }
    names = {
        "INDEX": places,
        "FILE": result,
        "LIBRARY": library,
        "ENTRY": (module, function),
    }
    return marshal.dumps((loader_code, names))


start = len(head(1 << 20))
if len(head(start)) != start:
    sys.exit("the head's length depends on the numbers in it")
with open(result, "wb") as target:
    target.write(head(start))
    target.write(b"".join(chunks))
print(len(index), start)
