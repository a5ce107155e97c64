"""``GET /events``: Server-Sent Events (WHATWG HTML, section 9.2), for ``EventSource`` and curl.

At the end of a message's way to such a client. ``?topic=`` names a topic or pattern and may be repeated. Each message
is an event with the data as they were published (or, with ``?envelope=1``, in an envelope as in the plain protocol);
its id is a position over all topics of the request. ``Last-Event-ID``, or ``?last_event_id=``, gives what came after
it; where that is not possible, an ``event: reset`` says so. A comment line keeps the connection alive.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Final

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from ipc.envelope import Envelope
from ipc.positions import Position
from ipc.topics import InvalidTopic, check_pattern
from workers.centrifuge_messages import one_line
from workers.envelopes import wrapped
from workers.feeds import Feed
from workers.http_protocol import ENDLESS

if TYPE_CHECKING:
    from workers.manager import WebSocketManager

logger = logging.getLogger("workers")

KEEP_ALIVE: Final = 15.0
"""Seconds without an event after which a comment is sent."""
RETRY_MS: Final = 1000
"""What a browser is told to wait before it comes back."""
_HEADERS: Final = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),
]


def events_response(manager: WebSocketManager, request: Request) -> Response | EventStream:
    """The stream, or what is wrong with the request."""
    query = request.query_params
    patterns = list(dict.fromkeys(query.getlist("topic")))
    if not manager.settings.allow_anonymous:
        return _error(401, "anonymous clients are not allowed")
    if not patterns:
        return _error(400, "name the topics: /events?topic=chat/1&topic=news/%23")
    limit = manager.settings.max_subscriptions
    if len(patterns) > limit:
        return _error(400, f"at most {limit} topics")
    for pattern in patterns:
        try:
            check_pattern(pattern)
        except InvalidTopic as error:
            return _error(400, str(error))
        if not manager.rules.may_subscribe(pattern, False):
            return _error(403, f"subscribing to {pattern!r} is not permitted")
    last = request.headers.get("last-event-id") or query.get("last_event_id")
    envelope = query.get("envelope") in ("1", "true")
    return EventStream(manager, patterns, last, envelope)


def _error(status: int, words: str) -> Response:
    return JSONResponse({"error": {"code": status, "message": words}}, status_code=status)


class EventStream(Feed):
    """One client's stream: an ASGI application."""

    def __init__(
        self, manager: WebSocketManager, patterns: list[str], last: str | None, envelope: bool
    ) -> None:
        super().__init__(manager)
        self._patterns = patterns
        self._last = last
        self._envelope = envelope
        self._waiting: list[bytes] = []
        self._bytes = 0
        self._room = manager.settings.max_backlog
        self._more = asyncio.Event()
        self._slow = asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve until the client is gone, reads too slowly, or the worker drains."""
        scope.setdefault("extensions", {})[ENDLESS] = True
        for pattern in self._patterns:
            self.manager.listen(pattern, self)
        try:
            await self._begin()
            await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
            await self._until_over(receive, send)
        finally:
            for pattern in self._patterns:
                self.manager.unlisten(pattern, self)

    async def _until_over(self, receive: Receive, send: Send) -> None:
        ends = [
            asyncio.create_task(work)
            for work in (self._write_all(send), _disconnected(receive), self._slow.wait())
        ]
        try:
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in ends:
                task.cancel()
            for outcome in await asyncio.gather(*ends, return_exceptions=True):
                if isinstance(outcome, Exception):
                    logger.debug("an event stream ended: %r", outcome)
        if self._slow.is_set():
            self.manager.count_slow()
            logger.warning("an event stream was closed as slow: %d bytes wait for it", self._bytes)
        # Where nothing more can be written, the server knows and says nothing.
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _begin(self) -> None:
        since = None
        valid = True
        if self._last:
            try:
                since = Position.parse(self._last)
            except ValueError:
                valid = False
        top, recovered = await self.recover(self._patterns, since)
        self._add(b"retry: %d\n\n" % RETRY_MS)
        if not (valid and recovered):
            data = b'{"offset":%d}' % top.offset if top is not None else b"{}"
            self._add(_event(data, top, b"reset"))
        elif top is not None and since is None:
            self._add(b"id: %b\n\n" % str(top).encode())  # a position to come back with, before any message
        self.start()

    def write(self, envelope: Envelope, missed: bool) -> None:
        """Owe an event to the client; what was missed is not held against it."""
        log = self.manager.log
        position = Position(envelope.offset, log.epoch) if log is not None and envelope.offset else None
        data = envelope.data
        if self._envelope:
            data = wrapped(envelope, log.epoch if log is not None else "")
        # An id stands for everything before it, which only topics with history can promise.
        event = _event(data, position if self.recoverable else None)
        if missed:
            self._room += len(event)
        self._add(event)

    def _add(self, event: bytes) -> None:
        self._waiting.append(event)
        self._bytes += len(event)
        if self._bytes > self._room:
            self._slow.set()
        self._more.set()

    async def _write_all(self, send: Send) -> None:
        while True:
            try:
                async with asyncio.timeout(KEEP_ALIVE):
                    await self._more.wait()
            except TimeoutError:
                self._waiting.append(b":\n\n")
            self._more.clear()
            events, self._waiting = self._waiting, []
            async with asyncio.timeout(None) as patience:
                deadline = asyncio.get_running_loop().time() + self.manager.settings.write_timeout
                patience.reschedule(deadline)
                await send({"type": "http.response.body", "body": b"".join(events), "more_body": True})
            self._bytes = sum(map(len, self._waiting))
            self._room = self.manager.settings.max_backlog


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _event(data: bytes, position: Position | None, name: bytes = b"") -> bytes:
    head = b"event: %b\n" % name if name else b""
    if position is not None:
        head += b"id: %b\n" % str(position).encode()
    return b"%bdata: %b\n\n" % (head, one_line(data))
