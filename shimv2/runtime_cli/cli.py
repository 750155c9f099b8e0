# SPDX-License-Identifier: Apache-2.0
"""The command line of ``kata-runtime``.  Exit status: 0, 1 for a failure, 2 for wrong usage."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shimv2.config import Config, ConfigError, load_config, locate
from shimv2.version import VERSION

from .boot_report import BootReportError, add_boot_report, boot_report
from .direct_volume import add_direct_volume

EPILOG = """\
examples:
  kata-runtime check                  can this host run containers in VMs, and how fast
  kata-runtime env --json             versions, paths and settings in force
  kata-runtime boot-report            where the time of the newest start went
  kata-runtime list                   sandboxes on this host
  kata-runtime factory status         saved VMs that sandboxes are cloned from
  kata-runtime exec 4f2a              a root shell in the guest whose sandbox id starts so
  kata-runtime metrics 4f2a           its figures, as Prometheus reads them
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line asks; returns the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.show_default_config_paths:
        print("\n".join(map(str, locate.default_paths(locate.installed_prefix()))))
        return 0
    if options.command is None:
        parser.print_usage()
        print(f"{parser.prog} --help tells more")
        return 0
    commands = {
        "boot-report": _boot_report,
        "check": _check,
        "direct-volume": _direct_volume,
        "env": _env,
        "exec": _exec,
        "factory": _factory,
        "iptables": _iptables,
        "list": _list,
        "metrics": _metrics,
        "version": _version,
    }
    try:
        return commands[options.command](options)
    except (ConfigError, PermissionError) as error:
        return _fail(str(error))
    except BrokenPipeError:  # the reader of our output had enough
        sys.stderr.close()
        return 0
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kata-runtime",
        description="Looks at, and into, the sandboxes of this container runtime.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("-v", "--version", action="version", version=version_text())
    parser.add_argument(
        "--config",
        "--kata-config",
        type=Path,
        metavar="FILE",
        help="use this configuration.toml instead of the first one found",
    )
    parser.add_argument(
        "--show-default-config-paths",
        "--kata-show-default-config-paths",
        action="store_true",
        help="print where configuration.toml is looked for, and exit",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    check = commands.add_parser(
        "check",
        help="what this host can do, what is used instead, and what to install",
        aliases=["kata-check"],
        description="Looks at everything that is needed to run containers in VMs. "
        "The exit status is 0 if they can run, else 1.",
    )
    env = commands.add_parser(
        "env", help="versions, paths and settings in force (TOML)", aliases=["kata-env"]
    )
    listing = commands.add_parser("list", help="sandboxes on this host", aliases=["ps"])
    for command in (check, env, listing):
        command.add_argument("--json", action="store_true", help="print JSON")
    check.set_defaults(command="check")
    env.set_defaults(command="env")
    listing.set_defaults(command="list")
    shell = commands.add_parser(
        "exec",
        help="a root shell inside a sandbox's guest",
        description="Connects this terminal to the debug console of a guest. It has one only "
        "with debug_console_enabled = true in section [agent.kata] when it was started.",
    )
    shell.add_argument("sandbox", metavar="SANDBOX", help="its id, or the start of it")
    shell.add_argument(
        "--kata-debug-port",
        type=_port,
        default=1026,
        metavar="PORT",
        help="vsock port of the console (1026)",
    )
    factory = commands.add_parser(
        "factory",
        help="templates that sandboxes are cloned from",
        description="Templates are saved VMs that sandboxes are cloned from, in a fraction of the "
        "time of a boot. They are made without asking when enable_template is set in section "
        "[factory]; here they are made, looked at and removed by hand.",
    )
    factory.add_argument(
        "action",
        choices=("init", "status", "destroy"),
        help="make the template of this configuration; list all; end makers and remove all",
    )
    _add_management(commands)
    add_direct_volume(commands)
    add_boot_report(commands)
    commands.add_parser("version", help="as --version")
    return parser


def _add_management(commands: Any) -> None:
    """The commands that ask a sandbox's shim."""
    metrics = commands.add_parser("metrics", help="a sandbox's figures, in Prometheus' text format")
    metrics.add_argument("sandbox", metavar="SANDBOX", help="its id, or the start of it")
    firewall = commands.add_parser("iptables", help="the packet filter of a sandbox's guest")
    actions = firewall.add_subparsers(dest="action", metavar="ACTION", required=True)
    get = actions.add_parser("get", help="print its rules, as iptables-save does")
    put = actions.add_parser("set", help="replace its rules, as iptables-restore does")
    for action in (get, put):
        action.add_argument(
            "--sandbox-id", required=True, metavar="SANDBOX", help="its id, or the start of it"
        )
        action.add_argument("--v6", action="store_true", help="those of ip6tables")
    put.add_argument("file", metavar="FILE", help="rules; - is standard input")


def _port(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 0 < int(text) < 1 << 32:
        raise argparse.ArgumentTypeError(f"{text!r} is no vsock port")
    return int(text)


def _config(options: argparse.Namespace) -> Config:
    path = options.config
    return load_config(path.absolute() if path else None)


def _fail(message: str) -> int:
    print(f"kata-runtime: {message}", file=sys.stderr)
    return 1


def version_text() -> str:
    """What ``--version`` prints."""
    from .environment import commit

    return f"kata-runtime  : {VERSION} (pykata)\n   commit   : {commit() or 'unknown'}"


def _version(_options: argparse.Namespace) -> int:
    print(version_text())
    return 0


def _check(options: argparse.Namespace) -> int:
    from .check import Finding, Host, State, check

    findings = []
    try:
        config = _config(options)
    except ConfigError as error:
        config = Config()
        findings.append(Finding("configuration", State.MISSING, str(error)))
    else:
        source = str(config.source) if config.source else "built-in defaults (no file found)"
        findings.append(Finding("configuration", State.OK, source))
        if config.source:
            findings += [Finding("configuration", State.FALLBACK, text) for text in config.warnings]
        findings += check(config, Host())
    able = all(finding.state is not State.MISSING for finding in findings)
    if options.json:
        rows = [
            {"name": f.name, "state": f.state.value, "detail": f.detail, "remedy": f.remedy}
            for f in findings
        ]
        print(json.dumps({"able": able, "findings": rows}, indent=2))
        return 0 if able else 1
    for finding in findings:
        print(f"{finding.state.value:9} {finding.name:14} {finding.detail}")
        if finding.remedy and finding.state is not State.OK:
            print(f"{'':24} -> {finding.remedy}")
    print(f"\nContainers {'can' if able else 'can NOT'} run in VMs on this host.")
    return 0 if able else 1


def _env(options: argparse.Namespace) -> int:
    from .environment import as_toml, environment

    tables = environment(_config(options))
    print(json.dumps(tables, indent=2) if options.json else as_toml(tables))
    return 0


def _list(options: argparse.Namespace) -> int:
    from .sandboxes import sandboxes

    found = list(sandboxes())
    if options.json:
        rows = [
            {
                "id": sandbox.id,
                "namespace": sandbox.namespace,
                "alive": sandbox.alive,
                "pids": sandbox.pids,
                "age_seconds": round(sandbox.age, 2),
                "pss_bytes": sandbox.memory,
            }
            for sandbox in found
        ]
        print(json.dumps(rows, indent=2))
        return 0
    print(f"{'SANDBOX':36} {'NAMESPACE':12} {'STATE':6} {'AGE':>9} {'MEMORY':>9}  PROCESSES")
    for sandbox in found:
        state = "alive" if sandbox.alive else "dead"
        pids = " ".join(f"{role}={pid}" for role, pid in sandbox.pids.items())
        age, memory = f"{sandbox.age:.0f} s", f"{sandbox.memory >> 20} MiB"
        row = f"{sandbox.id:36} {sandbox.namespace:12} {state:6} {age:>9} {memory:>9}  {pids}"
        print(row.rstrip())
    return 0


def _factory(options: argparse.Namespace) -> int:
    from .factory import FactoryError, run

    try:
        return run(options.action, _config(options))
    except FactoryError as error:
        return _fail(str(error))


def _boot_report(options: argparse.Namespace) -> int:
    try:
        return boot_report(options)
    except BootReportError as error:
        return _fail(str(error))


def _exec(options: argparse.Namespace) -> int:
    from shimv2 import state

    from .console import ConsoleError, attach, connect
    from .sandboxes import NoSuchSandboxError, find

    try:
        sandbox = find(options.sandbox)
        stream, first = connect(state.vm_dir(sandbox) / "hybrid.sock", options.kata_debug_port)
    except (ConsoleError, NoSuchSandboxError) as error:
        return _fail(str(error))
    with stream:
        attach(stream, first)
    return 0


def _metrics(options: argparse.Namespace) -> int:
    return _ask(options.sandbox, "GET", "/metrics")


def _iptables(options: argparse.Namespace) -> int:
    target = "/ip6tables" if options.v6 else "/iptables"
    if options.action == "get":
        return _ask(options.sandbox_id, "GET", target)
    try:
        rules = sys.stdin.buffer.read() if options.file == "-" else Path(options.file).read_bytes()
    except OSError as error:
        return _fail(f"{options.file}: {error.strerror}")
    return _ask(options.sandbox_id, "PUT", target, rules)


def _direct_volume(options: argparse.Namespace) -> int:
    from shimv2.direct_volumes import DirectVolumeError

    from .direct_volume import run
    from .management import ManagementError

    try:
        run(options)
    except (DirectVolumeError, ManagementError) as error:
        return _fail(str(error))
    return 0


def _ask(sandbox: str, method: str, target: str, body: bytes | None = None) -> int:
    """Print what the sandbox's shim answers."""
    from .management import ManagementError, ask
    from .sandboxes import NoSuchSandboxError, find

    try:
        answer = ask(find(sandbox), method, target, body)
    except (ManagementError, NoSuchSandboxError) as error:
        return _fail(str(error))
    sys.stdout.flush()
    sys.stdout.buffer.write(answer)
    sys.stdout.flush()
    return 0
