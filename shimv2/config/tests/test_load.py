# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import importlib.util
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest

from shimv2.config import Config, ConfigError, load_config, locate
from shimv2.config.resolve import host_cpus, host_memory_mib

_spec = importlib.util.spec_from_file_location("samples", Path(__file__).with_name("samples.py"))
assert _spec and _spec.loader
samples = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(samples)


def test_kata_go_file_loads_without_a_word(load):
    config = load(samples.GO_QEMU)
    assert config.warnings == ()
    assert config.hypervisor.kernel == Path("/usr/share/kata-containers/vmlinux.container")
    assert config.hypervisor.rootfs_type == "ext4"
    assert config.hypervisor.virtio_fs_extra_args[0] == "--thread-pool-size=1"
    assert config.hypervisor.firmware is None
    assert config.hypervisor.initrd is None
    assert config.agent.dial_timeout == 45
    assert config.runtime.disable_guest_seccomp is True


def test_kata_rust_file_loads(load):
    config = load(samples.RUST_QEMU)
    assert config.hypervisor.name == "qemu"
    assert config.hypervisor.block_device_driver == "virtio-blk"
    assert config.runtime.create_container_timeout == 30
    assert config.runtime.sandbox_cgroup_only is True
    assert all("overhead_" in text or "static_" in text for text in config.warnings)


def test_config_is_frozen(load):
    config = load("")
    with pytest.raises(FrozenInstanceError):
        config.hypervisor.default_memory = 1
    with pytest.raises(FrozenInstanceError):
        config.source = None


def test_no_file_at_all_gives_defaults_and_says_where_it_looked(monkeypatch, tmp_path):
    monkeypatch.setattr(locate, "default_paths", lambda prefix: [tmp_path / "none.toml"])
    config = load_config(None, {})
    assert config.source is None
    assert str(tmp_path / "none.toml") in config.warnings[0]
    assert config.hypervisor.default_memory == 2048
    assert config.hypervisor.rootfs_type == "erofs"


def test_order_of_the_places(monkeypatch, tmp_path):
    files = {}
    for name in ("options", "env", "etc", "share"):
        files[name] = tmp_path / f"{name}.toml"
        files[name].write_text("")
    monkeypatch.setattr(locate, "default_paths", lambda prefix: [files["etc"], files["share"]])
    env = {"KATA_CONF_FILE": str(files["env"])}
    assert load_config(files["options"], env).source == files["options"]
    assert load_config(None, env).source == files["env"]
    assert load_config(None, {}).source == files["etc"]
    files["etc"].unlink()
    assert load_config(None, {}).source == files["share"]


def test_default_paths():
    paths = [str(path) for path in locate.default_paths(Path("/usr/local"))]
    assert paths[0] == "/etc/kata-containers/configuration.toml"
    assert paths[1] == "/etc/kata-containers/runtime-rs/configuration.toml"
    assert paths[2] == "/usr/local/share/defaults/kata-containers/configuration.toml"
    assert paths[-2] == "/opt/kata/share/defaults/kata-containers/configuration.toml"
    assert len(set(paths)) == len(paths) == 8


def test_installed_prefix():
    module = Path("/usr/local/lib/pykata/shimv2/config/locate.py")
    assert locate.installed_prefix(module) == Path("/usr/local")
    assert locate.installed_prefix(Path("/src/tree/shimv2/config/locate.py")) is None


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("/nowhere/configuration.toml", "No such file"),
        ("configuration.toml", "not an absolute path"),
        ("/dev/null", "not a regular file"),
        ("/" + "x" * 300, "name too long"),
    ],
)
def test_a_given_path_that_is_not_there_is_an_error(path, reason):
    with pytest.raises(ConfigError, match=f"given by the runtime options.*{reason}"):
        load_config(Path(path), {})
    with pytest.raises(ConfigError, match=f"given by KATA_CONF_FILE.*{reason}"):
        load_config(None, {"KATA_CONF_FILE": path})


def test_drop_ins_merge_in_name_order_beside_the_resolved_file(tmp_path):
    real = tmp_path / "real"
    (real / "config.d").mkdir(parents=True)
    (real / "configuration-qemu.toml").write_text(
        '[hypervisor.qemu]\ndefault_memory = 512\nkernel_params = "a"\n'
        'virtio_fs_extra_args = ["--a", "--b"]\n'
    )
    (real / "config.d/10-first.toml").write_text(
        '[hypervisor.qemu]\ndefault_memory = 600\nvirtio_fs_extra_args = ["--c"]\n'
    )
    (real / "config.d/20-second").write_text("[hypervisor.qemu]\ndefault_memory = 700\n")
    (real / "config.d/.hidden.swp").write_text("not TOML [")
    (real / "config.d/20-second~").write_text("not TOML [")
    link = tmp_path / "configuration.toml"
    link.symlink_to(real / "configuration-qemu.toml")
    config = load_config(link, {})
    assert config.hypervisor.default_memory == 700
    assert config.hypervisor.kernel_params == "a"
    assert config.hypervisor.virtio_fs_extra_args == ("--c",)
    assert config.source == real / "configuration-qemu.toml"
    assert [path.name for path in config.drop_ins] == ["10-first.toml", "20-second"]


def test_a_directory_among_the_drop_ins_is_an_error(load, tmp_path):
    (tmp_path / "config.d/sub").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"config\.d/sub: drop-ins must be regular files"):
        load("")


def test_an_error_names_the_file_the_value_came_from(load):
    with pytest.raises(
        ConfigError,
        match=r'config\.d/b\.toml: hypervisor\.qemu\.default_memory = "lots": '
        r"expected a whole number from 0 to \d+ MiB",
    ):
        load("[hypervisor.qemu]\n", b_toml='[hypervisor.qemu]\ndefault_memory = "lots"\n')


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("enable_debug = 1", "enable_debug = 1: expected true or false"),
        ("default_memory = true", "default_memory = true: expected a whole number"),
        ("default_memory = 2048.0", "default_memory = 2048.0: expected a whole number"),
        ("default_memory = -5", "default_memory = -5: expected a whole number from 0"),
        ("default_memory = 999999999999", "expected a whole number from 0 to 16777216 MiB"),
        ("default_memory = 16777216", "expected at most this host's memory"),
        ("default_memory = 32", "default_memory = 32: expected at least 64 MiB"),
        ('default_vcpus = "two"', 'default_vcpus = "two": expected a number'),
        ("default_vcpus = nan", "default_vcpus = nan: expected a number"),
        ("default_vcpus = inf", "default_vcpus = inf: expected a number of sensible size"),
        ("default_maxvcpus = -1", "default_maxvcpus = -1: expected"),
        ("memory_slots = 256", "memory_slots = 256: expected a whole number from 0 to 255"),
        ("default_bridges = 6", "default_bridges = 6: expected a whole number from 0 to 5"),
        ('kernel = "vmlinux"', 'kernel = "vmlinux": expected an absolute path'),
        ("kernel = []", "kernel = .*: expected a text"),
        ('kernel_params = ["a"]', "kernel_params = .*: expected a text"),
        ('kernel_params = "a\\u0000b"', "expected a text without NUL"),
        ('virtio_fs_extra_args = "--x"', "expected a list of texts"),
        ("enable_annotations = [1]", "expected a list of texts"),
        ('guest_extension_images = ["a"]', "expected a list of tables"),
        ('rootfs_type = "btrfs"', 'rootfs_type = "btrfs": expected one of "ext4", "xfs", "erofs"'),
        ('machine_type = "vax"', 'machine_type = "vax": expected one of "q35"'),
        (
            'machine_type = "microvm"',
            'machine_type = "microvm": Kata knows it, this runtime has only',
        ),
        ('machine_type = "virt"', 'machine_type = "virt": Kata knows it, this runtime has only'),
        ('shared_fs = "virtio-9p"', "Kata knows it, this runtime has only"),
        ('accelerator = "hvf"', 'accelerator = "hvf": expected one of "auto", "kvm", "tcg"'),
        ('vsock = "x"', 'vsock = "x": expected one of "auto", "vhost"'),
        ("block_device_logical_sector_size = 1000", "expected a power of two"),
        ('image = "/a"\ninitrd = "/b"', "image and initrd: expected only one"),
        ('initrd = "/a"\nmodules_initrd = "/b"', "initrd and modules_initrd: expected only one"),
        ("[hypervisor.qemu.kernel]", "kernel = {}: expected a text"),
        ("confidential_guest = true", "confidential_guest = true: this runtime can't do that"),
        ("rootless = true", "rootless = true: this runtime can't do that"),
        ('hot_plug_vfio = "root-port"\ncold_plug_vfio = "root-port"', "expected only one of"),
    ],
)
def test_bad_values(load, line, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load(f"[hypervisor.qemu]\n{line}\n")
    assert "configuration.toml: hypervisor.qemu" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[hypervisor.qemu", "configuration.toml: not valid TOML: "),
        ("hypervisor = 3", r"hypervisor: expected a section \[hypervisor\]"),
        ("[hypervisor]\nqemu = 3", r"expected a section \[hypervisor\.qemu\]"),
        ("[hypervisor.vmware]", r"hypervisor\.vmware: no such hypervisor; expected one of qemu"),
        ("[hypervisor.qemu]\n[hypervisor.clh]", "hypervisor_name must say which one"),
        ('[hypervisor.clh]\n[runtime]\nhypervisor_name="qemu"', "there is no section"),
        ('[runtime]\nhypervisor_name="bhyve"', '"bhyve": expected one of qemu'),
        ("[agent.other]", r"agent\.other: expected a section \[agent\.kata\]"),
        ("[agent.kata]\ndial_timeout = -1", r"agent\.kata\.dial_timeout = -1: expected"),
        ("[runtime]\ndisable_new_netns = true", "expected together with internetworking_model"),
        ('[runtime]\nemptydir_mode = "block-plain"', "Kata knows it"),
        ('[agent.kata]\npolicy = "package p"', "policy = .*can't do that"),
    ],
)
def test_bad_files(load, text, message):
    with pytest.raises(ConfigError, match=message):
        load(text)


def test_not_text_and_too_long(tmp_path):
    file = tmp_path / "configuration.toml"
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not UTF-8 text"):
        load_config(file, {})
    file.write_bytes(b"#" * (1 << 20) + b"\n")
    with pytest.raises(ConfigError, match="longer than 1 MiB"):
        load_config(file, {})


def test_unknown_keys_are_warned_of_with_the_nearest_name(load):
    config = load(
        "[hypervisor.qemu]\ndefault_memroy = 1\n[runtimes]\nx = 1\n[netmon]\n[agent.kata]\nzzz = 1\n"
    )
    text = "\n".join(config.warnings)
    assert "hypervisor.qemu.default_memroy: unknown key; did you mean default_memory?" in text
    assert "runtimes: unknown section; did you mean runtime?" in text
    assert "[netmon]: Kata no longer reads this section" in text
    assert "agent.kata.zzz: unknown key\n" in text + "\n"


def test_known_but_unsupported_says_so_once_and_only_if_asked_for(load):
    config = load("[hypervisor.qemu]\nenable_iommu = true\nenable_numa = false\n")
    assert len(config.warnings) == 1
    assert "hypervisor.qemu.enable_iommu: a key of Kata that is not supported" in config.warnings[0]


def test_a_key_of_another_vmm_says_so(load):
    config = load('[hypervisor.qemu]\njailer_path = "/usr/bin/jailer"\n')
    assert "jailer_path: has no effect with this hypervisor" in config.warnings[0]


def test_sections_of_other_hypervisors(load):
    config = load('[hypervisor.qemu]\n[hypervisor.clh]\n[runtime]\nhypervisor_name = "clh"\n')
    assert config.hypervisor.name == "clh"


def test_sizes_that_depend_on_the_host(load):
    cpus, memory = host_cpus(), host_memory_mib()
    vm = load("[hypervisor.qemu]\ndefault_vcpus = -1\ndefault_memory = 0\n").hypervisor
    assert vm.default_vcpus == cpus
    assert vm.default_maxvcpus == min(cpus, 240)
    assert (vm.default_memory, vm.default_maxmemory) == (2048, memory)
    vm = load("[hypervisor.qemu]\ndefault_vcpus = 0\ndefault_maxvcpus = 100000\n").hypervisor
    assert vm.default_vcpus == 1
    assert vm.default_maxvcpus == min(cpus, 240)
    vm = load("[hypervisor.qemu]\ndefault_vcpus = 1.5\ndefault_maxvcpus = 1\n").hypervisor
    assert vm.default_maxvcpus == 2
    vm = load("[hypervisor.qemu]\ndefault_maxmemory = 1000\n").hypervisor
    assert vm.default_maxmemory == 2048


def test_own_keys(load):
    vm = load('[hypervisor.qemu]\naccelerator = "tcg"\nvsock = "vhost-user"\n').hypervisor
    assert (vm.accelerator, vm.vsock) == ("tcg", "vhost-user")
    assert (load("").hypervisor.accelerator, load("").hypervisor.vsock) == ("auto", "auto")


def test_the_rust_runtimes_log_levels(load):
    config = load('[runtime]\nlog_level = "debug"\n[agent.kata]\nlog_level = "trace"\n')
    assert config.runtime.enable_debug is True
    assert config.agent.enable_debug is True


def test_old_spellings(load):
    vm = load('[hypervisor.qemu]\nvirtio_fs_cache = "none"\n').hypervisor
    assert vm.virtio_fs_cache == "never"


def test_tables_as_values(load):
    config = load(
        '[[hypervisor.qemu.guest_extension_images]]\nname = "x"\npath = "/x"\n'
        '[[runtime.shared_mounts]]\nname = "a"\n'
    )
    assert config.hypervisor.guest_extension_images[0]["name"] == "x"
    assert config.runtime.shared_mounts[0]["name"] == "a"
    with pytest.raises(ConfigError, match="rootless_user"):
        load("[hypervisor.qemu.rootless_user]\nuid = 5\ngroups = [1]\n")


def test_loading_imports_no_difflib_unless_there_is_something_to_say(load, tmp_path):
    import subprocess
    import sys

    load("[hypervisor.qemu]\n")
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path\nfrom shimv2.config import load_config\n"
        "load_config(Path(sys.argv[2]), {})\n"
        "print(sorted({'difflib', 'trio', 'google.protobuf', 'json'} & set(sys.modules)))\n"
    )
    tree = Path(__file__).parents[3]
    out = subprocess.run(
        [sys.executable, "-IS", "-c", code, str(tree), str(tmp_path / "configuration.toml")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert out.stdout.strip() == "[]"


def test_every_field_has_its_facts():
    from shimv2.config.agent import MemAgentConfig
    from shimv2.config.keys import keys_of

    config = Config()
    kinds = set()
    for section in (
        *(type(part) for part in (config.hypervisor, config.agent, config.runtime, config.factory)),
        MemAgentConfig,
    ):
        for item, key in keys_of(section):
            kinds.add(str(item.type))
            assert key.doc, item.name
            if str(item.type) in ("int", "int | None"):
                assert key.low is not None and key.high is not None, item.name
            if key.choices and isinstance(item.default, str) and item.default:
                assert item.default in key.choices, item.name
    assert kinds == {
        "bool",
        "int",
        "int | None",
        "float",
        "str",
        "Path",
        "Path | None",
        "tuple[str, ...]",
        "tuple[Mapping[str, Any], ...]",
        "Mapping[str, Any] | None",
    }
