# SPDX-License-Identifier: Apache-2.0
"""PID 1's program: the bytecode of all modules that the agent imports, in one file.

/sbin/init executes the interpreter on `init.pyc`, which is guest/loader.py with the places of the
modules in `agent.bin`. There is no source in it, so that Python's parser and compiler are never
met, which an emulated guest would translate: 2,600 of the 35,000 blocks that a bare start of Python
has. LC_ALL=C saves 2,000 more, those that look for a locale; Python takes UTF-8 then. The modules
also lie in the library as files, for the lines in tracebacks.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from guestbuild import launcher, root, tree
from guestbuild.command import run
from guestbuild.description import Agent

INIT = "/usr/sbin/init"
_FILE = f"{root.LIBRARY}/agent.bin"
_PROGRAM = f"{root.LIBRARY}/init.pyc"
_PYTHON = "/usr/bin/python3"
_PROGRAMS = Path(__file__).parent / "guest"


def write(target: Path, agent: Agent) -> int:
    """Write the start files and /sbin/init into a root that has the agent compiled.

    Returns:
        How many modules are in them.

    Raises:
        BuildError: The agent can't be imported in the guest; with the traceback.
    """
    scratch = target / "tmp/startup"
    scratch.mkdir(parents=True)
    try:
        for program in ("collect.py", "loader.py"):
            shutil.copyfile(_PROGRAMS / program, scratch / program)
        words = [
            *(root.LIBRARY, "/tmp/startup/loader.py", _PROGRAM, _FILE, agent.entry),
            ",".join(agent.packages),
        ]
        output = run([*root.interpreter(target), "/tmp/startup/collect.py", *words])
    finally:
        shutil.rmtree(scratch)
    init = tree.inside(target, INIT)
    init.unlink(missing_ok=True)
    init.write_bytes(launcher.program(_PYTHON, [_PYTHON, "-IS", _PROGRAM], "LC_ALL=C"))
    init.chmod(0o755)
    return int(output.split()[-1])
