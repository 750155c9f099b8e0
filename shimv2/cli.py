# SPDX-License-Identifier: Apache-2.0
"""``containerd-shim-kata-v2``: the command line that containerd calls.

``start`` answers in a few tens of milliseconds: it binds the socket, forks, prints and
returns.  All slow imports happen in the child, while containerd connects; or they have happened
already, in the process that `shimv2.ready` forks a shim from.
"""

from __future__ import annotations

import os
import sys
from _socket import AF_UNIX
from _socket import socket as Socket  # what socket adds is enum and selectors, 5 ms of imports

from shimv2 import bootstrap, light_json
from shimv2.version import RUNTIME_NAME, SHIM_BINARY, VERSION

TYPE_CHECKING = False
if TYPE_CHECKING:  # typing takes as long to import as json and re together
    import socket
    from typing import NoReturn

USAGE = f"""\
{SHIM_BINARY}: the shim that containerd starts for the runtime {RUNTIME_NAME}

usage: {SHIM_BINARY} -namespace NS -id ID -address SOCKET [-publish-binary PATH]
           [-bundle DIR] [-debug] [-socket PATH] start | delete
       {SHIM_BINARY} -v | -info | -help

It is not meant to be started by hand.  Try:
       ctr run --rm --runtime {RUNTIME_NAME} IMAGE ID COMMAND
and, to see what this host can do:
       kata-runtime check
"""

# containerd waits this long for a shim that it believes is there before it starts anew.
_PROBE_LIMIT = 0.1
_VALUE_FLAGS = ("namespace", "id", "address", "publish-binary", "bundle", "socket", "debug-socket")
_BOOL_FLAGS = ("debug", "v", "version", "info", "help", "h")
# As containerd's own rule for identifiers; a sandbox id becomes a directory name.
_ID_LIMIT = 76
_ID_CHARS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-")


class UsageError(Exception):
    """The command line or its environment is wrong; the message says what to change."""


class Arguments:
    """The parsed command line; flags not given are "" or False."""

    __slots__ = ("action", "address", "bundle", "debug", "id", "info", "namespace", "version")

    def __init__(self, argv: list[str]) -> None:
        values: dict[str, str] = {}
        switches: set[str] = set()
        action = ""
        words = iter(argv)
        for word in words:
            if not word.startswith("-") or word == "-":
                action = action or word
                continue
            name, has_value, value = word.lstrip("-").partition("=")
            if name in _BOOL_FLAGS:
                if not has_value or value.lower() in ("1", "t", "true"):
                    switches.add(name)
            elif name in _VALUE_FLAGS:
                if not has_value:
                    following = next(words, None)
                    if following is None:
                        raise UsageError(f"flag -{name} needs a value")
                    value = following
                values[name] = value
            else:
                raise UsageError(f"unknown flag {word!r} (see {SHIM_BINARY} -help)")
        if switches & {"help", "h"}:
            action = "help"
        self.action = action
        self.namespace = values.get("namespace", "")
        self.id = values.get("id", "")
        self.address = values.get("address", "")
        self.bundle = values.get("bundle", "")
        self.debug = "debug" in switches
        self.version = bool(switches & {"v", "version"})
        self.info = "info" in switches


def check_id(name: str, value: str) -> None:
    """Hold `value` to containerd's rule for identifiers.

    Raises:
        UsageError: names the flag and the value.
    """
    if not value:
        raise UsageError(f"-{name} must not be empty")
    if len(value) > _ID_LIMIT:
        raise UsageError(
            f"-{name} {value[:20]!r}… has {len(value)} characters, at most {_ID_LIMIT}"
        )
    if not value[0].isalnum() or not _ID_CHARS.issuperset(value):
        raise UsageError(
            f"-{name} {value!r}: only A-Z a-z 0-9 _ . - are allowed, the first a letter or digit"
        )


def main() -> NoReturn:
    """Entry point; the exit status is 0, or 1 with one line on stderr."""
    try:
        status = run(sys.argv[1:])
    except UsageError as error:
        status = _fail(str(error))
    except OSError as error:
        status = _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except Exception as error:
        status = _fail(f"{type(error).__name__}: {error}")
    sys.stdout.flush()
    sys.exit(status)


def run(argv: list[str]) -> int:
    """Do what the command line asks; returns the exit status."""
    args = Arguments(argv)
    if args.version:
        print(f"{SHIM_BINARY}:\n  Version:  {VERSION}\n  Python:   {sys.version.split()[0]}")
        return 0
    if args.action == "help":
        print(USAGE, end="")
        return 0
    if args.info:
        from shimv2.info import runtime_info

        bootstrap.read_stdin()  # runtime options change nothing in the answer
        os.write(1, runtime_info())
        return 0
    if args.action not in ("start", "delete"):
        sys.stderr.write(USAGE)
        return 1
    check_id("namespace", args.namespace)
    check_id("id", args.id)
    if args.action == "start":
        return _start(args)
    from shimv2.delete import delete

    os.write(1, delete(args.id, args.namespace, args.bundle or os.getcwd()))
    return 0


def _fail(message: str) -> int:
    sys.stderr.write(f"{SHIM_BINARY}: {message}\n")
    return 1


def _start(args: Arguments) -> int:
    try:
        stdin = bootstrap.read_stdin()
        params = bootstrap.parse_params(stdin, args.id, args.namespace)
    except ValueError as error:
        raise UsageError(str(error)) from error
    bundle = os.getcwd()
    group = group_of(bundle, args.id)
    path = bootstrap.socket_path(
        grpc_address(args, params), args.namespace, group, params.socket_dir
    )
    address = f"unix://{path}"
    if _somebody_listens(path):
        _answer(address, params, bundle)
        return 0
    if group != args.id:
        raise UsageError(f"sandbox {group!r} of container {args.id!r} is not running")

    from shimv2.state import (
        READY_SHIMS,
        SandboxInUseError,
        SandboxRecord,
        claim,
        kill_processes,
        remove_sandbox,
    )

    record = SandboxRecord(args.id, args.namespace, grpc_address(args, params), path)
    record.add_process("shim", os.getpid())  # replaced below; until then `start` is the owner
    try:
        claim(record)
    except SandboxInUseError as error:
        raise UsageError(str(error)) from error
    pid = 0
    listener = None
    try:
        listener = _listen(path)
        if os.path.isdir(READY_SHIMS):
            from shimv2.ready.hand_over import ready_shim

            pid, recorded_write = ready_shim(sys.argv[1:], stdin, listener)
        if not pid:
            recorded, recorded_write = os.pipe()
            pid = os.fork()
            if pid == 0:
                os.close(recorded_write)
                serve(args, params, _as_socket(listener), recorded)
            os.close(recorded)
        record.add_process("shim", pid)
        record.save()
        os.write(recorded_write, b"1")  # from here on the record is the child's
        with open(os.path.join(bundle, "shim.pid"), "w") as file:
            file.write(str(pid))
        _answer(address, params, bundle)
    except BaseException:
        record.add_process("shim", pid or os.getpid())
        kill_processes(record.processes)  # it may not have got on record
        if listener is not None:
            listener.close()
        remove_sandbox(args.id, args.namespace)
        raise
    return 0


def _answer(address: str, params: bootstrap.Params, bundle: str) -> None:
    with open(os.path.join(bundle, "address"), "w") as file:
        file.write(address)
    wants_json = os.environ.get("KATA_SHIM_JSON_ANSWER", "") not in ("", "0")
    os.write(1, bootstrap.answer(address, rich=params.rich, json_answer=wants_json))


def group_of(bundle: str, container_id: str) -> str:
    """The sandbox a container belongs to, by its bundle's annotations; itself if none says.

    A bundle without config.json, or one that can't be read, is a sandbox of its own: what
    is wrong with it is said by Create, which has a way to answer.
    """
    try:
        with open(os.path.join(bundle, "config.json"), "rb") as file:
            text = file.read()
    except OSError:
        return container_id
    try:
        spec = light_json.loads(text)
        annotations = spec.get("annotations") or {}
        for key in GROUP_ANNOTATIONS:
            group = annotations.get(key)
            if isinstance(group, str) and group:
                check_id("id", group)
                return group
    except (ValueError, AttributeError):
        pass
    return container_id


# First found wins; the last is CRI-O's.
GROUP_ANNOTATIONS = (
    "io.containerd.runc.v2.group",
    "io.kubernetes.cri.sandbox-id",
    "io.kubernetes.cri-o.SandboxID",
)


def _somebody_listens(path: str) -> bool:
    probe = Socket(AF_UNIX)
    probe.settimeout(_PROBE_LIMIT)
    try:
        probe.connect(path)
    except OSError:
        return False
    finally:
        probe.close()
    return True


def _listen(path: str) -> Socket:
    directory = os.path.dirname(path)
    os.makedirs(directory, mode=0o711, exist_ok=True)
    try:  # noqa: SIM105  # contextlib is not worth its import
        os.unlink(path)  # nobody listens there: left by a shim that was killed
    except FileNotFoundError:
        pass
    listener = Socket(AF_UNIX)
    try:
        listener.bind(path)
        os.chmod(path, 0o600)
        listener.listen(128)
    except OSError as error:
        listener.close()
        raise UsageError(f"cannot listen on {path}: {error.strerror or error}") from error
    return listener


def _as_socket(plain: Socket) -> socket.socket:
    import socket

    return socket.socket(fileno=plain.detach())


def serve(
    args: Arguments, params: bootstrap.Params, listener: socket.socket, recorded: int
) -> NoReturn:
    """Be the shim, in a process of its own whose directory is the bundle.

    Args:
        recorded: a pipe that has a byte as soon as this process is on record.
    """
    # containerd reads stdout and stderr of `start` until they close.
    status = 1
    try:
        os.setsid()
        if not os.read(recorded, 1):  # nobody wrote down whom `delete` has to end
            os._exit(1)
        only_descriptor(listener.fileno())
        from ttrpc import upb

        upb.install()
        from shimv2.daemon import serve as serve_sandbox

        status = serve_sandbox(
            namespace=args.namespace,
            sandbox_id=args.id,
            bundle=os.getcwd(),
            grpc_address=grpc_address(args, params),
            ttrpc_address=os.environ.get("TTRPC_ADDRESS", "") or params.ttrpc_address,
            options=params.options,
            debug=args.debug or params.debug,
            listener=listener,
        )
    finally:
        os._exit(status)  # never back into `start`'s frames


def grpc_address(args: Arguments, params: bootstrap.Params) -> str:
    """Where containerd listens: of its three ways to say so, the first that it used."""
    return args.address or params.grpc_address or os.environ.get("GRPC_ADDRESS", "")


def only_descriptor(fd: int) -> None:
    """Close all that was inherited but `fd`; 0, 1 and 2 become /dev/null."""
    null = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(null, number)
    os.closerange(3, fd)
    os.closerange(fd + 1, os.sysconf("SC_OPEN_MAX"))


if __name__ == "__main__":
    main()
