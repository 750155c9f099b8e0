# SPDX-License-Identifier: Apache-2.0
"""``kata-runtime factory``: templates made, looked at and removed by hand."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from shimv2.config import Config
from vmm.errors import VmmError
from vmm.template import Entry, TemplateBusyError, TemplateStore

NOT_ENABLED = (
    "vm factory not enabled: set enable_template = true in section [factory] of {source}, "
    "or name another file by --config"
)


class FactoryError(Exception):
    """The command could not be done; the message is for the user."""


def run(action: str, config: Config) -> int:
    """Do one of init, status and destroy; returns the exit status.

    Raises:
        FactoryError: it could not be done.
    """
    store = TemplateStore(Path(config.factory.template_path))
    if action == "status":
        return _status(config, store)
    if os.geteuid() != 0:
        raise FactoryError(f"factory {action} must run as root")
    if action == "destroy":
        return _destroy(store)
    if not config.factory.enable_template:
        raise FactoryError(NOT_ENABLED.format(source=config.source or "a configuration.toml"))
    return _init(config)


def _init(config: Config) -> int:
    import trio

    from shimv2.factory.maker import make
    from ttrpc.errors import RpcError

    began = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - began:5.1f} s] {text}", flush=True)

    try:
        key = trio.run(make, config, say)
    except TemplateBusyError as error:
        raise FactoryError(f"{error} already: `kata-runtime factory status` shows it") from error
    except (VmmError, RpcError, OSError) as error:
        raise FactoryError(f"no template could be made: {error}") from error
    say(f"template {key[:12]} is in {config.factory.template_path}")
    print("vm factory initialized")
    return 0


def _destroy(store: TemplateStore) -> int:
    from shimv2.factory.maker import remove_leftovers

    for pid in store.destroy():
        print(f"ended the maker of a template, process {pid}")
    remove_leftovers(store)
    print("vm factory destroyed")
    return 0


def _status(config: Config, store: TemplateStore) -> int:
    print(f"vm factory is {'on' if config.factory.enable_template else 'off'}")
    if config.factory.vm_cache_number:
        _cache_status(config)
    entries = store.status()
    if not entries:
        print(f"no templates in {store.root}")
        return 0
    ours = _key_of(config)
    print(f"{'TEMPLATE':13} {'STATE':11} {'SIZE':>8} {'MADE':>12} {'USED':>12}  FOR")
    for entry in entries:
        print(_row(entry, ours).rstrip())
    return 0


def _cache_status(config: Config) -> None:
    import trio

    from vmm.template import handover

    try:
        told = trio.run(handover.status, config.factory.vm_cache_endpoint)
    except handover.HandoverError as error:
        print(f"VM cache: {error}")
        return
    print(f"VM cache: process {told.get('pid')}, {config.factory.vm_cache_number} VMs wanted")
    for machine in told.get("machines", []):
        since = _ago(float(machine["since"]))
        print(f"cached VM {machine['pid']}  made in {machine['seconds']} s, {since}")


def _key_of(config: Config) -> str:
    """The key that sandboxes of this configuration look for; "" if it can't be known."""
    import trio

    from shimv2.factory.templates import template_key

    try:
        return trio.run(template_key, config)
    except VmmError as error:
        print(f"kata-runtime: {error}", file=sys.stderr)
        return ""


def _row(entry: Entry, ours: str) -> str:
    about = entry.about or {}
    size = f"{entry.size / 1e6:.0f} MB" if entry.size else ""
    used = _ago(entry.used) if entry.used else ""
    what = entry.detail
    if entry.pid:
        what = f"process {entry.pid}"
    elif about:
        what = f"{about.get('memory_mib')} MiB, {about.get('kernel')}, {about.get('image')}"
    if entry.key == ours:
        what += "  (this configuration)"
    return f"{entry.key[:12]:13} {entry.state:11} {size:>8} {_ago(entry.created):>12} {used:>12}  {what}"


def _ago(when: float) -> str:
    seconds = max(0, int(time.time() - when))
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds // length} {unit} ago"
    return f"{seconds} s ago"
