"""Rooms meet: a client that names its topic in the handshake goes to the worker that has the others of this topic.

Stands at the very beginning, between a handshake's head and its answer. The kernel spreads connections over the
workers without knowing what they are for, so that most messages of a small room have to cross. But whoever connects
with ``?topic=room/7`` says so before anything has happened: then the socket is handed (``ipc/passing.py``) to a worker
that has a subscriber of this topic, or while there is none, to the one that is the topic's home, and what is said in
the room does not cross. Nobody is refused for it: where that worker is fuller, busy or gone, and for a topic that is
here already, clients stay where they came in.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Sequence
from hashlib import blake2b
from typing import Final, Protocol
from urllib.parse import parse_qsl

from ipc.board import Counter, Record
from ipc.passing import Passing
from ipc.peer import Peer
from ipc.topics import InvalidTopic, check_topic

#: A worker is too full for another's clients when it has more than this many times as many.
TOO_FULL: Final = 1.25
#: With fewer other clients than this a worker keeps what comes: there is little to save.
FEW: Final = 32
#: What a worker shows as its load that takes nobody's clients.
TAKES_NOBODY: Final = -1
#: Seconds until the load is shown again although nobody came.
SHOW_EVERY: Final = 1.0


class Host(Protocol):
    """The server of this worker."""

    @property
    def load(self) -> int:
        """Client sockets, handshakes under way among them; :data:`TAKES_NOBODY` while there shall be no more."""

    def adopt(self, sock: socket.socket, head: bytes) -> None:
        """Serve a connection from which this much was read."""


def has_room(theirs: int, ours: int) -> bool:
    """Whether a worker with a load of ``theirs`` should get a client of one that has ``ours`` others. Pure."""
    return ours >= FEW and TAKES_NOBODY < theirs <= ours * TOO_FULL


def home(topic: str, workers: Sequence[int]) -> int:
    """Which of these is the topic's home (rendezvous hashing): the same for all, and changed for few by a change.

    Pure. The workers, one at least, are told by the listener that they serve, which a successor has too.
    """
    return max(
        workers, key=lambda worker: blake2b(b"%d %b" % (worker, topic.encode()), digest_size=8).digest()
    )


def topic_of(url: bytes) -> str | None:
    """The first topic without wildcards that a request asks for by ``topic=``. Pure."""
    query = url.partition(b"?")[2]
    if b"topic=" not in query:
        return None
    for name, value in parse_qsl(query.decode("latin-1")):
        if name == "topic":
            try:
                check_topic(value)
            except InvalidTopic:
                continue  # a pattern, or a mistake that is told when the handshake is served
            return value
    return None


class Gathering:
    """What one worker does for it. Begins at once; :meth:`close` ends it."""

    def __init__(self, peer: Peer, host: Host) -> None:
        self._peer = peer
        self._host = host
        self._passing = Passing(peer.runtime, peer.slot, host.adopt)
        self._given: dict[int, tuple[int, int]] = {}
        """Of each slot: the load it showed, and how many it got from us since it has shown that."""
        self._loop = asyncio.get_running_loop()
        self._timer = self._loop.call_soon(self._keep_showing)

    def _keep_showing(self) -> None:
        self._timer = self._loop.call_later(SHOW_EVERY, self._keep_showing)
        self._show()

    def _show(self) -> int:
        """Put our load on the board; whoever decides about others' clients reads it there."""
        load = self._host.load
        self._peer.record.set(Counter.LOAD, load)
        return load

    def offer(self, url: bytes, head: Callable[[], bytes], transport: asyncio.Transport) -> bool:
        """A client asks for ``url``; True when another worker has got it, with ``head()``: then forget it."""
        topic = topic_of(url)
        if topic is None:
            return False
        load = self._show()
        if self._peer.wants_exactly(topic):
            return False
        for record in self._peer.workers_wanting_exactly(topic) or self._home(topic):
            shown, given = self._load_of(record)
            if has_room(shown + given, load) and self._hand_over(record, transport, head()):
                self._given[record.slot] = shown, given + 1
                return True
        return False

    def _hand_over(self, to: Record, transport: asyncio.Transport, head: bytes) -> bool:
        sock = transport.get_extra_info("socket")
        return sock is not None and self._passing.hand_over((to.slot, to.epoch), sock.fileno(), head)

    def _home(self, topic: str) -> tuple[Record, ...]:
        """The worker whose topic it is, unless that is this one."""
        workers = {record.listener: record for record in self._peer.serving_workers()}
        found = workers[home(topic, list(workers))] if workers else self._peer.record
        return () if found.slot == self._peer.slot else (found,)

    def _load_of(self, record: Record) -> tuple[int, int]:
        """What it shows, and how many we have given it since."""
        shown = record.get(Counter.LOAD)
        before, given = self._given.get(record.slot, (shown, 0))
        return shown, given if before == shown != TAKES_NOBODY else 0

    def close(self) -> None:
        """Hand over and take over nothing more. Before the peer is closed."""
        self._timer.cancel()
        self._peer.record.set(Counter.LOAD, TAKES_NOBODY)
        self._passing.close()
