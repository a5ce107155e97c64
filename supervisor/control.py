"""The control socket in the runtime directory: one JSON line each way, for ``status``, ``reload``, ``scale``, ``stop``.

No message passes here. The server side belongs to the supervisor's poll loop and never blocks; the client side is
what the commands use.
"""

from __future__ import annotations

import logging
import os
import selectors
import socket
import time
from collections.abc import Callable
from typing import Any, Literal

import msgspec

from ipc.runtime import CONTROL_NAME

logger = logging.getLogger("supervisor")

MAX_CLIENTS = 16
"""Commands served at once; more wait in the socket's queue."""
MAX_REQUEST = 4096
"""Bytes of a request line."""
MAX_REPLY = 4 * 1024 * 1024
"""Bytes of a reply line that a command accepts."""
IDLE_TIMEOUT = 10.0
"""Seconds a client has to send its line, and to take its answer."""
ACCEPT_PAUSE = 1.0
"""Seconds without accepting after a failure (no descriptor left)."""


class Request(msgspec.Struct, forbid_unknown_fields=True):
    """What a command asks for."""

    command: Literal["status", "stop", "reload", "scale"]
    workers: int = 0


class Refused(Exception):
    """The hub can not do what a command asks; the text says why."""


class HubNotRunning(Exception):
    """No hub answers in the runtime directory."""


Answer = dict[str, Any]
Pending = Callable[[], Answer | None]
"""Asked again and again until it has an answer."""


class ControlServer:
    """Accepts commands; ``handle`` answers each at once or gives a function that will have the answer later."""

    def __init__(
        self, dir_fd: int, selector: selectors.BaseSelector, handle: Callable[[Request], Answer | Pending]
    ) -> None:
        self._handle = handle
        self._selector = selector
        self._clients: dict[socket.socket, _Client] = {}
        self._accept_at: float | None = None
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        # Not by its path, which may be longer than the 107 bytes of a socket address.
        self._socket.bind(f"/proc/self/fd/{dir_fd}/{CONTROL_NAME}")
        os.chmod(CONTROL_NAME, 0o600, dir_fd=dir_fd)
        self._socket.listen(MAX_CLIENTS)
        self._socket.setblocking(False)
        selector.register(self._socket, selectors.EVENT_READ, self._accept)

    def advance(self, now: float) -> None:
        """Give the answers that have become known, drop who is late, and accept again after a pause."""
        for client in list(self._clients.values()):
            if client.pending is not None:
                self._answer(client, client.pending, now)
            elif now > client.deadline:
                self._drop(client)
        if self._accept_at is not None and now >= self._accept_at and len(self._clients) < MAX_CLIENTS:
            self._accept_at = None
            self._selector.register(self._socket, selectors.EVENT_READ, self._accept)

    def close(self) -> None:
        """Hang up on everybody; the commands that wait for the end of the hub see it now."""
        for client in list(self._clients.values()):
            self._drop(client)
        self._socket.close()

    def _accept(self, now: float) -> None:
        try:
            connection, _ = self._socket.accept()
        except (BlockingIOError, ConnectionError):
            return
        except OSError as error:
            logger.warning("can not accept a command: %s", error)
            self._pause(now + ACCEPT_PAUSE)
            return
        connection.setblocking(False)
        client = _Client(connection, now + IDLE_TIMEOUT)
        self._clients[connection] = client
        self._selector.register(connection, selectors.EVENT_READ, lambda now: self._converse(client, now))
        if len(self._clients) >= MAX_CLIENTS:
            self._pause(now)

    def _pause(self, until: float) -> None:
        self._accept_at = until
        self._selector.unregister(self._socket)

    def _converse(self, client: _Client, now: float) -> None:
        """Read a request or the end, or go on writing an answer."""
        try:
            if client.outgoing:
                self._write(client)
                return
            data = client.connection.recv(MAX_REQUEST)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        client.incoming += data
        if not data or len(client.incoming) > MAX_REQUEST:
            self._drop(client)
        elif b"\n" in client.incoming and client.pending is None:
            self._serve(client, bytes(client.incoming).partition(b"\n")[0], now)

    def _serve(self, client: _Client, line: bytes, now: float) -> None:
        client.incoming.clear()
        try:
            answer = self._handle(_decoder.decode(line))
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            answer = {"ok": False, "error": f"not a request: {error}"}
        except Refused as error:
            answer = {"ok": False, "error": str(error)}
        if callable(answer):
            client.pending = answer
            self._answer(client, answer, now)
        else:
            self._send(client, answer, now)

    def _answer(self, client: _Client, pending: Pending, now: float) -> None:
        try:
            answer = pending()
        except Refused as error:
            answer = {"ok": False, "error": str(error)}
        if answer is not None:
            client.pending = None
            self._send(client, answer, now)

    def _send(self, client: _Client, answer: Answer, now: float) -> None:
        client.outgoing += msgspec.json.encode(answer) + b"\n"
        client.deadline = now + IDLE_TIMEOUT
        try:
            self._write(client)
        except OSError:
            self._drop(client)

    def _write(self, client: _Client) -> None:
        try:
            sent = client.connection.send(client.outgoing)
        except BlockingIOError:
            sent = 0
        del client.outgoing[:sent]
        key = self._selector.get_key(client.connection)
        events = selectors.EVENT_WRITE if client.outgoing else selectors.EVENT_READ
        self._selector.modify(client.connection, events, key.data)

    def _drop(self, client: _Client) -> None:
        self._selector.unregister(client.connection)
        client.connection.close()
        del self._clients[client.connection]


class _Client:
    def __init__(self, connection: socket.socket, deadline: float) -> None:
        self.connection = connection
        self.deadline = deadline
        self.incoming = bytearray()
        self.outgoing = bytearray()
        self.pending: Pending | None = None


_decoder = msgspec.json.Decoder(Request)


def ask(runtime_dir: str, request: dict[str, Any], timeout: float) -> Answer | None:
    """Send one command to the hub of ``runtime_dir`` and wait for its answer.

    Returns:
        The answer; None when the hub hung up without one, as it does when it ends.

    Raises:
        HubNotRunning: nobody answers there.
        TimeoutError: no answer within ``timeout`` seconds.
    """
    deadline = time.monotonic() + timeout
    with _connect(runtime_dir) as connection:
        try:
            connection.sendall(msgspec.json.encode(request) + b"\n")
            line = _read_line(connection, deadline)
        except ConnectionError:
            line = b""
    answer: Answer | None = msgspec.json.decode(line) if line else None
    return answer


def _connect(runtime_dir: str) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        dir_fd = os.open(runtime_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            if os.fstat(dir_fd).st_uid != os.geteuid() != 0:
                raise HubNotRunning(f"{runtime_dir} belongs to another user")
            connection.connect(f"/proc/self/fd/{dir_fd}/{CONTROL_NAME}")
        finally:
            os.close(dir_fd)
    except OSError as error:
        connection.close()
        if isinstance(error, PermissionError):
            raise HubNotRunning(f"{runtime_dir} belongs to another user") from error
        raise HubNotRunning(f"no hub is running in {runtime_dir}") from error
    except HubNotRunning:
        connection.close()
        raise
    return connection


def _read_line(connection: socket.socket, deadline: float) -> bytes:
    received = bytearray()
    while b"\n" not in received and len(received) <= MAX_REPLY:
        connection.settimeout(max(0.001, deadline - time.monotonic()))
        data = connection.recv(65536)
        if not data:
            return b""
        received += data
    return bytes(received)
