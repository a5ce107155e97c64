"""uvicorn's WebSocket protocol with a lean handshake, and the limits and endings that every connection needs.

The socket side of a connection, beneath ``workers/protocol.py``, which adds the fast path. ``websockets``' sans-I/O
parser reads the frames here. Bounds that uvicorn has not: fragments of a message, bytes of pongs for a client that
floods us with pings, objects made of one chunk of tiny frames, time for a closing client to go. Those of the request
before the handshake are in ``workers/http_protocol.py``.
"""

from __future__ import annotations

import asyncio
import logging
import random
from asyncio.transports import BaseTransport
from typing import Any, Final, Literal, cast

from starlette.websockets import WebSocketDisconnect
from uvicorn.config import Config
from uvicorn.protocols.utils import ClientDisconnected, get_remote_addr
from uvicorn.server import ServerState
from websockets.exceptions import InvalidState
from websockets.frames import Frame, Opcode

from workers.codes import closing
from workers.fanout import current_fanout
from workers.keepalive import keepalive_of
from workers.lean_protocol import LeanProtocol, is_utf8

logger = logging.getLogger("workers")

#: Fragments of one message: a thousand, and one more for each 64 bytes that the message may have.
FREE_FRAGMENTS: Final = 1024
#: Bytes of pongs that may wait for a client that does not read them.
MAX_CONTROL_BACKLOG: Final = 64 * 1024
#: Bytes that a client may send before its handshake is answered.
MAX_EARLY: Final = 64 * 1024
#: Seconds a closing client has to answer before its connection is cut.
CLOSE_TIMEOUT: Final = 10.0
#: What the parser gets at once: it makes an object of each frame, and a chunk may hold 40,000.
SLICE: Final = 8 * 1024

#: Why reading from a client pauses (bit flags).
HOLD_BUS: Final = 1
HOLD_INBOX: Final = 2
HOLD_PONGS: Final = 4
HOLD_ANSWERS: Final = 8


class LimitedProtocol(LeanProtocol):
    """The lean protocol with limits, a keepalive, and a clean end in all cases."""

    curr_msg_data_type: Literal["text", "bytes"] = "bytes"
    pending_ping_payload = None
    ping_sent_at = 0.0
    _fragments: bytearray | None = None
    _fragment_count = 0
    _parsing = False
    _failed = False
    _holds = 0
    _released_at = 0.0
    _app_closed = False
    _early = b""
    _close: tuple[int, str] | None = None
    _drain_close: tuple[int, str] | None = None
    _abort_timer: asyncio.TimerHandle | None = None

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._traffic = current_fanout()
        self._keepalive = keepalive_of(server_state, config, self.loop)

    @property
    def close_timeout(self) -> float:  # type: ignore[override]
        """Seconds a closing client has to answer."""
        return CLOSE_TIMEOUT

    # For the subclass.

    def take_message(self, data: bytes, is_text: bool) -> None:
        """One whole message: to the ASGI queue, one at a time."""
        if is_text:
            self.queue.put_nowait({"type": "websocket.receive", "text": data.decode()})
        else:
            self.queue.put_nowait({"type": "websocket.receive", "bytes": data})
        if not self.read_paused:
            self.read_paused = True
            self.transport.pause_reading()

    def owed(self) -> bytes:
        """What must leave before our close frame; nothing more is sent after it was asked for."""
        return b""

    def ended(self, code: int, reason: str) -> None:
        """The connection is over, or will be once the closing handshake is done. May be called again."""

    @property
    def kept(self) -> bool:
        """Whether no application waits for messages any more."""
        return False

    @property
    def is_behind(self) -> bool:
        """Whether the client is taking what it was sent before our ping, if slowly."""
        return False

    # --- holding back -----------------------------------------------------------------------------------

    def hold(self, reason: int) -> None:
        """Read nothing more from this client until :meth:`release` with the same reason."""
        if self.close_sent or self.transport.is_closing():
            return
        self._holds |= reason
        self.transport.pause_reading()

    def release(self, reason: int) -> None:
        """Read on, first what had already arrived."""
        if self._holds & reason:
            self._holds &= ~reason
            if not self._holds and not self.disconnected:
                self._released_at = self.loop.time()
                self.read_on()

    def holds(self, reason: int) -> bool:
        """Whether reading is paused for this reason."""
        return bool(self._holds & reason)

    def read_on(self) -> None:
        """Read again, unless there is still a reason not to."""
        if not (self._holds or self.read_paused or self.transport.is_closing()):
            self.transport.resume_reading()

    async def receive(self) -> Any:
        if not self._connect_told:
            self._connect_told = True
            return {"type": "websocket.connect"}
        message = await self.queue.get()
        self._released_at = self.loop.time()
        if self.read_paused and self.queue.empty():
            self.read_paused = False
            self.read_on()
        return message

    # --- in ---------------------------------------------------------------------------------------------

    def connection_made(self, transport: BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        if self.client is None:
            self.client = get_remote_addr(self.transport)
        self.connections.add(self)
        self._traffic.connections += 1

    def data_received(self, data: bytes) -> None:
        if self.handshake_complete:
            self.parse(data)
            return
        # It should wait for our answer; what it says before may not be answered before the handshake is.
        self._early += data
        if len(self._early) > MAX_EARLY:
            self.transport.abort()

    def parse(self, data: bytes) -> None:
        """Give bytes to the parser, and what it makes of them to the handlers below."""
        self._parsing = True
        for at in range(0, len(data), SLICE):
            if self._failed:
                return  # read and forgotten, see _linger
            self.conn.receive_data(data[at : at + SLICE] if len(data) > SLICE else data)
            self.handle_events()
            if self.conn.parser_exc is not None and not self._failed:
                self.handle_parser_exception()

    def is_between_frames(self) -> bool:
        """Whether the parser has all of the frame it last began, so that somebody else may read the next one."""
        waits: Any = self.conn.parser
        while waits.gi_yieldfrom is not None:
            waits = waits.gi_yieldfrom
        return bool(waits.__name__ == "at_eof")

    def handle_events(self) -> None:
        for event in self.conn.events_received():
            if not isinstance(event, Frame):
                continue  # requests and responses belong to the handshake
            if event.opcode is Opcode.TEXT:
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
            if self._failed:
                return

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
            self._fragments = bytearray(event.data)
            self._fragment_count = 1

    def handle_cont(self, event: Frame) -> None:
        # One buffer, not a list: a flood of tiny fragments costs its bytes and no objects.
        self._fragments = self._fragments or bytearray()
        self._fragments += event.data
        self._fragment_count += 1
        if event.fin:
            data = bytes(self._fragments)
            self._fragments = None
            self._fragment_count = 0
            self._message(data)
        elif self._fragment_count > FREE_FRAGMENTS + self.config.ws_max_size // 64:
            self.fail(1009, "too many fragments")

    def _message(self, data: bytes) -> None:
        if self.close_sent:
            return
        self._traffic.messages_in += 1
        self._traffic.bytes_in += len(data)
        is_text = self.curr_msg_data_type == "text"
        if is_text and not is_utf8(data):
            self.fail(1007, "invalid UTF-8")
        else:
            self.take_message(data, is_text)

    def handle_ping(self) -> None:
        super().handle_ping()
        if self.transport.get_write_buffer_size() > MAX_CONTROL_BACKLOG:
            # It pings and does not read the answers. Not reading it is answer enough.
            self.hold(HOLD_PONGS)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._released_at = self.loop.time()
        self.release(HOLD_PONGS)

    # --- out --------------------------------------------------------------------------------------------

    def write(self, data: bytes | memoryview) -> None:
        """Whole frames, or the rest of some, now."""
        self.transport.write(data)

    async def send(self, message: Any) -> None:
        if self.close_sent and self.handshake_complete and not self._app_closed:
            raise ClientDisconnected  # it is we who closed; the application could not know
        if self.initial_response is not None and not self.close_sent:
            self._answer_denial(message)
            return
        if not self.handshake_complete:
            self._answer_handshake(message)
            self._changed()
            early, self._early = self._early, b""
            if early and not self.close_sent:
                self.data_received(early)
            return
        await super().send(message)
        if message["type"] == "websocket.close" and self.close_sent:
            self._app_closed = True
            self.cut_later()

    # --- the end ----------------------------------------------------------------------------------------

    def close(self, code: int, reason: str = "") -> None:
        """Start the closing handshake after all that the client is owed; who does not answer is cut off.

        Raises:
            ValueError: ``code`` may not be sent (RFC 6455 section 7.4).
        """
        if self.close_sent or self.disconnected or self.transport.is_closing():
            return
        if not self.handshake_complete:
            self.transport.close()
            return
        code, reason = closing(code, reason)
        try:
            self.conn.send_close(code, reason)
        except InvalidState:
            self.transport.close()
            return
        self.close_sent = True
        self._close = self._close or (code, reason)
        self.stop_keepalive()
        self.queue.put_nowait({"type": "websocket.disconnect", "code": code, "reason": reason})
        self.transport.write(self.owed() + b"".join(self.conn.data_to_send()))
        self._holds = 0
        self.read_paused = False
        self.transport.resume_reading()
        self.cut_later()
        self.ended(code, reason)

    def cut_later(self) -> None:
        if self._abort_timer is None and not self.disconnected:
            self._abort_timer = self.loop.call_later(self.close_timeout, self.transport.abort)

    def handle_close(self, event: Frame) -> None:
        received = self.conn.close_rcvd
        code, reason = (received.code, received.reason) if received is not None else (1006, "")
        owed = b""
        if not self.close_sent:
            self.queue.put_nowait({"type": "websocket.disconnect", "code": code, "reason": reason})
            self.close_sent = True
            owed = self.owed()
        self._close = self._close or (code, reason)
        self.ended(code, reason)
        self.transport.write(owed + b"".join(self.conn.data_to_send()))
        self.transport.close()
        self.cut_later()

    def fail(self, code: int, reason: str) -> None:
        """Fail the connection (RFC 6455 section 7.1.7)."""
        self.conn.fail(code, reason)
        self.handle_parser_exception()

    def handle_parser_exception(self) -> None:
        self._failed = True
        sent = self.conn.close_sent
        if sent is None or self.transport.is_closing():
            # The client had closed already, or the stream ended: nothing to say.
            self.transport.close()
            return
        self._close = self._close or (sent.code, sent.reason)
        self.stop_keepalive()
        self.queue.put_nowait({"type": "websocket.disconnect", "code": sent.code, "reason": sent.reason})
        self.close_sent = (
            True  # before the flush: a client that it finds too slow is closed by this frame already
        )
        owed = self.owed()
        self.ended(sent.code, sent.reason)
        self.transport.write(owed + b"".join(self.conn.data_to_send()))
        self._linger()

    def _linger(self) -> None:
        """End our direction only: a socket closed over unread bytes is reset, and the client might not see why."""
        self._holds = 0
        self.read_paused = False
        if self.transport.can_write_eof():
            self.transport.write_eof()
            self.transport.resume_reading()
        else:
            self.transport.close()
        self.cut_later()

    def start_keepalive(self) -> None:
        """A ping is due in a while."""
        self._keepalive.pings.set(self)

    def stop_keepalive(self) -> None:
        self._keepalive.pings.clear(self)
        self._keepalive.pongs.clear(self)

    def ping(self) -> None:
        """Ask whether the client still lives (RFC 6455 section 5.5.2)."""
        if self.close_sent or self.transport.is_closing():
            return
        payload = random.randbytes(4)
        self.pending_ping_payload = payload
        self.ping_sent_at = self.loop.time()
        self.transport.write(b"\x89\x04" + payload)
        if self._keepalive.pongs.seconds:
            self._keepalive.pongs.set(self)
        else:
            self._keepalive.pings.set(self)

    def handle_pong(self, event: Frame) -> None:
        self.pong(bytes(event.data))

    def pong(self, payload: bytes) -> None:
        """The client lives, if this answers our ping; any other pong means nothing."""
        if payload == self.pending_ping_payload:
            self.pending_ping_payload = None
            self._keepalive.pongs.clear(self)
            self._keepalive.pings.set(self)

    def keepalive_timeout(self) -> None:
        """No pong in time. The deadline stands still while it is we who do not read, or what the client was sent
        before our ping is still on its way; then the write deadline judges it."""
        timeout = self._keepalive.pongs.seconds
        excused = self._holds & ~HOLD_PONGS or self.read_paused or self.is_behind
        quiet = self.loop.time() - max(self._released_at, self.ping_sent_at)
        if excused or quiet < timeout * 0.99:
            self._keepalive.pongs.set(self)
        elif not (self.close_sent or self.transport.is_closing()):
            self._failed = True
            self._close = self._close or (1011, "keepalive ping timeout")
            self.conn.fail(*self._close)
            self.ended(*self._close)
            self.transport.write(b"".join(self.conn.data_to_send()))
            self.close_sent = True
            self.transport.close()
            self.cut_later()

    def use_codes(self, drain: tuple[int, str], too_big: tuple[int, str], pings: bool) -> None:
        """Codes of a protocol of its own: for a drain, and for a message that is too large; without our pings if it
        has its own."""
        self._drain_close = drain
        fail = self.conn.fail

        def fail_with_its_code(code: int, reason: str = "") -> None:
            fail(*(too_big if code == 1009 else (code, reason)))

        self.conn.fail = fail_with_its_code  # type: ignore[method-assign]
        if not pings:
            self.stop_keepalive()

    def drain(self, code: int) -> None:
        """The worker is going: end this connection with ``code`` (1001 stop, 1012 replaced)."""
        if self.handshake_complete and self._drain_close is not None:
            self.close(*self._drain_close)
        elif self.handshake_complete:
            self.close(code, "server is going away" if code == 1001 else "service restart")
        else:
            self.send_500_response()
            self.transport.close()

    @property
    def handshaking(self) -> bool:
        """True until the handshake is answered."""
        return not self.handshake_complete

    def connection_lost(self, exc: Exception | None) -> None:
        self._close = self._close or (1006, "")
        if self._abort_timer is not None:
            self._abort_timer.cancel()
            self._abort_timer = None
        self.stop_keepalive()
        if self._queue is not None or not self.handshake_complete or not self.kept:
            self.queue.put_nowait({"type": "websocket.disconnect", "code": 1006})  # RFC 6455 section 7.1.5
        self.connections.discard(self)
        self.handshake_complete = True
        self.disconnected = True
        if self._writable is not None:
            self._writable.set()
        if exc is None:
            self.transport.close()
        self.ended(*self._close)
        self._traffic.connections -= 1
        self._changed()

    async def run_asgi(self) -> None:
        try:
            result: Any = await self.app(self.scope, self.receive, self.send)
        except (ClientDisconnected, WebSocketDisconnect):
            result = None  # an application need not guard every send against a client that goes
        except GeneratorExit:
            raise  # the loop is gone
        except BaseException as exc:
            if not isinstance(exc, asyncio.CancelledError):
                logger.exception("the application failed on a WebSocket connection from %s", self.peer_name())
            self.send_500_response()
            self.close(1011, "internal error")
            if not self.handshake_complete:
                self.transport.close()
            return
        self.returned(result)

    def returned(self, result: Any) -> None:
        """The application is done with this connection."""
        if not self.handshake_complete:
            logger.error("the application returned without answering the handshake")
            self.send_500_response()
        elif result is not None:
            logger.error("the application should return None, but returned %r", result)
        if self._abort_timer is None:
            self.transport.close()
            self.cut_later()


def nothing() -> None:
    """Nobody waits for us, under a server that is not ours."""
