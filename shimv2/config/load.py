# SPDX-License-Identifier: Apache-2.0
"""Reads configuration.toml and its drop-ins into a `Config`."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import Field, dataclass, replace
from pathlib import Path
from typing import Any

from . import locate
from .agent import AgentConfig, MemAgentConfig
from .errors import ConfigError
from .factory import FactoryConfig
from .hypervisor import HypervisorConfig
from .keys import Key, Section, Support, keys_of
from .model import Config
from .resolve import resolve
from .runtime import RuntimeConfig
from .values import from_toml, shown

MAX_FILE = 1 << 20
HYPERVISORS = {
    "qemu": "Q",
    "clh": "C",
    "cloud-hypervisor": "C",
    "firecracker": "F",
    "dragonball": "",
    "stratovirt": "Q",
    "remote": "R",
    "openvmm": "",
}
GONE = frozenset({"image", "netmon", "shim", "proxy"})

Table = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Setting:
    """One value as found: what, and in which file."""

    value: Any
    file: Path


Merged = dict[tuple[str, ...], Setting]


def load_config(config_path: Path | None = None, env: Mapping[str, str] = os.environ) -> Config:
    """Find, read, merge and check the configuration.

    Args:
        config_path: of the runtime options in CreateTask or CreateSandbox; None or empty
            when the caller gave none.
        env: for KATA_CONF_FILE.

    Raises:
        ConfigError: names the file, the key, the value and what was expected.
    """
    prefix = locate.installed_prefix()
    source = locate.find(config_path, env, prefix)
    if source is None:
        looked = ", ".join(str(path) for path in locate.default_paths(prefix))
        warning = f"no configuration file found (looked at {looked}); built-in defaults are used"
        return resolve(Config(warnings=(warning,)), prefix)
    merged: Merged = {}
    _merge(merged, _read(source), source)
    drop_ins = tuple(_drop_ins(source.parent / "config.d"))
    for path in drop_ins:
        _merge(merged, _read(path), path)
    config = replace(_build(merged), source=source, drop_ins=drop_ins)
    return resolve(config, prefix)


def _read(path: Path) -> Table:
    import tomllib

    try:
        with path.open("rb") as file:
            raw = file.read(MAX_FILE + 1)
        if len(raw) > MAX_FILE:
            raise ConfigError(f"{path}: longer than {MAX_FILE >> 20} MiB")
        return tomllib.loads(raw.decode("utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: can't be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not UTF-8 text") from None
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None


def _drop_ins(directory: Path) -> Iterator[Path]:
    """Files of config.d in name order.  As in Kata, whatever its suffix each counts, but not
    hidden files or editors' backups."""
    try:
        names = sorted(os.listdir(directory))
    except FileNotFoundError:
        return
    except OSError as error:
        raise ConfigError(f"{directory}: can't be read: {error.strerror}") from None
    for name in names:
        if name.startswith(".") or name.endswith("~"):
            continue
        path = directory / name
        if not path.is_file():
            raise ConfigError(f"{path}: drop-ins must be regular files")
        yield path


def _merge(merged: Merged, table: Table, file: Path, at: tuple[str, ...] = ()) -> None:
    """Tables merge key by key; scalars and arrays are replaced whole."""
    for name, value in table.items():
        where = (*at, name)
        if isinstance(value, dict):
            if where not in merged or not isinstance(merged[where].value, dict):
                merged[where] = Setting({}, file)
            _merge(merged, value, file, where)
        else:
            merged[where] = Setting(value, file)


class _Table:
    """The settings of one table, taken out key by key; what is left over is unknown."""

    def __init__(self, merged: Merged, *at: str) -> None:
        self.at = at
        self.found = {path[-1]: setting for path, setting in merged.items() if path[:-1] == at}
        self.merged = merged

    def dotted(self, name: str) -> str:
        return ".".join((*self.at, name))

    def take(
        self, known: type[Section], warnings: list[str], vmm: str = "", inner: Iterable[str] = ()
    ) -> dict[str, Any]:
        """Checked values by field name; warnings for what has no effect here."""
        values: dict[str, Any] = {}
        left = {name: setting for name, setting in self.found.items() if name not in inner}
        for item, key in keys_of(known):
            for name in (item.name, *key.aliases):
                setting = left.pop(name, None)
                if setting is None:
                    continue
                where = f"{setting.file}: {self.dotted(name)}"
                raw = setting.value
                if str(item.type).startswith("Mapping") and raw == {}:
                    raw = _nested(self.merged, (*self.at, name))
                values[item.name] = from_toml(item, key, raw, where)
                check_support(item, key, values[item.name], where, vmm, warnings)
        for name, setting in left.items():
            self._unknown(name, setting, known, warnings)
        return values

    def _unknown(
        self, name: str, setting: Setting, known: type[Section], warnings: list[str]
    ) -> None:
        names = [item.name for item, _ in keys_of(known)]
        warnings.append(f"{setting.file}: {self.dotted(name)}: unknown key{nearest(name, names)}")


def nearest(name: str, names: Iterable[str]) -> str:
    """``; did you mean …?`` or nothing."""
    import difflib

    close = difflib.get_close_matches(name, list(names), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def check_support(
    item: Field[Any], key: Key, value: object, where: str, vmm: str, warnings: list[str]
) -> None:
    """Say so when a value other than the default can't have its effect.

    Raises:
        ConfigError: leaving it out would weaken what was asked for.
    """
    if value == item.default:
        return
    if key.support is Support.REFUSED:
        raise ConfigError(
            f"{where} = {shown(value)}: this runtime can't do that, and won't start "
            "a sandbox that only looks as if it did"
        )
    if key.support is Support.NO:
        whose = "a key" if key.own else "a key of Kata"
        warnings.append(f"{where}: {whose} that is not supported here; it has no effect")
    elif vmm and vmm not in key.vmms:
        warnings.append(f"{where}: has no effect with this hypervisor")


def _nested(merged: Merged, at: tuple[str, ...]) -> Table:
    table: Table = {}
    for path, setting in merged.items():
        if path[:-1] == at:
            is_table = setting.value == {} and isinstance(setting.value, dict)
            table[path[-1]] = _nested(merged, path) if is_table else setting.value
    return table


def _names(merged: Merged, section: str) -> list[str]:
    return [path[1] for path in merged if len(path) == 2 and path[0] == section]


def _hypervisor_name(merged: Merged, runtime: RuntimeConfig) -> str:
    names = _names(merged, "hypervisor")
    for name in names:
        where = f"{merged['hypervisor', name].file}: hypervisor.{name}"
        if not isinstance(merged["hypervisor", name].value, dict):
            raise ConfigError(f"{where}: expected a section [hypervisor.{name}]")
        if name not in HYPERVISORS:
            known = ", ".join(HYPERVISORS)
            raise ConfigError(f"{where}: no such hypervisor; expected one of {known}")
    chosen = runtime.hypervisor_name
    if chosen:
        if chosen not in HYPERVISORS:
            raise ConfigError(
                f"{merged['runtime', 'hypervisor_name'].file}: runtime.hypervisor_name = "
                f"{shown(chosen)}: expected one of {', '.join(HYPERVISORS)}"
            )
        if names and chosen not in names:
            raise ConfigError(
                f"{merged['runtime', 'hypervisor_name'].file}: runtime.hypervisor_name = "
                f'"{chosen}": there is no section [hypervisor.{chosen}]'
            )
        return chosen
    if len(names) > 1:
        listed = ", ".join(f"[hypervisor.{name}]" for name in names)
        raise ConfigError(
            f"{merged['hypervisor', names[-1]].file}: {listed}: "
            "runtime.hypervisor_name must say which one counts"
        )
    return names[0] if names else "qemu"


def _build(merged: Merged) -> Config:
    warnings: list[str] = []
    for (section, *rest), setting in merged.items():
        if rest:
            continue
        if section in GONE:
            warnings.append(f"{setting.file}: [{section}]: Kata no longer reads this section")
        elif section not in ("hypervisor", "agent", "runtime", "factory"):
            hint = nearest(section, ("hypervisor", "agent", "runtime", "factory"))
            warnings.append(f"{setting.file}: {section}: unknown section{hint}")
        elif not isinstance(setting.value, dict):
            raise ConfigError(f"{setting.file}: {section}: expected a section [{section}]")
    runtime = RuntimeConfig(**_Table(merged, "runtime").take(RuntimeConfig, warnings))
    name = _hypervisor_name(merged, runtime)
    values = _Table(merged, "hypervisor", name).take(
        HypervisorConfig, warnings, HYPERVISORS[name], inner=("factory",)
    )
    factory = _Table(merged, "hypervisor", name, "factory").take(FactoryConfig, warnings)
    factory |= _Table(merged, "factory").take(FactoryConfig, warnings)
    agent: dict[str, Any] = {}
    for agent_name in _names(merged, "agent"):
        where = f"{merged['agent', agent_name].file}: agent.{agent_name}"
        if agent_name != "kata" or not isinstance(merged["agent", agent_name].value, dict):
            raise ConfigError(f"{where}: expected a section [agent.kata]")
        agent = _Table(merged, "agent", "kata").take(AgentConfig, warnings, inner=("mem_agent",))
        _Table(merged, "agent", "kata", "mem_agent").take(MemAgentConfig, warnings)
    return Config(
        hypervisor=HypervisorConfig(name=name, **values),
        agent=AgentConfig(**agent),
        runtime=runtime,
        factory=FactoryConfig(**factory),
        warnings=tuple(warnings),
    )
