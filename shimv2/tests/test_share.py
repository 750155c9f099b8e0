# SPDX-License-Identifier: Apache-2.0
"""The shared directory and what of a spec's mounts goes there, with real mounts."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from shimv2 import mounts, namespaces, volumes
from shimv2.share import GUEST_DIR, Share, ShareError
from shimv2.spec import Spec


def seen(share: Share, guest_path: Path) -> Path:
    """The path that virtiofsd serves for what the guest finds at `guest_path`."""
    return share.shared_dir / guest_path.relative_to(GUEST_DIR)


def files(tmp_path: Path) -> Path:
    base = tmp_path / "host"
    (base / "dir" / "sub").mkdir(parents=True)
    (base / "dir" / "file").write_text("in dir")
    (base / "single").write_text("just me")
    (base / "neighbour").write_text("secret")
    return base


def spec_of(tmp_path: Path, *listed: tuple[str, str, str, list[str]]) -> Spec:
    entries = [
        {"destination": destination, "type": kind, "source": source, "options": options}
        for destination, kind, source, options in listed
    ]
    return Spec({"ociVersion": "1.1.0", "mounts": entries}, tmp_path)


def test_only_what_was_asked_for_is_there_and_goes_again(tmp_path: Path, isolated) -> None:
    base = files(tmp_path)
    directory = tmp_path / "sandboxes" / "sid"

    def body() -> None:
        with Share(directory) as share:
            root = share.add_rootfs("web", base / "dir")
            one = share.add_mount("web", str(base / "single"), "/etc/single")
            other = share.add_rootfs("db", base / "dir")
            assert str(root) == "/run/kata-containers/shared/containers/web/rootfs"
            assert one.name.startswith("web-")
            assert one.name.endswith("-single")
            assert len(one.name) == len("web-") + 16 + len("-single")
            assert (seen(share, root) / "file").read_text() == "in dir"
            assert seen(share, one).read_text() == "just me"
            assert set(os.listdir(share.shared_dir)) == {"web", "db", one.name}
            seen(share, one).write_text("changed")
            assert (base / "single").read_text() == "changed"
            held = (seen(share, root) / "file").open()  # as virtiofsd may
            share.remove_container("web")
            share.remove_container("web")
            assert os.listdir(share.shared_dir) == ["db"]
            assert (seen(share, other) / "file").exists()
            held.close()
        assert not directory.exists()
        assert mounts.mount_points_below(tmp_path) == []

    isolated(body)
    assert (base / "dir" / "file").exists()


def test_what_several_containers_have_is_shared_once(tmp_path: Path, isolated) -> None:
    base = files(tmp_path)

    def body() -> None:
        with Share(tmp_path / "sid") as share:
            source = str(base / "dir")
            first = share.add_mount("web", source, "/a")
            assert share.add_mount("web", source, "/b") == first
            assert share.add_mount("db", source, "/c") == first
            assert share.add_mount("db", source, "/c", readonly=True) != first
            assert share.add_mount("db", source, "/c", follow=True) != first
            mounts.mount("t", base / "dir" / "sub", "tmpfs")
            (base / "dir" / "sub" / "later").touch()
            later = share.add_mount("db", source, "/d")
            assert (seen(share, later) / "sub" / "later").exists()
            share.remove_container("web")
            assert (seen(share, first) / "file").exists()
            share.remove_container("db")
            assert os.listdir(share.shared_dir) == []
            again = share.add_mount("web", source, "/a")
            assert (seen(share, again) / "file").exists()

    isolated(body)


def test_config_maps_are_watched(tmp_path: Path, isolated) -> None:
    base = files(tmp_path)
    config = base / "kubernetes.io~configmap" / "config"
    config.mkdir(parents=True)
    (config / "key").touch()
    spec = spec_of(
        tmp_path,
        ("/config", "bind", str(config), ["rbind", "ro"]),
        ("/dir", "bind", str(base / "dir"), ["rbind"]),
    )

    def body() -> None:
        with Share(tmp_path / "sid") as share:
            result = volumes.share_mounts(spec, share, "web")
            (storage,) = result.storages
            assert storage.driver == "watchable-bind"
            assert storage.source.startswith(f"{GUEST_DIR}/web-")
            assert result.mounts[0].source == storage.mount_point
            assert result.mounts[0].options == ["rbind", "ro"]
            assert result.mounts[1].source.startswith(f"{GUEST_DIR}/")

    isolated(body)


def test_the_guest_can_create_nothing_beside_its_shares(tmp_path: Path, isolated) -> None:
    base = files(tmp_path)

    def body() -> None:
        with Share(tmp_path / "sid") as share:
            root = share.add_rootfs("web", base / "dir")
            with pytest.raises(OSError, match="Read-only"):
                (share.shared_dir / "new").touch()
            with pytest.raises(OSError, match="Read-only"):
                (share.shared_dir / "web" / "new").touch()
            (seen(share, root) / "new").touch()

    isolated(body)


def test_read_only_holds_in_mounts_below(tmp_path: Path, isolated) -> None:
    base = files(tmp_path)

    def body() -> None:
        mounts.mount("t", base / "dir" / "sub", "tmpfs")
        with Share(tmp_path / "sid") as share:
            path = seen(share, share.add_mount("web", str(base / "dir"), "/data", readonly=True))
            for target in (path / "x", path / "sub" / "x"):
                with pytest.raises(OSError, match="Read-only"):
                    target.touch()
            (base / "dir" / "sub" / "x").touch()
            assert (path / "sub" / "x").exists()

    isolated(body)


def test_later_mounts_of_the_host_appear_only_where_asked_for(tmp_path: Path, isolated) -> None:
    base = files(tmp_path)

    def body() -> None:
        with Share(tmp_path / "sid") as share:
            private = seen(share, share.add_mount("web", str(base / "dir"), "/a"))
            slave = seen(share, share.add_mount("web", str(base / "dir"), "/b", follow=True))
            mounts.mount("t", base / "dir" / "sub", "tmpfs")
            (base / "dir" / "sub" / "later").touch()
            assert not (private / "sub" / "later").exists()
            assert (slave / "sub" / "later").exists()
            share.remove_container("web")
            assert (base / "dir" / "sub" / "later").exists()  # nothing went back to the host

    isolated(body)


def test_shares_reach_a_server_with_a_namespace_of_its_own(tmp_path: Path, isolated) -> None:
    """virtiofsd unshares, makes / a slave, and binds the directory it serves."""
    base = files(tmp_path)

    def body() -> None:
        with Share(tmp_path / "sid") as share:
            to_child, to_parent = os.pipe(), os.pipe()
            pid = os.fork()
            if pid == 0:
                os.close(to_child[1])
                namespaces.unshare(namespaces.CLONE_NEWNS)
                mounts.set_propagation("/", mounts.MS_REC | mounts.MS_SLAVE)
                mounts.mount(
                    str(share.shared_dir),
                    share.shared_dir,
                    None,
                    mounts.MS_BIND | mounts.MS_REC,
                )
                os.chdir(share.shared_dir)
                os.write(to_parent[1], b"1")
                while name := os.read(to_child[0], 200):
                    found = os.path.exists(name)
                    try:
                        with open(name.decode() + "/write", "w"):
                            writable = True
                    except OSError:
                        writable = False
                    os.write(to_parent[1], f"{found:d}{writable:d}".encode())
                os._exit(0)
            os.close(to_child[0])
            os.read(to_parent[0], 1)

            def ask(path: Path) -> bytes:
                os.write(to_child[1], str(path.relative_to(GUEST_DIR)).encode())
                return os.read(to_parent[0], 2)

            root = share.add_rootfs("web", base / "dir")
            readonly = share.add_mount("web", str(base / "dir"), "/d", readonly=True)
            assert ask(root) == b"11"
            assert ask(readonly) == b"10"
            share.remove_container("web")
            assert ask(root) == b"00"
            os.close(to_child[1])
            assert os.waitpid(pid, 0)[1] == 0

    isolated(body)


def test_what_cannot_be_shared_is_named(tmp_path: Path, isolated) -> None:
    def body() -> None:
        with Share(tmp_path / "sid") as share:
            with pytest.raises(ShareError, match="/no/such"):
                share.add_mount("web", "/no/such", "/x")
            with pytest.raises(ShareError, match="not a directory"):
                share.add_rootfs("web", tmp_path / "nothing")
            share.add_mount("web", str(tmp_path), "/" + "n" * 250)  # a name that just fits
            share.add_mount("web", str(tmp_path), "/")

    isolated(body)


def test_mounts_of_a_spec(tmp_path: Path, isolated) -> None:
    base = files(tmp_path)
    empty = tmp_path / "volumes" / "kubernetes.io~empty-dir" / "cache"
    empty.mkdir(parents=True)

    def body() -> None:
        mounts.mount("tmpfs", empty, "tmpfs", 0, "size=3m")
        os.chown(empty, 0, 4321)
        spec = spec_of(
            tmp_path,
            ("/proc", "proc", "proc", []),
            ("/sys", "sysfs", "sysfs", ["ro"]),
            ("/hostproc", "bind", "/proc", ["rbind"]),
            ("/dev/shm", "bind", str(base / "dir"), ["rbind", "ro"]),
            ("/dev/null2", "bind", "/dev/null", ["rbind"]),
            ("/hostdev", "bind", "/dev/", ["rbind"]),
            ("/data", "bind", str(base / "dir"), ["rbind", "ro"]),
            ("/etc/one", "none", "host/single", ["bind"]),
            ("/cache", "bind", str(empty), ["rbind"]),
        )
        with Share(tmp_path / "sid") as share:
            result = volumes.share_mounts(spec, share, "web")
            by_destination = {m.destination: m for m in result.mounts}
            assert by_destination["/proc"].source == "proc"
            assert by_destination["/hostproc"].source == "/proc"
            shm = by_destination["/dev/shm"]
            assert (shm.source, shm.options) == (volumes.SHM_DIR, ["rbind"])
            assert [text.split(":")[0] for text in result.skipped] == ["/dev/null2", "/hostdev"]
            data = by_destination["/data"]
            assert data.options == ["rbind", "ro"]
            assert (seen(share, Path(data.source)) / "file").exists()
            with pytest.raises(OSError, match="Read-only"):
                (seen(share, Path(data.source)) / "x").touch()
            assert seen(share, Path(by_destination["/etc/one"].source)).read_text() == "just me"
            (storage,) = result.storages
            assert storage.driver == "ephemeral"
            assert list(storage.options) == ["fsgid=4321", f"size={3 << 20}"]
            assert by_destination["/cache"].source == storage.mount_point
            assert len(os.listdir(share.shared_dir)) == 2

    isolated(body)


def test_whose_dev_shm_it_is(tmp_path: Path, isolated) -> None:
    large = tmp_path / "volumes/kubernetes.io~empty-dir/shm"
    large.mkdir(parents=True)

    def body() -> None:
        mounts.mount("tmpfs", large, "tmpfs", 0, "size=9m")
        with Share(tmp_path / "sid") as share:

            def shm(kind: str, source: str, ipc: dict[str, str] | None = None) -> str:
                options = ["rbind"] if kind == "bind" else []
                spec = spec_of(tmp_path, ("/dev/shm", kind, source, options))
                spec.namespaces.update(ipc or {})
                (mount,) = volumes.share_mounts(spec, share, "web").mounts
                return mount.source

            assert shm("bind", "/dev/shm") == volumes.SHM_DIR, "of the engine"
            assert shm("bind", str(large)) == f"{volumes.EPHEMERAL_DIR}/shm", "of a user"
            assert shm("tmpfs", "shm", {"ipc": "/proc/1/ns/ipc"}) == volumes.SHM_DIR, "of the pod"
            assert shm("tmpfs", "shm", {"ipc": ""}) == "shm", "of the container"
            assert shm("tmpfs", "shm") == "shm"

    isolated(body)


def test_a_missing_source_undoes_the_others(tmp_path: Path, isolated) -> None:
    base = files(tmp_path)

    def body() -> None:
        spec = spec_of(
            tmp_path,
            ("/data", "bind", str(base / "dir"), ["rbind"]),
            ("/more", "bind", "/no/such", ["rbind"]),
        )
        with Share(tmp_path / "sid") as share:
            with pytest.raises(ShareError, match="/no/such"):
                volumes.share_mounts(spec, share, "web")
            assert os.listdir(share.shared_dir) == []

    isolated(body)


def test_storages_of_the_sandbox(tmp_path: Path, isolated) -> None:
    (tmp_path / "shm").mkdir()
    (tmp_path / "resolv.conf").write_text("nameserver 10.0.0.1\n\nsearch a b\n")

    def body() -> None:
        mounts.mount("shm", tmp_path / "shm", "tmpfs", 0, "size=7m")
        spec = spec_of(
            tmp_path,
            ("/dev/shm", "bind", str(tmp_path / "shm"), ["rbind"]),
            ("/etc/resolv.conf", "bind", str(tmp_path / "resolv.conf"), ["rbind", "ro"]),
        )
        share, shm = volumes.sandbox_storages(spec)
        assert volumes.sandbox_storages(spec, share=False) == [shm]
        assert (share.driver, share.source, share.fstype) == ("virtio-fs", "kataShared", "virtiofs")
        assert share.mount_point == "/run/kata-containers/shared/containers/"
        assert f"size={7 << 20}" in shm.options
        assert volumes.dns_lines(spec) == ["nameserver 10.0.0.1", "search a b"]
        assert f"size={64 << 20}" in volumes.sandbox_storages(None)[1].options
        assert volumes.dns_lines(spec_of(tmp_path)) == []

    isolated(body)
