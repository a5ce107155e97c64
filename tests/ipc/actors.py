"""Peers for the tests of the bus: several in this process, and real ones in processes that obey orders.

``python -m tests.ipc.actors DIRECTORY [BACKLOG]`` opens a peer and obeys one JSON order a line; :class:`Actor` is its
handle in the test's process.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

from ipc.board import Board, Counter, SlotState
from ipc.flow import BACKLOG
from ipc.peer import TOPIC, Envelope, InterestKind, Peer, PeerKind
from ipc.runtime import RuntimeDir
from tests.support import until_async


async def open_peer(path: object, *, backlog: int = BACKLOG, kind: PeerKind = PeerKind.APPLICATION) -> Peer:
    """A peer of its own, where a second ``Peer.open`` in this process would share the first."""
    peer = await Peer._open(str(path), kind, None, None, backlog)
    peer._users = 1
    return peer


@contextlib.asynccontextmanager
async def peers(path: object, count: int, *, backlog: int = BACKLOG) -> AsyncIterator[list[Peer]]:
    """So many peers on this loop; closed at the end, all at once."""
    opened = []
    try:
        for _ in range(count):
            opened.append(await open_peer(path, backlog=backlog))
        yield opened
    finally:
        await asyncio.gather(*(peer.close() for peer in opened if peer.runtime.fd >= 0))


class Inbox:
    """Collects what a peer receives on a channel."""

    def __init__(self, peer: Peer, channel: str = "hub") -> None:
        self.runs: list[list[Envelope]] = []
        peer.attach(channel, self.runs.append)

    @property
    def envelopes(self) -> list[Envelope]:
        return [envelope for run in self.runs for envelope in run]

    @property
    def data(self) -> list[bytes]:
        return [envelope.data for envelope in self.envelopes]


def sums(board: Board) -> dict[Counter, int]:
    """Each counter over all slots, of the living and the dead."""
    return {counter: sum(board.record(slot).get(counter) for slot in range(256)) for counter in Counter}


def read_sums(path: object) -> dict[Counter, int]:
    """The same, without a peer."""
    with RuntimeDir.open(str(path), create=False) as runtime:
        return sums(runtime.open_board())


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


def stop_reading(peer: Peer) -> None:
    """As a stopped process: it lives, but takes nothing in and its heart does not beat."""
    bus = peer.bus
    bus.loop.remove_reader(bus.inbound.fd)
    bus.loop.remove_reader(bus.inbound.shortcut_fd)
    assert bus._tick_timer
    bus._tick_timer.cancel()


def read_again(peer: Peer) -> None:
    peer.bus.loop.add_reader(peer.bus.inbound.fd, peer.bus._on_inbox)
    peer.bus.loop.add_reader(peer.bus.inbound.shortcut_fd, peer.bus._on_shortcut)
    peer.bus._on_inbox()
    peer.bus._tick()


def die(peer: Peer) -> None:
    """As a killed process: its locks are gone, its record and its inbox stay."""
    bus = peer.bus
    stop_reading(peer)
    bus.loop.remove_reader(bus.outbound.fd)
    bus._open = False
    bus.outbound._socket.close(0)
    bus.inbound._socket.close(0)
    bus.inbound._shortcut._socket.close()
    for link in bus.outbound.links.values():
        if link.shortcut is not None:
            link.shortcut.close()
    bus._context.term()
    runtime = peer.runtime
    for slot in runtime._mine:
        runtime._locks.unlock(16 + slot)
    runtime._mine.clear()
    runtime.close()


class Actor:
    """A peer in another process."""

    def __init__(self, path: object, backlog: int = BACKLOG) -> None:
        command = [sys.executable, "-m", "tests.ipc.actors", str(path), str(backlog)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._greeting: dict[str, Any] | None = None

    @property
    def greeting(self) -> dict[str, Any]:
        """What it said when it was on the bus."""
        if self._greeting is None:
            self._greeting = self.answer()
        return self._greeting

    @property
    def slot(self) -> int:
        slot: int = self.greeting["slot"]
        return slot

    def order(self, what: str, **arguments: Any) -> None:
        """Tell it to do something; :meth:`answer` has the result."""
        assert self.process.stdin and self.greeting
        self.process.stdin.write(json.dumps({"what": what, **arguments}) + "\n")
        self.process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout
        line = self.process.stdout.readline()
        assert line, f"the actor ended with {self.process.wait(10)}"
        answer: dict[str, Any] = json.loads(line)
        return answer

    def ask(self, what: str, **arguments: Any) -> dict[str, Any]:
        self.order(what, **arguments)
        return self.answer()

    def want(self, text: str, kind: InterestKind = InterestKind.EXACT) -> None:
        self.ask("want", kind=int(kind), text=text)

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate(timeout=10)


@contextlib.contextmanager
def actors(path: object, count: int, backlog: int = BACKLOG) -> Iterator[list[Actor]]:
    """So many peers in processes of their own, on the bus; killed at the end."""
    started = [Actor(path, backlog) for _ in range(count)]
    try:
        for actor in started:
            assert actor.greeting
        yield started
    finally:
        for actor in started:
            if actor.process.returncode is None:
                actor.kill()


# -- the other side --------------------------------------------------------------------------------------------------


class _Obedient:
    """What runs in the actor's process."""

    def __init__(self, peer: Peer) -> None:
        self.peer = peer
        self.delay = 0.0
        self.last: dict[str, int] = {}
        self.count: dict[str, int] = {}
        self.disorder = 0
        self.flood: asyncio.Task[dict[str, Any]] | None = None
        peer.attach("hub", self.deliver)

    def deliver(self, envelopes: list[Envelope]) -> None:
        for envelope in envelopes:
            publisher, numbered, number = envelope.data.rstrip(b" ").partition(b":")
            if not numbered:
                continue
            name = publisher.decode()
            if int(number) <= self.last.get(name, -1):
                self.disorder += 1
            self.last[name] = int(number)
            self.count[name] = self.count.get(name, 0) + 1
            if self.delay:
                time.sleep(self.delay)

    async def obey(self, what: str, order: dict[str, Any]) -> dict[str, Any]:
        if what == "want":
            self.peer.interest_add(InterestKind(order["kind"]), "hub", order["text"])
            return {}
        if what == "publish":
            return await self.publish(**order)
        if what == "flood":
            self.flood = asyncio.ensure_future(self.publish(**order))
            return {}
        if what == "flooded":
            assert self.flood is not None
            return await self.flood
        if what == "block":
            time.sleep(order["seconds"])
            return {}
        if what == "delay":
            self.delay = order["seconds"]
            return {}
        if what == "seen":
            return {"last": self.last, "count": self.count, "disorder": self.disorder}
        if what == "congested":
            return {"congested": self.peer.congested}
        if what == "leave":
            started = time.monotonic()
            await self.peer.close()
            return {"seconds": time.monotonic() - started}
        raise AssertionError(what)

    async def publish(
        self, topics: list[str], count: int, size: int = 0, per_turn: int = 50, start: int = 0
    ) -> dict[str, Any]:
        """Publish ``count`` numbered messages over the topics, pausing when told to."""
        name = str(os.getpid()).encode()
        largest = pauses = 0
        turns = []
        for number in range(start, start + count):
            data = b"%b:%d" % (name, number)
            self.peer.publish(Envelope(TOPIC, "hub", topics[number % len(topics)], data.ljust(size)))
            if number % per_turn == per_turn - 1:
                began = time.perf_counter()
                await asyncio.sleep(0)
                largest = max(
                    largest, *(link.outbox_bytes for link in self.peer.bus.outbound.links.values()), 0
                )
                if self.peer.congested:
                    pauses += 1
                    await self.peer.accepted()
                turns.append(time.perf_counter() - began)
        turns.sort()
        return {
            "largest": largest,
            "pauses": pauses,
            "p99": turns[len(turns) * 99 // 100] if turns else 0.0,
            "worst": turns[-1] if turns else 0.0,
        }


async def _main(path: str, backlog: int) -> None:
    reader = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    started = time.monotonic()
    peer = await Peer.open(path, kind=PeerKind.APPLICATION, bus_backlog=backlog)
    _say({"slot": peer.slot, "epoch": peer.epoch, "pid": os.getpid(), "seconds": time.monotonic() - started})
    obedient = _Obedient(peer)
    while line := await reader.readline():
        order = json.loads(line)
        _say(await obedient.obey(order.pop("what"), order))


def _say(answer: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    # A test run that is killed leaves nobody behind, not even who was stopped (PR_SET_PDEATHSIG).
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    asyncio.run(_main(sys.argv[1], int(sys.argv[2])))
