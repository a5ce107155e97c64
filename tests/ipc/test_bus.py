"""The bus between peers of one process: where messages go, how they travel, what bad ones do."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest
import uvloop
import zmq
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ipc import envelope as wire
from ipc.board import Counter, PeerKind, SlotState
from ipc.envelope import BROADCAST, DIRECT, TOPIC, Envelope, EnvelopeTooBig, FrameKind
from ipc.inbound import Inbound
from ipc.interest import InterestKind
from ipc.peer import BusClosed, Peer
from ipc.rules import Rules, TopicRule
from ipc.runtime import RulesMismatch, RuntimeDir, inbox_name
from tests.ipc.actors import Inbox, open_peer, peers, sums
from tests.support import run, until_async


def topic(name: str, data: bytes = b"{}", channel: str = "hub") -> Envelope:
    return Envelope(TOPIC, channel, name, data)


async def settled(*members: Peer) -> None:
    """Everything that was published has been processed."""

    def idle(peer: Peer) -> bool:
        outbound = peer.bus.outbound
        for link in outbound.links.values():
            outbound.read_credit(link)
        return all(link.idle for link in outbound.links.values())

    await until_async(lambda: all(idle(peer) for peer in members))


def state(peer: Peer) -> SlotState:
    return peer.record.state


def got(peer: Peer, counter: Counter) -> int:
    return peer.record.get(counter)


# -- where to --------------------------------------------------------------------------------------------------------


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
            a.publish(topic("t"))
            with pytest.raises(EnvelopeTooBig):
                a.publish(topic("t", bytes(wire.MAX_ENVELOPE)))
            with pytest.raises(ValueError, match="surrogates"):
                a.publish(topic("\ud800"))

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
        return len(os.listdir("/proc/self/fd"))

    counts = [run(main()) for _ in range(5)]
    assert counts == [counts[0]] * 5
    assert sorted(os.listdir(tmp_path / "hub")) == ["board", "lock"]


# -- joining ---------------------------------------------------------------------------------------------------------


def test_publishing_right_after_a_join_loses_nothing_either_way(tmp_path: Path) -> None:
    """R11 on the bus: a hundred times somebody joins and both sides publish in that very turn."""

    async def main() -> None:
        async with peers(tmp_path / "hub", 2) as (a, b):
            inboxes = [Inbox(a), Inbox(b)]
            for peer in (a, b):
                peer.interest_add(InterestKind.EXACT, "hub", "from/new")
            for number in range(100):
                data = b"%d" % number
                new = await open_peer(tmp_path / "hub")
                inbox = Inbox(new)
                new.interest_add(InterestKind.EXACT, "hub", "from/old")
                new.publish(topic("from/new", data))
                a.publish(topic("from/old", b"a" + data))
                b.publish(topic("from/old", b"b" + data))
                await asyncio.sleep(0)
                await settled(a, b, new)
                assert sorted(inbox.data) == [b"a" + data, b"b" + data]
                assert [inbox.data[-1] for inbox in inboxes] == [data, data]
                await new.close()
            assert [len(inbox.data) for inbox in inboxes] == [100, 100]
            totals = sums(a.runtime.board)
            assert totals[Counter.BUS_SENT] == totals[Counter.BUS_RECEIVED] == 400
            assert not totals[Counter.BUS_DROPPED] + totals[Counter.BUS_GAPS] + totals[Counter.BUS_INVALID]

    run(main())


def test_many_join_at_once(tmp_path: Path) -> None:
    async def main() -> None:
        members = await asyncio.gather(*(open_peer(tmp_path / "hub") for _ in range(12)))
        inboxes = [Inbox(peer) for peer in members]
        for peer in members:
            peer.interest_add(InterestKind.EXACT, "hub", "t")
        for peer in members:
            peer.publish(topic("t", b"%d" % peer.slot))
        await asyncio.sleep(0)
        await settled(*members)
        for peer, inbox in zip(members, inboxes, strict=True):
            assert sorted(inbox.data) == sorted(b"%d" % other.slot for other in members if other is not peer)
        await asyncio.gather(*(peer.close() for peer in members))

    run(main())


def test_a_second_open_shares_the_peer(tmp_path: Path) -> None:
    async def main() -> None:
        path = str(tmp_path / "hub")
        rules = Rules(topics={"chat/#": TopicRule(publish="nobody")})
        first, second = await asyncio.gather(
            Peer.open(path, kind=PeerKind.WORKER, listener=3, rules=rules),
            Peer.open(path, kind=PeerKind.APPLICATION),
        )
        assert first is second
        assert first.record.kind is PeerKind.WORKER
        assert first.record.listener == 3
        assert state(first) is SlotState.JOINING
        first.set_state(SlotState.READY)
        with pytest.raises(RulesMismatch, match="nobody"):
            await Peer.open(path, kind=PeerKind.APPLICATION, rules=Rules())
        await first.close()
        second.publish(topic("t"))
        assert state(first) is SlotState.READY
        await second.close()
        third = await Peer.open(path, kind=PeerKind.APPLICATION)
        assert third is not first
        assert third.record.state is SlotState.READY
        await third.close()

    run(main())


def test_other_rules_are_refused_and_no_slot_is_kept(tmp_path: Path) -> None:
    async def main() -> None:
        path = str(tmp_path / "hub")
        with RuntimeDir.supervise(path) as runtime:
            runtime.agree(Rules(anonymous=False))
            for _ in range(2):
                with pytest.raises(RulesMismatch, match="anonymous"):
                    await Peer.open(path, kind=PeerKind.WORKER, rules=Rules())
            peer = await Peer.open(path, kind=PeerKind.WORKER)
            assert peer.rules == Rules(anonymous=False)
            assert runtime.living() == [peer.slot]
            await peer.close()

    run(main())


def test_a_loop_that_was_closed_over_a_peer_does_not_keep_its_slot(tmp_path: Path) -> None:
    async def forget() -> Peer:
        return await Peer.open(str(tmp_path / "hub"), kind=PeerKind.APPLICATION)

    async def again() -> None:
        peer = await Peer.open(str(tmp_path / "hub"), kind=PeerKind.APPLICATION)
        assert peer is not lost
        assert peer.runtime.living() == [peer.slot]
        await peer.close()

    lost = run(forget())
    run(again())


def test_a_directory_that_was_removed_is_told_and_the_next_open_finds_the_new_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        path = tmp_path / "hub"
        old = await Peer.open(str(path), kind=PeerKind.APPLICATION)
        path.rename(tmp_path / "elsewhere")
        await until_async(lambda: "removed or replaced" in caplog.text)
        new = await Peer.open(str(path), kind=PeerKind.APPLICATION)
        assert new is not old
        assert await Peer.open(str(path), kind=PeerKind.APPLICATION) is new
        await old.close()
        assert await Peer.open(str(path), kind=PeerKind.APPLICATION) is new
        for _ in range(3):
            await new.close()

    run(main())


def test_a_successor_in_a_slot_gets_nothing_of_its_predecessors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The predecessor dies with batches under way and in the outbox; the successor has the same slot and interest."""

    async def main() -> None:
        async with peers(tmp_path / "hub", 1, backlog=1 << 20) as (a,):
            b = await open_peer(tmp_path / "hub")
            b.interest_add(InterestKind.EXACT, "hub", "t")
            stop_reading(b)
            for _ in range(60):
                a.publish(topic("t", bytes(100_000)))
            await asyncio.sleep(0)
            die(b)
            claim = RuntimeDir.claim
            slot = b.slot
            monkeypatch.setattr(
                RuntimeDir, "claim", lambda self, kind, listener: claim(self, kind, listener, slot=slot)
            )
            successor = await open_peer(tmp_path / "hub")
            monkeypatch.undo()
            assert (successor.slot, successor.epoch) == (b.slot, b.epoch + 1)
            inbox = Inbox(successor)
            successor.interest_add(InterestKind.EXACT, "hub", "t")
            a.publish(topic("t", b"fresh"))
            await asyncio.sleep(0)
            await settled(a)
            assert inbox.data == [b"fresh"]
            totals = sums(a.runtime.board)
            assert totals[Counter.BUS_DROPPED] == 60
            assert totals[Counter.BUS_SENT] == 61
            assert totals[Counter.BUS_GAPS] == 0
            await successor.close()

    run(main())


def stop_reading(peer: Peer) -> None:
    """As a stopped process: it lives, but takes nothing in and its heart does not beat."""
    bus = peer.bus
    bus._loop.remove_reader(bus.inbound.fd)
    assert bus._tick_timer
    bus._tick_timer.cancel()


def read_again(peer: Peer) -> None:
    peer.bus._loop.add_reader(peer.bus.inbound.fd, peer.bus._on_inbox)
    peer.bus._on_inbox()
    peer.bus._tick()


def die(peer: Peer) -> None:
    """As a killed process: its locks are gone, its record and its inbox stay."""
    bus = peer.bus
    stop_reading(peer)
    bus._loop.remove_reader(bus.outbound.fd)
    bus._open = False
    bus.outbound._socket.close(0)
    bus.inbound._socket.close(0)
    bus._context.term()
    runtime = peer.runtime
    for slot in runtime._mine:
        runtime._locks.unlock(16 + slot)
    runtime._mine.clear()


# -- flow ------------------------------------------------------------------------------------------------------------


def test_a_peer_that_falls_behind_makes_publishers_pause_and_loses_nothing(tmp_path: Path) -> None:
    async def main() -> None:
        async with peers(tmp_path / "hub", 2, backlog=1 << 20) as (a, b):
            inbox = Inbox(b)
            cleared: list[int] = []
            b.interest_add(InterestKind.EXACT, "hub", "t")
            a.on_clear(lambda: cleared.append(0))
            await asyncio.sleep(0)
            assert cleared == [0], "not congested: at once"
            stop_reading(b)
            for number in range(57):
                a.publish(topic("t", b"%d" % number + bytes(100_000)))
                await asyncio.sleep(0)
            assert a.congested
            a.on_clear(lambda: cleared.append(1))
            waiting = asyncio.ensure_future(a.accepted())
            await asyncio.sleep(0.01)
            assert cleared == [0]
            assert not waiting.done()
            assert got(a, Counter.BUS_BACKLOG) > 1 << 20
            read_again(b)
            await asyncio.wait_for(waiting, 10)
            assert cleared == [0, 1]
            assert not a.congested
            await settled(a)
            assert [int(data.rstrip(b"\0")) for data in inbox.data] == list(range(57))
            assert got(a, Counter.BUS_DROPPED) == got(b, Counter.BUS_GAPS) == 0
            await until_async(lambda: got(a, Counter.BUS_BACKLOG) == 0)

    run(main())


def test_who_does_not_pause_is_told_before_memory_runs_out(tmp_path: Path) -> None:
    async def main() -> None:
        from ipc.peer import BusFull

        async with peers(tmp_path / "hub", 2, backlog=1 << 20) as (a, b):
            inbox = Inbox(b)
            b.interest_add(InterestKind.EXACT, "hub", "t")
            await settled(a)
            stop_reading(b)
            taken = 0
            with pytest.raises(BusFull, match="await"):
                for _ in range(10_000):  # all in one turn
                    a.publish(topic("t", bytes(10_000)))
                    taken += 1
            link = next(iter(a.bus.outbound.links.values()))
            assert link.outbox_bytes <= 4 * (1 << 20)
            read_again(b)
            await settled(a)
            assert len(inbox.data) == taken, "what was taken arrives, what was refused does not"

    run(main())


def test_a_peer_that_stands_still_costs_the_others_nothing_and_each_loss_is_counted_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with peers(tmp_path / "hub", 3, backlog=1 << 20) as (a, b, c):
            inboxes = [Inbox(b), Inbox(c)]
            for peer in (b, c):
                peer.interest_add(InterestKind.EXACT, "hub", "t")
            stop_reading(b)
            link = a.bus.outbound.links[b.slot, b.epoch]
            number = 0
            while not link.stalled or number < 400:
                a.publish(topic("t", b"%d" % number + bytes(50_000)))
                number += 1
                await a.accepted()
                await asyncio.sleep(0.001)
            assert not a.congested
            assert link.outbox_bytes <= 1 << 20
            assert got(a, Counter.BUS_DROPPED) > 0
            await until_async(lambda: len(inboxes[1].data) == number)
            read_again(b)
            await settled(a)
            a.publish(topic("t", b"%d" % number))
            await asyncio.sleep(0)
            await settled(a)
            received = [int(data.rstrip(b"\0")) for data in inboxes[0].data]
            assert received == sorted(set(received))
            assert received[-1] == number
            totals = sums(a.runtime.board)
            assert totals[Counter.BUS_DROPPED] == number + 1 - len(received) > 0
            assert totals[Counter.BUS_SENT] - totals[Counter.BUS_RECEIVED] == totals[Counter.BUS_DROPPED]
            assert got(b, Counter.BUS_GAPS) == totals[Counter.BUS_DROPPED], (
                "the receiver knows what it missed"
            )

    run(main())
    assert caplog.text.count("stands still") == 1
    assert caplog.text.count("moves again") == 1


@pytest.mark.parametrize("fraction", [0.3, 1.0])
def test_lost_batches_show_as_gaps_also_at_the_tail(tmp_path: Path, fraction: float) -> None:
    async def main() -> None:
        async with peers(tmp_path / "hub", 2) as (a, b):
            inbox = Inbox(b)
            b.interest_add(InterestKind.EXACT, "hub", "t")
            a.bus.drop_fraction = fraction
            for number in range(100):
                a.publish(topic("t", b"%d" % number))
                await asyncio.sleep(0)
            await until_async(lambda: got(b, Counter.BUS_GAPS) + len(inbox.data) == 100)
            await settled(a)
            assert got(b, Counter.BUS_GAPS) > 0
            assert inbox.data == sorted(inbox.data, key=int)
            a.bus.drop_fraction = 0
            a.publish(topic("t", b"100"))
            await asyncio.sleep(0)
            await settled(a)
            assert inbox.data[-1] == b"100"
            assert got(b, Counter.BUS_INVALID) == 0

    run(main())


def test_nothing_is_repeated_for_ever_to_who_does_not_answer(tmp_path: Path) -> None:
    async def main() -> None:
        async with peers(tmp_path / "hub", 2) as (a, b):
            b.interest_add(InterestKind.EXACT, "hub", "t")
            outbound = a.bus.outbound
            link = outbound.links[b.slot, b.epoch]
            tails: list[float] = []
            control = outbound.control
            now = 1000.0

            def spy(link: Any, kind: FrameKind) -> None:
                tails.append(now)
                control(link, kind)

            outbound.control = spy  # type: ignore[method-assign]
            stop_reading(b)
            a.publish(topic("t"))
            await asyncio.sleep(0)
            for _ in range(400):
                now += 0.25
                outbound._repeat_tail(link, now)
            assert 5 <= len(tails) <= 10
            read_again(b)
            await settled(a)

    run(main())


# -- what is not ours ------------------------------------------------------------------------------------------------


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
        control = len(message) > 9 and message[9] != 0
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
