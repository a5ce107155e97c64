"""The socket side of a connection: uvicorn's WebSocket protocol with limits and a fast path.

First and last stage of a message's way. In: a whole, plain, masked frame of an open connection goes straight to the
connection's handler; everything else (handshake, control frames, fragments, errors) to ``websockets``' sans-I/O
parser, which knows RFC 6455's corners. Out: :class:`~workers.sinks.SocketSink` writes ready frames to the transport.

A connection of ours *attaches* through ``scope["extensions"]["flockwire"]`` (this object). An endpoint that uses a
plain Starlette ``WebSocket`` never does, and gets ASGI to the letter.

Bounds that uvicorn has not: fragments of a message, bytes of pongs for a client that floods us with pings, time for a
closing client to go. Those of the request before the handshake are in ``workers/http_protocol.py``.
"""

from __future__ import annotations

import asyncio
import logging
from asyncio.transports import BaseTransport
from collections.abc import Callable
from typing import Any, Final

from uvicorn.config import Config
from uvicorn.protocols.utils import ClientDisconnected
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from uvicorn.server import ServerState
from websockets.exceptions import InvalidState
from websockets.frames import Frame, Opcode
from websockets.protocol import OPEN

from workers.fanout import binary_frame, current_fanout, text_frame
from workers.sinks import SocketSink

try:
    from websockets.speedups import apply_mask
except ImportError:  # a platform without the compiled extension
    from websockets.utils import apply_mask

logger = logging.getLogger("workers")

#: Fragments of one message: a thousand, and one more for each 64 bytes that the message may have.
FREE_FRAGMENTS: Final = 1024
#: Bytes of pongs that may wait for a client that does not read them.
MAX_CONTROL_BACKLOG: Final = 64 * 1024
#: Seconds a closing client has to answer before its connection is cut.
CLOSE_TIMEOUT: Final = 10.0
#: A partial frame up to this size is kept here for the next chunk; a longer one is the parser's.
MAX_PARTIAL: Final = 16 * 1024

#: Why reading from a client pauses (bit flags).
HOLD_BUS: Final = 1
HOLD_INBOX: Final = 2
HOLD_PONGS: Final = 4

Handler = Callable[[bytes, bool], None]
Closed = Callable[[int, str], None]


class WebSocketProtocol(WebSocketsSansIOProtocol):
    """uvicorn's sans-I/O WebSocket protocol with limits, a fast path, and the hand-over to a connection of ours."""

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.close_timeout = CLOSE_TIMEOUT
        self._traffic = current_fanout()
        self._changed: Callable[[], None] = getattr(server_state, "changed", nothing)
        self._max_size = config.ws_max_size
        self._max_fragments = FREE_FRAGMENTS + config.ws_max_size // 64
        self._fragments = bytearray()
        self._fragment_count = 0
        self._sink: SocketSink | None = None
        self._handler: Handler | None = None
        self._on_closed: Closed | None = None
        self._kept = False
        self._partial = b""
        self._holds = 0
        self._released_at = 0.0
        self._close: tuple[int, str] | None = None
        self._abort_timer: asyncio.TimerHandle | None = None

    # --- the connection of ours -------------------------------------------------------------------

    def attach(self, on_closed: Closed, max_backlog: int, write_timeout: float) -> SocketSink:
        """Take the outgoing side: from now on all frames go through the sink that is returned.

        ``on_closed`` is called once with the close code and reason when the client is gone.
        """
        self._sink = SocketSink(self, current_fanout(), max_backlog, write_timeout)
        self._on_closed = on_closed
        return self._sink

    def opened(self) -> None:
        """After accept: the sink may write, and knows from ``pause_writing`` at once what the kernel did not take."""
        if self._sink is not None and not self.transport.is_closing():
            self.transport.set_write_buffer_limits(high=0)
            self._sink.open()

    def take_input(self, handler: Handler) -> bool:
        """Give messages to ``handler(payload, is_text)`` instead of the ASGI queue, in order, from now on.

        Messages that wait in the queue are handed over first. False: the client has gone already.
        """
        waiting = []
        while not self.queue.empty():
            waiting.append(self.queue.get_nowait())
        self._handler = handler
        for event in waiting:
            if event["type"] == "websocket.receive":
                text = event.get("text")
                if text is not None:
                    handler(text.encode(), True)
                else:
                    handler(event.get("bytes") or b"", False)
            elif event["type"] == "websocket.disconnect":
                return False
        if self.read_paused:
            self.read_paused = False
            self._apply_holds()
        return not self.disconnected

    def keep(self) -> None:
        """The ASGI application may return without ending the connection, which is served by the handler alone."""
        self._kept = True

    def hold(self, reason: int) -> None:
        """Read nothing more from this client until :meth:`release` with the same reason."""
        if not self._holds and not self.transport.is_closing():
            self.transport.pause_reading()
        self._holds |= reason

    def release(self, reason: int) -> None:
        """Read on, first what had already arrived."""
        if self._holds & reason:
            self._holds &= ~reason
            self._apply_holds()

    def holds(self, reason: int) -> bool:
        """Whether reading is paused for this reason."""
        return bool(self._holds & reason)

    def _apply_holds(self) -> None:
        if self._holds or self.disconnected:
            return
        self._released_at = self.loop.time()
        if self._partial:
            partial, self._partial = self._partial, b""
            self.data_received(partial)
        if not self._holds and not self.transport.is_closing():
            self.transport.resume_reading()

    def write(self, data: bytes) -> None:
        """Whole frames, now."""
        self.transport.write(data)

    def peer_name(self) -> str:
        """The client's address for a log line."""
        return f"{self.client[0]}:{self.client[1]}" if self.client else "an unnamed peer"

    def close(self, code: int, reason: str = "") -> None:
        """Start the closing handshake after all that the client is owed; who does not answer is cut off."""
        if self.close_sent or self.disconnected or self.transport.is_closing():
            return
        if not self.handshake_complete:
            self.transport.close()
            return
        self._close = self._close or (code, reason)
        rest = b""
        if self._sink is not None:
            current_fanout().flush()
            rest = self._sink.rest()
            self._sink.close()
        try:
            self.conn.send_close(code, reason)
        except InvalidState:
            self.transport.close()
            return
        self.close_sent = True
        self.stop_keepalive()
        self.queue.put_nowait({"type": "websocket.disconnect", "code": code, "reason": reason})
        self.transport.write(rest + b"".join(self.conn.data_to_send()))
        self._holds = 0
        self.read_paused = False
        self.transport.resume_reading()
        self._cut_later()
        if self._partial:
            partial, self._partial = self._partial, b""
            super().data_received(partial)

    def _cut_later(self) -> None:
        if self._abort_timer is None:
            self._abort_timer = self.loop.call_later(self.close_timeout, self.transport.abort)

    # --- in -----------------------------------------------------------------------------------------

    def connection_made(self, transport: BaseTransport) -> None:
        super().connection_made(transport)
        self._traffic.connections += 1

    def data_received(self, data: bytes) -> None:
        handler = self._handler
        if handler is None or self._close is not None:
            super().data_received(data)
            return
        if self._holds:
            self._partial += data
            return
        if self._partial:
            data, self._partial = self._partial + data, b""
        if self._fragment_count or self.conn.reader.buffer or self.conn.state is not OPEN:
            super().data_received(data)
            return
        self._read_frames(data, handler)

    def _read_frames(self, data: bytes, handler: Handler) -> None:
        """The fast path: whole, final, unextended, masked text and binary frames (RFC 6455 section 5.2)."""
        at = 0
        end = len(data)
        while end - at >= 6:
            kind = data[at]
            size = data[at + 1] ^ 0x80
            if (kind != 0x81 and kind != 0x82) or size > 126:
                break  # control, fragment, extension, unmasked or huge: not for us
            start = at + 6
            if size == 126:
                if end - at < 8:
                    break
                size = data[at + 2] << 8 | data[at + 3]
                start = at + 8
            stop = start + size
            if size > self._max_size:
                break
            if stop > end:
                if stop - at <= MAX_PARTIAL:
                    self._partial = data[at:]
                    return
                break
            payload = apply_mask(data[start:stop], data[start - 4 : start])
            at = stop
            if kind == 0x81 and not _is_utf8(payload):
                self._fail(1007, "invalid UTF-8")
                return
            self._traffic.messages_in += 1
            self._traffic.bytes_in += size
            handler(payload, kind == 0x81)
            if self._close is not None or self.disconnected:
                at = end
            elif self._holds or self._handler is not handler:
                break
        if at >= end:
            return
        rest = data[at:] if at else data
        if self._holds:
            self._partial = rest
        elif self._handler is not handler:
            self.data_received(rest)
        else:
            super().data_received(rest)

    def handle_connect(self, event: Any) -> None:
        super().handle_connect(event)
        if self.response.status_code == 101:
            extensions: Any = self.scope["extensions"]
            extensions["flockwire"] = self

    def handle_text(self, event: Frame) -> None:
        self.curr_msg_data_type = "text"
        self._begin(event)

    def handle_bytes(self, event: Frame) -> None:
        self.curr_msg_data_type = "bytes"
        self._begin(event)

    def _begin(self, event: Frame) -> None:
        if event.fin:
            self._message(bytes(event.data))
        else:
            self._fragments += event.data
            self._fragment_count = 1

    def handle_cont(self, event: Frame) -> None:
        # One buffer, not a list: a flood of tiny fragments costs its bytes and no objects.
        self._fragments += event.data
        self._fragment_count += 1
        if event.fin:
            data = bytes(self._fragments)
            self._fragments = bytearray()
            self._fragment_count = 0
            self._message(data)
        elif self._fragment_count > self._max_fragments:
            self._fail(1009, "too many fragments")

    def _message(self, data: bytes) -> None:
        if self.close_sent:
            return
        self._traffic.messages_in += 1
        self._traffic.bytes_in += len(data)
        is_text = self.curr_msg_data_type == "text"
        if is_text and not _is_utf8(data):
            self._fail(1007, "invalid UTF-8")
        elif self._handler is not None:
            self._handler(data, is_text)
        else:
            if is_text:
                self.queue.put_nowait({"type": "websocket.receive", "text": data.decode()})
            else:
                self.queue.put_nowait({"type": "websocket.receive", "bytes": data})
            if not self.read_paused:
                self.read_paused = True
                self.transport.pause_reading()

    def handle_events(self) -> None:
        for event in self.conn.events_received():
            if not isinstance(event, Frame):
                self.handle_connect(event)
            elif event.opcode is Opcode.TEXT:
                self.handle_text(event)
            elif event.opcode is Opcode.BINARY:
                self.handle_bytes(event)
            elif event.opcode is Opcode.CONT:
                self.handle_cont(event)
            elif event.opcode is Opcode.PING:
                self.handle_ping()
            elif event.opcode is Opcode.PONG:
                self.handle_pong(event)
            elif event.opcode is Opcode.CLOSE:
                self.handle_close(event)

    def handle_ping(self) -> None:
        super().handle_ping()
        if self.transport.get_write_buffer_size() > MAX_CONTROL_BACKLOG:
            # It pings and does not read the answers. Not reading it is answer enough.
            self.hold(HOLD_PONGS)

    def handle_close(self, event: Frame) -> None:
        received = self.conn.close_rcvd
        if self._close is None and received is not None:
            self._close = (received.code, received.reason)
        if self._sink is not None:
            self._sink.close()
        if not self.close_sent and received is not None:
            self.queue.put_nowait(
                {"type": "websocket.disconnect", "code": received.code, "reason": received.reason}
            )
        self.transport.write(b"".join(self.conn.data_to_send()))
        self.transport.close()
        self._cut_later()

    def handle_parser_exception(self) -> None:
        if self.conn.close_sent is None:
            # The client had closed already, or the stream ended: nothing to say.
            self.transport.close()
            return
        if self._close is None:
            self._close = (self.conn.close_sent.code, self.conn.close_sent.reason)
        if self._sink is not None:
            self._sink.close()
        super().handle_parser_exception()
        self._cut_later()

    def _fail(self, code: int, reason: str) -> None:
        """Fail the connection (RFC 6455 section 7.1.7)."""
        self.conn.fail(code, reason)
        self.handle_parser_exception()

    # --- out ----------------------------------------------------------------------------------------

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._sink is not None:
            self._sink.blocked()

    def resume_writing(self) -> None:
        super().resume_writing()
        self.release(HOLD_PONGS)
        if self._sink is not None:
            self._sink.unblocked()

    async def send(self, message: Any) -> None:
        sink = self._sink
        kind = message["type"]
        if sink is None or not self.handshake_complete or self.initial_response is not None:
            await super().send(message)
            if self.handshake_complete:
                self._changed()
            return
        if kind == "websocket.send" and not self.close_sent:
            # Everything to an attached client leaves by one door, or frames would overtake each other.
            await sink.writable()
            if self.disconnected:
                raise ClientDisconnected
            data = message.get("bytes")
            frame = (
                binary_frame(data) if data is not None else text_frame((message.get("text") or "").encode())
            )
            current_fanout().send_frame((sink,), frame, b"")
        elif kind == "websocket.close" and not self.close_sent:
            self.close(message.get("code", 1000), message.get("reason") or "")
        else:
            await super().send(message)

    async def receive(self) -> Any:
        if self._handler is not None and not self._kept:
            # Somebody reads by ASGI after all: back to the queue from here on.
            self._handler = None
        message = await super().receive()
        self._released_at = self.loop.time()
        return message

    # --- life ---------------------------------------------------------------------------------------

    def keepalive_timeout(self) -> None:
        """No pong in time. The deadline stands still while it is we who do not read."""
        if self._holds or self.read_paused:
            self.pong_timer = self.loop.call_later(self.ping_timeout or 1.0, self.keepalive_timeout)
            return
        quiet = self.loop.time() - max(self._released_at, self.ping_sent_at)
        if self.ping_timeout is not None and quiet < self.ping_timeout * 0.99:
            self.pong_timer = self.loop.call_later(self.ping_timeout - quiet, self.keepalive_timeout)
            return
        if self._close is None:
            self._close = (1011, "keepalive ping timeout")
        super().keepalive_timeout()
        self._cut_later()

    def drain(self, code: int) -> None:
        """The worker is going: end this connection with ``code`` (1001 stop, 1012 replaced)."""
        if self.handshake_complete:
            self.close(code, "server is going away" if code == 1001 else "service restart")
        else:
            self.send_500_response()
            self.transport.close()

    @property
    def handshaking(self) -> bool:
        """True until the handshake is answered."""
        return not self.handshake_complete

    def connection_lost(self, exc: Exception | None) -> None:
        code, reason = self._close or (1006, "")
        self._close = (code, reason)
        if self._abort_timer is not None:
            self._abort_timer.cancel()
            self._abort_timer = None
        if self.conn.close_rcvd is not None:
            code, reason = self.conn.close_rcvd.code, self.conn.close_rcvd.reason
        super().connection_lost(exc)
        if self._sink is not None:
            self._sink.close()
        self._handler = None
        self._partial = b""
        on_closed, self._on_closed = self._on_closed, None
        if on_closed is not None:
            on_closed(code, reason)
        self._traffic.connections -= 1
        self._changed()

    async def run_asgi(self) -> None:
        try:
            result: Any = await self.app(self.scope, self.receive, self.send)
        except ClientDisconnected:
            result = None
        except BaseException as exc:
            if not isinstance(exc, asyncio.CancelledError):
                logger.exception("the application failed on a WebSocket connection from %s", self.peer_name())
            self.send_500_response()
            self.close(1011, "internal error")
            if not self.handshake_complete:
                self.transport.close()
            return
        if self._kept and self.handshake_complete:
            return
        if not self.handshake_complete:
            logger.error("the application returned without answering the handshake")
            self.send_500_response()
        elif result is not None:
            logger.error("the application should return None, but returned %r", result)
        if not self.close_sent and self._sink is not None:
            self.close(1000)
        elif self.close_timer is None and self._abort_timer is None:
            self.transport.close()


def nothing() -> None:
    """Nobody waits for us, under a server that is not ours."""


def _is_utf8(payload: bytes) -> bool:
    try:
        payload.decode()
    except UnicodeDecodeError:
        return False
    return True
