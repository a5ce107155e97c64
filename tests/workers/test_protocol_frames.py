"""The fast path and the parser together, without a socket: however a stream of frames is cut into chunks, the same
messages come out (RFC 6455 section 5), and whatever holds reading back, none is lost."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.websockets import WebSocket, WebSocketDisconnect

from tests.support import until_async
from tests.workers.server_fixture import (
    BINARY,
    CLOSE,
    CONT,
    PING,
    PONG,
    TEXT,
    close_frame,
    frame,
    settings,
    upgrade_request,
)
from workers.limited_protocol import HOLD_BUS, HOLD_INBOX
from workers.protocol import MAX_PARTIAL, WebSocketProtocol
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


# --- reading is held back ---


@given(stream=st.lists(sent, max_size=6), cuts=st.lists(st.integers(0, 5000), max_size=20))
def test_a_handler_that_holds_after_every_message_loses_none(
    loop: asyncio.Runner, stream: list[Sent], cuts: list[int]
) -> None:
    async def main() -> None:
        w = await wire()

        def handler(payload: bytes, is_text: bool) -> None:
            w.messages.append((payload, is_text))
            w.protocol.hold(HOLD_BUS)

        w.protocol.take_input(handler)
        w.feed(b"".join(one.stream() for one in stream), cuts)
        for _ in stream:
            w.protocol.release(HOLD_BUS)
        assert w.messages == [one.message for one in stream]
        assert w.pongs() == [ping for one in stream for ping in one.pings[: len(one.parts)]]
        assert w.transport.reading
        w.end()

    loop.run(main())


@given(
    stream=st.lists(sent, max_size=6),
    cuts=st.lists(st.integers(0, 5000), max_size=20),
    switches=st.sets(st.integers(0, 20)),
)
def test_reading_by_asgi_and_by_a_handler_in_turns_loses_none(
    loop: asyncio.Runner, stream: list[Sent], cuts: list[int], switches: set[int]
) -> None:
    async def main() -> None:
        w = await wire(plain)
        protocol = w.protocol
        got: list[Message] = []
        inbox: list[Message] = []

        def untaken() -> list[Message]:
            rest = inbox[:]
            inbox.clear()
            return rest

        reads_by_asgi = True
        data = b"".join(one.stream() for one in stream)
        ends = [*sorted({cut % (len(data) + 1) for cut in cuts}), len(data)]
        at = 0
        for number, end in enumerate(ends):
            if at < end:
                protocol.data_received(data[at:end])
                at = end
            if number in switches:
                reads_by_asgi = not reads_by_asgi
            if reads_by_asgi:
                if protocol._handler is not None:
                    protocol._give_back()
                while not protocol.queue.empty():
                    event: Any = await protocol.receive()
                    text = event.get("text")
                    got.append((text.encode(), True) if text is not None else (event["bytes"], False))
            else:
                if protocol._handler is None:
                    protocol.take_input(lambda *message: inbox.append(message), untaken)
                if inbox:
                    got.append(inbox.pop(0))
        got += inbox
        assert got == [one.message for one in stream]
        assert w.transport.reading
        w.end()

    loop.run(main())


async def plain(scope: Any, receive: Any, send: Any) -> None:
    """An endpoint that accepts and then leaves its socket to the test."""
    await WebSocket(scope, receive, send).accept()
    await asyncio.Event().wait()


def test_a_pong_hold_does_not_undo_the_queue_s(loop: asyncio.Runner) -> None:
    """With a message in the ASGI queue, the end of a ping flood does not make the client's next ones be read."""

    async def main() -> None:
        w = await wire(plain)
        w.transport.stuck = 1 << 20
        w.protocol.data_received(frame(TEXT, b"1") + frame(PING, b"x"))
        assert not w.transport.reading
        w.transport.stuck = 0
        w.protocol.resume_writing()
        assert not w.transport.reading
        await w.protocol.receive()
        assert w.transport.reading
        w.end()

    loop.run(main())


def test_receiving_does_not_undo_the_hold_of_a_ping_flood(loop: asyncio.Runner) -> None:
    async def main() -> None:
        w = await wire(plain)
        w.transport.stuck = 1 << 20
        w.protocol.data_received(frame(TEXT, b"1") + frame(PING, b"x"))
        await w.protocol.receive()
        assert not w.transport.reading
        w.protocol.resume_writing()
        assert w.transport.reading
        w.end()

    loop.run(main())


def test_the_handler_gets_first_what_had_come_before_it(loop: asyncio.Runner) -> None:
    async def main() -> None:
        w = await wire(plain)
        w.protocol.data_received(frame(TEXT, b"1") + frame(BINARY, b"2") + frame(TEXT, b"3")[:4])
        w.protocol.take_input(lambda payload, is_text: w.messages.append((payload, is_text)))
        w.protocol.data_received(frame(TEXT, b"3")[4:])
        assert w.messages == [(b"1", True), (b"2", False), (b"3", True)]
        assert w.transport.reading
        w.end()

    loop.run(main())


def test_the_end_is_told_also_to_who_reads_by_asgi_after_the_handler(loop: asyncio.Runner) -> None:
    async def main() -> None:
        w = await wire(plain)
        w.protocol.data_received(frame(TEXT, b"1") + close_frame(4321))
        assert not w.protocol.take_input(lambda payload, is_text: w.messages.append((payload, is_text)))
        assert w.messages == [(b"1", True)]
        event: Any = await w.protocol.receive()
        assert (event["type"], event["code"]) == ("websocket.disconnect", 4321)
        w.end()

    loop.run(main())


# --- the pong deadline ---


def test_the_pong_deadline_stands_still_while_we_do_not_read(loop: asyncio.Runner) -> None:
    async def main() -> None:
        w = await wire()
        protocol = w.protocol
        protocol._keepalive.pongs.seconds = 0.01
        protocol.ping_sent_at = protocol.loop.time() - 60.0
        protocol.hold(HOLD_INBOX)
        protocol.keepalive_timeout()
        assert not w.transport.closing
        protocol.release(HOLD_INBOX)
        protocol.keepalive_timeout()
        assert not w.transport.closing, "it had no time to answer yet"
        await until_async(lambda: w.transport.closing, 5.0)
        assert w.closed == [1011]
        w.end()

    loop.run(main())


def test_the_pong_deadline_stands_still_while_the_ping_is_behind_other_data(loop: asyncio.Runner) -> None:
    async def main() -> None:
        w = await wire()
        protocol = w.protocol
        protocol._keepalive.pongs.seconds = 10.0
        protocol.ping_sent_at = protocol.loop.time() - 60.0
        protocol.pause_writing()
        protocol.keepalive_timeout()
        assert not w.transport.closing
        protocol.resume_writing()
        protocol.keepalive_timeout()
        assert not w.transport.closing
        w.end()

    loop.run(main())


def test_a_client_that_never_reads_its_pongs_is_not_spared_the_deadline(loop: asyncio.Runner) -> None:
    async def main() -> None:
        w = await wire(plain)
        w.transport.stuck = 1 << 20
        w.protocol.data_received(frame(PING, b"x"))
        assert not w.transport.reading
        w.no_pong()
        assert w.transport.closing
        w.end()

    loop.run(main())


# --- closing ---


def test_what_is_pipelined_behind_our_close_is_ignored_but_the_clients_close_is_seen(
    loop: asyncio.Runner,
) -> None:
    async def main() -> None:
        w = await wire()

        def handler(payload: bytes, is_text: bool) -> None:
            w.messages.append((payload, is_text))
            w.protocol.close(1003, "no")

        w.protocol.take_input(handler)
        w.protocol.data_received(
            frame(BINARY, b"1") + frame(TEXT, b"2") + frame(TEXT, b"x" * 200, fin=False) + frame(CONT, b"y")
        )
        assert not w.transport.closing
        w.protocol.data_received(frame(TEXT, b"3") + close_frame(1000))
        assert w.messages == [(b"1", False)]
        assert w.transport.closing, "it waits for a close frame that has come already"
        assert w.frames() == [(CLOSE, b"\x03\xebno")]
        w.end()
        assert w.closed == [1003]

    loop.run(main())


def test_our_close_in_the_middle_of_a_frame(loop: asyncio.Runner) -> None:
    async def main() -> None:
        for size in (100, 3 * MAX_PARTIAL):
            w = await wire()
            data = frame(TEXT, b"x" * size)
            w.protocol.data_received(data[: size // 2])
            w.protocol.close(1012)
            w.protocol.data_received(data[size // 2 :] + close_frame(1012))
            assert w.messages == []
            assert w.transport.closing
            assert [opcode for opcode, _ in w.frames()] == [CLOSE]
            w.end()

    loop.run(main())


def test_a_reason_too_long_is_cut_and_a_code_that_is_none_changes_nothing(loop: asyncio.Runner) -> None:
    async def main() -> None:
        w = await wire()
        for code in (1005, 1006, 999, 5000, 0):
            with pytest.raises(ValueError, match=str(code)):
                w.protocol.close(code)
        w.protocol.data_received(frame(TEXT, b"still here"))
        assert w.messages == [(b"still here", True)]
        w.protocol.close(1000, "ä" * 100)
        ((opcode, payload),) = w.frames()
        assert (opcode, payload[2:].decode()) == (CLOSE, "ä" * 61)
        w.end()

    loop.run(main())


def test_nothing_is_written_after_the_close_frame(loop: asyncio.Runner) -> None:
    async def main() -> None:
        ways: dict[str, Callable[[Wire], None]] = {
            "our close": lambda w: w.protocol.close(1000),
            "theirs": lambda w: w.protocol.data_received(close_frame()),
            "a failure": lambda w: w.protocol.data_received(frame(TEXT, b"\xff")),
            "a failure in the parser": lambda w: w.protocol.data_received(frame(3, b"")),
            "no pong": lambda w: w.no_pong(),
        }
        for way, end in ways.items():
            w = await wire()
            sink = w.protocol._sink
            assert sink is not None
            w.transport.stuck = 100
            sink.push(b"before")
            end(w)
            sink.push(b"after")
            await asyncio.sleep(0)
            opcodes = [opcode for opcode, _ in w.frames()]
            assert opcodes == [TEXT, CLOSE], way
            assert len(w.closed) == 1, way
            w.end()
            assert len(w.closed) == 1, way

    loop.run(main())


def test_two_connections_on_one_socket_share_its_sink(loop: asyncio.Runner) -> None:
    async def main() -> None:
        w = await wire()
        again: list[int] = []
        sink = w.protocol.attach(lambda code, reason: again.append(code), 1000, 10.0)
        assert sink is w.protocol._sink
        w.protocol.pause_writing()
        w.protocol.opened()  # must not let out what is held back
        assert not sink.flowing
        w.protocol.resume_writing()
        w.protocol.data_received(close_frame(4000))
        w.end()
        assert w.closed == again == [4000]

    loop.run(main())


def test_sending_after_we_closed_is_the_clients_going_not_the_applications_fault(
    loop: asyncio.Runner,
) -> None:
    outcomes: list[str] = []

    async def sends(scope: Any, receive: Any, send: Any) -> None:
        websocket = WebSocket(scope, receive, send)
        await websocket.accept()
        await gate.wait()
        try:
            await websocket.send_text("too late")
        except WebSocketDisconnect:
            outcomes.append("disconnect")

    async def main() -> None:
        ends: list[Callable[[Wire], None]] = [
            lambda w: w.protocol.drain(1012),
            lambda w: w.protocol.data_received(frame(TEXT, b"\xff")),
        ]
        for end in ends:
            gate.clear()
            w = await wire(sends)
            end(w)
            gate.set()
            await asyncio.wait(w.protocol.tasks, timeout=5.0)
            w.end()
        assert outcomes == ["disconnect"] * 2

    gate = asyncio.Event()
    loop.run(main())
