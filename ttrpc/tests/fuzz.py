# SPDX-License-Identifier: Apache-2.0
"""A fuzzer of the frame parser: ``python -m ttrpc.tests.fuzz [--seconds N] [--seed N]``.

Mutated conversations are fed in random pieces to both roles. Only a ProtocolError may come out,
and what the parser holds stays within its bounds. A failing seed is printed and can be repeated.
"""

from __future__ import annotations

import argparse
import itertools
import random
import struct
import sys
import time
import traceback

from ttrpc.errors import ProtocolError, RpcError
from ttrpc.protocol import Connection, RequestReceived, Role

LIMIT = 2000


def conversation(rng: random.Random) -> bytes:
    """Well-formed frames of a client or a server, with a few that are at their limits."""
    client = Connection(Role.CLIENT, max_message=1 << 20)
    server = Connection(Role.SERVER, max_message=1 << 20)
    from_server = bytearray()
    from_client = bytearray()
    for _ in range(rng.randint(1, 6)):
        size = rng.choice((0, 1, 100, LIMIT - 30, LIMIT, LIMIT + 1, 3 * LIMIT))
        stream_id = client.send_request(
            rng.choice(("", "s", "pykata.test.Echo")),
            "Method",
            rng.randbytes(size),
            timeout_nano=rng.choice((0, 1, 1 << 62)),
            metadata=[("key", "value")] * rng.randint(0, 3),
            more=rng.random() < 0.5,
        )
        for _ in range(rng.randint(0, 3)):
            client.send_message(stream_id, rng.randbytes(rng.randint(0, 50)))
        if rng.random() < 0.7:
            client.close_send(stream_id)
        wire = client.data_to_send()
        from_client += wire
        for event in server.receive_data(wire):
            if not isinstance(event, RequestReceived):
                continue
            for _ in range(rng.randint(0, 3)):
                server.send_message(event.stream_id, rng.randbytes(rng.randint(0, 50)))
            if rng.random() < 0.5:
                server.close_send(event.stream_id)
            else:
                code = rng.randint(0, 20)
                server.send_response(event.stream_id, rng.randbytes(rng.randint(0, 90)), code, "?")
        from_server += server.data_to_send()
    return bytes(rng.choice((from_client, from_server)))


def mutate(rng: random.Random, data: bytes) -> bytes:
    """A few changes: bytes, bits, lengths, cuts, repetitions, insertions."""
    out = bytearray(data)
    for _ in range(rng.randint(0, 5)):
        pos = rng.randrange(len(out) + 1)
        choice = rng.randrange(6)
        if choice == 0 and pos < len(out):
            out[pos] = rng.randrange(256)
        elif choice == 1 and pos < len(out):
            out[pos] ^= 1 << rng.randrange(8)
        elif choice == 2:
            del out[pos : pos + rng.randint(1, 20)]
        elif choice == 3:
            out[pos:pos] = out[pos : pos + rng.randint(1, 50)]
        elif choice == 4:
            out[pos:pos] = rng.randbytes(rng.randint(1, 20))
        else:
            length = rng.choice((0, 1, LIMIT, LIMIT + 1, 1 << 20, 1 << 24, (1 << 32) - 1))
            kind, flags = rng.randrange(5), rng.randrange(8)
            out[pos:pos] = struct.pack(">IIBB", length, rng.randrange(12), kind, flags)
    return bytes(out)


def run_once(seed: int) -> None:
    """One case, all of it from the seed.

    Raises:
        AssertionError: a bound doesn't hold; anything else but ProtocolError: a bug too.
    """
    rng = random.Random(seed)
    data = mutate(rng, conversation(rng))
    role = rng.choice([Role.CLIENT, Role.SERVER])
    connection = Connection(role, max_message=LIMIT, max_streams=4, max_request_bytes=4 * LIMIT)
    if role is Role.CLIENT:
        for more in (True, False, True, False):
            connection.send_request("s", "m", b"", streaming=True, more=more)
        connection.data_to_send()
    pos = 0
    try:
        while pos < len(data):
            step = rng.choice((1, 9, 10, 11, 500, 65536))
            events = connection.receive_data(data[pos : pos + step])
            pos += step
            assert len(events) <= step // 10 + 2, "more events than frames"
            assert len(connection._partial) <= LIMIT + 10, "too much is kept"
            assert connection.in_flight <= 4, "too much is in flight"
            assert 0 <= connection._request_bytes <= 4 * LIMIT, "requests are miscounted"
            assert set(connection._open) <= set(connection._active), "an open stream is unknown"
            assert len(connection.data_to_send()) <= (step + 20) * 20, "answers are amplified"
            for event in events:
                if isinstance(event, RequestReceived) and rng.random() < 0.5:
                    connection.send_response(event.stream_id, b"answer")
        connection.receive_eof()
    except (ProtocolError, RpcError):
        assert connection.in_flight == 0, "streams outlive the connection"


def main() -> int:
    """Run for a time; the seeds count up from a first one."""
    parser = argparse.ArgumentParser(prog="python -m ttrpc.tests.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, help="repeat this one case")
    parser.add_argument("--first", type=int, default=random.SystemRandom().randrange(1 << 48))
    args = parser.parse_args()
    if args.seed is not None:
        run_once(args.seed)
        return 0
    end = time.monotonic() + args.seconds
    for number in itertools.count():
        if number % 100 == 0 and time.monotonic() > end:
            print(f"{number} cases from seed {args.first}: no failure")
            return 0
        try:
            run_once(args.first + number)
        except Exception:
            traceback.print_exc()
            print(f"failed: --seed {args.first + number}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
