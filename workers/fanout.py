"""Frames to sockets: what one turn of the event loop owes its clients, encoded once and written once.

Stands at the end of a message's way: :class:`~workers.manager.WebSocketManager` (for its own clients and for what
came over the bus) hands a payload and the tuple of sinks that want it to :meth:`Fanout.send`; at the end of the turn
each sink gets one write. Consecutive messages for the same set of sinks form a *run*, whose frames are joined once
for all of them; where several runs meet, each client's are walked in sequence, so its order is kept over all topics.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Sequence
from typing import Final, Literal, Protocol

logger = logging.getLogger("workers")

SlowPolicy = Literal["close", "drop_oldest", "latest"]

#: How often sinks that wait for their client are looked at (seconds); the write deadline is exact to this.
WATCH_INTERVAL: Final = 0.25

#: Bytes of frames that one turn may collect before they are written; bounds what a loop that never waits can owe.
MAX_TURN_BYTES: Final = 512 * 1024

_SHORT_HEADS: Final = tuple(bytes((0x81, size)) for size in range(126))


def text_frame(payload: bytes) -> bytes:
    """One unmasked, unfragmented WebSocket text frame (RFC 6455 section 5.2) around UTF-8 ``payload``."""
    size = len(payload)
    if size < 126:
        return _SHORT_HEADS[size] + payload
    if size < 65536:
        return b"\x81\x7e" + size.to_bytes(2, "big") + payload
    return b"\x81\x7f" + size.to_bytes(8, "big") + payload


def binary_frame(payload: bytes) -> bytes:
    """The same for a binary message."""
    return b"\x82" + text_frame(payload)[1:]


class Run:
    """Consecutive messages of one turn for one set of sinks, under one slow-consumer policy."""

    __slots__ = ("_joined", "frames", "payloads", "policy", "targets", "topic")

    def __init__(self, targets: Sequence[Sink], policy: SlowPolicy, topic: str) -> None:
        self.targets = targets
        self.policy: SlowPolicy = policy
        self.topic = topic
        self.frames: list[bytes] = []
        self.payloads: list[bytes] = []
        self._joined: bytes | None = None

    def joined(self) -> bytes:
        """All frames of the run as the bytes of one write; computed once for all its sinks."""
        if self._joined is None:
            self._joined = self.frames[0] if len(self.frames) == 1 else b"".join(self.frames)
        return self._joined


class Sink(Protocol):
    """Where a client's frames go; see ``workers/sinks.py`` for the two kinds."""

    pending: list[Run] | None

    def write_run(self, run: Run) -> None:
        """Send all of one run, now; what the client does not take waits, within the bound."""

    def write_runs(self, runs: list[Run]) -> None:
        """The same for several runs, in their order."""

    def overdue(self, now: float) -> bool:
        """Called while the sink waits for its client; returns False when it need not be watched any more."""


class Fanout:
    """One per event loop: collects what a turn sends and writes it when the turn ends."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.thread = threading.get_ident()
        self._runs: list[Run] = []
        self._last: Run | None = None
        self._turn_bytes = 0
        #: So much was sent in this turn already that whoever can wait should let the loop turn.
        self.crowded = False
        self._watched: dict[Sink, None] = {}
        self._watch_timer: asyncio.TimerHandle | None = None
        #: messages x sinks, messages, and bytes handed to sinks since the start: copied to the board by the worker.
        self.deliveries = 0
        self.messages = 0
        self.bytes = 0
        #: messages and bytes that came in from clients; client sockets and their subscriptions now.
        self.messages_in = 0
        self.bytes_in = 0
        self.connections = 0
        self.subscriptions = 0
        #: connections closed as slow, and messages dropped by the policies ``drop_oldest`` and ``latest``.
        self.slow_closed = 0
        self.slow_dropped = 0

    def send(
        self, targets: Sequence[Sink], payload: bytes, policy: SlowPolicy = "close", topic: str = ""
    ) -> None:
        """Owe ``payload`` (UTF-8 text) to every sink of ``targets``; written when this turn of the loop ends."""
        self.send_frame(targets, text_frame(payload), payload, policy, topic)

    def send_frame(
        self,
        targets: Sequence[Sink],
        frame: bytes,
        payload: bytes,
        policy: SlowPolicy = "close",
        topic: str = "",
    ) -> None:
        """As :meth:`send` with the frame made by the caller; ``targets`` must not change afterwards."""
        run = self._last
        if run is None or run.targets is not targets or run.topic != topic:
            if not targets:
                return
            if not self._runs:
                self.loop.call_soon(self._end_of_turn)
            run = self._last = Run(targets, policy, topic)
            self._runs.append(run)
        run.frames.append(frame)
        run.payloads.append(payload)
        self._turn_bytes += len(frame)
        if self._turn_bytes > MAX_TURN_BYTES:
            self.crowded = True
            self.flush()

    def _end_of_turn(self) -> None:
        self.crowded = False
        self.flush()

    def flush(self) -> None:
        """Write all that is owed. Runs by itself at the end of the turn; call it before closing a client."""
        runs = self._runs
        if not runs:
            return
        self._runs = []
        self._last = None
        self._turn_bytes = 0
        if len(runs) == 1:
            run = runs[0]
            self._count(run)
            for sink in run.targets:
                sink.write_run(run)
            return
        touched: list[Sink] = []
        for run in runs:
            self._count(run)
            for sink in run.targets:
                if sink.pending is None:
                    sink.pending = [run]
                    touched.append(sink)
                else:
                    sink.pending.append(run)
        for sink in touched:
            mine = sink.pending or []
            sink.pending = None
            if len(mine) == 1:
                sink.write_run(mine[0])
            else:
                sink.write_runs(mine)

    def _count(self, run: Run) -> None:
        sinks = len(run.targets)
        self.messages += len(run.frames)
        self.deliveries += sinks * len(run.frames)
        self.bytes += sinks * len(run.joined())

    def watch(self, sink: Sink) -> None:
        """Look at ``sink`` every :data:`WATCH_INTERVAL` until its ``overdue`` says there is no more need."""
        self._watched[sink] = None
        if self._watch_timer is None:
            self._watch_timer = self.loop.call_later(WATCH_INTERVAL, self._look)

    def unwatch(self, sink: Sink) -> None:
        """Forget ``sink``, which may be unknown."""
        self._watched.pop(sink, None)
        if not self._watched and self._watch_timer is not None:
            self._watch_timer.cancel()
            self._watch_timer = None

    def _look(self) -> None:
        now = self.loop.time()
        for sink in list(self._watched):
            if not sink.overdue(now):
                self._watched.pop(sink, None)
        self._watch_timer = self.loop.call_later(WATCH_INTERVAL, self._look) if self._watched else None


_local = threading.local()


def current_fanout() -> Fanout:
    """The running loop's fan-out, made at the first call.

    Raises:
        RuntimeError: no event loop is running.
    """
    loop = asyncio.get_running_loop()
    known: tuple[asyncio.AbstractEventLoop, Fanout] | None = getattr(_local, "fanout", None)
    if known is None or known[0] is not loop:
        known = (loop, Fanout(loop))
        _local.fanout = known
    return known[1]
