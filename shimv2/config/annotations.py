# SPDX-License-Identifier: Apache-2.0
"""``io.katacontainers.config.*``: what a pod may change of its own sandbox.

Annotations of the hypervisor can point the VMM anywhere on the host, so each needs a pattern
in ``enable_annotations``; those that name a program or a host file also need a glob in the
matching ``valid_*`` key.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Mapping
from dataclasses import Field, replace
from pathlib import Path
from typing import Any

from . import locate
from .agent import AgentConfig
from .errors import ConfigError
from .hypervisor import MAX_VCPUS, HypervisorConfig
from .keys import Key, Section, annotation_name, keys_of
from .load import HYPERVISORS, check_support, nearest
from .model import Config
from .resolve import host_cpus, resolve
from .runtime import RuntimeConfig
from .values import bad, from_text

PREFIX = "io.katacontainers.config."
PINNING = "io.katacontainers.enable_vcpus_pinning"  # the Go runtime's name for it
MIN_MEMORY_MIB = 256
HASHES = {
    "kernel_hash": "kernel",
    "image_hash": "image",
    "initrd_hash": "initrd",
    "firmware_hash": "firmware",
    "hypervisor_hash": "path",
    "path_hash": "path",
    "jailer_hash": "jailer_path",
}
REFUSED = {
    "hypervisor.cc_init_data": "confidential guests are not supported",
    "hypervisor.firmware_volume_hash": "split firmware is not supported",
    "runtime.sandbox_bind_mounts": "host paths can't be asked for by a pod",
}
SECTIONS: Mapping[str, type[Section]] = {
    "hypervisor": HypervisorConfig,
    "agent": AgentConfig,
    "runtime": RuntimeConfig,
}


def apply_annotations(config: Config, annotations: Mapping[str, str]) -> Config:
    """The configuration of one sandbox, from that of the node and its OCI annotations.

    Raises:
        ConfigError: names an annotation that is not enabled, malformed, or not allowed its path.
    """
    asked = sorted(name for name in annotations if name.startswith(PREFIX) or name == PINNING)
    if not asked:
        return config
    warnings: list[str] = []
    changed: dict[str, dict[str, Any]] = {name: {} for name in SECTIONS}
    for name in asked:
        section, _, base = name.removeprefix(PREFIX).partition(".")
        if name == PINNING:
            section, base = "runtime", "enable_vcpus_pinning"
        if section not in SECTIONS:
            warnings.append(f"annotation {name}: unknown{nearest(section, SECTIONS)}")
            continue
        _one(config, section, base, name, annotations[name], changed[section], warnings)
    hypervisor = changed["hypervisor"]
    hashes = {name: hypervisor.pop(name) for name in HASHES if name in hypervisor}
    _exclusive(hypervisor)
    result = replace(
        config,
        hypervisor=replace(config.hypervisor, **hypervisor),
        agent=replace(config.agent, **changed["agent"]),
        runtime=replace(config.runtime, **changed["runtime"]),
        warnings=(*config.warnings, *warnings),
    )
    if result.runtime.hypervisor_name not in ("", result.hypervisor.name):
        raise ConfigError(
            f"annotation {PREFIX}runtime.hypervisor_name = {result.runtime.hypervisor_name!r}: "
            f"the configuration is for {result.hypervisor.name}"
        )
    result = resolve(result, locate.installed_prefix())
    for name, digest in hashes.items():
        _check_hash(result.hypervisor, name, digest)
    return result


def _one(
    config: Config,
    section: str,
    base: str,
    name: str,
    text: str,
    changed: dict[str, Any],
    warnings: list[str],
) -> None:
    where = f"annotation {name}"
    if section == "hypervisor" and not _enabled(config.hypervisor, base):
        raise ConfigError(
            f"{where}: not enabled; hypervisor.{config.hypervisor.name}.enable_annotations "
            "has no pattern for it"
        )
    if f"{section}.{base}" in REFUSED:
        raise ConfigError(f"{where}: {REFUSED[f'{section}.{base}']}")
    if section == "hypervisor" and base in HASHES:
        changed[base] = _hash_text(text, where)
        return
    found = _field(section, base)
    if found is None:
        names = filter(None, (annotation_name(*pair) for pair in keys_of(SECTIONS[section])))
        warnings.append(f"{where}: unknown{nearest(base, names)}")
        return
    item, known = found
    if not text.strip() and str(item.type) in ("str", "Path", "Path | None"):
        return  # as in Kata, an empty text changes nothing
    value = from_text(item, known, text, where)
    _strict(item, value, where)
    if known.allowed_by:
        _allowed(getattr(config.hypervisor, known.allowed_by), known.allowed_by, value, where)
    check_support(item, known, value, where, HYPERVISORS[config.hypervisor.name], warnings)
    if base == "kernel_params":
        value = merge_kernel_params(config.hypervisor.kernel_params, value)
    elif base == "virtio_fs_extra_args":
        value = (*config.hypervisor.virtio_fs_extra_args, *value)
    changed[item.name] = value


def _enabled(vm: HypervisorConfig, base: str) -> bool:
    for pattern in vm.enable_annotations:
        try:
            if re.search(pattern, base):
                return True
        except re.error as error:
            raise ConfigError(
                f"hypervisor.{vm.name}.enable_annotations: {pattern!r} is no regular expression: "
                f"{error}"
            ) from None
    return False


def _field(section: str, base: str) -> tuple[Field[Any], Key] | None:
    for item, known in keys_of(SECTIONS[section]):
        if base and base == annotation_name(item, known):
            return item, known
    return None


def _strict(item: Field[Any], value: Any, where: str) -> None:
    """A file's value beyond the host is cut to what there is; a pod's is an error."""
    cpus = min(host_cpus(), MAX_VCPUS)
    if item.name in ("default_vcpus", "default_maxvcpus") and not 0 <= value <= cpus:
        raise bad(where, value, f"from 0 to the {cpus} CPUs of this host")
    if item.name == "default_memory" and value < MIN_MEMORY_MIB:
        raise bad(where, value, f"at least {MIN_MEMORY_MIB} MiB")
    if item.name == "guest_hook_path" and not value.startswith("/"):
        raise bad(where, value, "an absolute path")


def _allowed(globs: tuple[str, ...], by: str, value: Path, where: str) -> None:
    if not any(str(value) in glob.glob(pattern) for pattern in globs):
        raise bad(where, str(value), f"an existing file that {by} allows")


def _exclusive(changed: dict[str, Any]) -> None:
    """Setting one of a pair takes the other one back."""
    if "image" in changed and "initrd" in changed:
        raise ConfigError(f"annotations {PREFIX}hypervisor.image and .initrd: expected only one")
    if "initrd" in changed:
        changed["image"] = None
    elif "image" in changed:
        changed["initrd"] = None
    for one, other in (
        ("hot_plug_vfio", "cold_plug_vfio"),
        ("cold_plug_vfio", "hot_plug_vfio"),
    ):
        if one in changed and other not in changed:
            changed[other] = "no-port"


def merge_kernel_params(base: str, more: str) -> str:
    """A parameter of `more` replaces every one of the same name in `base`; the rest is kept."""
    added = more.split()
    names = {word.partition("=")[0] for word in added}
    kept = [word for word in base.split() if word.partition("=")[0] not in names]
    return " ".join(kept + added)


def _hash_text(text: str, where: str) -> str:
    digest = text.strip().lower()
    if len(digest) != 128 or not set(digest) <= set("0123456789abcdef"):
        raise bad(where, text, "a SHA-512 digest in hex")
    return digest


def _check_hash(vm: HypervisorConfig, name: str, digest: str) -> None:
    import hashlib

    path = getattr(vm, HASHES[name])
    where = f"annotation {PREFIX}hypervisor.{name}"
    if path is None:
        raise ConfigError(f"{where}: no {HASHES[name]} is configured")
    try:
        with path.open("rb") as file:
            real = hashlib.file_digest(file, "sha512").hexdigest()
    except OSError as error:
        raise ConfigError(f"{where}: {path}: {error.strerror}") from None
    if real != digest:
        raise ConfigError(f"{where}: {path} has another digest ({real[:16]}…)")
