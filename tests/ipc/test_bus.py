"""The bus between peers of one process: where messages go and how they travel."""

from __future__ import annotations

import asyncio
import gc
import os
import time
from pathlib import Path
from typing import Any

import pytest
import uvloop

from ipc import envelope as wire
from ipc.board import Counter, SlotState
from ipc.bus import SURE_BYTES
from ipc.envelope import BROADCAST, DIRECT, Envelope, EnvelopeTooBig
from ipc.interest import InterestKind
from ipc.peer import BusClosed, Peer
from tests.ipc.actors import (
    Inbox,
    got,
    open_peer,
    peers,
    settled,
    sums,
    topic,
)
from tests.support import run, until_async


@pytest.mark.parametrize("runner", [asyncio.run, uvloop.run])
def test_a_message_reaches_whom_it_concerns_and_nobody_else(tmp_path: Path, runner: Any) -> None:
    async def main() -> None:
        async with peers(tmp_path / "hub", 5) as members:
            a, exact, prefix, all_, none = members
            inboxes = [Inbox(peer) for peer in members]
            exact.interest_add(InterestKind.EXACT, "hub", "a/b")
            prefix.interest_add(InterestKind.PREFIX, "hub", "a/")
            all_.interest_add(InterestKind.PREFIX, "hub", "")
            a.interest_add(InterestKind.PREFIX, "hub", "")
            for name in ("a/b", "a/c", "x", "$sys/x"):
                a.publish(topic(name, name.encode()))
            await asyncio.sleep(0)
            await settled(a)
            assert [inbox.data for inbox in inboxes] == [
                [],  # not to itself: its manager delivers locally
                [b"a/b"],
                [b"a/b", b"a/c"],
                [b"a/b", b"a/c", b"x"],
                [],
            ]
            assert got(a, Counter.BUS_SENT) == 6
            assert [got(peer, Counter.BUS_RECEIVED) for peer in members] == [0, 1, 2, 3, 0]

    runner(asyncio.wait_for(main(), 30) if runner is asyncio.run else main())


def test_direct_messages_go_to_the_holders_of_any_and_broadcasts_to_all_with_a_connection(
    tmp_path: Path,
) -> None:
    async def main() -> None:
        async with peers(tmp_path / "hub", 4) as (a, b, c, d):
            inboxes = [Inbox(peer) for peer in (b, c, d)]
            b.interest_add(InterestKind.CONN, "hub", "one")
            c.interest_add(InterestKind.CONN, "hub", "two")
            for peer in (b, d):
                peer.interest_add(InterestKind.CHANNEL, "hub", "")
            d.interest_add(InterestKind.CHANNEL, "other", "")
            a.publish(Envelope(DIRECT, "hub", "", b"1", ("one",)))
            a.publish(Envelope(DIRECT, "hub", "", b"2", ("one", "two", "none")))
            a.publish(Envelope(DIRECT, "hub", "", b"3", ("none",)))
            a.publish(Envelope(BROADCAST, "hub", "", b"4"))
            await asyncio.sleep(0)
            await settled(a)
            assert [inbox.data for inbox in inboxes] == [[b"1", b"2", b"4"], [b"2"], [b"4"]]
            assert inboxes[1].envelopes[0].conn_ids == ("one", "two", "none")

    run(main())


def test_channels_are_apart_and_runs_of_one_are_handed_on_together(tmp_path: Path) -> None:
    async def main() -> None:
        async with peers(tmp_path / "hub", 2) as (a, b):
            hub, other = Inbox(b, "hub"), Inbox(b, "other")
            for channel in ("hub", "other", "unattended"):
                b.interest_add(InterestKind.EXACT, channel, "t")
            for number, channel in enumerate(["hub", "hub", "other", "unattended", "hub", "other", "other"]):
                a.publish(topic("t", b"%d" % number, channel))
            await asyncio.sleep(0)
            await settled(a)
            assert [[envelope.data for envelope in run] for run in hub.runs] == [[b"0", b"1"], [b"4"]]
            assert [[envelope.data for envelope in run] for run in other.runs] == [[b"2"], [b"5", b"6"]]
            b.detach("other")
            a.publish(topic("t", b"7", "other"))
            await asyncio.sleep(0)
            await settled(a)
            assert len(other.runs) == 2
            with pytest.raises(ValueError, match="has a receiver"):
                b.attach("hub", print)

    run(main())


def test_a_confirmed_subscription_misses_nothing(tmp_path: Path) -> None:
    """The bit is set, then the message is published: it arrives, however often that changes."""

    async def main() -> None:
        async with peers(tmp_path / "hub", 3) as (a, b, c):
            inboxes = {b: Inbox(b), c: Inbox(c)}
            expected: dict[Peer, list[bytes]] = {b: [], c: []}
            for number in range(2000):
                peer = (b, c)[number % 2]
                name = f"room/{number % 7}"
                data = b"%d" % number
                peer.interest_add(InterestKind.EXACT, "hub", name)
                a.publish(topic(name, data))
                expected[peer].append(data)
                if number % 3 == 0:
                    await asyncio.sleep(0)
                    peer.interest_discard(InterestKind.EXACT, "hub", name)
            await asyncio.sleep(0)
            await settled(a)
            for peer, inbox in inboxes.items():
                received = set(inbox.data)
                assert not [data for data in expected[peer] if data not in received]

    run(main())


def test_who_wants_nothing_any_more_is_sent_nothing(tmp_path: Path) -> None:
    async def main() -> None:
        async with peers(tmp_path / "hub", 2) as (a, b):
            b.interest_add(InterestKind.EXACT, "hub", "t")
            a.publish(topic("t"))
            await asyncio.sleep(0)
            await settled(a)
            b.interest_discard(InterestKind.EXACT, "hub", "t")
            a.publish(topic("t"))
            await asyncio.sleep(0)
            assert got(a, Counter.BUS_SENT) == 1
            with pytest.raises(ValueError, match="never added"):
                b.interest_discard(InterestKind.EXACT, "hub", "t")

    run(main())


# -- how -------------------------------------------------------------------------------------------------------------


def test_one_turn_is_one_batch_in_order(tmp_path: Path) -> None:
    async def main() -> None:
        async with peers(tmp_path / "hub", 2) as (a, b):
            inbox = Inbox(b)
            b.interest_add(InterestKind.PREFIX, "hub", "")
            for number in range(500):
                a.publish(topic(f"t/{number % 9}", b"%d" % number))
            await asyncio.sleep(0)
            await settled(a)
            assert len(inbox.runs) == 1
            assert inbox.data == [b"%d" % number for number in range(500)]

    run(main())


def test_a_large_turn_is_split_and_a_large_message_goes_alone(tmp_path: Path) -> None:
    async def main() -> None:
        async with peers(tmp_path / "hub", 2) as (a, b):
            inbox = Inbox(b)
            b.interest_add(InterestKind.EXACT, "hub", "t")
            sizes = [100_000] * 10 + [5 * 1024 * 1024] + [10] * 3
            for size in sizes:
                a.publish(topic("t", bytes(size)))
            await asyncio.sleep(0)
            await settled(a)
            assert [len(data) for data in inbox.data] == sizes
            assert max(sum(len(envelope.data) for envelope in run) for run in inbox.runs if len(run) > 1) <= (
                wire.BATCH_TARGET
            )
            largest = topic("t", bytes(wire.MAX_ENVELOPE - 100))
            a.publish(largest)
            await asyncio.sleep(0)
            await settled(a)
            assert inbox.envelopes[-1] == largest
            with pytest.raises(EnvelopeTooBig):
                a.publish(topic("t", bytes(wire.MAX_ENVELOPE)))

    run(main())


def test_alone_on_the_bus_what_cannot_travel_is_refused_all_the_same(tmp_path: Path) -> None:
    async def main() -> None:
        async with peers(tmp_path / "hub", 1) as (a,):
            await until_async(lambda: time.monotonic() < a.bus.outbound.alone_until)
            # Or it would be found out with the second worker; then as if somebody might have come since the last look.
            for until in (a.bus.outbound.alone_until, 0.0):
                a.bus.outbound.alone_until = until
                a.publish(topic("t"))
                with pytest.raises(EnvelopeTooBig):
                    a.publish(topic("t", bytes(wire.MAX_ENVELOPE)))
                with pytest.raises(ValueError, match="surrogates"):
                    a.publish(topic("\ud800"))
            # What might fail to be encoded is encoded at once.
            a.publish(topic("é"))
            a.publish(topic("t" * (SURE_BYTES + 1)))
            assert [encoded is None for _, encoded in a.bus._turn] == [True, False, False]

    run(main())


def test_a_receiver_that_fails_is_logged_and_stops_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with peers(tmp_path / "hub", 2) as (a, b):
            calls = []

            def deliver(envelopes: list[Envelope]) -> None:
                calls.append(envelopes)
                raise RuntimeError("of the user")

            b.attach("hub", deliver)
            b.interest_add(InterestKind.EXACT, "hub", "t")
            for _ in range(3):
                a.publish(topic("t"))
                await asyncio.sleep(0)
            await settled(a)
            assert sum(map(len, calls)) == 3
            assert got(b, Counter.BUS_RECEIVED) == 3

    run(main())
    assert "of the user" in caplog.text


def test_a_closed_peer_refuses_and_leaves_nothing(tmp_path: Path) -> None:
    async def main() -> int:
        a, b = await open_peer(tmp_path / "hub"), await open_peer(tmp_path / "hub")
        inbox = Inbox(b)
        b.interest_add(InterestKind.EXACT, "hub", "t")
        a.publish(topic("t", b"last words"))
        await a.close()
        assert inbox.data == [b"last words"], "what was published before the close arrives"
        with pytest.raises(BusClosed):
            a.publish(topic("t"))
        board = b.runtime.board
        assert board.record(a.slot).state is SlotState.FREE
        totals = sums(board)
        assert totals[Counter.BUS_DROPPED] == 0
        assert totals[Counter.BUS_SENT] == totals[Counter.BUS_RECEIVED] == 1
        await b.close()
        gc.collect()
        return len(os.listdir("/proc/self/fd"))

    first = run(main())
    assert max(run(main()) for _ in range(4)) <= first
    assert sorted(os.listdir(tmp_path / "hub")) == ["board", "lock"]


def test_who_is_behind_and_publishes_reads_no_more_in_a_turn_than_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a turn may take in is bounded; a turn that also sends looks once more, but starts no reading of its own."""

    async def main() -> None:
        async with peers(tmp_path / "hub", 2) as (a, b):
            b.interest_add(InterestKind.EXACT, "hub", "t")
            reads = 0

            def behind() -> bool:
                nonlocal reads
                reads += 1
                return True

            monkeypatch.setattr(a.bus.inbound, "read", behind)
            a.bus._on_inbox()
            most = 0
            for _ in range(50):
                a.bus._looks = 4
                a.publish(topic("t"))
                reads = 0
                await asyncio.sleep(0)
                most = max(most, reads)
            assert 1 <= most <= 2
            monkeypatch.undo()

    run(main())
