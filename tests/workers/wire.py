"""A protocol of ours without a socket: what is fed to it and what it writes are bytes."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Iterator
from typing import Any

import pytest
from starlette.websockets import WebSocket

from tests.workers.server_fixture import (
    PONG,
    settings,
    upgrade_request,
)
from workers.protocol import WebSocketProtocol
from workers.server import DrainState
from workers.worker import server_config

Message = tuple[bytes, bool]


class FakeTransport(asyncio.Transport):
    """Keeps what is written; reads nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.written = bytearray()
        self.closing = False
        self.aborted = False
        self.reading = True
        self.ended = False
        self.stuck = 0

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default

    def write(self, data: bytes | bytearray | memoryview) -> None:
        assert not self.ended, "written after the end"
        self.written += data

    def write_eof(self) -> None:
        self.ended = True

    def can_write_eof(self) -> bool:
        return True

    def get_write_buffer_size(self) -> int:
        return self.stuck

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass

    def is_closing(self) -> bool:
        return self.closing

    def close(self) -> None:
        self.closing = True

    def abort(self) -> None:
        self.closing = self.aborted = True

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True


class Wire:
    """A protocol after its handshake, attached as our connections do, with a handler that keeps what it gets."""

    def __init__(self, protocol: WebSocketProtocol, transport: FakeTransport) -> None:
        self.protocol = protocol
        self.transport = transport
        self.messages: list[Message] = []
        self.closed: list[int] = []

    def end(self) -> None:
        """The end of the TCP connection, and of the application."""
        self.protocol.connection_lost(None)
        for task in self.protocol.tasks:
            task.cancel()

    def feed(self, data: bytes, cuts: list[int]) -> None:
        """The stream in chunks that end at ``cuts``."""
        at = 0
        for cut in [*sorted({cut % (len(data) + 1) for cut in cuts}), len(data)]:
            if cut > at:
                self.protocol.data_received(data[at:cut])
                at = cut

    def no_pong(self) -> None:
        """The deadline for a pong, a minute after the ping."""
        self.protocol._keepalive.pongs.seconds = 10.0
        self.protocol.ping_sent_at = self.protocol.loop.time() - 60.0
        self.protocol._released_at = 0.0
        self.protocol.keepalive_timeout()

    def pongs(self) -> list[bytes]:
        """The payloads of the pongs that were written."""
        return [payload for opcode, payload in self.frames() if opcode == PONG]

    def frames(self) -> list[tuple[int, bytes]]:
        """What was written, as frames."""
        found, at, data = [], 0, bytes(self.transport.written)
        while at < len(data):
            size, start = data[at + 1], at + 2
            if size == 126:
                size, start = int.from_bytes(data[start : start + 2], "big"), start + 2
            found.append((data[at] & 15, data[start : start + size]))
            at = start + size
        return found


made: list[Wire] = []


async def application(scope: Any, receive: Any, send: Any) -> None:
    """What the hub does with a socket: attach, accept, take the input, return."""
    protocol: WebSocketProtocol = scope["extensions"]["flockwire"]
    mine = made[-1]
    protocol.attach(lambda code, reason: mine.closed.append(code), 1 << 20, 10.0)
    await WebSocket(scope, receive, send).accept()
    protocol.opened()
    protocol.keep()
    protocol.take_input(lambda payload, is_text: mine.messages.append((payload, is_text)))


@functools.cache
def config(app: Any = application) -> Any:
    """uvicorn's, with a limit of 64 KiB and without pings."""
    with settings(ping_interval=0.0) as chosen:
        found = server_config(chosen, app)
    found.load()
    return found


async def wire(app: Any = application) -> Wire:
    """Make one."""
    protocol = WebSocketProtocol(config(app), DrainState(), {})
    transport = FakeTransport()
    protocol.connection_made(transport)
    made.append(Wire(protocol, transport))
    head = [line.split(b": ", 1) for line in upgrade_request().split(b"\r\n")[1:] if line]
    protocol.begin("GET", "1.1", b"/", [(name.lower(), value) for name, value in head])
    while protocol.handshaking:
        await asyncio.sleep(0)
    await asyncio.sleep(0)
    transport.written.clear()
    return made.pop()


@pytest.fixture(scope="module")
def loop() -> Iterator[asyncio.Runner]:
    """One loop for all examples; a new one for each would be most of the time."""
    with asyncio.Runner() as runner:
        yield runner


async def plain(scope: Any, receive: Any, send: Any) -> None:
    """An endpoint that accepts and then leaves its socket to the test."""
    await WebSocket(scope, receive, send).accept()
    await asyncio.Event().wait()
