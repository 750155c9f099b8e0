# SPDX-License-Identifier: Apache-2.0
"""The command line of ``kata-monitor``.  Exit status: 0, 1 for a failure, 2 for wrong usage."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
from collections.abc import Sequence
from functools import partial

import trio

from shimv2.management.http import serve_connection
from shimv2.monitor.endpoints import Endpoints
from shimv2.monitor.traces import Collector, Exporter, collector
from shimv2.version import VERSION
from vmm.errors import ungrouped

PROGRAM = "kata-monitor"
LISTEN = "127.0.0.1:8090"

# Kata's names of levels that Python lacks.
_LEVELS = {
    "trace": logging.DEBUG,
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warn": logging.WARNING,
    "warning": logging.WARNING,
    "error": logging.ERROR,
    "fatal": logging.CRITICAL,
    "panic": logging.CRITICAL,
}
_CONNECTIONS = 32

log = logging.getLogger(PROGRAM)


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM or SIGINT; returns the exit status."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(
        level=_LEVELS[options.log_level], format="%(levelname)s %(name)s: %(message)s"
    )
    if options.runtime_endpoint:
        log.info("--runtime-endpoint is not needed: shims know their pods' names themselves")
    host, port = options.listen_address
    try:
        with ungrouped():
            trio.run(_run, host, port, options.otlp_endpoint)
    except OSError as error:
        reason = error.strerror or error
        print(f"{PROGRAM}: --listen-address {host or '*'}:{port}: {reason}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Serves the figures of all sandboxes of this host to Prometheus. It has to "
        "run as root, and whoever can connect to it can read them.",
    )
    parser.add_argument("-v", "--version", action="version", version=f"{PROGRAM} {VERSION}")
    parser.add_argument(
        "--listen-address",
        type=_address,
        default=LISTEN,
        metavar="HOST:PORT",
        help=f"where to listen ({LISTEN}); without HOST on every address",
    )
    parser.add_argument("--log-level", choices=tuple(_LEVELS), default="info", help="(info)")
    parser.add_argument(
        "--runtime-endpoint", metavar="SOCKET", help="taken for compatibility, not used"
    )
    parser.add_argument(
        "--otlp-endpoint",
        type=_collector,
        metavar="URL",
        help="also send each start of a sandbox as a trace to this OpenTelemetry collector",
    )
    return parser


def _collector(text: str) -> Collector:
    try:
        return collector(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _address(text: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        colon = ""  # an IPv6 address is written in brackets
    if not colon or not (port.isascii() and port.isdigit()) or int(port) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not HOST:PORT")
    return host, int(port)


async def _run(host: str, port: int, traces: Collector | None) -> None:
    endpoints = Endpoints()
    listeners = await trio.open_tcp_listeners(port, host=host or None)
    async with trio.open_nursery() as nursery:
        handler = partial(_serve, endpoints, trio.Semaphore(_CONNECTIONS))
        nursery.start_soon(trio.serve_listeners, handler, listeners)
        if traces is not None:
            nursery.start_soon(Exporter(traces).run)
        name, number = listeners[0].socket.getsockname()[:2]
        log.info("listening on %s port %d", name, number)
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            async for _ in signals:
                nursery.cancel_scope.cancel()
                return


async def _serve(endpoints: Endpoints, free: trio.Semaphore, stream: trio.SocketStream) -> None:
    async with free:
        try:
            await serve_connection(stream, endpoints.answer)
        except Exception:
            log.exception("a connection failed")
