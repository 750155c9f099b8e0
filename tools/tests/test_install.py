# SPDX-License-Identifier: Apache-2.0
"""`tools/install.py` as `make install` calls it, with the dependencies of this environment."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

TREE = Path(__file__).parents[2]
Run = Callable[..., subprocess.CompletedProcess[str]]

sys.path.insert(0, str(TREE / "tools"))
import install as installer  # noqa: E402

sys.path.pop(0)


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A build directory whose dependencies are there already: no package index is asked."""
    build = tmp_path_factory.mktemp("build")
    source = Path(sysconfig.get_path("purelib"))
    made = build / "deps" / installer.dependencies_name("/usr/bin/python3")
    made.mkdir(parents=True)
    for name in ("trio", "attr", "attrs", "idna", "outcome", "sniffio", "sortedcontainers", "h11"):
        if (source / name).exists():
            shutil.copytree(source / name, made / name)
    shutil.copytree(source / "google", made / "google")
    return build


@pytest.fixture
def run(tmp_path: Path, build: Path) -> Run:
    """Call the installer with a prefix and a guest of this test."""
    guest = tmp_path / "guest"
    guest.mkdir()
    (guest / "vmlinux").write_text("kernel")
    (guest / "kata-containers.img").write_text("image")

    def call(action: str, *more: str, prefix: Path | None = None, check: bool = True):
        command = ["/usr/bin/python3", "-I", str(TREE / "tools/install.py"), action]
        command += ["--prefix", str(prefix or tmp_path / "prefix"), "--build", str(build)]
        command += ["--guest", str(guest), *more]
        return subprocess.run(command, capture_output=True, text=True, check=check)

    return call


def names(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*")}


def test_install_run_and_uninstall(run, tmp_path):
    prefix = tmp_path / "prefix"
    run("install")
    shim = subprocess.run(
        [prefix / "bin/containerd-shim-kata-v2", "-v"], capture_output=True, text=True, check=True
    )
    assert "Version" in shim.stdout
    env = subprocess.run(
        [prefix / "bin/kata-runtime", "env"], capture_output=True, text=True, check=True
    )
    tables = tomllib.loads(env.stdout)
    share = prefix / "share/kata-containers"
    assert tables["Kernel"]["Path"] == str(share / "vmlinux.container")
    assert tables["Image"] == {"Path": str(share / "kata-containers.img"), "RootfsType": "erofs"}
    assert tables["Runtime"]["Path"] == str(prefix / "bin/containerd-shim-kata-v2")
    assert (share / "vmlinux.container").read_text() == "kernel"
    installed = names(prefix)
    assert not [name for name in installed if "/tests" in name or name.endswith((".proto", ".pyi"))]
    assert not [name for name in installed if name.startswith("lib/pykata/agent/main")]
    run("uninstall")
    assert not prefix.exists()


def test_every_installed_module_imports_from_what_is_installed(run, tmp_path):
    run("install")
    lib = tmp_path / "prefix/lib/pykata"
    code = (
        "import importlib, pathlib, sys\n"
        "lib = pathlib.Path(sys.argv[1]); sys.path.append(str(lib))\n"
        "for room in ('ttrpc', 'vmm', 'agent', 'shimv2'):\n"
        "    for file in sorted(lib.joinpath(room).rglob('*.py')):\n"
        "        name = '.'.join(file.relative_to(lib).with_suffix('').parts)\n"
        "        if not name.endswith('__main__'):\n"
        "            importlib.import_module(name.removesuffix('.__init__'))\n"
        "print(*(m.__file__ for m in list(sys.modules.values()) if getattr(m, '__file__', None)))\n"
    )
    done = subprocess.run(
        ["/usr/bin/python3", "-IS", "-c", code, str(lib)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert not [file for file in done.stdout.split() if file.startswith(str(TREE))]


def test_the_bytecode_is_there_and_current(run, tmp_path):
    run("install")
    lib = tmp_path / "prefix/lib/pykata"
    before = names(lib)
    subprocess.run(
        [tmp_path / "prefix/bin/kata-runtime", "--version"], check=True, capture_output=True
    )
    assert names(lib) == before
    sources = {name for name in before if name.endswith(".py")}
    assert len([name for name in before if name.endswith(".pyc")]) == len(sources)


def test_destdir_is_only_where_it_goes_for_now(run, tmp_path):
    stage = tmp_path / "stage"
    run("install", "--destdir", str(stage), prefix=Path("/opt/py kata"))
    assert "'/opt/py kata/lib/pykata'" in (stage / "opt/py kata/bin/kata-runtime").read_text()
    text = (stage / "opt/py kata/share/defaults/kata-containers/configuration.toml").read_text()
    kernel = tomllib.loads(text)["hypervisor"]["qemu"]["kernel"]
    assert kernel == "/opt/py kata/share/kata-containers/vmlinux.container"
    assert str(stage) not in text
    run("uninstall", "--destdir", str(stage), prefix=Path("/opt/py kata"))
    assert names(tmp_path / "stage") == set()


def test_a_second_install_replaces_and_forgets_nothing(run, tmp_path):
    run("install")
    (tmp_path / "guest/kata-containers.json").write_text("{}")
    (tmp_path / "guest/kata-containers.img").unlink()
    (tmp_path / "guest/kata-containers-initrd.img").write_text("initrd")
    run("install")
    share = tmp_path / "prefix/share"
    assert names(share / "kata-containers") == {
        "vmlinux.container",
        "kata-containers-initrd.img",
        "kata-containers.json",
    }
    config = tomllib.loads((share / "defaults/kata-containers/configuration.toml").read_text())
    assert "image" not in config["hypervisor"]["qemu"]
    assert config["hypervisor"]["qemu"]["initrd"].endswith("kata-containers-initrd.img")
    run("uninstall")
    assert not (tmp_path / "prefix").exists()


def test_files_of_others_stay(run, tmp_path):
    prefix = tmp_path / "prefix"
    (prefix / "bin").mkdir(parents=True)
    (prefix / "bin/other").write_text("theirs")
    run("install")
    run("uninstall")
    assert names(prefix) == {"bin", "bin/other"}
    (prefix / "bin/kata-runtime").write_text("theirs")
    done = run("install", check=False)
    assert done.returncode == 1
    assert "bin/kata-runtime is there and was not put there" in done.stderr
    assert (prefix / "bin/kata-runtime").read_text() == "theirs"


def test_an_edited_configuration_stays(run, tmp_path):
    run("install")
    directory = tmp_path / "prefix/share/defaults/kata-containers"
    edited = directory / "configuration.toml"
    edited.write_text("# mine\n")
    assert "was edited" in run("install").stdout or (directory / "configuration.toml.new").exists()
    assert edited.read_text() == "# mine\n"
    run("uninstall")
    assert names(directory) == {"configuration.toml"}
    run("install")
    assert edited.read_text() == "# mine\n"


def test_uninstall_of_nothing(run):
    assert "nothing is installed" in run("uninstall").stdout


def test_a_relative_prefix_is_refused(run):
    done = run("install", prefix=Path("here"), check=False)
    assert done.returncode == 2
    assert "not an absolute path" in done.stderr
