# SPDX-License-Identifier: Apache-2.0
"""The kernel command line, as far as it is meant for the agent (Kata's parameter names).

A value that makes no sense is a warning and leaves the default: an agent that refuses to start
over a mistyped parameter is a VM that nobody can ask what is wrong.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

LOG_LEVELS = ("trace", "debug", "info", "warning", "error", "critical")
_LOG_ALIASES = {"warn": "warning", "fatal": "critical", "panic": "critical"}
_REST_APIS = ("all", "attestation", "resource")
_PROCS = ("none", "attestation-agent", "confidential-data-hub", "api-server-rest")
_MAX_PORT = 0xFFFFFFFF  # vsock ports have 32 bits


class AgentConfig:
    """What the agent was told at boot. Times are in seconds, sizes in bytes, 0 is "off"."""

    __slots__ = (
        "cdh_api_timeout",
        "cdi_timeout",
        "config_file",
        "container_pipe_size",
        "debug_console",
        "debug_console_vport",
        "devmode",
        "forward_port",
        "guest_components_procs",
        "guest_components_rest_api",
        "hotplug_timeout",
        "https_proxy",
        "image_pull_timeout",
        "launch_process_timeout",
        "log",
        "log_vport",
        "mem_agent",
        "no_proxy",
        "passfd_listener_port",
        "policy_file",
        "secure_storage_integrity",
        "server_addr",
        "trace",
        "unified_cgroup_hierarchy",
        "visible_cdi_devices",
        "warnings",
    )

    def __init__(self) -> None:
        self.log = "info"
        self.debug_console = False
        self.debug_console_vport = 0
        self.log_vport = 0
        self.devmode = False
        self.trace = False
        self.server_addr = "vsock://-1:1024"
        self.hotplug_timeout = 3
        self.cdh_api_timeout = 50
        self.image_pull_timeout = 1200
        self.cdi_timeout = 100
        self.launch_process_timeout = 6
        self.container_pipe_size = 0
        self.passfd_listener_port = 0
        self.forward_port = 0
        self.visible_cdi_devices = False
        self.https_proxy = ""
        self.no_proxy = ""
        self.guest_components_rest_api = "resource"
        self.guest_components_procs = "api-server-rest"
        self.secure_storage_integrity = True
        self.config_file = ""
        self.policy_file = ""
        self.unified_cgroup_hierarchy: bool | None = None  # None: not said
        self.mem_agent: dict[str, str] = {}
        self.warnings: list[str] = []

    @property
    def debug(self) -> bool:
        return self.log in ("trace", "debug")


def load(path: str = "/proc/cmdline", environ: Mapping[str, str] | None = None) -> AgentConfig:
    """The configuration of this boot: command line, or the file it names, then environment."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            text = file.read(65536)
    except OSError as error:
        text = ""
        config = AgentConfig()
        config.warnings.append(f"kernel command line: {error}")
    else:
        config = parse(text)
    if config.config_file:
        _load_file(config)
    _apply_environment(config, os.environ if environ is None else environ)
    return config


def parse(text: str) -> AgentConfig:
    """The configuration in one command line; quotes keep blanks together, as for the kernel."""
    config = AgentConfig()
    for word in _split(text):
        name, equals, value = word.partition("=")
        if name.startswith("agent.mem_agent_"):
            config.mem_agent[name[len("agent.mem_agent_") :]] = value
        elif name in _BOOLEANS:
            # A bare flag switches on; with a value, the value decides.
            setattr(config, _BOOLEANS[name], _boolean(value) if equals else True)
        elif name in _VALUES and equals:
            _set(config, name, value)
        elif name == "cgroup_no_v1" and value == "all":
            config.unified_cgroup_hierarchy = True
        elif name.startswith("agent."):
            config.warnings.append(f"kernel parameter {name!r} is unknown to this agent")
    return config


def _split(text: str) -> list[str]:
    if '"' not in text:
        return text.split()
    words: list[str] = []
    word = ""
    quoted = False
    for character in text + " ":
        if character == '"':
            quoted = not quoted
        elif character.isspace() and not quoted:
            if word:
                words.append(word)
            word = ""
        else:
            word += character
    if word:
        words.append(word)
    return words


def _boolean(text: str) -> bool:
    """Kata's rule: true, false, or a number of which 0 is false; anything else is false."""
    if text.lower() == "true":
        return True
    try:
        return int(text) != 0
    except ValueError:
        return False


def _number(low: int, high: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        number = int(text)
        if not low <= number <= high:
            raise ValueError(f"not in {low}..{high}")
        return number

    return read


def _choice(known: tuple[str, ...]) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text not in known:
            raise ValueError(f"not one of {', '.join(known)}")
        return text

    return read


def _choices(known: tuple[str, ...]) -> Callable[[str], str]:
    def read(text: str) -> str:
        for part in text.split(","):
            if part not in known:
                raise ValueError(f"{part!r} is not one of {', '.join(known)}")
        return text

    return read


def _log_level(text: str) -> str:
    return _choice(LOG_LEVELS)(_LOG_ALIASES.get(text, text))


def _address(text: str) -> str:
    scheme, separator, rest = text.partition("://")
    if not separator or not rest:
        raise ValueError("not SCHEME://ADDRESS")
    if scheme == "vsock":
        cid, _, port = rest.rpartition(":")
        int(cid)
        _number(1, _MAX_PORT)(port)
    elif scheme not in ("unix", "serial"):
        raise ValueError("not a vsock://, unix:// or serial:// address")
    return text


_seconds = _number(1, 10**6)
_port = _number(0, _MAX_PORT)

_BOOLEANS = {
    "agent.debug_console": "debug_console",
    "agent.devmode": "devmode",
    "agent.trace": "trace",
    "agent.visible_cdi_devices": "visible_cdi_devices",
    "agent.secure_storage_integrity": "secure_storage_integrity",
    "systemd.unified_cgroup_hierarchy": "unified_cgroup_hierarchy",
}

_VALUES: dict[str, tuple[str, Callable[[str], Any]]] = {
    "agent.log": ("log", _log_level),
    "agent.debug_console_vport": ("debug_console_vport", _port),
    "agent.log_vport": ("log_vport", _port),
    "agent.server_addr": ("server_addr", _address),
    "agent.hotplug_timeout": ("hotplug_timeout", _seconds),
    "agent.cdh_api_timeout": ("cdh_api_timeout", _seconds),
    "agent.image_pull_timeout": ("image_pull_timeout", _seconds),
    "agent.cdi_timeout": ("cdi_timeout", _seconds),
    "agent.launch_process_timeout": ("launch_process_timeout", _seconds),
    "agent.container_pipe_size": ("container_pipe_size", _number(0, 1 << 30)),
    "agent.passfd_listener_port": ("passfd_listener_port", _port),
    "agent.forward_port": ("forward_port", _port),  # not Kata's
    "agent.https_proxy": ("https_proxy", str),
    "agent.no_proxy": ("no_proxy", str),
    "agent.guest_components_rest_api": ("guest_components_rest_api", _choice(_REST_APIS)),
    "agent.guest_components_procs": ("guest_components_procs", _choices(_PROCS)),
    "agent.config_file": ("config_file", str),
}

# Keys of agent.config_file that are not the parameter's name without "agent.".
_FILE_KEYS = {"log_level": "agent.log", "dev_mode": "agent.devmode", "tracing": "agent.trace"}

_ENVIRONMENT = {
    "KATA_AGENT_SERVER_ADDR": "agent.server_addr",
    "KATA_AGENT_LOG_LEVEL": "agent.log",
    "KATA_AGENT_TRACING": "agent.trace",
}


def _set(config: AgentConfig, name: str, value: str) -> None:
    attribute, read = _VALUES[name]
    try:
        setattr(config, attribute, read(value))
    except ValueError as error:
        default = getattr(config, attribute)
        config.warnings.append(f"kernel parameter {name}={value!r}: {error}; using {default!r}")


def _load_file(config: AgentConfig) -> None:
    """Replace what the command line said by what the TOML file says."""
    import tomllib

    path = config.config_file
    try:
        with open(path, "rb") as file:
            table = tomllib.load(file)
    except (OSError, ValueError) as error:
        config.warnings.append(f"agent.config_file {path}: {error}; using the command line")
        return
    warnings = config.warnings
    config.__init__()  # type: ignore[misc]  # every field back to its default
    config.config_file = path
    config.warnings = warnings
    for key, value in table.items():
        if key == "mem_agent" and isinstance(value, dict):
            config.mem_agent = {name: _text(item) for name, item in value.items()}
            continue
        name = _FILE_KEYS.get(key, f"agent.{key}")
        if name in _BOOLEANS:
            setattr(config, _BOOLEANS[name], _boolean(_text(value)))
        elif name in _VALUES and key != "config_file":
            _set(config, name, _text(value))
        elif key == "unified_cgroup_hierarchy":
            config.unified_cgroup_hierarchy = _boolean(_text(value))
        elif key == "policy_file":
            config.policy_file = _text(value)
        else:
            warnings.append(f"{path}: key {key!r} is unknown to this agent")


def _text(value: object) -> str:
    """A TOML value as the command line would spell it; a duration table counts its seconds."""
    if isinstance(value, dict):
        return str(value.get("secs", value))
    if isinstance(value, list):
        return ",".join(_text(item) for item in value)
    return str(value)


def _apply_environment(config: AgentConfig, environ: Mapping[str, str]) -> None:
    for variable, name in _ENVIRONMENT.items():
        value = environ.get(variable)
        if value is None:
            continue
        if name in _BOOLEANS:
            setattr(config, _BOOLEANS[name], _boolean(value))
        else:
            _set(config, name, value)
    if "KATA_AGENT_POLICY_FILE" in environ:
        config.policy_file = environ["KATA_AGENT_POLICY_FILE"]
