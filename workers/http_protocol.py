"""uvicorn's HTTP protocol with the bounds it lacks: time for a request's head, and its bytes.

The very first stage: every connection begins as HTTP/1.1, and becomes a WebSocket by its handshake.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Final

from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from workers.limited_protocol import nothing

#: Key in a request's extensions that says that its response has no end.
ENDLESS: Final = "flockwire.endless"
#: Seconds from the connection, or from its first byte, to the end of a request's head.
HANDSHAKE_TIMEOUT: Final = 10.0
#: Bytes of a request's head.
MAX_HEAD_BYTES: Final = 64 * 1024


class HttpProtocol(HttpToolsProtocol):
    """uvicorn's HTTP/1.1 protocol with a deadline and a size for the request's head."""

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._head_bytes = 0
        self._in_head = False
        self._changed: Callable[[], None] = getattr(server_state, "changed", nothing)
        self._handshake_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._start_handshake_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel_handshake_timer()
        super().connection_lost(exc)
        self._changed()

    def shutdown(self) -> None:
        """The worker drains: a response without end would hold it up, and its client comes back by itself."""
        super().shutdown()
        cycle = self.cycle
        if cycle is not None and not cycle.response_complete and ENDLESS in cycle.scope.get("extensions", {}):
            self.transport.close()

    @property
    def handshaking(self) -> bool:
        """True while the head of a request is awaited or has begun to arrive."""
        return self._handshake_timer is not None

    def _start_handshake_timer(self) -> None:
        if self._handshake_timer is None:
            self._handshake_timer = self.loop.call_later(HANDSHAKE_TIMEOUT, self._handshake_overdue)

    def _cancel_handshake_timer(self) -> None:
        if self._handshake_timer is not None:
            self._handshake_timer.cancel()
            self._handshake_timer = None

    def _handshake_overdue(self) -> None:
        self._handshake_timer = None
        self.transport.abort()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._in_head and not self.transport.is_closing():
            # httptools reports a header only when it is whole, and bounds nothing itself.
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self.send_400_response("Request header fields too large.")

    def on_message_begin(self) -> None:
        self._in_head = True
        self._head_bytes = 0
        self._start_handshake_timer()
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._cancel_handshake_timer()
        if len(self.url) + sum(len(name) + len(value) for name, value in self.headers) > MAX_HEAD_BYTES:
            raise ValueError("request head over the limit")  # the parser turns it into a 400
        super().on_headers_complete()
