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

from workers.deadlines import Deadlines
from workers.limited_protocol import nothing

_UNKNOWN: Final = b"?"
#: Key in a request's extensions that says that its response has no end.
ENDLESS: Final = "flockwire.endless"
#: Seconds from the connection, or from its first byte, to the end of a request's head.
HANDSHAKE_TIMEOUT: Final = 10.0
#: Bytes of a request's head.
MAX_HEAD_BYTES: Final = 64 * 1024


class HttpProtocol(HttpToolsProtocol):
    """uvicorn's HTTP/1.1 protocol with a deadline and a size for the request's head."""

    _upgrade: bytes | None = _UNKNOWN

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
        self._taken: Callable[[int], None] = getattr(server_state, "taken", _nobody_counts)
        self._deadlines = _handshakes(server_state, self.loop)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._deadlines.set(self)
        sock = transport.get_extra_info("socket")
        if sock is not None:
            self._taken(sock.fileno())

    def connection_lost(self, exc: Exception | None) -> None:
        self._deadlines.clear(self)
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
        return self in self._deadlines

    def overdue(self) -> None:
        """No request has arrived in time."""
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
        self._upgrade = _UNKNOWN
        if self not in self._deadlines:
            self._deadlines.set(self)
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._deadlines.clear(self)
        if len(self.url) + sum(len(name) + len(value) for name, value in self.headers) > MAX_HEAD_BYTES:
            raise ValueError("request head over the limit")  # the parser turns it into a 400
        super().on_headers_complete()

    def _get_upgrade(self) -> bytes | None:
        """uvicorn asks three times for each request, whose headers do not change."""
        if self._upgrade is _UNKNOWN:
            self._upgrade = super()._get_upgrade()
        return self._upgrade

    def handle_websocket_upgrade(self) -> None:
        """The connection goes on as a WebSocket: its protocol gets the head that was read here."""
        self.connections.discard(self)
        protocol: Any = self.ws_protocol_class(  # type: ignore[misc, call-arg]
            config=self.config, server_state=self.server_state, app_state=self.app_state, _loop=self.loop
        )
        protocol.server, protocol.client = self.server, self.client  # each would be a system call
        protocol.connection_made(self.transport)
        self.transport.set_protocol(protocol)
        # It has our methods and we have it: without this, the garbage collector would have to find both.
        self.parser = None  # type: ignore[assignment]
        protocol.begin(self.scope["method"], self.scope["http_version"], self.url, self.headers)


def _handshakes(server_state: ServerState, loop: asyncio.AbstractEventLoop) -> Deadlines[HttpProtocol]:
    """The deadlines of all connections of one server that have not said what they want."""
    state: Any = server_state
    if not hasattr(state, "handshakes"):
        state.handshakes = Deadlines(loop, HANDSHAKE_TIMEOUT, HttpProtocol.overdue)
    found: Deadlines[HttpProtocol] = state.handshakes
    return found


def _nobody_counts(descriptor: int) -> None:
    """The server is not ours."""
