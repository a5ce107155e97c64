"""One client's connection, as an application sees it.

Between the socket (``workers/protocol.py``, or any ASGI server) and the manager that routes messages. Under our own
server it reads and writes without the ASGI queue; behind a foreign server, or a middleware that has wrapped
``receive`` or ``send``, it uses plain ASGI. Nothing of that is visible from outside.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any, Final, Protocol

from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from workers import codes, jsontext
from workers.errors import WebSocketException
from workers.fanout import binary_frame, current_fanout
from workers.feeds import Receiver
from workers.limited_protocol import HOLD_INBOX
from workers.message import Message, validate_client_message
from workers.protocol import WebSocketProtocol, our_protocol, protocol_beneath
from workers.sinks import AnySink, AsgiSink, SocketSink
from workers.topic_set import TopicSet

logger = logging.getLogger("workers")

#: Messages that may wait for an application that does not receive; then its client is not read.
MAX_INBOX: Final = 64

_UNSET: Final = object()


class Owner(Protocol):
    """What a connection needs of its manager."""

    def connection_subscribed(self, connection: Connection, pattern: str) -> None:
        """The connection now wants ``pattern``."""

    def connection_unsubscribed(self, connection: Connection, pattern: str) -> None:
        """The connection no longer wants ``pattern``."""

    def connection_renamed(self, connection: Connection, old: str, new: str) -> None:
        """The connection is now addressed by another id."""

    def connection_gone(self, connection: Connection) -> None:
        """The client is gone."""


def check_conn_id(conn_id: object) -> None:
    """Say so now if an id could not travel over the bus.

    Raises:
        TypeError: it is not a string.
    """
    if not isinstance(conn_id, str):
        raise TypeError(f"a conn_id is a string, not {type(conn_id).__name__}: write str({conn_id!r})")


class Connection:
    """A client's connection.

    Args:
        websocket: the Starlette (or FastAPI) socket, not yet accepted.
        conn_id: the address for direct messages; need not be unique.
        topic: a first pattern to subscribe to.

    Made by :meth:`workers.WebSocketManager.new_connection`; one that is made by hand has no manager, and its
    topics have no effect.
    """

    __slots__ = (
        "__dict__",
        "__weakref__",
        "_alone",
        "_close_at_accept",
        "_gone",
        "_id",
        "_inbox",
        "_patience",
        "_protocol",
        "_reading",
        "_sink",
        "_target",
        "_topics",
        "_waiter",
        "errors",
        "feed",
        "owner",
        "websocket",
    )

    def __init__(self, websocket: WebSocket, conn_id: str, topic: str | None = None) -> None:
        self.websocket = websocket
        self._alone = False
        self.owner: Owner | None = None
        self.feed: Receiver | None = None
        """Takes the messages of its topics instead of the sink, for a client that wants them in another form."""
        self._id = conn_id
        self._topics: TopicSet | None = None
        self._protocol: WebSocketProtocol | None = None
        self._sink: AnySink | None = None
        self._target: tuple[AnySink, ...] = ()
        self._inbox: deque[tuple[bytes, bool]] | None = None
        self._reading = False
        self._waiter: asyncio.Future[None] | None = None
        self._gone: tuple[int, str] | None = None
        self.errors = 0
        """Errors in a row that it was told."""
        self._close_at_accept: tuple[int, str] | None = None
        self._patience: asyncio.Timeout | None = None
        if topic:
            self.topics.add(topic)

    def __repr__(self) -> str:
        return f"<Connection {self._id!r}{' gone' if self._gone else ''}>"

    # --- what it is ---------------------------------------------------------------------------------

    @property
    def id(self) -> str:
        """The address for direct messages. Setting it moves the connection; it does not tell the client."""
        return self._id

    @id.setter
    def id(self, conn_id: str) -> None:
        check_conn_id(conn_id)
        old, self._id = self._id, conn_id
        if self.owner is not None and old != conn_id:
            self.owner.connection_renamed(self, old, conn_id)

    @property
    def topics(self) -> set[str]:
        """The patterns this connection is subscribed to; adding or removing one subscribes or unsubscribes."""
        if self._topics is None:
            self._topics = TopicSet(self)
        return self._topics

    @topics.setter
    def topics(self, patterns: Iterable[str]) -> None:
        if patterns is not self._topics:  # as it is after "connection.topics |= …"
            wanted = set(patterns)
            self.topics.intersection_update(wanted)
            self.topics.update(wanted)

    @property
    def subscription_count(self) -> int:
        """How many patterns it is subscribed to."""
        return len(self._topics) if self._topics is not None else 0

    @property
    def target(self) -> tuple[AnySink, ...]:
        """Its sink as a set of receivers for ``Fanout.send``; empty for a connection without a manager."""
        return self._target

    @property
    def gone(self) -> tuple[int, str] | None:
        """The close code and reason once it is over."""
        return self._gone

    @property
    def closed(self) -> bool:
        """True when the client is gone or the connection was closed."""
        return self._gone is not None or (self._sink is not None and self._sink.closed)

    @property
    def closing(self) -> bool:
        """True also before accept, when it has been decided that it will be closed then."""
        return self._close_at_accept is not None or self.closed

    @property
    def backlog_bytes(self) -> int:
        """Bytes that wait for this client in this process."""
        return self._sink.backlog_bytes if self._sink is not None else 0

    # --- life ---------------------------------------------------------------------------------------

    def prepare(self, owner: Owner, max_backlog: int, write_timeout: float) -> None:
        """Make the outgoing side, which holds what is sent until :meth:`accept`. For the manager."""
        self.owner = owner
        fanout = current_fanout()
        self._protocol = our_protocol(self.websocket)
        if self._protocol is not None:
            self._sink = self._protocol.attach(self._on_gone, max_backlog, write_timeout)
        else:
            self._sink = AsgiSink(self.websocket, fanout, max_backlog, write_timeout, self._on_gone)
            beneath = protocol_beneath(self.websocket)
            if beneath is not None:
                beneath.tell_end(self._on_gone)
        self._target = (self._sink,)

    async def accept(
        self, subprotocol: str | None = None, headers: Iterable[tuple[bytes, bytes]] | None = None
    ) -> None:
        """Answer the handshake."""
        if self.websocket.application_state is WebSocketState.CONNECTING:
            await self.websocket.accept(subprotocol, headers)
        if self._protocol is not None:
            self._protocol.opened()
        elif isinstance(self._sink, AsgiSink):
            self._sink.open()
        if self._close_at_accept is not None:
            await self.close(*self._close_at_accept)

    async def close(self, code: int = 1000, reason: str | None = None) -> None:
        """Close with a close frame, after what is already owed to the client. Closing again does nothing.

        Before :meth:`accept` it refuses the handshake with 403.

        Raises:
            ValueError: no code to close with (RFC 6455 section 7.4).
        """
        code, reason = codes.closing(code, reason or "")
        if self._alone:
            return self.close_soon(code, reason)
        state = self.websocket.application_state
        if self._protocol is not None and state is not WebSocketState.CONNECTING:
            if state is WebSocketState.CONNECTED:
                self._protocol.close(code, reason)
                self.websocket.application_state = WebSocketState.DISCONNECTED
            return
        if isinstance(self._sink, AsgiSink):
            if self._sink.closed:
                return
            current_fanout().flush()
            await self._sink.finish()
        if (
            state is not WebSocketState.DISCONNECTED
            and self.websocket.client_state is not WebSocketState.DISCONNECTED
        ):
            try:
                async with asyncio.timeout(self._sink.write_timeout if self._sink is not None else None):
                    await self.websocket.close(code, reason)
            except (RuntimeError, WebSocketDisconnect, OSError, TimeoutError) as exc:
                logger.debug("close of a connection that was already gone: %r", exc)
        self._on_gone(code, reason)

    def close_soon(self, code: int, reason: str) -> None:
        """As :meth:`close`, for callers that cannot wait; before :meth:`accept` it waits for that."""
        if not self._alone and self.websocket.application_state is WebSocketState.CONNECTING:
            self._close_at_accept = (code, reason)
        elif self._protocol is not None:
            self._protocol.close(code, reason)
        elif not self.closed:
            task = asyncio.get_running_loop().create_task(self.close(code, reason))
            self.__dict__["_closing"] = task  # a reference, or the loop may forget it

    def _on_gone(self, code: int, reason: str) -> None:
        if self._gone is not None:
            return
        self._gone = (code, reason)
        if self._sink is not None:
            self._sink.close()
        self._wake()
        if self._patience is not None:
            self._patience.reschedule(asyncio.get_running_loop().time())
        if self.owner is not None:
            self.owner.connection_gone(self)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # --- out ----------------------------------------------------------------------------------------

    async def send_json(self, data: Any, mode: str = "text") -> None:
        """Send one JSON value; waits while the client is behind.

        Raises:
            WebSocketDisconnect: the client is gone.
            TypeError, ValueError: no JSON form.
        """
        payload = jsontext.encode(data)
        if mode == "binary":
            await self.send_bytes(payload)
        else:
            await self._send(payload)

    async def send_text(self, data: str) -> None:
        """Send one text message; waits while the client is behind.

        Raises:
            WebSocketDisconnect: the client is gone.
        """
        await self._send(data.encode())

    async def send_bytes(self, data: bytes) -> None:
        """Send one binary message; waits while the client is behind.

        Raises:
            WebSocketDisconnect: the client is gone.
        """
        sink = self._sink
        if isinstance(sink, SocketSink):
            await self._ready(sink)
            current_fanout().send_frames(self._target, [binary_frame(data)])
            return
        if sink is not None:
            current_fanout().flush()
            await self._ready(sink)
        await self.websocket.send_bytes(data)

    async def _send(self, payload: bytes) -> None:
        sink = self._sink
        if sink is None:
            await self.websocket.send_text(payload.decode())
            return
        await self._ready(sink)
        current_fanout().send(self._target, payload)
        if isinstance(sink, AsgiSink):
            # What the endpoint sends by its websocket next must not overtake this.
            current_fanout().flush()
            await sink.writable()

    async def _ready(self, sink: AnySink) -> None:
        if not sink.flowing:
            await sink.writable()
        elif sink.fanout.crowded:
            await asyncio.sleep(0)  # an endpoint that only sends leaves the loop to others
        if sink.closed:
            raise WebSocketDisconnect(*(self._gone or (1006, "")))

    def push(self, data: Any) -> None:
        """Owe the client one JSON value without waiting; the backlog's bound holds."""
        self.push_text(jsontext.encode(data))

    def push_text(self, payload: bytes) -> None:
        """The same for JSON text in UTF-8."""
        if self._target:
            current_fanout().send(self._target, payload)

    def answer_error(self, words: str, code: int, ack: Any = _UNSET) -> None:
        """Tell the client what was wrong; at the tenth time in a row it is closed with 3509."""
        answer: dict[str, Any] = {"type": "error", "error": words, "code": int(code)}
        if ack is not _UNSET:
            answer["ack"] = ack
        self.push(answer)
        self.errors += 1
        if self.errors >= codes.MAX_ERRORS_IN_A_ROW:
            self.close_soon(*codes.TOO_MANY_ERRORS)

    # --- in -----------------------------------------------------------------------------------------

    def serve(self, handler: Callable[[bytes, bool], None]) -> bool:
        """Give all that comes in to ``handler(payload, is_text)``, so that no task need wait for it.

        False where that is not possible (plain ASGI): then call :meth:`receive_raw` in a loop.
        """
        if self._protocol is None:
            return False
        self._protocol.keep()
        self._protocol.take_input(handler)
        return True

    def forget_request(self) -> None:
        """For a connection that nobody but the hub uses: the request goes, and with it most of its memory."""
        if self._protocol is not None:
            self._protocol.forget_request()
            del self.websocket
            self._alone = True

    def hold_reading(self, reason: int, on_clear: Callable[[Callable[[], None]], None]) -> None:
        """Read nothing from this client until ``on_clear`` calls back. Under plain ASGI its endpoint waits instead."""
        protocol = self._protocol
        if protocol is not None and not protocol.holds(reason):
            protocol.hold(reason)
            on_clear(lambda: protocol.release(reason))

    async def receive_raw(self) -> tuple[bytes, bool]:
        """The next message and whether it is text.

        Raises:
            WebSocketDisconnect: the client is gone.
        """
        if self._protocol is None:
            return await self._receive_asgi()
        if not self._reading:
            self._reading = True
            self._inbox = deque()
            self._protocol.take_input(self._on_message, self._untaken)
        inbox = self._inbox
        assert inbox is not None
        while not inbox:
            if self._gone is not None or self._protocol.close_sent:
                self.websocket.client_state = WebSocketState.DISCONNECTED
                raise WebSocketDisconnect(*(self._gone or (1006, "")))
            if self._waiter is not None:
                raise RuntimeError("another task is receiving from this connection already")
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        item = inbox.popleft()
        if len(inbox) == MAX_INBOX // 2:
            self._protocol.release(HOLD_INBOX)
        return item

    def _untaken(self) -> Iterable[tuple[bytes, bool]]:
        """The endpoint reads by its websocket now; :meth:`receive_raw` takes the input back when it is called."""
        self._reading = False
        inbox, self._inbox = self._inbox, None
        return inbox or ()

    def _on_message(self, payload: bytes, is_text: bool) -> None:
        inbox = self._inbox
        assert inbox is not None
        inbox.append((payload, is_text))
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
        if len(inbox) >= MAX_INBOX and self._protocol is not None:
            self._protocol.hold(HOLD_INBOX)

    async def _receive_asgi(self) -> tuple[bytes, bool]:
        if self._gone is not None:
            raise WebSocketDisconnect(*self._gone)
        try:
            async with asyncio.timeout(None) as self._patience:
                message = await self.websocket.receive()
        except TimeoutError:
            if self._gone is None:
                raise
            raise WebSocketDisconnect(*self._gone) from None
        finally:
            self._patience = None
        if message["type"] == "websocket.disconnect":
            code, reason = message.get("code", 1005), message.get("reason") or ""
            self._on_gone(code, reason)
            raise WebSocketDisconnect(code, reason)
        text = message.get("text")
        return (text.encode(), True) if text is not None else (message.get("bytes") or b"", False)

    async def receive_json(self) -> Any:
        """The next JSON value. What is no JSON is answered with error 107 and passed over; binary closes with 1003.

        Raises:
            WebSocketDisconnect: the client is gone.
        """
        while True:
            payload, is_text = await self.receive_raw()
            if not is_text:
                await self.close(*codes.UNSUPPORTED_DATA)
                raise WebSocketDisconnect(*codes.UNSUPPORTED_DATA)
            try:
                value = jsontext.decode(payload)
            except jsontext.NotJson as exc:
                await self._complain(str(exc))
                continue
            self.errors = 0
            return value

    async def _complain(self, words: str) -> None:
        if self._sink is not None:
            self.answer_error(words, codes.ErrorCode.BAD_REQUEST)
        else:  # made by hand
            await self.send_json({"type": "error", "error": words, "code": int(codes.ErrorCode.BAD_REQUEST)})

    async def iter_json(self) -> AsyncIterator[Any]:
        """JSON values until the client is gone."""
        try:
            while True:
                yield await self.receive_json()
        except WebSocketDisconnect:
            return

    def __aiter__(self) -> AsyncIterator[Message]:
        return self

    async def __anext__(self) -> Message:
        """The next valid :class:`~workers.Message`; invalid ones are answered with an error and passed over."""
        while True:
            try:
                data = await self.receive_json()
            except WebSocketDisconnect:
                raise StopAsyncIteration from None
            try:
                return validate_client_message(data)
            except (ValueError, WebSocketException) as exc:
                await self._complain(str(exc))
