"""Hostile clients against our protocols on real sockets (R9, S2 to S9): what each gets, and what it may cost us."""

from __future__ import annotations

import asyncio
import json
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
    upgrade_request,
    uvrun,
)
from workers import http_protocol, limited_protocol
from workers.limited_protocol import FREE_FRAGMENTS, HOLD_BUS
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


# --- floods ---


@ECHOES
def test_a_flood_of_pings_whose_pongs_are_not_read(app: Any) -> None:
    async def main() -> None:
        async with serving(app, leaves=False) as live:
            client = await live.raw(receive_buffer=4096)
            (protocol,) = live.protocols
            client.reader._transport.pause_reading()  # type: ignore[attr-defined]
            flood = frame(PING, b"x" * 125) * 2000
            before = rss()
            sent = 0
            while not protocol.holds(limited_protocol.HOLD_PONGS):
                client.writer.write(flood)
                sent += len(flood)
                await asyncio.sleep(0)
                assert sent < 64 << 20, "it is read without end"
            await asyncio.sleep(0)
            assert protocol.transport.get_write_buffer_size() < 512 * 1024
            client.writer.transport.abort()
            await until_async(lambda: not live.protocols, 5.0)
            assert rss() - before < sent + (4 << 20)

    uvrun(main())


@pytest.mark.parametrize("fragment", [b"", b"xx"])
@ECHOES
def test_a_flood_of_fragments(app: Any, fragment: bytes) -> None:
    async def main() -> None:
        async with serving(app, max_message_size=1 << 20) as live:
            for _ in range(2):  # what is measured is the second, when the allocator has had its arenas
                client = await live.raw()
                flood = frame(CONT, fragment, fin=False) * 40_000
                await client.send(TEXT, fragment, fin=False)
                before = rss()
                client.writer.write(flood)
                assert await client.close_code() == 1009
                growth = rss() - before - len(flood)
                await client.end()
                await until_async(lambda: not live.protocols, 5.0)
            assert growth < 3 << 20

    uvrun(main())


def test_as_many_fragments_as_a_message_may_have() -> None:
    async def main() -> None:
        async with serving(connection_echo, max_message_size=64 * 1024) as live:
            client = await live.raw()
            most = FREE_FRAGMENTS + 1024
            await client.write(
                frame(TEXT, b"x", fin=False) + frame(CONT, b"x", fin=False) * (most - 2) + frame(CONT, b"x")
            )
            assert await client.text() == "x" * most
            await client.end()

    uvrun(main())


def test_a_flood_of_closes_and_of_pongs() -> None:
    async def main() -> None:
        async with serving() as live:
            client = await live.raw("/ws/x")
            await client.write(frame(PONG, b"x" * 125) * 10_000)
            await client.send(PING, b"end")
            assert await client.read() == (PONG, b"end")
            client.writer.write(close_frame(1000) * 10_000)
            opcode, _ = await client.read()
            assert opcode == CLOSE
            await client.gone()
            await client.end()

    uvrun(main())


def test_a_flood_of_messages_does_not_starve_others() -> None:
    async def main() -> None:
        async with serving() as live:
            flooder, other = await live.raw("/ws/flooder"), await live.client("/ws/other?topic=o")
            message = frame(TEXT, b'{"type":"send","topic":"nobody"}')
            flooder.writer.write(message * 50_000)
            await other.send('{"type":"send","topic":"o","n":1,"ack":1}')
            got = {await other.recv(), await other.recv()}
            assert got == {'{"n":1}', '{"type":"ack","ack":1}'}
            await flooder.end()
            await other.close()

    uvrun(main())


# --- before the handshake is answered ---


def test_half_a_handshake_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_protocol, "HANDSHAKE_TIMEOUT", 0.2)

    async def main() -> None:
        async with serving() as live:
            silent, half = await live.socket(), await live.socket()
            await half.write(upgrade_request()[:-3])
            second = await live.socket()
            await second.write(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
            await second.reader.readuntil(b'"pid"')
            await second.write(b"GET /healthz HTTP/1.1\r\nHost: x\r\n")  # and never the empty line
            for client in (silent, half, second):
                await asyncio.wait_for(client.gone(), 3.0)
                await client.end()

    uvrun(main())


def test_endless_headers_are_refused() -> None:
    async def main() -> None:
        async with serving() as live:
            for junk in (b"X-Long: " + b"x" * 100_000, b"X: y\r\n" * 20_000, b"x" * 100_000):
                client = await live.socket()
                client.writer.write(upgrade_request()[:-2] + junk)
                head = await client.reader.read(64)
                assert head == b"" or head.startswith(b"HTTP/1.1 400 "), head
                await client.gone()
                await client.end()
            client = await live.socket()
            client.writer.write(b"GET /" + b"x" * 100_000)
            head = await client.reader.read(64)
            assert head == b"" or head.startswith(b"HTTP/1.1 400 "), head
            await client.end()

    uvrun(main())


def test_a_client_that_goes_during_its_handshake_is_nobodys_fault() -> None:
    async def main() -> None:
        async with serving() as live:
            for _ in range(20):
                client = await live.socket()
                client.writer.write(upgrade_request("/ws?topic=a"))
                await asyncio.sleep(0)
                await client.end()

    uvrun(main())


# --- back-pressure and the keep-alive ---


def test_a_client_that_is_held_back_is_read_on_where_it_stopped() -> None:
    async def main() -> None:
        async with serving() as live:
            client, reader = await live.raw("/ws/client"), await live.raw("/ws/reader?topic=t")
            protocol = next(p for p in live.protocols if p.scope["path"].endswith("client"))
            protocol.hold(HOLD_BUS)
            numbers = range(20_000)
            client.writer.write(
                b"".join(frame(TEXT, b'{"type":"send","topic":"t","n":%d}' % n) for n in numbers)
            )
            probe = await live.client("/ws/probe")
            await probe.send('{"type":"connect","ack":1}')
            await probe.recv()
            assert len(protocol._partial) <= 512 * 1024
            protocol.release(HOLD_BUS)
            del protocol  # or it is we who keep it
            for n in numbers:
                assert json.loads(await reader.text()) == {"n": n}
            for raw in (client, reader):
                await raw.end()
            await probe.close()

    uvrun(main())


def test_pings_are_sent_and_who_does_not_answer_is_closed() -> None:
    async def main() -> None:
        async with serving(ping_interval=0.1, ping_timeout=0.2) as live:
            client = await live.raw("/ws/x")
            for _ in range(3):
                opcode, payload = await client.read()
                assert opcode == PING
                await client.send(PONG, b"something else")
                await client.send(PONG, payload)
            assert await client.close_code() == 1011
            await client.end()

    uvrun(main())


def test_a_client_that_we_do_not_read_need_not_answer() -> None:
    async def main() -> None:
        async with serving(ping_interval=0.05, ping_timeout=0.1) as live:
            client = await live.client("/ws/x")
            (protocol,) = live.protocols
            protocol.hold(HOLD_BUS)
            await until_async(lambda: live.protocols[0] in live.protocols[0]._keepalive.pongs, 3.0)
            deadline = asyncio.get_running_loop().time() + 0.5
            await until_async(lambda: asyncio.get_running_loop().time() > deadline, 3.0)
            assert not protocol.transport.is_closing()
            protocol.release(HOLD_BUS)
            del protocol
            await client.send('{"type":"connect","ack":1}')
            assert await client.recv() == '{"type":"ack","ack":1}'
            await client.close()

    uvrun(main())
