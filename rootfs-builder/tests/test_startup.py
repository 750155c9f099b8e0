# SPDX-License-Identifier: Apache-2.0
"""The start file, made and run by this host's Python instead of the guest's."""

from __future__ import annotations

import compileall
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from guestbuild import launcher

PROGRAMS = Path(__file__).resolve().parent.parent / "guestbuild/guest"
MAIN = """\
import app.used
import json
def main():
    import app.later
    print(app.used.NAME, app.later.NAME, app.used.__file__, sorted(app.__path__))
    print(json.dumps([1]))
"""
FILES = {
    "app/__init__.py": "",
    "app/main.py": MAIN,
    "app/used.py": "NAME = 'used'\n",
    "app/later.py": "NAME = 'later'\n",
    "app/hostonly.py": "import a_module_that_is_nowhere\n",
}


def collect(tmp_path: Path, *, entry: str = "app.main:main", main: str = MAIN) -> Path:
    library = tmp_path / "library"
    for name, text in (FILES | {"app/main.py": main}).items():
        path = library / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    compileall.compile_dir(library, quiet=1)
    words = [
        library,
        PROGRAMS / "loader.py",
        tmp_path / "init.pyc",
        tmp_path / "agent.bin",
        entry,
        "app",
    ]
    python = [sys.executable, "-sSP", PROGRAMS / "collect.py"]
    subprocess.run([*python, *map(str, words)], check=True, capture_output=True)
    return tmp_path / "init.pyc"


def start(file: Path) -> str:
    init = file.with_name("init")
    init.write_bytes(
        launcher.program(sys.executable, [sys.executable, "-IS", str(file)], "LC_ALL=C")
    )
    init.chmod(0o755)
    result = subprocess.run([init], capture_output=True, text=True, check=False)
    return result.stdout + result.stderr


def test_the_agent_runs_out_of_the_file(tmp_path: Path) -> None:
    file = collect(tmp_path)
    origin = tmp_path / "library/app/used.py"
    shutil.rmtree(tmp_path / "library")
    assert start(file).splitlines() == [
        f"used later {origin} ['{origin.parent}']",
        "[1]",
    ]


def test_what_is_not_in_the_file_is_found_in_the_library(tmp_path: Path) -> None:
    main = "def main():\n    import app.new\n    1 / 0\n"
    file = collect(tmp_path, main=main)
    (tmp_path / "library/app/new.py").write_text("print('new')\n")
    output = start(file)
    assert output.startswith("new\n")
    assert f'File "{tmp_path}/library/app/main.py", line 3, in main' in output
    assert "1 / 0" in output, "a traceback shows the sources"


def test_the_file_is_the_same_each_time(tmp_path: Path) -> None:
    file = collect(tmp_path)
    results = [file, file.with_name("agent.bin")]
    first = [result.read_bytes() for result in results]
    for result in results:
        result.unlink()
    collect(tmp_path)
    assert [result.read_bytes() for result in results] == first


def test_an_agent_that_does_not_import_fails_the_build(tmp_path: Path) -> None:
    with pytest.raises(subprocess.CalledProcessError) as caught:
        collect(tmp_path, entry="app.nowhere:main")
    assert b"No module named 'app.nowhere'" in caught.value.stderr


def test_source_is_compiled_only_when_the_image_is_built(tmp_path: Path) -> None:
    main = (
        "def main():\n"
        "    import sys\n"
        "    sys.addaudithook(lambda event, _: event == 'compile' and print('compiles'))\n"
        "    import app.used\n"
        "    compile('1', '', 'eval')\n"
        "    print(app.used.NAME, sys.flags.utf8_mode, sys.getfilesystemencoding())\n"
    )
    assert start(collect(tmp_path, main=main)).splitlines() == ["compiles", "used 1 utf-8"]
