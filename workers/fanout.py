"""Frames to sockets: what one turn of the event loop owes its clients, encoded once and written once.

Stands at the end of a message's way: :class:`~workers.manager.WebSocketManager` (for its own clients and for what
came over the bus) hands a payload and the tuple of sinks that want it to :meth:`Fanout.send`; at the end of the turn
each sink gets one write. Consecutive messages for the same set of sinks form a *run*, whose frames are joined once
for all of them; where several runs meet, each client's are walked in sequence, so its order is kept over all topics.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import Sequence
from typing import Final, Literal, Protocol

import msgspec

logger = logging.getLogger("workers")

SlowPolicy = Literal["close", "drop_oldest", "latest"]

#: How often sinks that wait for their client are looked at (seconds); the write deadline is exact to this.
WATCH_INTERVAL: Final = 0.25

#: Bytes of frames that one turn may collect before they are written; bounds what a loop that never waits can owe.
MAX_TURN_BYTES: Final = 512 * 1024

#: The heads of text frames up to a size that most messages have.
HEADS: Final = (
    *(bytes((0x81, size)) for size in range(126)),
    *(b"\x81\x7e" + size.to_bytes(2, "big") for size in range(126, 1024)),
)


def text_frame(payload: bytes) -> bytes:
    """One unmasked, unfragmented WebSocket text frame (RFC 6455 section 5.2) around UTF-8 ``payload``."""
    size = len(payload)
    if size < 1024:
        return HEADS[size] + payload
    if size < 65536:
        return b"\x81\x7e" + size.to_bytes(2, "big") + payload
    return b"\x81\x7f" + size.to_bytes(8, "big") + payload


def binary_frame(payload: bytes) -> bytes:
    """The same for a binary message."""
    return b"\x82" + text_frame(payload)[1:]


class Run(msgspec.Struct, gc=False):
    """Consecutive messages of one turn for one set of sinks, under one slow-consumer policy."""

    targets: Sequence[Sink]
    policy: SlowPolicy
    topic: str
    frames: list[bytes]


class Sink(Protocol):
    """Where a client's frames go; see ``workers/sinks.py`` for the two kinds."""

    #: What one turn owes it, while the turn is written: one chunk, or several.
    pending: bytes | list[bytes] | None
    #: The socket, while whole frames may be written to it past the transport; else -1.
    fd: int

    def write(self, data: bytes) -> None:
        """Send whole frames; what the client does not take waits, within the bound."""

    def write_rest(self, data: memoryview, policy: SlowPolicy) -> None:
        """What the kernel did not take of a write to :attr:`fd`; a view, so that many slow clients share one copy."""

    def write_each(self, frames: Sequence[bytes], policy: SlowPolicy, topic: str) -> None:
        """As :meth:`write` for frames that may be dropped, each by itself, if the client is behind."""

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
        self.send_frames(targets, [text_frame(payload)], policy, topic)

    def send_frames(
        self, targets: Sequence[Sink], frames: list[bytes], policy: SlowPolicy = "close", topic: str = ""
    ) -> None:
        """As :meth:`send` with frames made by the caller, one or more, whose list is the fan-out's from now on;
        ``targets`` must not change afterwards."""
        last = self._last
        if last is not None and last.targets is targets and last.topic == topic:
            last.frames += frames
        elif targets:
            if last is None:
                self.loop.call_soon(self._end_of_turn)
            last = self._last = Run(targets, policy, topic, frames)
            self._runs.append(last)
        else:
            return
        size = self._turn_bytes + (len(frames[0]) if len(frames) == 1 else sum(map(len, frames)))
        self._turn_bytes = size
        if size > MAX_TURN_BYTES:
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
            self._write_run(runs[0])
        else:
            self._write_runs(runs)

    def _write_run(self, run: Run) -> None:
        """The only run of a turn: the same bytes for all."""
        frames, policy, targets = run.frames, run.policy, run.targets
        count = len(frames)
        data = frames[0] if count == 1 else b"".join(frames)
        size = len(data)
        self.messages += count
        self.deliveries += count * len(targets)
        self.bytes += size * len(targets)
        write = os.write
        for sink in targets:
            fd = sink.fd
            if fd < 0:
                if policy == "close":
                    sink.write(data)
                else:
                    sink.write_each(frames, policy, run.topic)
                continue
            try:
                sent = write(fd, data)
            except OSError:
                sent = 0  # full, or gone: the transport finds the same and acts on it
            if sent != size:
                sink.write_rest(memoryview(data)[sent:], policy)

    def _write_runs(self, runs: list[Run]) -> None:
        """Several runs: each client's are put together in sequence, so that it is written once."""
        messages = deliveries = size = 0
        touched: list[Sink] = []
        for run in runs:
            frames, targets = run.frames, run.targets
            count, sinks = len(frames), len(targets)
            data = frames[0] if count == 1 else b"".join(frames)
            messages += count
            deliveries += count * sinks
            size += len(data) * sinks
            if run.policy != "close":
                for sink in targets:
                    _write_pending(sink)
                    if sink.fd < 0:
                        sink.write_each(frames, run.policy, run.topic)
                    else:
                        _write(sink, data, run.policy)
                continue
            for sink in targets:
                pending = sink.pending
                if pending is None:
                    sink.pending = data
                    touched.append(sink)
                elif type(pending) is list:
                    pending.append(data)
                else:
                    sink.pending = [pending, data]  # type: ignore[list-item]
        self.messages += messages
        self.deliveries += deliveries
        self.bytes += size
        write = os.write
        for sink in touched:
            fd, pending = sink.fd, sink.pending
            if fd < 0 or type(pending) is not bytes:
                _write_pending(sink)
                continue
            # The usual case, without calls.
            sink.pending = None
            try:
                sent = write(fd, pending)
            except OSError:
                sent = 0
            if sent != len(pending):
                sink.write_rest(memoryview(pending)[sent:], "close")

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


def _write_pending(sink: Sink) -> None:
    pending, sink.pending = sink.pending, None
    if pending is not None:
        _write(sink, b"".join(pending) if type(pending) is list else pending)  # type: ignore[arg-type]


def _write(sink: Sink, data: bytes, policy: SlowPolicy = "close") -> None:
    """As the loop of :meth:`Fanout._write_run`, for one client."""
    fd = sink.fd
    if fd < 0:
        sink.write(data)
        return
    try:
        sent = os.write(fd, data)
    except OSError:
        sent = 0
    if sent != len(data):
        sink.write_rest(memoryview(data)[sent:], policy)


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
