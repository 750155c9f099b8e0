# SPDX-License-Identifier: Apache-2.0
"""Where the configuration file and the installed assets are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from .errors import ConfigError

FILE_NAME = "configuration.toml"
RELATIVE = Path("kata-containers") / FILE_NAME
RELATIVE_RUST = Path("kata-containers/runtime-rs") / FILE_NAME
ETC = Path("/etc")
VIRTIOFSD_PATHS = (
    Path("/usr/libexec/virtiofsd"),
    Path("/usr/lib/qemu/virtiofsd"),
    Path("/usr/libexec/kata-qemu/virtiofsd"),
    Path("/opt/kata/libexec/virtiofsd"),
)


def installed_prefix(module: Path = Path(__file__)) -> Path | None:
    """PREFIX of an installed product (``PREFIX/lib/pykata/shimv2/config/…``), else None."""
    lib = module.parents[2]
    if lib.name == "pykata" and lib.parent.name == "lib":
        return lib.parents[1]
    return None


def default_paths(prefix: Path | None = None) -> Iterator[Path]:
    """The files that count when none is named; the first that exists is taken."""
    shares = [Path("/usr/share/defaults"), Path("/opt/kata/share/defaults")]
    if prefix is not None:
        shares.insert(0, prefix / "share/defaults")
    seen = set()
    for base in (ETC, *shares):
        for relative in (RELATIVE, RELATIVE_RUST):
            path = base / relative
            if path not in seen:
                seen.add(path)
                yield path


def find(config_path: Path | None, env: Mapping[str, str], prefix: Path | None) -> Path | None:
    """The file to read, symlinks resolved, or None when there is none at all.

    Raises:
        ConfigError: a path that was given is relative, missing or not a file.
    """
    if config_path is not None and str(config_path) not in ("", "."):
        return _given(config_path, "the runtime options")
    if env.get("KATA_CONF_FILE"):
        return _given(Path(env["KATA_CONF_FILE"]), "KATA_CONF_FILE")
    for path in default_paths(prefix):
        if path.is_file():
            return path.resolve()
    return None


def _given(path: Path, by: str) -> Path:
    shown = str(path)[:256]
    if not path.is_absolute():
        raise ConfigError(f"configuration file {shown!r} given by {by}: not an absolute path")
    try:
        resolved = path.resolve(strict=True)
    except (OSError, RuntimeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"configuration file {shown!r} given by {by}: {reason}") from None
    if not resolved.is_file():
        raise ConfigError(f"configuration file {shown!r} given by {by}: not a regular file")
    return resolved


def default_asset(name: str, prefix: Path | None) -> Path:
    """Where a guest asset lies unless configured: the installed one, else the usual place."""
    return (prefix or Path("/usr")) / "share/kata-containers" / name


def default_virtiofsd(prefix: Path | None) -> Path:
    """The first virtiofsd that exists, else where the Rust one is usually installed."""
    own = (prefix / "libexec/virtiofsd",) if prefix is not None else ()
    return next((path for path in own + VIRTIOFSD_PATHS if path.exists()), VIRTIOFSD_PATHS[0])
