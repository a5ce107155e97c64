"""Floods, slow handshakes and held readers on real sockets (R9, S2, S3, S6 to S8): what they cost us is bounded."""

from __future__ import annotations

import asyncio
import json
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
from tests.workers.test_protocol import ECHOES, connection_echo, rss
from workers import http_protocol, limited_protocol
from workers.limited_protocol import FREE_FRAGMENTS, HOLD_BUS
from workers.manager import WebSocketManager

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


def test_what_comes_before_the_handshake_is_answered_waits_for_it() -> None:
    """Also what would end the connection: its answer may not overtake the 101."""
    gate = asyncio.Event()
    got: list[int] = []

    def app(manager: WebSocketManager) -> Any:
        async def endpoint(websocket: WebSocket) -> None:
            await gate.wait()
            connection = await manager.new_connection(websocket, "c")
            async for value in connection.iter_json():
                got.append(value)

        return Starlette(routes=[WebSocketRoute("/ws", endpoint)])

    async def main() -> None:
        async with serving(app) as live:
            for early, code in (
                (frame(TEXT, b"1") + frame(PING, b"p") + close_frame(4000), 4000),
                (frame(TEXT, b"2") + frame(TEXT, b"\xff"), 1007),
                (frame(TEXT, b"x", mask=None), 1002),
            ):
                gate.clear()
                client = await live.socket()
                await client.write(upgrade_request())
                await until_async(lambda: live.server.server_state.tasks, 3.0)
                await client.write(early)
                await until_async(lambda: live.protocols[0]._early, 3.0)
                gate.set()
                head = await client.reader.readuntil(b"\r\n\r\n")
                assert head.startswith(b"HTTP/1.1 101 ")
                assert await client.close_code() == code
                await client.end()
            gate.clear()
            client = await live.socket()
            await client.write(upgrade_request())
            await until_async(lambda: live.server.server_state.tasks, 3.0)
            client.writer.write(frame(BINARY, b"x" * 60_000) * 3)
            await client.gone()
            gate.set()
            await client.end()

    uvrun(main())
    assert got == [1, 2]


def test_a_query_full_of_errors_is_answered_like_messages_full_of_errors() -> None:
    async def main() -> None:
        async with serving(max_subscriptions=3) as live:
            client = await live.raw("/ws/x?" + "&".join(["topic=a%2B"] * 2000))
            for _ in range(10):
                assert json.loads(await client.text())["code"] == 107
            assert await client.close_code() == 3509
            await client.end()
            client = await live.raw(
                "/ws/x?" + "&".join(f"topic={n}" for n in range(5)) + "&topic=&topic=%00&other=1"
            )
            codes = [json.loads(await client.text())["code"] for _ in range(4)]
            assert codes == [106, 106, 107, 107]
            await client.send(TEXT, b'{"type":"send","topic":"2","n":1}')
            assert await client.text() == '{"n":1}'
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
