# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shimv2.config import Config, ConfigError, apply_annotations
from shimv2.config.annotations import merge_kernel_params
from shimv2.config.resolve import host_cpus

H = "io.katacontainers.config.hypervisor."
A = "io.katacontainers.config.agent."
R = "io.katacontainers.config.runtime."


@pytest.fixture
def config(load) -> Config:
    return load('[hypervisor.qemu]\nenable_annotations = [".*"]\nkernel_params = "a=1 b=2 a=3"\n')


def test_none_of_ours_leaves_the_config_alone(config):
    others = {"io.kubernetes.cri.container-type": "sandbox", "io.katacontainers.pkg.oci.x": "y"}
    assert apply_annotations(config, others) is config
    assert apply_annotations(config, {}) is config


@pytest.mark.parametrize(
    ("name", "text", "field", "value"),
    [
        ("default_memory", "512", "default_memory", 512),
        ("default_vcpus", " 1 ", "default_vcpus", 1.0),
        ("default_max_vcpus", "1", "default_maxvcpus", 1),
        ("memory_slots", "3", "memory_slots", 3),
        ("enable_hugepages", "T", "enable_hugepages", True),
        ("reclaim_guest_freed_memory", "0", "reclaim_guest_freed_memory", False),
        ("kernel", "/boot/other", "kernel", Path("/boot/other")),
        ("machine_type", "q35", "machine_type", "q35"),
        ("machine_type", "", "machine_type", "q35"),
        ("kernel_params", "a=9 c", "kernel_params", "b=2 a=9 c"),
        ("blk_logical_sector_size", "4096", "block_device_logical_sector_size", 4096),
        ("virtio_fs_cache", "never", "virtio_fs_cache", "never"),
        ("virtio_fs_extra_args", '["-o", "x,y"]', "virtio_fs_extra_args", ("-o", "x,y")),
        ("virtio_fs_extra_args", "--a,--b", "virtio_fs_extra_args", ("--a", "--b")),
        ("guest_hook_path", "/hooks", "guest_hook_path", "/hooks"),
    ],
)
def test_hypervisor(config, name, text, field, value):
    assert getattr(apply_annotations(config, {H + name: text}).hypervisor, field) == value


def test_agent_and_runtime_are_not_gated(load):
    config = load("")
    changed = apply_annotations(
        config,
        {
            A + "kernel_modules": "e1000e EEE=1; i915 ;",
            A + "container_pipe_size": "65536",
            R + "disable_guest_seccomp": "true",
            R + "sandbox_cgroup_only": "1",
            R + "create_container_timeout": "9",
        },
    )
    assert changed.agent.kernel_modules == ("e1000e EEE=1", "i915")
    assert changed.agent.container_pipe_size == 65536
    assert changed.runtime.disable_guest_seccomp is True
    assert changed.runtime.sandbox_cgroup_only is True
    assert changed.runtime.create_container_timeout == 9
    assert config.agent.kernel_modules == ()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (H + "default_memory", "lots", r'default_memory = "lots": expected a whole number'),
        (H + "default_memory", "128", "expected at least 256 MiB"),
        (H + "default_memory", "16777216", "expected at most this host's memory"),
        (H + "default_memory", "١٢٨٠", "expected a whole number"),
        (H + "default_memory", "9" * 5000, "expected a whole number"),
        (H + "default_vcpus", "-1", "CPUs of this host"),
        (H + "default_vcpus", str(host_cpus() + 1), "CPUs of this host"),
        (H + "default_vcpus", "nan", "expected a number"),
        (H + "default_max_vcpus", "100000", "CPUs of this host"),
        (H + "enable_hugepages", "yes", "expected true or false"),
        (H + "kernel", "vmlinux", "expected an absolute path"),
        (H + "guest_hook_path", "hooks", "expected an absolute path"),
        (H + "virtio_fs_extra_args", "[1]", "expected a list of texts"),
        (H + "virtio_fs_extra_args", "[", "expected a JSON list"),
        (H + "path", "/bin/sh", "expected an existing file that valid_hypervisor_paths allows"),
        (H + "kernel_hash", "abc", "expected a SHA-512 digest"),
        (H + "cc_init_data", "x", "confidential guests are not supported"),
        (H + "kernel_verity_params", "root_hash=1", "can't do that"),
        (R + "sandbox_bind_mounts", "/etc", "can't be asked for by a pod"),
        (R + "internetworking_model", "bridge", 'expected one of "tcfilter"'),
        (R + "hypervisor_name", "clh", "the configuration is for qemu"),
        (R + "create_container_timeout", "1.5", "expected a whole number"),
        (A + "policy", "cGFja2FnZQ==", "can't do that"),
    ],
)
def test_bad_ones_name_the_annotation(config, name, text, message):
    with pytest.raises(ConfigError, match=message) as caught:
        apply_annotations(config, {name: text})
    assert name in str(caught.value) or "default_memory" in str(caught.value)
    assert len(str(caught.value)) < 500


def test_a_hypervisor_annotation_needs_a_pattern(load):
    config = load('[hypervisor.qemu]\nenable_annotations = ["^default_", "hash$"]\n')
    assert apply_annotations(config, {H + "default_memory": "300"}).hypervisor.default_memory == 300
    for name in ("kernel", "machine_type", "no_such_thing"):
        with pytest.raises(ConfigError, match=f"{H}{name}: not enabled"):
            apply_annotations(config, {H + name: "/x"})


def test_patterns_are_not_anchored(load, tmp_path):
    config = load('[hypervisor.qemu]\nenable_annotations = ["memory"]\n')
    changed = apply_annotations(config, {H + "default_memory": "300", H + "memory_slots": "2"})
    assert (changed.hypervisor.default_memory, changed.hypervisor.memory_slots) == (300, 2)


def test_a_bad_pattern_is_said(load):
    config = load('[hypervisor.qemu]\nenable_annotations = ["("]\n')
    with pytest.raises(ConfigError, match=r"enable_annotations: '\(' is no regular expression"):
        apply_annotations(config, {H + "kernel": "/x"})


def test_paths_need_a_glob_that_finds_them(load, tmp_path):
    (tmp_path / "qemu-1").touch()
    (tmp_path / "other").touch()
    config = load(
        '[hypervisor.qemu]\nenable_annotations = ["path"]\n'
        f'valid_hypervisor_paths = ["{tmp_path}/qemu-*"]\n'
    )
    good = apply_annotations(config, {H + "path": f"{tmp_path}/qemu-1"})
    assert good.hypervisor.path == tmp_path / "qemu-1"
    for bad in ("other", "qemu-2", "qemu-1/../other"):
        with pytest.raises(ConfigError, match="valid_hypervisor_paths"):
            apply_annotations(config, {H + "path": f"{tmp_path}/{bad}"})


def test_image_and_initrd_take_each_others_place(load):
    config = load('[hypervisor.qemu]\nenable_annotations = ["."]\nimage = "/i"\n')
    changed = apply_annotations(config, {H + "initrd": "/r"}).hypervisor
    assert (changed.image, changed.initrd) == (None, Path("/r"))
    with pytest.raises(ConfigError, match="expected only one"):
        apply_annotations(config, {H + "initrd": "/r", H + "image": "/i"})


def test_hashes_are_checked(load, tmp_path):
    kernel = tmp_path / "vmlinux"
    kernel.write_bytes(b"kernel")
    config = load(f'[hypervisor.qemu]\nenable_annotations = ["."]\nkernel = "{kernel}"\n')
    digest = hashlib.sha512(b"kernel").hexdigest()
    assert apply_annotations(config, {H + "kernel_hash": digest}).hypervisor.kernel == kernel
    with pytest.raises(ConfigError, match="has another digest"):
        apply_annotations(config, {H + "kernel_hash": "0" * 128})
    kernel.unlink()
    with pytest.raises(ConfigError, match="No such file"):
        apply_annotations(config, {H + "kernel_hash": digest})


def test_unknown_and_unsupported_ones_are_warned_of(config):
    changed = apply_annotations(
        config,
        {
            H + "default_memmory": "1",
            R + "foo": "1",
            "io.katacontainers.config.runtimes.x": "1",
            H + "enable_iommu": "true",
            "io.katacontainers.enable_vcpus_pinning": "true",
        },
    )
    text = "\n".join(changed.warnings)
    assert "default_memmory: unknown; did you mean default_memory?" in text
    assert "runtime.foo: unknown" in text
    assert "config.runtimes.x: unknown; did you mean runtime?" in text
    assert "enable_iommu: a key of Kata that is not supported" in text
    assert "enable_vcpus_pinning: a key of Kata that is not supported" in text


def test_applying_twice_is_the_same(config):
    asked = {H + "default_vcpus": "1", R + "sandbox_cgroup_only": "true"}
    once = apply_annotations(config, asked)
    assert apply_annotations(once, asked) == once


def test_merge_kernel_params():
    assert merge_kernel_params("", "a") == "a"
    assert merge_kernel_params("console=x quiet", "quiet console=y console=z") == (
        "quiet console=y console=z"
    )


@given(st.dictionaries(st.sampled_from(["kernel", "memory", "x", ""]), st.text(), max_size=3))
def test_any_text_is_a_config_or_a_config_error(given_texts):
    annotations = {f"{R}{name}": text for name, text in given_texts.items()}
    annotations |= {f"{A}{name}": text for name, text in given_texts.items()}
    annotations |= {
        R + "create_container_timeout": next(iter(given_texts.values()), "1"),
        A + "kernel_modules": next(iter(given_texts.values()), ""),
    }
    with contextlib.suppress(ConfigError):
        apply_annotations(Config(), annotations)
