"""The fast path and the parser together, without a socket: however a stream of frames is cut into chunks, the same
messages come out (RFC 6455 section 5), and whatever holds reading back, none is lost."""

from __future__ import annotations

import asyncio
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.workers.server_fixture import (
    BINARY,
    CONT,
    PING,
    TEXT,
    close_frame,
    frame,
)
from tests.workers.wire import Message, loop, plain, wire
from workers.limited_protocol import HOLD_BUS

__all__ = ["loop"]


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


@pytest.mark.parametrize("size", [0, 1, 2, 124, 125, 126, 127, 128, 131, 200, 300, 65_535, 65_536])
@pytest.mark.parametrize("opcode", [TEXT, BINARY])
def test_every_cut_of_one_frame(loop: asyncio.Runner, size: int, opcode: int) -> None:
    """A head that says one thing about a chunk's length and another about the frame's shall mislead nobody."""

    async def main() -> None:
        w = await wire()
        payload = bytes(65 + place % 26 for place in range(size))
        data = frame(opcode, payload)
        for cut in range(1, min(len(data), 400)):
            del w.messages[:]
            w.protocol.data_received(data[:cut])
            w.protocol.data_received(data[cut:])
            assert w.messages == [(payload, opcode == TEXT)], cut
        assert not w.transport.closing
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
