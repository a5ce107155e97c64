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
import struct
from collections.abc import Callable, Sequence
from hashlib import blake2b
from typing import Final, Protocol
from urllib.parse import parse_qsl

from ipc.board import Counter, Record
from ipc.passing import Answer, Passing
from ipc.peer import Peer
from ipc.topics import InvalidTopic, check_topic

#: A worker is too full for another's clients when it has more than this many times as many.
TOO_FULL: Final = 1.25
#: With fewer other clients than this a worker keeps what comes: there is little to save.
FEW: Final = 32
#: What a worker shows as its load that takes nobody's clients.
TAKES_NOBODY: Final = -1
#: Before a request that is offered: the load of who offers it, without this one.
_LOAD: Final = struct.Struct("I")
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
        self._passing = Passing(peer.runtime, peer.slot, self._wants, self._adopt)
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

    def _wants(self, offered: bytes) -> bool:
        """Several may offer at the same time, so who is offered something looks again."""
        return len(offered) > _LOAD.size and has_room(self._host.load, *_LOAD.unpack_from(offered))

    def _adopt(self, sock: socket.socket, offered: bytes) -> None:
        self._host.adopt(sock, offered[_LOAD.size :])
        self._show()

    def offer(
        self, url: bytes, head: Callable[[], bytes], transport: asyncio.Transport, answer: Answer
    ) -> bool:
        """A client asks for ``url``. True: it was offered to another worker, see :meth:`ipc.passing.Passing.offer`."""
        topic = topic_of(url)
        if topic is None or not self._peer.bus.inbound.channels:
            return False
        others = self._show() - 1 - self._passing.unanswered()
        if self._peer.wants_exactly(topic):
            return False
        for record in self._peer.workers_wanting_exactly(topic) or self._home(topic):
            key = record.slot, record.epoch
            theirs = record.get(Counter.LOAD)
            if theirs > TAKES_NOBODY and has_room(theirs + self._passing.unanswered(key), others):
                sock = transport.get_extra_info("socket")
                data = _LOAD.pack(others) + head()
                if sock is not None and self._passing.offer(key, sock.fileno(), data, answer):
                    return True
        return False

    def _home(self, topic: str) -> tuple[Record, ...]:
        """The worker whose topic it is, unless that is this one."""
        workers = {record.listener: record for record in self._peer.serving_workers()}
        found = workers[home(topic, list(workers))] if workers else self._peer.record
        return () if found.slot == self._peer.slot else (found,)

    def close(self) -> None:
        """Offer and take nothing more. Before the peer is closed."""
        self._timer.cancel()
        self._peer.record.set(Counter.LOAD, TAKES_NOBODY)
        self._passing.close()
