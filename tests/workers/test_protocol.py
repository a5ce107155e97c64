"""Hostile clients against our protocols on real sockets (R9, S2 to S9): what each gets, and what it may cost us."""

from __future__ import annotations

import asyncio
import os
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocket

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
    serving,
    uvrun,
)
from workers import limited_protocol
from workers.manager import WebSocketManager

LIMIT = 4096


def starlette_echo(manager: WebSocketManager) -> Any:
    """An endpoint that knows nothing of us."""

    async def endpoint(websocket: WebSocket) -> None:
        await websocket.accept()
        while True:
            event = await websocket.receive()
            if event["type"] == "websocket.disconnect":
                return
            await websocket.send({**event, "type": "websocket.send"})

    return Starlette(routes=[WebSocketRoute("/ws", endpoint)])


def connection_echo(manager: WebSocketManager) -> Any:
    """The same by our Connection."""

    async def endpoint(websocket: WebSocket) -> None:
        connection = await manager.new_connection(websocket, "echo")
        while True:
            payload, is_text = await connection.receive_raw()
            await (connection.send_text(payload.decode()) if is_text else connection.send_bytes(payload))

    return Starlette(routes=[WebSocketRoute("/ws", endpoint)])


ECHOES = pytest.mark.parametrize("app", [starlette_echo, connection_echo])


def rss() -> int:
    """Resident memory of this process, client and server, in bytes."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")


# --- what is valid ---


@ECHOES
def test_fragments_with_pings_between_them(app: Any) -> None:
    async def main() -> None:
        async with serving(app) as live:
            client = await live.raw()
            for opcode in (TEXT, BINARY):
                await client.send(opcode, b"a", fin=False)
                await client.send(PING, b"first")
                await client.send(CONT, b"", fin=False)
                await client.send(PING, b"second")
                await client.send(CONT, b"b")
                assert [await client.read() for _ in range(3)] == [
                    (PONG, b"first"),
                    (PONG, b"second"),
                    (opcode, b"ab"),
                ]
            await client.write(close_frame(1000))
            assert await client.close_code() == 1000
            await client.end()

    uvrun(main())


@ECHOES
def test_every_length_and_an_empty_message(app: Any) -> None:
    async def main() -> None:
        async with serving(app) as live:
            client = await live.raw()
            for size in (0, 1, 125, 126, 127, 65535, 65536):
                await client.send(BINARY, b"x" * size)
                assert await client.read() == (BINARY, b"x" * size)
                await client.send(TEXT, b"\xc3\xa4" * (size // 2))
                assert await client.read() == (TEXT, b"\xc3\xa4" * (size // 2))
            await client.end()

    uvrun(main())


@ECHOES
def test_byte_by_byte_over_a_socket(app: Any) -> None:
    async def main() -> None:
        async with serving(app) as live:
            client = await live.raw()
            for byte in frame(TEXT, b"one") + frame(PING, b"two") + frame(TEXT, b"three", mask=b"\x81\x83ab"):
                await client.write(bytes((byte,)))
                await asyncio.sleep(0)
            answers = [await client.read() for _ in range(3)]
            assert [a for a in answers if a[0] == TEXT] == [(TEXT, b"one"), (TEXT, b"three")]
            assert (PONG, b"two") in answers
            await client.end()

    uvrun(main())


@ECHOES
def test_pongs_nobody_asked_for_and_pings_with_all_payloads(app: Any) -> None:
    async def main() -> None:
        async with serving(app) as live:
            client = await live.raw()
            for size in (0, 1, 125):
                await client.send(PONG, b"p" * size)
                await client.send(PING, b"q" * size)
                assert await client.read() == (PONG, b"q" * size)
            await client.send(TEXT, b"alive")
            assert await client.read() == (TEXT, b"alive")
            await client.end()

    uvrun(main())


def test_a_frame_that_comes_with_the_handshake(app: Any = connection_echo) -> None:
    """A client should wait for the 101, but nothing forbids it to be quick after it."""

    async def main() -> None:
        async with serving(app) as live:
            client = await live.socket()
            await client.handshake()
            await client.write(frame(TEXT, b"1") + frame(TEXT, b"2", fin=False) + frame(CONT, b"3")[:3])
            assert await client.text() == "1"
            await client.write(frame(CONT, b"3")[3:])
            assert await client.text() == "23"
            await client.end()

    uvrun(main())


# --- what is not ---

BROKEN = {
    "unmasked": (frame(TEXT, b"x", mask=None), 1002),
    "reserved bit": (frame(TEXT, b"x", rsv=4), 1002),
    "reserved opcode": (frame(3, b"x"), 1002),
    "reserved control opcode": (frame(11, b"x"), 1002),
    "continuation of nothing": (frame(CONT, b"x"), 1002),
    "text within a message": (frame(TEXT, b"x", fin=False) + frame(TEXT, b"y"), 1002),
    "long pong": (frame(PONG, b"x" * 126), 1002),
    "long ping": (frame(PING, b"x" * 126), 1002),
    "fragmented ping": (frame(PING, b"x", fin=False), 1002),
    "close of one byte": (frame(CLOSE, b"x"), 1002),
    "close with no code to send": (close_frame(1005), 1002),
    "close with a reason that is no text": (frame(CLOSE, b"\x03\xe8\xff"), 1007),
    "no text": (frame(TEXT, b"\xff"), 1007),
    "surrogate": (frame(TEXT, b"\xed\xa0\x80"), 1007),
    "overlong": (frame(TEXT, b"\xc0\xaf"), 1007),
    "cut character": (frame(TEXT, b"\xe2\x82"), 1007),
    "no text over fragments": (frame(TEXT, b"ok", fin=False) + frame(CONT, b"\xff"), 1007),
    "too big": (frame(BINARY, b"x" * (LIMIT + 1)), 1009),
    "too big text": (frame(TEXT, b"x" * (LIMIT + 1)), 1009),
    "2^40 announced": (b"\x82\xff" + (2**40).to_bytes(8, "big") + b"mask" + b"x" * 100, 1009),
    "too big over fragments": (frame(TEXT, b"x" * LIMIT, fin=False) + frame(CONT, b"xx"), 1009),
}


@pytest.mark.parametrize("app", [starlette_echo, connection_echo, None])
def test_broken_frames_close_with_their_code(app: Any) -> None:
    async def main() -> None:
        async with serving(*([app] if app else []), max_message_size=LIMIT) as live:
            for what, (data, code) in BROKEN.items():
                client = await live.raw("/ws" if app else "/ws/x")
                await client.write(data)
                assert await client.close_code() == code, what
                await client.end()
            # Behind a valid message in the same chunk, and cut into two in every place that matters.
            for what, (data, code) in BROKEN.items():
                for cut in (1, 2, 6, 9):
                    client = await live.raw("/ws" if app else "/ws/x")
                    await client.write(frame(PONG, b"") + data[:cut])
                    await until_async(lambda: live.server.server_state.connections, 5.0)
                    await client.write(data[cut:])
                    assert await client.close_code() == code, (what, cut)
                    await client.end()

    uvrun(main())


def test_what_was_whole_before_an_error_still_counts() -> None:
    async def main() -> None:
        async with serving() as live:
            reader = await live.raw("/ws/reader?topic=t")
            for before in (b"", frame(PING, b"x")):  # through the fast path, and through the parser
                client = await live.raw("/ws/x")
                await client.write(
                    before + frame(TEXT, b'{"type":"send","topic":"t","n":1}') + frame(TEXT, b"x", mask=None)
                )
                assert await client.close_code() == 1002
                assert await reader.text() == '{"n":1}'
                await client.end()
            await reader.end()

    uvrun(main())


def test_a_big_message_is_refused_so_that_its_sender_can_see_why() -> None:
    """It is still sending when it is told: a connection reset over unread bytes might take the reason with it."""

    async def main() -> None:
        async with serving(max_message_size=LIMIT) as live:
            for _ in range(5):
                client = await live.raw("/ws/x")
                data = frame(TEXT, b"x" * 65535) * 60
                client.writer.write(data)
                assert await client.close_code() == 1009
                await client.end()

    uvrun(main())


def test_who_does_not_end_after_a_failure_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limited_protocol, "CLOSE_TIMEOUT", 0.2)

    async def main() -> None:
        async with serving() as live:
            client = await live.raw("/ws/x")
            await client.send(TEXT, b"\xff")
            assert await client.close_code() == 1007
            await until_async(lambda: not live.protocols, 3.0, "the cut")
            other = await live.raw("/ws/y")
            live.protocols[0].close(1012)
            await until_async(lambda: not live.protocols, 3.0, "the cut")
            await client.end()
            await other.end()

    uvrun(main())


@ECHOES
def test_close_handshakes(app: Any) -> None:
    async def main() -> None:
        async with serving(app) as live:
            for sent, code in (
                (close_frame(1000), 1000),
                (close_frame(4999, "ä"), 4999),
                (frame(CLOSE), 1005),
            ):
                client = await live.raw()
                await client.write(sent)
                assert await client.close_code() == code
                await client.end()
            client = await live.raw()
            live.protocols[0].close(1012, "again")
            assert await client.read() == (CLOSE, b"\x03\xf4again")
            await client.write(close_frame(1012))
            await client.gone()
            await client.end()
            client = await live.raw()
            await client.send(TEXT, b"begun", fin=False)
            await client.write(close_frame(1000))
            assert await client.close_code() in (1000, 1002)  # Autobahn 7.1.5: either will do
            await client.end()
            client = await live.raw()
            await client.write(close_frame(1000) + frame(TEXT, b"late") + b"\xff" * 100)
            assert await client.close_code() == 1000
            await client.end()

    uvrun(main())


def test_an_application_is_told_that_a_client_has_vanished() -> None:
    """1006: no close frame came (RFC 6455 section 7.1.5); 1005: one came, without a code."""
    told: asyncio.Queue[int] = asyncio.Queue()

    async def endpoint(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        while (event := await receive())["type"] != "websocket.disconnect":
            pass
        told.put_nowait(event["code"])

    async def main() -> None:
        async with serving(lambda manager: endpoint) as live:
            client = await live.raw()
            client.writer.transport.abort()
            assert await told.get() == 1006
            client = await live.raw()
            await client.write(frame(CLOSE))
            assert await told.get() == 1005
            await client.end()

    uvrun(main())


@ECHOES
def test_clients_that_vanish_leave_nothing(app: Any) -> None:
    async def main() -> None:
        async with serving(app) as live:
            for number in range(30):
                client = await live.raw()
                if number % 3:
                    await client.send(TEXT, b"x" * number)
                if number % 3 == 2:
                    await client.write(frame(TEXT, b"half of it")[:5])
                await client.end()

    uvrun(main())
