# SPDX-License-Identifier: Apache-2.0
"""PID 1's program: the bytecode of all modules that the agent imports, in one file.

/sbin/init is a script of three lines; it unmarshals the head of `agent.bin`, which is (code of
guest/loader.py, its names), and runs it. The modules also lie in the library as files, for the
lines in tracebacks.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from guestbuild import root, tree
from guestbuild.command import run
from guestbuild.description import Agent

INIT = "/usr/sbin/init"
_FILE = f"{root.LIBRARY}/agent.bin"
_PROGRAMS = Path(__file__).parent / "guest"
_SCRIPT = """\
#!/usr/bin/python3 -IS
from marshal import loads
from posix import close, open, pread
file = open("{file}", 0)
code, names = loads(pread(file, {size}, 0))
close(file)
exec(code, {{"__name__": "init", **names}})
"""


def write(target: Path, agent: Agent) -> int:
    """Write the start file and /sbin/init into a root that has the agent compiled.

    Returns:
        How many modules are in the file.

    Raises:
        BuildError: The agent can't be imported in the guest; with the traceback.
    """
    scratch = target / "tmp/startup"
    scratch.mkdir(parents=True)
    try:
        for program in ("collect.py", "loader.py"):
            shutil.copyfile(_PROGRAMS / program, scratch / program)
        words = [
            *(root.LIBRARY, "/tmp/startup/loader.py", _FILE, agent.entry),
            ",".join(agent.packages),
        ]
        output = run([*root.interpreter(target), "/tmp/startup/collect.py", *words])
    finally:
        shutil.rmtree(scratch)
    init = tree.inside(target, INIT)
    init.unlink(missing_ok=True)
    modules, head = output.split()[-2:]
    init.write_text(_SCRIPT.format(file=_FILE, size=head))
    init.chmod(0o755)
    return int(modules)
