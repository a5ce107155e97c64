"""Joining and leaving the bus: ready means connected, and nothing is left of the dead."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ipc.board import Counter, PeerKind, SlotState
from ipc.interest import InterestKind
from ipc.peer import Peer
from ipc.rules import Rules, TopicRule
from ipc.runtime import RulesMismatch, RuntimeDir
from tests.ipc.actors import (
    Inbox,
    die,
    open_peer,
    peers,
    settled,
    state,
    stop_reading,
    sums,
    topic,
)
from tests.support import run, until_async


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


def test_a_process_that_ends_without_closing_leaves_no_slot_and_no_inbox(tmp_path: Path) -> None:
    code = """
import asyncio, sys
from ipc.peer import Peer, PeerKind
loop = asyncio.new_event_loop()
peer = loop.run_until_complete(Peer.open(sys.argv[1], kind=PeerKind.APPLICATION))
if sys.argv[2] == "closed":
    loop.close()
sys.exit(0)
"""
    for loop in ("open", "closed"):
        command = [sys.executable, "-c", code, str(tmp_path / "hub"), loop]
        done = subprocess.run(command, timeout=30, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
        assert sorted(os.listdir(tmp_path / "hub")) == ["board", "lock"]
        with RuntimeDir.open(str(tmp_path / "hub")) as runtime:
            assert runtime.open_board().used_slots() == []


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


def test_who_is_alone_looks_again_after_each_heartbeat(tmp_path: Path) -> None:
    """Alone, nothing is kept for anybody; from a joiner's first moment on everything is."""

    async def main() -> None:
        async with peers(tmp_path / "hub", 1) as (a,):
            outbound = a.bus.outbound
            await until_async(lambda: outbound.alone_until > time.monotonic())
            a.publish(topic("t", b"to nobody"))
            assert not a.bus._turn
            outbound.alone_until = time.monotonic() - 1  # its loop has stood still
            a.publish(topic("t", b"before"))
            assert len(a.bus._turn) == 1
            await asyncio.sleep(0)
            opening = asyncio.ensure_future(open_peer(tmp_path / "hub"))
            number = 0
            while not opening.done():
                a.publish(topic("t", b"%d" % number))
                number += 1
                await asyncio.sleep(0)
            b = await opening
            assert outbound.alone_until == 0.0
            inbox = Inbox(b)
            b.interest_add(InterestKind.EXACT, "hub", "t")
            a.publish(topic("t", b"first"))
            await asyncio.sleep(0)
            await settled(a)
            assert inbox.data == [b"first"]
            await b.close()
            await until_async(lambda: outbound.alone_until > time.monotonic())

    run(main())
