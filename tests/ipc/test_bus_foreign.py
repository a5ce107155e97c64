"""What comes in and is not ours: counted, dropped, and no harm done."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest
import zmq
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ipc import envelope as wire
from ipc.board import Counter, PeerKind
from ipc.envelope import Envelope, FrameKind
from ipc.inbound import Inbound
from ipc.interest import InterestKind
from ipc.peer import Peer
from ipc.runtime import RuntimeDir, inbox_name
from tests.ipc.actors import (
    Inbox,
    got,
    peers,
    settled,
    topic,
)
from tests.support import run, until_async


class Stranger:
    """Connects to a peer's inbox and sends what it likes."""

    def __init__(self, peer: Peer) -> None:
        self.peer = peer
        self.to = wire.destination(peer.slot, peer.epoch)
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.socket = self.context.socket(zmq.XPUB)
        self.socket.setsockopt(zmq.SNDHWM, 0)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.connect(f"ipc://{peer.runtime.path}/{inbox_name(peer.slot, peer.epoch)}")

    async def send(self, *messages: bytes) -> None:
        await until_async(lambda: self.socket.poll(0) or self.subscribed)
        if not self.subscribed:
            self.socket.recv()
            self.subscribed = True
        for message in messages:
            self.socket.send(message)

    subscribed = False

    def close(self) -> None:
        self.socket.close(0)
        self.context.term()


def bad_messages(peer: Peer, known: Peer) -> list[tuple[bytes, int]]:
    """(what is sent, how many it counts for)."""
    to = wire.destination(peer.slot, peer.epoch)
    slot, epoch = known.slot, known.epoch
    good = wire.encode(topic("t"))
    whole = wire.data_frame(to, slot, epoch, 0, 1, 100, good)
    return [
        (to, 1),
        (whole[:20], 1),
        (to + bytes(100), 1),
        (whole[:8] + b"\x07" + whole[9:], 1),
        (wire.data_frame(to, 200, 5, 0, 1, 100, good), 1),
        (wire.data_frame(to, slot, epoch + 1, 0, 3, 100, good * 3), 3),
        (wire.data_frame(to, 999, 1, 0, 1, 100, good), 1),
        (to + os.urandom(500), 1),
        (whole + bytes(wire.MAX_FRAME), 1),
    ]


def test_what_is_not_ours_is_counted_and_dropped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with peers(tmp_path / "hub", 2) as (a, b):
            inbox = Inbox(b)
            b.interest_add(InterestKind.EXACT, "hub", "t")
            stranger = Stranger(b)
            messages = bad_messages(b, a)
            for _ in range(3):
                await stranger.send(*[message for message, _ in messages])
            expected = 3 * sum(count for _, count in messages)
            await until_async(lambda: got(b, Counter.BUS_INVALID) >= expected)
            assert got(b, Counter.BUS_INVALID) == expected
            a.publish(topic("t", b"still here"))
            await asyncio.sleep(0)
            await settled(a)
            assert inbox.data == [b"still here"]
            assert got(b, Counter.BUS_GAPS) == 0
            stranger.close()

    with caplog.at_level(logging.WARNING, "ipc"):
        run(main())
    assert 2 <= caplog.text.count("dropped from the bus") <= 9, "once per sender"


def test_a_bad_envelope_costs_its_neighbours_nothing(tmp_path: Path) -> None:
    async def main() -> None:
        async with peers(tmp_path / "hub", 2) as (a, b):
            inbox = Inbox(b)
            stranger = Stranger(b)
            body = b"".join([wire.encode(topic("t", b"1")), b"\xa5wrong", wire.encode(topic("t", b"2"))])
            await stranger.send(wire.data_frame(stranger.to, a.slot, a.epoch, 0, 3, 0, body))
            await until_async(lambda: len(inbox.data) == 2)
            assert inbox.data == [b"1", b"2"]
            assert got(b, Counter.BUS_INVALID) == 1
            await stranger.send(wire.data_frame(stranger.to, a.slot, a.epoch, 3, 4, 0, body[:5]))
            await until_async(lambda: got(b, Counter.BUS_INVALID) == 5)
            await stranger.send(wire.data_frame(stranger.to, a.slot, a.epoch, 3, 1, 0, body[:5]))
            await until_async(lambda: got(b, Counter.BUS_INVALID) == 6)
            stranger.close()

    run(main())


def test_no_bytes_at_all_end_the_inbox(tmp_path: Path) -> None:
    """S24: frames of any bytes, and real ones with any bytes changed."""
    runtime, slot = RuntimeDir.join(str(tmp_path / "hub"), PeerKind.APPLICATION)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    inbound = Inbound(runtime, slot, context)
    received: list[Envelope] = []
    inbound.attach("hub", received.extend)
    sender = runtime.claim(PeerKind.PUBLISHER)
    record = runtime.board.record(slot)
    whole = wire.data_frame(
        wire.destination(slot, 1), sender, 1, 0, 2, 100, wire.encode(topic("t")) + wire.encode(topic("u"))
    )

    def checked(body: bytes) -> bytes:
        return wire.data_frame(wire.destination(slot, 1), sender, 1, numbers.pop(), 1, 0, body)

    numbers = list(range(1_000_000, 0, -1))
    changed = st.builds(
        lambda at, new: whole[:at] + new + whole[at + len(new) :],
        st.integers(0, len(whole)),
        st.binary(max_size=4),
    )

    @settings(max_examples=500, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(st.one_of(st.binary(max_size=100), changed, st.binary(max_size=60).map(checked)))
    def any_bytes(message: bytes) -> None:
        before = record.get(Counter.BUS_INVALID), len(received)
        inbound._take_in(message)
        control = len(message) > 9 and 0 < message[9] <= FrameKind.BYE_ACK
        assert control or before < (record.get(Counter.BUS_INVALID), len(received))

    any_bytes()
    inbound.close()
    context.term()
    runtime.close()


def test_a_late_batch_of_a_predecessor_is_delivered_but_gives_it_no_credit(tmp_path: Path) -> None:
    async def main() -> None:
        async with peers(tmp_path / "hub", 2) as (a, b):
            inbox = Inbox(b)
            runtime = a.runtime
            sender = runtime.claim(PeerKind.PUBLISHER)
            runtime.free(sender)
            runtime.claim(PeerKind.PUBLISHER, slot=sender)
            to = wire.destination(b.slot, b.epoch)

            def batch(epoch: int, number: int, data: bytes) -> bytes:
                return wire.data_frame(
                    to, sender, epoch, number, 1, (number + 1) * 100, wire.encode(topic("t", data))
                )

            cell = runtime.board.credit_index(b.slot, sender)
            b.bus.inbound._take_in(batch(1, 0, b"old 0"))
            b.bus.inbound._take_in(batch(2, 0, b"new 0"))
            credit = runtime.board.words[cell]
            b.bus.inbound._take_in(batch(1, 1, b"old 1"))
            assert inbox.data == [b"old 0", b"new 0", b"old 1"]
            assert runtime.board.words[cell] == credit == 2 << 48 | 100
            assert got(b, Counter.BUS_GAPS) == got(b, Counter.BUS_INVALID) == 0

    run(main())


def test_no_coroutine_is_left(tmp_path: Path) -> None:
    async def main() -> None:
        async with peers(tmp_path / "hub", 3):
            pass
        assert asyncio.all_tasks() == {asyncio.current_task()}

    coroutine: Coroutine[Any, Any, None] = main()
    run(coroutine)
