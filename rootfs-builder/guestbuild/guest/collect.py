# SPDX-License-Identifier: Apache-2.0
"""Runs once, when an image is built, by the guest's Python: writes the files that PID 1 starts from.

Arguments: the library's folder, the loader's source, the loader compiled, the modules' file,
MODULE:FUNCTION and a comma-separated list of the agent's packages. The modules' bytecode lies one
after the other in its file; where, is in the compiled loader.
"""

import marshal
import os
import sys
from _frozen_importlib_external import MAGIC_NUMBER

library, loader, program, result, entry, packages = sys.argv[1:]
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

names = {
    "INDEX": index,
    "FILE": result,
    "LIBRARY": library,
    "ENTRY": (module, function),
}
with open(loader, encoding="utf-8") as source:
    _, _, text = source.read().partition("\n")  # in place of the licence's line: line numbers stay
constants = "; ".join(f"{name} = {value!r}" for name, value in names.items())
program_code = compile(f"{constants}\n{text}", "loader.py", "exec", dont_inherit=True, optimize=2)
with open(program, "wb") as target:
    # A pyc: magic, flags, and the time and size of a source that it does not have (PEP 552).
    target.write(MAGIC_NUMBER + bytes(12) + marshal.dumps(program_code))
with open(result, "wb") as target:
    target.write(b"".join(chunks))
print(len(index))
