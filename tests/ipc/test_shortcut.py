"""The short way beside the mesh: what takes it, that order is kept where both ways are used, and what does no harm."""

from __future__ import annotations

import asyncio
import os
import random
import resource
import socket
from pathlib import Path

import pytest

from ipc import envelope as wire
from ipc.board import Counter
from ipc.descriptors import RESERVED
from ipc.interest import InterestKind
from ipc.peer import Peer
from ipc.runtime import RuntimeDir, shortcut_name
from ipc.shortcut import MAX_BYTES, Shortcut, ShortcutEnd
from tests.ipc.actors import Inbox, got, open_peer, peers, read_again, settled, stop_reading, sums, topic
from tests.support import run, until_async


class Ways:
    """Counts the frames that leave each way."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.short = self.refused = 0
        send = Shortcut.send

        def counted(shortcut: Shortcut, frame: bytes) -> bool:
            taken = send(shortcut, frame)
            self.short += taken
            self.refused += not taken
            return taken

        monkeypatch.setattr(Shortcut, "send", counted)


@pytest.fixture(name="ways")
def counted_ways(monkeypatch: pytest.MonkeyPatch) -> Ways:
    return Ways(monkeypatch)


def path_of(peer: Peer) -> Path:
    return Path(peer.runtime.path, shortcut_name(peer.slot, peer.epoch))


def test_small_batches_take_it_and_large_ones_do_not(tmp_path: Path, ways: Ways) -> None:
    async def main() -> None:
        async with peers(tmp_path / "hub", 2) as (a, b):
            inbox = Inbox(b)
            b.interest_add(InterestKind.EXACT, "hub", "t")
            for number, size in enumerate((100, 10_000, MAX_BYTES, 200_000, 100)):
                a.publish(topic("t", b"%d " % number + bytes(size)))
                await asyncio.sleep(0)
                await settled(a)
            assert [int(data.split()[0]) for data in inbox.data] == [0, 1, 2, 3, 4]
            assert (ways.short, ways.refused) == (3, 2)

    run(main())


def test_what_went_short_comes_before_what_followed_through_the_mesh(tmp_path: Path, ways: Ways) -> None:
    """The receiver meets the mesh first, and finds there what is later."""

    async def main() -> None:
        async with peers(tmp_path / "hub", 2) as (a, b):
            inbox = Inbox(b)
            b.interest_add(InterestKind.EXACT, "hub", "t")
            stop_reading(b)
            for number in range(5):
                a.publish(topic("t", b"%d" % number))
                await asyncio.sleep(0)
            a.publish(topic("t", b"5" + bytes(200_000)))
            await asyncio.sleep(0)
            assert (ways.short, ways.refused) == (5, 1)
            a.publish(topic("t", b"6"))
            await asyncio.sleep(0)
            assert ways.short == 5, "not while something may still be in the mesh"
            await until_async(b.bus.inbound._readable)
            while len(inbox.data) < 7:
                b.bus._on_inbox()
                await asyncio.sleep(0)
            assert [int(data[:1]) for data in inbox.data] == list(range(7))
            assert got(b, Counter.BUS_GAPS) == 0
            await asyncio.sleep(0)
            await settled(a)
            a.publish(topic("t", b"7"))
            await asyncio.sleep(0)
            b.bus.inbound.read_shortcut()
            assert len(inbox.data) == 8
            assert ways.short == 6, "and then again"
            read_again(b)

    run(main())


@pytest.mark.parametrize("seed", range(6))
def test_order_is_kept_whatever_goes_which_way(tmp_path: Path, ways: Ways, seed: int) -> None:
    """Bursts that the kernel has no room for, large ones between small ones, a receiver that stops and goes on."""
    generator = random.Random(seed)

    async def main() -> None:
        async with peers(tmp_path / "hub", 4) as (*senders, b):
            inbox = Inbox(b)
            b.interest_add(InterestKind.EXACT, "hub", "t")
            number = [0, 0, 0]
            for _ in range(60):
                if generator.random() < 0.2:
                    stop_reading(b)
                    paused = True
                else:
                    paused = False
                for _ in range(generator.randrange(1, 25)):
                    which = generator.randrange(3)
                    for _ in range(generator.choice((1, 1, 1, 5))):
                        size = generator.choice((10, 10, 10, 1000, 40_000, 100_000))
                        senders[which].publish(topic("t", b"%d %d " % (which, number[which]) + bytes(size)))
                        number[which] += 1
                    await asyncio.sleep(0)
                if paused:
                    read_again(b)
                if generator.random() < 0.5:
                    await settled(*senders)
            await settled(*senders)
            seen: list[list[int]] = [[], [], []]
            for data in inbox.data:
                sender, place = map(int, data.split()[:2])
                seen[sender].append(place)
            assert seen == [list(range(count)) for count in number]
            totals = sums(b.runtime.board)
            assert totals[Counter.BUS_GAPS] == totals[Counter.BUS_DROPPED] == totals[Counter.BUS_INVALID] == 0
            assert ways.short > 50 and ways.refused > 50

    run(main())


def test_what_is_not_ours_is_counted_and_does_no_harm(tmp_path: Path) -> None:
    async def main() -> None:
        async with peers(tmp_path / "hub", 2) as (a, b):
            inbox = Inbox(b)
            b.interest_add(InterestKind.EXACT, "hub", "t")
            to = wire.destination(b.slot, b.epoch)
            good = wire.encode(topic("t"))
            whole = wire.data_frame(to, a.slot, a.epoch, 0, 1, 100, good)
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as stranger:
                stranger.connect(str(path_of(b)))
                bad = (b"x", whole[:20], os.urandom(500), whole[:8] + b"\7" + whole[9:], os.urandom(100_000))
                for count, message in enumerate(bad, 1):
                    stranger.send(b"")
                    stranger.send(message)
                    await until_async(lambda count=count: got(b, Counter.BUS_INVALID) >= 2 * count)  # type: ignore[misc]
            assert got(b, Counter.BUS_INVALID) == 2 * len(bad)
            a.publish(topic("t", b"1"))
            await asyncio.sleep(0)
            await settled(a)
            assert inbox.data == [b"1"]

    run(main())


def test_without_it_everything_goes_through_the_mesh(tmp_path: Path, ways: Ways) -> None:
    async def main() -> None:
        a = await open_peer(tmp_path / "hub")
        b = await open_peer(tmp_path / "hub")
        path_of(b).unlink()
        c = await open_peer(tmp_path / "hub")
        inbox = Inbox(b)
        b.interest_add(InterestKind.EXACT, "hub", "t")
        for number in range(50):
            c.publish(topic("t", b"%d" % number))
            await asyncio.sleep(0)
        await asyncio.sleep(0)
        await settled(c)
        assert inbox.data == [b"%d" % number for number in range(50)]
        assert ways.short == 0
        a.publish(topic("t", b"last"))
        await asyncio.sleep(0)
        await settled(a)
        assert ways.short == 1, "who had opened it before has it still"
        for peer in (a, b, c):
            await peer.close()

    run(main())


def test_nothing_of_it_is_left(tmp_path: Path) -> None:
    async def main() -> None:
        async with peers(tmp_path / "hub", 3) as opened:
            assert all(path_of(peer).exists() for peer in opened)
        assert not list((tmp_path / "hub").glob("d*"))

    run(main())


def test_a_file_of_before_the_power_failed_is_replaced(tmp_path: Path) -> None:
    with RuntimeDir.open(str(tmp_path / "hub")) as runtime:
        for _ in range(2):
            end = ShortcutEnd(runtime, 3, 1)
            end._socket.close()
        end = ShortcutEnd(runtime, 3, 1)
        shortcut = Shortcut.open(runtime, 3, 1)
        assert shortcut is not None and shortcut.send(b"frame")
        assert (end.receive(), end.receive()) == (b"frame", None)
        end.close()
        assert not shortcut.send(b"frame"), "nobody is there"
        shortcut.close()


@pytest.mark.parametrize("foreign", [b"", b"nonsense"])
def test_what_a_foreign_program_sends_there_costs_nobody_a_message(tmp_path: Path, foreign: bytes) -> None:
    async def main() -> None:
        async with peers(tmp_path / "hub", 2) as (a, b):
            inbox = Inbox(b)
            b.interest_add(InterestKind.EXACT, "hub", "t")
            stop_reading(b)
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
                sender.connect(str(path_of(b)))
                sender.send(foreign)
            for number in range(5):
                a.publish(topic("t", b"%d " % number))
                await asyncio.sleep(0)
            a.publish(topic("t", b"5 " + bytes(200_000)))  # through the mesh, and read first
            await until_async(b.bus.inbound._readable)
            b.bus._on_inbox()
            read_again(b)
            await settled(a)
            assert [int(data.split()[0]) for data in inbox.data] == [0, 1, 2, 3, 4, 5]
            assert (got(b, Counter.BUS_GAPS), got(b, Counter.BUS_INVALID)) == (0, 1)

    run(main())


def test_the_mesh_makes_nobody_read_more_of_it_than_order_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each sender says a few times a second how far it is: that must not read all that others have sent meanwhile."""

    async def main() -> None:
        async with peers(tmp_path / "hub", 3) as (a, b, c):
            inbox = Inbox(c)
            c.interest_add(InterestKind.EXACT, "hub", "t")
            stop_reading(c)
            for number in range(4):
                b.publish(topic("t", b"%d" % number))
                await asyncio.sleep(0)
            a.bus.outbound.control(a.bus.outbound.links[c.slot, c.epoch], wire.FrameKind.TAIL)
            await until_async(c.bus.inbound._readable)
            c.bus._on_inbox()
            assert inbox.data == []
            read_again(c)
            await settled(b)
            assert inbox.data == [b"0", b"1", b"2", b"3"]

    run(main())


def test_the_last_descriptors_are_left_to_zeromq(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with RuntimeDir.open(str(tmp_path / "hub")) as runtime:
        end = ShortcutEnd(runtime, 3, 1)
        monkeypatch.setattr(resource, "getrlimit", lambda which: (end.fd + 1, end.fd + 1))
        assert Shortcut.open(runtime, 3, 1) is None
        monkeypatch.setattr(resource, "getrlimit", lambda which: (end.fd + RESERVED + 20,) * 2)
        opened = Shortcut.open(runtime, 3, 1)
        assert opened is not None
        opened.close()
        end.close()
