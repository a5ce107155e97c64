"""The fast path and the parser together, without a socket: however a stream of frames is cut into chunks, the same
messages come out (RFC 6455 section 5), and whatever holds reading back, none is lost."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.websockets import WebSocket

from tests.workers.server_fixture import (
    BINARY,
    CONT,
    PING,
    PONG,
    TEXT,
    frame,
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
        """The end of the TCP connection."""
        self.protocol.connection_lost(None)

    def feed(self, data: bytes, cuts: list[int]) -> None:
        """The stream in chunks that end at ``cuts``."""
        at = 0
        for cut in [*sorted({cut % (len(data) + 1) for cut in cuts}), len(data)]:
            if cut > at:
                self.protocol.data_received(data[at:cut])
                at = cut

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
    protocol.data_received(upgrade_request())
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


class Sent(NamedTuple):
    """One message in fragments, with a ping after each."""

    parts: list[bytes]
    is_text: bool
    pings: list[bytes]
    mask: bytes

    def stream(self) -> bytes:
        data = b""
        for number, part in enumerate(self.parts):
            opcode = CONT if number else TEXT if self.is_text else BINARY
            data += frame(opcode, part, fin=number == len(self.parts) - 1, mask=self.mask)
            if number < len(self.pings):
                data += frame(PING, self.pings[number], mask=self.mask)
        return data

    @property
    def message(self) -> Message:
        return b"".join(self.parts), self.is_text


# Masks that look like the beginning of a frame, where a reader out of step would believe them.
masks = st.sampled_from((b"\x81\x80\x81\x80", b"\x81\x85\x01\x02", b"\x82\xfe\x00\x01")) | st.binary(
    min_size=4, max_size=4
)
ascii_parts = st.text(st.characters(max_codepoint=0x7E), max_size=60).map(str.encode) | st.sampled_from(
    (b"", b"x" * 125, b"y" * 126, b"z" * 700)
)
sent = st.builds(
    Sent,
    st.lists(ascii_parts, min_size=1, max_size=3),
    st.booleans(),
    st.lists(st.binary(max_size=20), max_size=3),
    masks,
)


@given(stream=st.lists(sent, max_size=6), cuts=st.lists(st.integers(0, 5000), max_size=20))
def test_any_cutting_gives_the_same_messages(
    loop: asyncio.Runner, stream: list[Sent], cuts: list[int]
) -> None:
    async def main() -> None:
        w = await wire()
        w.feed(b"".join(one.stream() for one in stream), cuts)
        assert w.messages == [one.message for one in stream]
        assert w.pongs() == [ping for one in stream for ping in one.pings[: len(one.parts)]]
        assert not w.transport.closing
        w.end()

    loop.run(main())


@given(stream=st.lists(sent, min_size=1, max_size=3))
def test_byte_by_byte(loop: asyncio.Runner, stream: list[Sent]) -> None:
    async def main() -> None:
        w = await wire()
        data = b"".join(one.stream() for one in stream)
        w.feed(data, list(range(len(data))))
        assert w.messages == [one.message for one in stream]
        w.end()

    loop.run(main())
