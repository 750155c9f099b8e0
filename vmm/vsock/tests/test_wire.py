# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm.vsock import wire
from vmm.vsock.wire import Connection, Outcome, State


def opened(buf_alloc: int = 1000, peer: int = 1000) -> Connection:
    connection = Connection(3, 1024, 5000, buf_alloc)
    connection.request()
    assert ops(connection) == [wire.OP_REQUEST]
    assert connection.receive(wire.OP_RESPONSE, 0, 0, peer, 0) is Outcome.OPENED
    return connection


def ops(connection: Connection) -> list[int]:
    found = []
    while (packet := connection.next_control()) is not None:
        found.append(wire.HEADER.unpack(packet)[6])
    return found


def test_header_is_44_bytes_with_the_fields_in_place() -> None:
    connection = opened()
    connection.forwarded(10)
    header = connection.data_header(7)
    assert len(header) == wire.HEADER_SIZE == 44
    assert wire.HEADER.unpack(header) == (2, 3, 5000, 1024, 7, 1, wire.OP_RW, 0, 1000, 10)


def test_credit_follows_what_the_guest_tells() -> None:
    connection = opened(peer=100)
    assert connection.credit() == 100
    connection.data_header(60)
    assert connection.credit() == 40
    connection.receive(wire.OP_CREDIT_UPDATE, 0, 0, 100, 60)
    assert connection.credit() == 100


def test_credit_counters_wrap_at_32_bits() -> None:
    connection = opened(peer=1 << 20)
    connection.tx_cnt = connection.peer_fwd_cnt = (1 << 32) - 10
    connection.data_header(100)
    assert connection.tx_cnt == 90
    assert connection.credit() == (1 << 20) - 100
    connection.rx_cnt = connection.fwd_cnt = connection.advertised = (1 << 32) - 1
    assert connection.receive(wire.OP_RW, 0, 900, 1 << 20, 0) is Outcome.DATA
    connection.forwarded(900)
    assert connection.fwd_cnt == 899


def test_a_guest_that_claims_to_have_read_more_than_was_sent_gets_nothing() -> None:
    connection = opened(peer=100)
    connection.receive(wire.OP_CREDIT_UPDATE, 0, 0, 100, 5)
    assert connection.credit() == 0


def test_credit_update_once_half_of_the_smaller_window_is_free() -> None:
    connection = opened(buf_alloc=1000, peer=400)
    connection.receive(wire.OP_RW, 0, 300, 400, 0)
    connection.forwarded(199)
    assert ops(connection) == []
    connection.forwarded(1)
    assert ops(connection) == [wire.OP_CREDIT_UPDATE]


def test_data_tells_the_credit_too() -> None:
    connection = opened()
    connection.receive(wire.OP_RW, 0, 600, 1000, 0)
    connection.forwarded(600)
    connection.data_header(1)
    assert ops(connection) == []


def test_credit_request_is_answered() -> None:
    connection = opened()
    assert connection.receive(wire.OP_CREDIT_REQUEST, 0, 0, 1000, 0) is Outcome.NOTHING
    assert ops(connection) == [wire.OP_CREDIT_UPDATE]


@pytest.mark.parametrize(
    ("op", "flags", "length"),
    [
        (wire.OP_REQUEST, 0, 0),
        (wire.OP_RESPONSE, 0, 0),
        (wire.OP_RW, 0, 1001),
        (wire.OP_SHUTDOWN, 0, 0),
        (0, 0, 0),
        (8, 0, 0),
        (0xFFFF, 0, 0),
    ],
)
def test_what_makes_no_sense_resets_the_connection(op: int, flags: int, length: int) -> None:
    connection = opened()
    assert connection.receive(op, flags, length, 1000, 0) is Outcome.CLOSED
    assert connection.state is State.CLOSED
    assert ops(connection) == [wire.OP_RST]


def test_data_after_the_end_of_the_stream_resets() -> None:
    connection = opened()
    assert connection.receive(wire.OP_SHUTDOWN, 2, 0, 1000, 0) is Outcome.SHUTDOWN
    assert connection.receive(wire.OP_RW, 0, 1, 1000, 0) is Outcome.CLOSED


def test_guest_that_ended_both_ways_gets_its_reset() -> None:
    connection = opened()
    connection.receive(wire.OP_SHUTDOWN, wire.SHUTDOWN_SEND, 0, 1000, 0)
    assert connection.credit() == 1000
    connection.receive(wire.OP_SHUTDOWN, wire.SHUTDOWN_RCV, 0, 1000, 0)
    assert connection.state is State.CLOSED
    assert ops(connection) == [wire.OP_RST]


def test_host_half_close_then_full() -> None:
    connection = opened()
    connection.shutdown(wire.SHUTDOWN_SEND)
    assert ops(connection) == [wire.OP_SHUTDOWN]
    connection.shutdown(wire.SHUTDOWN_SEND)
    assert ops(connection) == []
    connection.shutdown(wire.SHUTDOWN_BOTH)
    assert wire.HEADER.unpack(connection.next_control() or b"")[6:8] == (wire.OP_SHUTDOWN, 3)


def test_nothing_is_owed_to_a_guest_that_reset() -> None:
    connection = opened()
    connection.shutdown(wire.SHUTDOWN_SEND)
    connection.receive(wire.OP_RST, 0, 0, 0, 0)
    assert not connection.owes()
    connection.reset()
    assert ops(connection) == []


packet = st.tuples(
    st.integers(0, 9),
    st.integers(0, 7),
    st.integers(0, 3000),
    st.integers(0, (1 << 32) - 1),
    st.integers(0, (1 << 32) - 1),
)


@given(st.lists(st.one_of(packet, st.integers(0, 2000)), max_size=60))
def test_no_sequence_of_packets_breaks_it(steps: list[tuple[int, ...] | int]) -> None:
    """Whatever comes: no exception, buffered bytes within the credit, CLOSED is final."""
    connection = opened()
    buffered = 0
    for step in steps:
        closed = connection.state is State.CLOSED
        if isinstance(step, int):
            count = min(step, buffered)
            buffered -= count
            connection.forwarded(count)
        else:
            op, flags, length, alloc, fwd = step
            outcome = connection.receive(op, flags, length, alloc, fwd)
            if outcome is Outcome.DATA:
                buffered += length
            assert not closed or outcome is Outcome.NOTHING
        assert buffered <= connection.buf_alloc
        assert 0 <= connection.credit() <= connection.peer_buf_alloc
        assert not closed or connection.state is State.CLOSED
        ops(connection)


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 500)), max_size=200))
def test_an_honest_peer_never_runs_dry_or_over(steps: list[tuple[bool, int]]) -> None:
    """Two ends of ours: with the rules kept nobody is reset, and when everything has been
    forwarded at least half of the window is open again."""
    host, guest = opened(1000, 1000), opened(1000, 1000)
    waiting = 0
    for send, most in steps:
        if send:
            count = min(most, guest.credit())
            if count:
                fields = wire.HEADER.unpack(guest.data_header(count))
                assert host.receive(wire.OP_RW, 0, count, *fields[8:]) is Outcome.DATA
                waiting += count
        else:
            count = min(most, waiting)
            waiting -= count
            host.forwarded(count)
        while (update := host.next_control()) is not None:
            fields = wire.HEADER.unpack(update)
            guest.receive(fields[6], fields[7], 0, *fields[8:])
    host.forwarded(waiting)
    while (update := host.next_control()) is not None:
        fields = wire.HEADER.unpack(update)
        guest.receive(fields[6], fields[7], 0, *fields[8:])
    assert guest.credit() > 500
