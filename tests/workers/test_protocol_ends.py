"""How a connection of our protocol ends, without a socket: pong deadlines, close frames, failures."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from starlette.websockets import WebSocket, WebSocketDisconnect

from tests.support import until_async
from tests.workers.server_fixture import (
    BINARY,
    CLOSE,
    CONT,
    PING,
    TEXT,
    close_frame,
    frame,
)
from tests.workers.wire import Wire, loop, plain, wire
from workers.fanout import SlowPolicy, current_fanout
from workers.limited_protocol import HOLD_INBOX
from workers.protocol import MAX_PARTIAL

__all__ = ["loop"]


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


@pytest.mark.parametrize(
    ("ending", "code"),
    [
        (b"\xc1\x80\0\0\0\0", 1002),
        (b"\x8f\x80\0\0\0\0", 1002),
        (frame(TEXT, b"\xff"), 1007),
        (close_frame(1000), 1000),
    ],
    ids=["rsv", "opcode 15", "bad UTF-8", "the client's close"],
)
@pytest.mark.parametrize("slow", [False, True])
def test_what_was_sent_before_leaves_before_the_close_frame(
    loop: asyncio.Runner, ending: bytes, code: int, slow: bool
) -> None:
    async def main() -> None:
        w = await wire()
        del w.transport.written[:]
        sink = w.protocol._sink
        assert sink is not None
        if slow:
            w.protocol.pause_writing()  # what is sent now waits in the backlog
            current_fanout().send((sink,), b"sent first")
            current_fanout().flush()
        current_fanout().send((sink,), b"sent before")
        w.protocol.data_received(ending)
        *sent, (opcode, payload) = w.frames()
        assert [data for _, data in sent] == [b"sent first", b"sent before"][not slow :]
        assert (opcode, payload[:2]) == (CLOSE, code.to_bytes(2, "big"))
        assert w.closed == [code]
        w.end()

    loop.run(main())


@pytest.mark.parametrize("policy", ["close", "drop_oldest", "latest"])
def test_nothing_follows_the_close_frame_in_the_turn_it_was_asked_for(
    loop: asyncio.Runner, policy: SlowPolicy
) -> None:
    async def main() -> None:
        w = await wire()
        del w.transport.written[:]
        sink = w.protocol._sink
        assert sink is not None
        w.protocol.close(1000)
        current_fanout().send((sink,), b"too late", policy, "t")
        current_fanout().flush()
        assert [opcode for opcode, _ in w.frames()] == [CLOSE]
        w.end()

    loop.run(main())
