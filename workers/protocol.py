"""The socket side of a connection: uvicorn's WebSocket protocol with limits and a fast path.

First and last stage of a message's way. In: a whole, plain, masked frame of an open connection goes straight to the
connection's handler; everything else (handshake, control frames, fragments, errors) to ``websockets``' sans-I/O
parser, which knows RFC 6455's corners (``workers/limited_protocol.py``). Out: :class:`~workers.sinks.SocketSink`
writes ready frames to the transport.

A connection of ours *attaches* through ``scope["extensions"]["flockwire"]`` (this object). An endpoint that uses a
plain Starlette ``WebSocket`` never does, and gets ASGI to the letter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Final

from starlette.websockets import WebSocket
from uvicorn.protocols.utils import ClientDisconnected, is_ssl

from workers.fanout import binary_frame, current_fanout, text_frame
from workers.lean_protocol import is_utf8
from workers.limited_protocol import HOLD_INBOX, LimitedProtocol
from workers.sinks import SocketSink

try:
    from websockets.speedups import apply_mask
except ImportError:  # a platform without the compiled extension
    from websockets.utils import apply_mask

#: A partial frame up to this size is kept here for the next chunk; a longer one is the parser's.
MAX_PARTIAL: Final = 16 * 1024

Handler = Callable[[bytes, bool], None]
Untaken = Callable[[], Iterable[tuple[bytes, bool]]]
Closed = Callable[[int, str], None]


class WebSocketProtocol(LimitedProtocol):
    """The protocol of our workers: a fast path, and the hand-over to a connection of ours."""

    _sink: SocketSink | None = None
    _handler: Handler | None = None
    _untaken: Untaken | None = None
    _on_closed: Closed | None = None
    _opened = False
    _kept = False
    _partial = b""

    # --- the connection of ours -------------------------------------------------------------------

    def attach(self, on_closed: Closed, max_backlog: int, write_timeout: float) -> SocketSink:
        """Take the outgoing side: from now on all frames go through the sink that is returned.

        ``on_closed`` is called once with the close code and reason when the connection is over: the client is gone,
        or our close frame is on its way. A second connection on the same socket shares the sink.
        """
        self.tell_end(on_closed)
        if self._sink is None:
            self._sink = SocketSink(self, self._traffic, max_backlog, write_timeout)
        return self._sink

    def tell_end(self, on_closed: Closed) -> None:
        """Call ``on_closed`` as :meth:`attach` does, without taking the outgoing side."""
        earlier = self._on_closed
        if earlier is None:
            self._on_closed = on_closed
            return

        def both(code: int, reason: str) -> None:
            earlier(code, reason)
            on_closed(code, reason)

        self._on_closed = both

    def opened(self) -> None:
        """After accept: the sink may write, and knows from ``pause_writing`` at once what the kernel did not take."""
        if self._sink is not None and not self._opened and not self.transport.is_closing():
            self._opened = True
            # A TLS transport counts "at the limit" as over it, and with 0 would wait for nothing, for ever.
            self.transport.set_write_buffer_limits(high=1 if is_ssl(self.transport) else 0)
            self._sink.open()

    def take_input(self, handler: Handler, untaken: Untaken | None = None) -> bool:
        """Give messages to ``handler(payload, is_text)`` instead of the ASGI queue, in order, from now on.

        Messages that wait in the queue are handed over first. Somebody who reads by ASGI after all gets those that
        ``untaken`` returns, and all later ones. False: the client has gone already.
        """
        waiting = []
        while self._queue is not None and not self._queue.empty():
            waiting.append(self._queue.get_nowait())
        self._handler, self._untaken = handler, untaken
        closed_before = self.close_sent
        for event in waiting:
            if event["type"] != "websocket.receive":
                self.queue.put_nowait(event)
            elif (
                self.close_sent == closed_before
            ):  # what follows a message that the handler closed for is ignored
                text = event.get("text")
                if text is not None:
                    handler(text.encode(), True)
                else:
                    handler(event.get("bytes") or b"", False)
        if self.read_paused:
            self.read_paused = False
            self.read_on()
        return (self._queue is None or self._queue.empty()) and not self.disconnected

    def _give_back(self) -> None:
        """Somebody reads by ASGI after all: to the queue with what was not taken, and what comes."""
        untaken, self._untaken, self._handler = self._untaken, None, None
        later = []
        while not self.queue.empty():
            later.append(self.queue.get_nowait())
        for payload, is_text in untaken() if untaken is not None else ():
            self.take_message(payload, is_text)
        for event in later:
            self.queue.put_nowait(event)
        self._holds &= ~HOLD_INBOX
        self.read_on()

    def keep(self) -> None:
        """The ASGI application may return without ending the connection, which is served by the handler alone."""
        self._kept = True

    @property
    def kept(self) -> bool:
        return self._kept

    def read_on(self) -> None:
        if self._partial and not self._holds:
            partial, self._partial = self._partial, b""
            self.data_received(partial)
        super().read_on()

    # --- in -----------------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        """The fast path: whole, final, unextended, masked text and binary frames (RFC 6455 section 5.2)."""
        handler = self._handler
        if handler is None or self._close is not None or self._holds or self._partial or self._parsing:
            data = self._not_yet(data)
            handler = self._handler
            if not data or handler is None:
                return
        end = len(data)
        if end > 8 and data[0] == 0x81:
            # The usual case, in few steps: one text frame and nothing else.
            size = data[1] ^ 0x80
            head = 6
            if size == 126:
                size = data[2] << 8 | data[3]
                head = 8
            elif size > 126:
                size = -1  # 64 bits of length, or not masked
            if size == end - head and size <= self.config.ws_max_size:
                payload = apply_mask(data[head:], data[head - 4 : head])
                if payload.isascii() or is_utf8(payload):
                    traffic = self._traffic
                    traffic.messages_in += 1
                    traffic.bytes_in += size
                    handler(payload, True)
                else:
                    self.fail(1007, "invalid UTF-8")
                return
        self._read_frames(data, handler)

    def _read_frames(self, data: bytes, handler: Handler) -> None:
        """All the frames that the fast path knows, one after the other."""
        at = 0
        end = len(data)
        max_size = self.config.ws_max_size
        traffic = self._traffic
        while end - at >= 6:
            kind = data[at]
            size = data[at + 1] ^ 0x80
            if (kind != 0x81 and kind != 0x82 and (kind != 0x8A or size > 125)) or size > 126:
                break  # control, fragment, extension, unmasked or huge: not for us
            start = at + 6
            if size == 126:
                if end - at < 8:
                    break
                size = data[at + 2] << 8 | data[at + 3]
                start = at + 8
            stop = start + size
            if size > max_size:
                break
            if stop > end:
                if stop - at <= MAX_PARTIAL:
                    self._partial = data[at:]
                    return
                break
            payload = apply_mask(data[start:stop], data[start - 4 : start])
            at = stop
            if kind == 0x8A:
                self.pong(payload)
                continue
            if kind == 0x81 and not payload.isascii() and not is_utf8(payload):
                self.fail(1007, "invalid UTF-8")
                return
            traffic.messages_in += 1
            traffic.bytes_in += size
            handler(payload, kind == 0x81)
            if self._holds or self._handler is not handler or self._close is not None:
                break
        if at >= end:
            return
        rest = data[at:] if at else data
        if self._close is not None or self._handler is None:
            self.parse(rest)
        elif self._holds:
            self._partial = rest
        elif self._handler is not handler:
            self.data_received(rest)
        else:
            self.parse(rest)

    def _not_yet(self, data: bytes) -> bytes:
        """Something stands before the fast path; returns what it may read nevertheless."""
        if self._handler is None or self._close is not None:
            super().data_received(data)
            return b""
        if self._holds:
            self._partial += data
            return b""
        if self._partial:
            data, self._partial = self._partial + data, b""
        if self._parsing:
            if self._fragment_count or not self.is_between_frames():
                self.parse(data)
                return b""
            self._parsing = False
        return data

    def take_message(self, data: bytes, is_text: bool) -> None:
        if self._handler is not None:
            self._handler(data, is_text)
        else:
            super().take_message(data, is_text)

    async def receive(self) -> Any:
        if self._handler is not None and not self._kept:
            self._give_back()
        return await super().receive()

    # --- out ----------------------------------------------------------------------------------------

    @property
    def is_behind(self) -> bool:
        return self._sink is not None and self._sink.progressing

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._sink is not None:
            self._sink.blocked()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._sink is not None:
            self._sink.unblocked()

    async def send(self, message: Any) -> None:
        sink = self._sink
        kind = message["type"]
        if (
            sink is None
            or self.close_sent
            or not self.handshake_complete
            or self.initial_response is not None
        ):
            await super().send(message)
        elif kind == "websocket.send":
            # Everything to an attached client leaves by one door, or frames would overtake each other.
            await sink.writable()
            if sink.closed:
                raise ClientDisconnected
            data = message.get("bytes")
            frame = (
                binary_frame(data) if data is not None else text_frame((message.get("text") or "").encode())
            )
            current_fanout().send_frames((sink,), [frame])
        elif kind == "websocket.close":
            self.close(message.get("code", 1000), message.get("reason") or "")
            self._app_closed = True
        else:
            await super().send(message)

    # --- the end ------------------------------------------------------------------------------------

    def owed(self) -> bytes:
        if self._sink is None:
            return b""
        current_fanout().flush()
        rest = self._sink.rest()
        self._sink.close()
        return rest

    def ended(self, code: int, reason: str) -> None:
        if self._sink is not None:
            self._sink.close()
        if self._partial:
            partial, self._partial = self._partial, b""
            if not self.disconnected:
                self.parse(partial)
        on_closed, self._on_closed = self._on_closed, None
        if on_closed is not None:
            on_closed(code, reason)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._handler = self._untaken = None

    def returned(self, result: Any) -> None:
        if self._kept and self.handshake_complete:
            return
        if self._sink is not None and self.handshake_complete and not self.close_sent and result is None:
            self.close(1000)
        else:
            super().returned(result)


def our_protocol(websocket: WebSocket) -> WebSocketProtocol | None:
    """The protocol object beneath ``websocket``, if nothing between it and the endpoint has wrapped ASGI."""
    protocol = protocol_beneath(websocket)
    if (
        protocol is None
        or websocket._receive != protocol.receive
        or _innermost(websocket._send) != protocol.send
    ):
        return None
    return protocol


def protocol_beneath(websocket: WebSocket) -> WebSocketProtocol | None:
    """The protocol object of our own server, whatever has been wrapped around it."""
    protocol = (websocket.scope.get("extensions") or {}).get("flockwire")
    return protocol if isinstance(protocol, WebSocketProtocol) else None


def _innermost(send: Any) -> Any:
    """``send`` without the wrapper of Starlette's own exception handling, which only watches HTTP responses."""
    while (
        getattr(send, "__qualname__", "")
        == "wrap_app_handling_exceptions.<locals>.wrapped_app.<locals>.sender"
    ):
        cells = dict(zip(send.__code__.co_freevars, send.__closure__ or (), strict=True))
        send = cells["send"].cell_contents
    return send
