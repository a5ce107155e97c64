"""The outgoing side of one client: what waits for it, how much may wait, and what happens when it reads too slowly.

:class:`SocketSink` writes frames straight to the transport of our own protocol (``workers/protocol.py``);
:class:`AsgiSink` goes through ASGI ``send`` under a foreign server or behind a middleware. Both are fed by
``workers/fanout.py`` and never make anybody else wait.

A client is slow when more than ``max_backlog`` bytes wait for it, or when something has waited ``write_timeout``
seconds without any byte leaving. Then the topic's policy decides: ``close`` (with the code of the client's protocol),
``drop_oldest``, or ``latest`` (only the newest message of each topic is kept while it waits).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Final

from uvicorn.protocols.utils import is_ssl

from workers.backlog import Backlog as Backlog
from workers.backlog import Waiting as Waiting
from workers.fanout import Fanout, SlowPolicy, text_frame

if TYPE_CHECKING:
    from starlette.websockets import WebSocket

    from workers.protocol import WebSocketProtocol

logger = logging.getLogger("workers")

#: How a plain client that reads too slowly is closed.
SLOW_CLOSE: Final = (1013, "slow consumer")


class SocketSink:
    """Frames of one client on the way to the transport of :class:`~workers.protocol.WebSocketProtocol`.

    While the transport has nothing buffered, the fan-out writes to the socket itself (:attr:`fd`). What the kernel does
    not take is the transport's; everything after it waits here until the transport is empty again.
    """

    __slots__ = (
        "__weakref__",
        "_backlog",
        "_extra",
        "_progress",
        "_protocol",
        "_socket",
        "_stuck",
        "_waiters",
        "closed",
        "fanout",
        "fd",
        "max_backlog",
        "pending",
        "slow_close",
        "write_timeout",
    )

    def __init__(
        self, protocol: WebSocketProtocol, fanout: Fanout, max_backlog: int, write_timeout: float
    ) -> None:
        self._protocol = protocol
        self.fanout = fanout
        # A backlog exists while the client is held (before accept) or blocked; None means "write at once".
        self._backlog: Backlog | None = Backlog(max_backlog, joins=True)
        self._progress = (0.0, 0)
        # The policy of what the transport holds, which can no more be dropped.
        self._stuck: SlowPolicy = "close"
        self._extra = 0
        self._waiters: list[asyncio.Future[None]] | None = None
        self.pending: bytes | list[bytes] | None = None
        self._socket = -1
        self.fd = -1
        self.closed = False
        self.max_backlog = max_backlog
        self.write_timeout = write_timeout
        self.slow_close = SLOW_CLOSE

    @property
    def backlog_bytes(self) -> int:
        """Bytes that wait for this client in this process."""
        waiting = self._backlog.size if self._backlog is not None else 0
        return waiting + (0 if self.closed else self._protocol.transport.get_write_buffer_size())

    def open(self) -> None:
        """The handshake is answered: what was held leaves now, or after what the kernel has not taken of the answer.

        The descriptor is ours until the protocol's ``connection_lost``: transports close it after that, not before.
        """
        transport = self._protocol.transport
        socket = transport.get_extra_info("socket")
        if socket is not None and not is_ssl(transport):
            self._socket = socket.fileno()
        if transport.get_write_buffer_size():
            self._wait()
        else:
            self._resume()

    def write(self, data: bytes) -> None:
        if self._backlog is not None:
            self._add(Waiting(data))
        elif not self.closed:
            self._protocol.write(data)

    def write_rest(self, data: memoryview, policy: SlowPolicy) -> None:
        """What the kernel did not take of the fan-out's own write: the transport tries again, and tells us."""
        self._stuck = policy
        self._protocol.write(data)
        if self._backlog is None:
            self._stuck = "close"

    def write_each(self, frames: Sequence[bytes], policy: SlowPolicy, topic: str) -> None:
        if self._backlog is None:
            if not self.closed:
                self.write_rest(memoryview(b"".join(frames)), policy)
        else:
            for frame in frames:
                self._add(Waiting(frame, policy, topic))

    @property
    def flowing(self) -> bool:
        """True while nothing waits: what is sent leaves at once."""
        return self._backlog is None

    @property
    def progressing(self) -> bool:
        """True while something waits and the client takes it, if slowly."""
        since, _ = self._progress
        return self._backlog is not None and asyncio.get_running_loop().time() - since < self.write_timeout

    def push(self, payload: bytes) -> None:
        """One text message, before anything that this turn of the loop still owes."""
        self.write(text_frame(payload))

    def push_extra(self, payload: bytes) -> None:
        """As :meth:`push`, for a large answer that is not held against the client: the bound is so much higher until
        nothing waits any more."""
        frame = text_frame(payload)
        self._extra += len(frame)
        self.max_backlog += len(frame)
        if self._backlog is not None:
            self._backlog.limit = self.max_backlog
        self.write(frame)
        if self._backlog is None:
            self._end_extra()

    def _end_extra(self) -> None:
        self.max_backlog -= self._extra
        self._extra = 0

    def _add(self, item: Waiting) -> None:
        backlog = self._backlog
        if self.closed or backlog is None:
            return
        dropped = backlog.dropped
        fits = backlog.add(item, self._protocol.transport.get_write_buffer_size())
        self.fanout.slow_dropped += backlog.dropped - dropped
        if not fits:
            self._close_slow(f"more than {self.max_backlog} bytes wait for it")

    def blocked(self) -> None:
        """The transport holds bytes that the kernel did not take."""
        self.fd = -1
        if self._backlog is None and not self.closed:
            self._backlog = Backlog(self.max_backlog, joins=True)
            self._wait()

    def _wait(self) -> None:
        self._progress = (asyncio.get_running_loop().time(), self._protocol.unsent())
        self.fanout.watch(self)

    def unblocked(self) -> None:
        """The transport is empty again."""
        self._resume()

    def _resume(self) -> None:
        backlog, self._backlog = self._backlog, None
        if self.closed:
            return
        if backlog:
            self._stuck = "close" if backlog.kept else "drop_oldest"
            self._protocol.write(b"".join(backlog.take()))
        if self._backlog is None:
            self._stuck = "close"
            self.fd = self._socket
            self.fanout.unwatch(self)
            self._end_extra()
            self._wake()

    def overdue(self, now: float) -> bool:
        if self.closed or self._backlog is None:
            return False
        left = self._protocol.unsent()
        since, before = self._progress
        if left < before:
            self._progress = (now, left)
            return True
        self._progress = (since, left)  # what came on top is our pings and pongs
        # What may be dropped may also wait; if the client is dead, it does not answer pings either.
        if (self._backlog.kept or self._stuck == "close") and now - since >= self.write_timeout:
            self._close_slow(f"nothing left for {self.write_timeout:g} s")
            return False
        return True

    async def writable(self) -> None:
        """Wait until nothing waits for this client (or it is gone): back-pressure for an application's own sends."""
        while self._backlog is not None and not self.closed:
            waiter = asyncio.get_running_loop().create_future()
            if self._waiters is None:
                self._waiters = []
            self._waiters.append(waiter)
            await waiter

    def _wake(self) -> None:
        waiters, self._waiters = self._waiters, None
        for waiter in waiters or ():
            if not waiter.done():
                waiter.set_result(None)

    def _close_slow(self, why: str) -> None:
        code, reason = self.slow_close
        self.fanout.slow_closed += 1
        logger.warning("connection from %s closed as slow (%d): %s", self._protocol.peer_name(), code, why)
        self.fd = -1
        # What still waits is given up; the frame that is half out stays whole, the close frame follows it.
        self._backlog = Backlog(self.max_backlog, joins=True)
        self._protocol.close(code, reason)

    def close(self) -> None:
        """Take nothing more. The protocol writes the close frame."""
        self.closed = True
        self.fd = -1
        self.fanout.unwatch(self)
        self._wake()

    def rest(self) -> bytes:
        """What still waits, for the protocol to put before its close frame."""
        backlog, self._backlog = self._backlog, None
        return b"".join(backlog.take()) if backlog is not None else b""


class AsgiSink:
    """Messages of one client on the way through ASGI ``send``: one writer task, one bounded backlog."""

    __slots__ = (
        "__weakref__",
        "_backlog",
        "_closing",
        "_current",
        "_held",
        "_on_gone",
        "_since",
        "_task",
        "_waiters",
        "_websocket",
        "closed",
        "fanout",
        "fd",
        "max_backlog",
        "pending",
        "slow_close",
        "write_timeout",
    )

    def __init__(
        self,
        websocket: WebSocket,
        fanout: Fanout,
        max_backlog: int,
        write_timeout: float,
        on_gone: Callable[[int, str], None],
    ) -> None:
        self._websocket = websocket
        self.fanout = fanout
        self._backlog = Backlog(max_backlog)
        self._held = True
        self._task: asyncio.Task[None] | None = None
        self._since = 0.0
        self._current: SlowPolicy = "close"
        self._waiters: list[asyncio.Future[None]] | None = None
        self._on_gone = on_gone
        self._closing = False
        self.pending: bytes | list[bytes] | None = None
        self.fd = -1
        self.closed = False
        self.max_backlog = max_backlog
        self.write_timeout = write_timeout
        self.slow_close = SLOW_CLOSE

    @property
    def backlog_bytes(self) -> int:
        """Bytes that wait for this client in this process."""
        return self._backlog.size

    def open(self) -> None:
        """The handshake is answered: what was held leaves now."""
        self._held = False
        self._start()

    def write(self, data: bytes) -> None:
        for payload in payloads(data):
            self._add(Waiting(payload))

    def write_each(self, frames: Sequence[bytes], policy: SlowPolicy, topic: str) -> None:
        for frame in frames:
            for payload in payloads(frame):
                self._add(Waiting(payload, policy, topic))

    def write_rest(self, data: memoryview, policy: SlowPolicy) -> None:
        """Never called: it has no descriptor."""

    @property
    def flowing(self) -> bool:
        """True while nothing waits and nothing is on its way: what is sent leaves at once."""
        return not self._backlog and (self._task is None or self._task.done())

    def push(self, payload: bytes) -> None:
        """One text message, before anything that this turn of the loop still owes."""
        self._add(Waiting(payload))

    def push_extra(self, payload: bytes) -> None:
        """As :meth:`push`, for a large answer that is not held against the client."""
        self._backlog.limit += len(payload)
        self._add(Waiting(payload))

    def _add(self, item: Waiting) -> None:
        if self.closed:
            return
        dropped = self._backlog.dropped
        fits = self._backlog.add(item)
        self.fanout.slow_dropped += self._backlog.dropped - dropped
        if not fits:
            self._close_slow(f"more than {self.max_backlog} bytes wait for it")
        else:
            self._start()

    def _start(self) -> None:
        if self._held or self.closed or not self._backlog:
            return
        if self._task is None or self._task.done():
            self._since = asyncio.get_running_loop().time()
            self._task = asyncio.get_running_loop().create_task(self._drain())
            self.fanout.watch(self)

    async def _drain(self) -> None:
        """Send what waits until nothing does; ends then, so an idle client has no task."""
        try:
            while self._backlog and not self.closed:
                item = self._backlog.pop()
                self._current = item.policy
                await self._websocket.send_text(item.data.decode())
                self._backlog.gone(item)
                self._since = asyncio.get_running_loop().time()
            self._backlog.limit = self.max_backlog
        except Exception as exc:
            # Servers differ in what they raise once the client is gone; whatever it was, this client is done.
            logger.debug("client gone while sending: %r", exc)
            self.close()
            self._on_gone(1006, "")
        self._wake()

    def overdue(self, now: float) -> bool:
        if self.closed or self._task is None or self._task.done():
            return False
        if (self._backlog.kept or self._current == "close") and now - self._since >= self.write_timeout:
            self._close_slow(f"nothing left for {self.write_timeout:g} s")
            return False
        return True

    async def writable(self) -> None:
        """Wait until nothing waits for this client, or it is gone."""
        while not self.flowing and not self.closed:
            waiter = asyncio.get_running_loop().create_future()
            if self._waiters is None:
                self._waiters = []
            self._waiters.append(waiter)
            await waiter

    def _wake(self) -> None:
        waiters, self._waiters = self._waiters, None
        for waiter in waiters or ():
            if not waiter.done():
                waiter.set_result(None)

    def _close_slow(self, why: str) -> None:
        code, reason = self.slow_close
        self.fanout.slow_closed += 1
        logger.warning("connection from %s closed as slow (%d): %s", self._websocket.client, code, why)
        task = self._task
        self.close()
        if task is not None:
            task.cancel()
        self._on_gone(code, reason)
        self._task = asyncio.get_running_loop().create_task(self._say_goodbye(code, reason))

    async def _say_goodbye(self, code: int, reason: str) -> None:
        try:
            async with asyncio.timeout(self.write_timeout):
                await self._websocket.close(code, reason)
        except Exception as exc:
            logger.debug("close frame of a slow client not sent: %r", exc)

    async def finish(self) -> None:
        """Let what waits leave, within the write deadline; then take nothing more."""
        task = self._task
        if task is not None and not task.done():
            await asyncio.wait([task], timeout=self.write_timeout)
            task.cancel()
        self.close()

    def close(self) -> None:
        """Take nothing more."""
        self.closed = True
        self.fanout.unwatch(self)
        self._wake()


def payloads(frames: bytes) -> Iterator[bytes]:
    """The payloads of frames of our own making: whole, final, not masked."""
    at = 0
    while at < len(frames):
        size = frames[at + 1]
        at += 2
        if size >= 126:
            width = 2 if size == 126 else 8
            size = int.from_bytes(frames[at : at + width], "big")
            at += width
        yield frames[at : at + size]
        at += size


AnySink = SocketSink | AsgiSink
