"""uvicorn's WebSocket protocol without what an idle connection never needs, and with a lean handshake.

The beginning of a connection, beneath ``limited_protocol.py``: the head that ``http_protocol.py`` has read
is checked here, the application started, and its answer written.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import struct
import termios
from collections.abc import Iterable
from typing import Any, Final
from urllib.parse import unquote

from uvicorn.config import Config
from uvicorn.protocols.utils import get_local_addr, get_path_with_query_string, is_ssl
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from uvicorn.server import ServerState
from websockets.protocol import OPEN, SERVER, Protocol

from workers import handshake

_int: Final = struct.Struct("i")


class LeanProtocol(WebSocketsSansIOProtocol):
    """uvicorn's sans-I/O WebSocket protocol with a lean handshake.

    What uvicorn makes for each connection and an idle one never needs (parser, queue, events, timers) is made when it
    is first asked for: most of an idle connection's memory, and of what it costs to connect.
    """

    logger = logging.getLogger("uvicorn.error")
    transport: asyncio.Transport
    server: tuple[str, int | None] | None = None
    client: tuple[str, int] | None = None
    handshake_initiated = False
    handshake_complete = False
    close_sent = False
    disconnected = False
    close_timer = None
    initial_response = None
    read_paused = False
    _conn: Protocol | None = None
    _queue: asyncio.Queue[Any] | None = None
    _writable: asyncio.Event | None = None
    _key = b""
    _connect_told = False

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        # Not uvicorn's own: see above. What it would set is a default of the class or a property.
        self.config = config
        self.app = config.loaded_app
        self.loop = _loop or asyncio.get_running_loop()
        self.app_state = app_state
        self.server_state = server_state

    # What uvicorn's methods expect to find.

    @property
    def connections(self) -> set[Any]:  # type: ignore[override]
        """All connections of this server."""
        return self.server_state.connections

    @property
    def tasks(self) -> set[asyncio.Task[None]]:  # type: ignore[override]
        """All tasks of this server's applications."""
        return self.server_state.tasks

    @property
    def conn(self) -> Protocol:  # type: ignore[override]
        """The parser, and the writer of control frames."""
        if self._conn is None:
            self._conn = Protocol(SERVER, state=OPEN, max_size=self.config.ws_max_size, logger=self.logger)
        return self._conn

    @property
    def queue(self) -> asyncio.Queue[Any]:  # type: ignore[override]
        """What the ASGI application will receive."""
        if self._queue is None:
            self._queue = asyncio.Queue()
        return self._queue

    @property
    def writable(self) -> asyncio.Event:  # type: ignore[override]
        """Whether the transport takes more from the ASGI application."""
        if self._writable is None:
            self._writable = asyncio.Event()
            self._writable.set()
        return self._writable

    def _changed(self) -> None:
        changed = getattr(self.server_state, "changed", None)
        if changed is not None:
            changed()

    # For the subclass.

    def cut_later(self) -> None:
        """Cut the connection if it has not ended in a while."""
        raise NotImplementedError

    def peer_name(self) -> str:
        """The client's address for a log line."""
        return f"{self.client[0]}:{self.client[1]}" if self.client else "an unnamed peer"

    def unsent(self) -> int:
        """Bytes that the client's kernel has not taken: in our buffer, and in our kernel's.

        Ours alone would not do: the kernel asks for more only when a third of its own is free.
        """
        waiting = self.transport.get_write_buffer_size()
        sock = self.transport.get_extra_info("socket")
        if sock is not None:
            (queued,) = _int.unpack(fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, _int.pack(0)))
            waiting += queued
        return waiting

    # --- the handshake ----------------------------------------------------------------------------------

    def begin(self, method: str, http_version: str, target: bytes, headers: handshake.HeaderList) -> None:
        """A request to upgrade has been read: start the application, or refuse."""
        self.handshake_initiated = True
        key = handshake.check(method, http_version, headers)
        if isinstance(key, handshake.Refusal):
            self._refuse(key.status, key.headers, key.words.encode())
            return
        self._key = key
        raw_path, _, query_string = target.partition(b"?")
        path, root_path = raw_path.decode("latin-1"), self.config.root_path
        extensions: Any = {"websocket.http.response": {}, "flockwire": self}
        self.scope = {
            "type": "websocket",
            "asgi": {"version": self.config.asgi_version, "spec_version": "2.4"},
            "http_version": "1.1",
            "scheme": "wss" if is_ssl(self.transport) else "ws",
            "server": self.server or get_local_addr(self.transport),
            "client": self.client,
            "root_path": root_path,
            "path": root_path + (unquote(path) if "%" in path else path),
            "raw_path": root_path.encode("ascii") + raw_path,
            "query_string": query_string,
            "headers": list(headers),
            "subprotocols": _subprotocols(headers),
            "state": self.app_state.copy(),
            "extensions": extensions,
        }
        task = self.loop.create_task(self.run_asgi())
        task.add_done_callback(self.on_task_complete)
        self.tasks.add(task)

    def forget_request(self) -> None:
        """The application is done with the request, which would otherwise stay as long as the connection."""
        del self.scope
        self._key = b""

    def _refuse(self, status: int, headers: Iterable[tuple[bytes, bytes]], body: bytes) -> None:
        self.handshake_complete = True
        self.close_sent = True
        self.transport.write(handshake.http_response(status, headers, body))
        self.transport.close()
        self.cut_later()

    def send_500_response(self) -> None:
        if not (self.handshake_complete or self.initial_response):
            self._refuse(500, (), b"Internal Server Error")

    def _answer_handshake(self, message: Any) -> None:
        """What the application says before it has said what becomes of the handshake."""
        kind = message["type"]
        if kind == "websocket.accept":
            headers = [*self.server_state.default_headers, *message.get("headers", [])]
            answer = handshake.accept(self._key, message.get("subprotocol"), headers)
            if not self.transport.is_closing():
                self.handshake_complete = True
                self.transport.write(answer)
                self.start_keepalive()
                if self.config.access_log:
                    path = get_path_with_query_string(self.scope)
                    self.logger.info('%s - "WebSocket %s" [accepted]', self.peer_name(), path)
        elif kind == "websocket.close":
            self.queue.put_nowait({"type": "websocket.disconnect", "code": 1006})
            self._refuse(403, (), b"")
        elif kind == "websocket.http.response.start":
            self.initial_response = (message["status"], list(message.get("headers", [])), b"")
        else:
            raise RuntimeError(
                "Expected ASGI message 'websocket.accept', 'websocket.close' or 'websocket.http.response.start', "
                f"but got {kind!r}."
            )

    def _answer_denial(self, message: Any) -> None:
        """The body of a refusal by the application itself."""
        if message["type"] != "websocket.http.response.body":
            raise RuntimeError(
                f"Expected ASGI message 'websocket.http.response.body', but got {message['type']!r}."
            )
        initial: Any = self.initial_response
        status, headers, body = initial
        body += message.get("body", b"")
        self.initial_response = (status, headers, body)
        if not message.get("more_body", False):
            self.queue.put_nowait({"type": "websocket.disconnect", "code": 1006})
            self._refuse(status, headers, body)


def _subprotocols(headers: handshake.HeaderList) -> list[str]:
    return [
        token.strip()
        for name, value in headers
        if name == b"sec-websocket-protocol"
        for token in value.decode("latin-1").split(",")
    ]


def is_utf8(payload: bytes) -> bool:
    """Whether it is text (RFC 3629)."""
    try:
        payload.decode()
    except UnicodeDecodeError:
        return False
    return True
