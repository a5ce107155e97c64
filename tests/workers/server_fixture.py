"""A worker's server in the test's own process: our protocols on uvloop and a manager, of which nothing may be left.

:func:`serving` starts it, :class:`RawClient` attacks it frame by frame, :func:`uvrun` runs the test and fails on
tasks, sockets and unexpected log lines that it leaves behind.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import gc
import logging
import os
import shutil
import socket
import struct
import tempfile
import weakref
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Iterator
from typing import Any, TypeVar

import msgspec
import uvloop
import websockets
from websockets.asyncio.client import ClientConnection

from ipc.board import INTEREST_BITS
from ipc.rules import Rules
from tests.support import until_async
from workers import context
from workers.brokers import IpcBroker
from workers.fanout import current_fanout
from workers.hub import create_hub
from workers.manager import WebSocketManager
from workers.protocol import WebSocketProtocol
from workers.server import DrainingServer
from workers.settings import Settings
from workers.sinks import AnySink, AsgiSink, SocketSink
from workers.worker import server_config

T = TypeVar("T")

TEXT, BINARY, CONT, CLOSE, PING, PONG = 1, 2, 0, 8, 9, 10


class Complaints(logging.Handler):
    """Log records that mean a fault: errors, and tracebacks at any level."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.ERROR or record.exc_info:
            self.found.append(logging.Formatter().format(record))


def uvrun(main: Coroutine[Any, Any, T], timeout: float = 30.0, *, complaints: bool = False) -> T:
    """Run a test on uvloop, with a deadline; nothing may be left running, and nothing be logged as an error.

    With ``complaints`` an error in the log is what the test provokes.
    """
    heard = Complaints()

    async def bounded() -> T:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, what: heard.found.append(f"loop: {what}"))
        async with asyncio.timeout(timeout):
            result = await main
        # Transports that were aborted, and tasks that were cancelled, end in the next turns of the loop.
        await until_async(lambda: len(asyncio.all_tasks()) == 1, 5.0, f"the end of {asyncio.all_tasks()}")
        return result

    root = logging.getLogger()
    root.addHandler(heard)
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            result = runner.run(bounded())
    finally:
        root.removeHandler(heard)
    if not complaints:
        assert heard.found == []
    return result


@contextlib.contextmanager
def settings(**changes: Any) -> Iterator[Settings]:
    """The settings of this process, with these changed, for as long as the block lasts."""
    before = context._settings
    made: Settings = msgspec.structs.replace(Settings.from_environment({}), **changes)
    context.use_settings(made)
    try:
        yield made
    finally:
        context._settings = before


@contextlib.contextmanager
def runtime_dir() -> Iterator[str]:
    """A path for a runtime directory of the test's own, removed afterwards."""
    base = tempfile.mkdtemp(prefix="fw-test-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None)
    try:
        yield os.path.join(base, "run")
    finally:
        shutil.rmtree(base, ignore_errors=True)


class Live:
    """A running server and its manager."""

    def __init__(self, port: int, manager: WebSocketManager, server: DrainingServer) -> None:
        self.port = port
        self.manager = manager
        self.server = server

    async def client(self, path: str = "/ws", **options: Any) -> ClientConnection:
        """A client by the ``websockets`` library."""
        options = {"ping_interval": None, "max_size": None, "compression": None, "proxy": None} | options
        return await websockets.connect(f"ws://127.0.0.1:{self.port}{path}", **options)

    async def raw(self, path: str = "/ws", **options: Any) -> RawClient:
        """A client of bare frames, after its handshake."""
        client = await self.socket(**options)
        await client.handshake(path)
        return client

    async def socket(self, *, receive_buffer: int | None = None, limit: int = 2**16) -> RawClient:
        """A bare TCP connection."""
        sock = socket.socket()
        if receive_buffer is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", self.port))
        reader, writer = await asyncio.open_connection(sock=sock, limit=limit)
        return RawClient(reader, writer)

    @property
    def protocols(self) -> list[WebSocketProtocol]:
        """The server's side of all WebSockets."""
        return [c for c in self.server.server_state.connections if isinstance(c, WebSocketProtocol)]


class RawClient:
    """A client that writes what it likes."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def handshake(self, path: str = "/ws", *headers: str) -> None:
        """The opening handshake; the test fails unless it is answered with 101."""
        self.writer.write(upgrade_request(path, *headers))
        head = await self.reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 101 "), head

    async def write(self, data: bytes) -> None:
        """Bytes as they are."""
        self.writer.write(data)
        await self.writer.drain()

    async def send(self, opcode: int, payload: bytes = b"", *, fin: bool = True) -> None:
        """One masked frame."""
        await self.write(frame(opcode, payload, fin=fin))

    async def read(self) -> tuple[int, bytes]:
        """One frame of the server: opcode and payload. It must be whole, unmasked and plain."""
        first, second = await self.reader.readexactly(2)
        assert first & 0xF0 == 0x80 and second < 0x80, (first, second)
        size = second
        if size == 126:
            (size,) = struct.unpack("!H", await self.reader.readexactly(2))
        elif size == 127:
            (size,) = struct.unpack("!Q", await self.reader.readexactly(8))
        return first & 0x0F, await self.reader.readexactly(size)

    async def text(self) -> str:
        """One text message."""
        opcode, payload = await self.read()
        assert opcode == TEXT, (opcode, payload)
        return payload.decode()

    async def close_code(self) -> int:
        """The code of the server's close frame, whatever comes before it; answered, it must be the last thing."""
        while True:
            opcode, payload = await self.read()
            if opcode == CLOSE:
                break
        self.writer.write(frame(CLOSE, payload[:2]))
        with contextlib.suppress(ConnectionError):
            assert await self.reader.read() == b""  # nothing may follow a close frame
        return int.from_bytes(payload[:2], "big") if payload else 1005

    async def gone(self) -> None:
        """Wait for the end of the TCP connection."""
        with contextlib.suppress(ConnectionError):
            while await self.reader.read(65536):
                pass

    async def end(self) -> None:
        """Leave without a word."""
        self.writer.transport.abort()
        with contextlib.suppress(ConnectionError):
            await self.writer.wait_closed()


def upgrade_request(path: str = "/ws", *headers: str) -> bytes:
    """The request of an opening handshake."""
    key = base64.b64encode(os.urandom(16)).decode()
    lines = [
        f"GET {path} HTTP/1.1",
        "Host: 127.0.0.1",
        "Upgrade: websocket",
        "Connection: Upgrade",
        f"Sec-WebSocket-Key: {key}",
        "Sec-WebSocket-Version: 13",
        *headers,
    ]
    return "\r\n".join([*lines, "", ""]).encode()


def frame(
    opcode: int,
    payload: bytes = b"",
    *,
    fin: bool = True,
    mask: bytes | None = b"\x11\x22\x33\x44",
    rsv: int = 0,
) -> bytes:
    """One frame of a client (RFC 6455 section 5.2); ``mask=None`` leaves it unmasked."""
    first = (0x80 if fin else 0) | rsv << 4 | opcode
    flag = 0x80 if mask is not None else 0
    size = len(payload)
    if size < 126:
        head = bytes((first, flag | size))
    elif size < 65536:
        head = bytes((first, flag | 126)) + struct.pack("!H", size)
    else:
        head = bytes((first, flag | 127)) + struct.pack("!Q", size)
    if mask is None:
        return head + payload
    return head + mask + bytes(byte ^ mask[at & 3] for at, byte in enumerate(payload))


def close_frame(code: int = 1000, reason: str = "") -> bytes:
    """A client's close frame."""
    return frame(CLOSE, code.to_bytes(2, "big") + reason.encode())


@contextlib.asynccontextmanager
async def serving(
    app: Callable[[WebSocketManager], Any] = create_hub,
    *,
    broker: str = "memory://",
    channel: str = "hub",
    rules: Rules | None = None,
    leaves: bool = True,
    **changes: Any,
) -> AsyncIterator[Live]:
    """Serve ``app(manager)`` with our protocols; on leaving, see that nothing of a connection is kept.

    Args:
        app: makes the ASGI application; the built-in hub by default.
        broker: the manager's broker URL.
        channel: the manager's channel.
        rules: topic rules.
        leaves: whether to look for what clients left behind, after they have gone.
        **changes: of the settings, ``max_backlog=1000`` for example.
    """
    if rules is not None:
        changes["rules"] = rules
    with settings(**changes) as made:
        strangers = weakref.WeakSet(all_sinks())
        manager = WebSocketManager(channel, broker)
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen(100)
            listener.setblocking(False)
            server = DrainingServer(server_config(made, app(manager)), listener)
            await manager.startup()
            await server.open()
            live = Live(listener.getsockname()[1], manager, server)
            failed = False
            try:
                yield live
            except BaseException:
                failed = True
                raise
            finally:
                try:
                    if leaves and not failed:
                        await until_async(
                            lambda: not server.server_state.connections, 5.0, "the end of all sockets"
                        )
                        await nothing_left(manager, strangers)
                finally:
                    if listener.fileno() != -1:  # else the test has drained it
                        await server.drain(1001, 1.0)
                    await manager.shutdown()


async def nothing_left(manager: WebSocketManager, strangers: Collection[AnySink] = ()) -> None:
    """What a manager and its loop hold of clients that are gone: nothing. ``strangers`` are sinks of other tests."""
    fanout = current_fanout()
    await until_async(lambda: not manager.active_connections, 5.0, "the end of all connections")
    assert len(manager._index) == 0
    assert manager._by_id == {}
    assert list(manager) == []
    assert manager._all_sinks() == ()
    assert (fanout.connections, fanout.subscriptions) == (0, 0)
    await until_async(lambda: not fanout._watched, 5.0, "the end of all watching")
    broker = manager.broker
    if isinstance(broker, IpcBroker) and broker.peer is not None:
        board, slot = broker.peer.runtime.board, broker.peer.slot
        begin = board.map_offset(slot)
        assert not any(board.memory[begin : begin + INTEREST_BITS // 8]), "interest that nobody has"

    def only_strangers() -> bool:
        gc.collect()
        return all(sink in strangers for sink in all_sinks())

    await until_async(only_strangers, 5.0, "the end of all sinks")


def all_sinks() -> list[AnySink]:
    """Every sink of a client that is in memory."""
    return [thing for thing in gc.get_objects() if type(thing) in (SocketSink, AsgiSink)]
