"""Back-pressure, standing still and gaps, between peers of one process."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from ipc.board import Counter
from ipc.envelope import FrameKind
from ipc.interest import InterestKind
from ipc.peer import BusFull
from tests.ipc.actors import (
    Inbox,
    got,
    peers,
    read_again,
    settled,
    stop_reading,
    sums,
    topic,
)
from tests.support import run, until_async


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
