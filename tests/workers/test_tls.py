"""The same protocol over TLS, where the transport is another: limits, back-pressure, close codes."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme
import websockets
from websockets.exceptions import ConnectionClosed

from tests.support import until_async
from tests.workers.server_fixture import CLOSE, TEXT, Live, RawClient, frame, serving, uvrun
from workers.fanout import current_fanout
from workers.limited_protocol import HOLD_BUS


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[dict[str, str], ssl.SSLContext]]:
    """Settings for the server, and a context for clients."""
    directory: Path = tmp_path_factory.mktemp("tls")
    authority = trustme.CA()
    certificate = authority.issue_cert("127.0.0.1")
    certificate.cert_chain_pems[0].write_to_path(str(directory / "cert.pem"))
    certificate.private_key_pem.write_to_path(str(directory / "key.pem"))
    context = ssl.create_default_context()
    authority.configure_trust(context)
    yield {"ssl_certfile": str(directory / "cert.pem"), "ssl_keyfile": str(directory / "key.pem")}, context


async def raw(live: Live, path: str, context: ssl.SSLContext) -> RawClient:
    """A client of bare frames over TLS."""
    reader, writer = await asyncio.open_connection("127.0.0.1", live.port, ssl=context)
    client = RawClient(reader, writer)
    await client.handshake(path)
    return client


async def client_of(live: Live, path: str, context: ssl.SSLContext) -> Any:
    """One by the ``websockets`` library."""
    return await websockets.connect(
        f"wss://127.0.0.1:{live.port}{path}", ssl=context, proxy=None, ping_interval=None, compression=None
    )


def test_messages_limits_and_closes(tls: tuple[dict[str, Any], ssl.SSLContext]) -> None:
    options, context = tls

    async def main() -> None:
        async with serving(**options) as live:
            a, b = (
                await client_of(live, "/ws/a?topic=t", context),
                await client_of(live, "/ws/b?topic=t", context),
            )
            for n in range(300):
                await a.send(json.dumps({"type": "send", "topic": "t", "n": n, "pad": "x" * 3000}))
            for client in (a, b):
                for n in range(300):
                    assert json.loads(await client.recv())["n"] == n
            with pytest.raises(ConnectionClosed):
                await a.send("x" * 1_000_000)
                await a.recv()
            assert a.close_code == 1009
            (protocol,) = [p for p in live.protocols if p.client == b.local_address[:2]]
            protocol.close(1012)
            del protocol
            with pytest.raises(ConnectionClosed):
                await b.recv()
            assert b.close_code == 1012
            broken = await raw(live, "/ws/c", context)
            await broken.send(TEXT, b"\xff")
            opcode, payload = await broken.read()
            assert (opcode, payload[:2]) == (CLOSE, b"\x03\xef")
            await broken.end()

    uvrun(main())


def test_held_back_and_read_on(tls: tuple[dict[str, Any], ssl.SSLContext]) -> None:
    options, context = tls

    async def main() -> None:
        async with serving(**options) as live:
            reader = await client_of(live, "/ws/reader?topic=t", context)
            sender = await raw(live, "/ws/sender", context)
            held = [p for p in live.protocols if p.client == sender.writer.get_extra_info("sockname")[:2]]
            (protocol,) = held
            protocol.hold(HOLD_BUS)
            sender.writer.write(
                b"".join(frame(TEXT, b'{"type":"send","topic":"t","n":%d}' % n) for n in range(5000))
            )
            await reader.send('{"type":"connect","ack":1}')
            assert await reader.recv() == '{"type":"ack","ack":1}'
            protocol.release(HOLD_BUS)
            del protocol, held
            for n in range(5000):
                assert json.loads(await reader.recv()) == {"n": n}
            await sender.end()
            await reader.close()

    uvrun(main())


def test_a_client_that_does_not_read(tls: tuple[dict[str, Any], ssl.SSLContext]) -> None:
    options, context = tls

    async def main() -> None:
        async with serving(**options, max_backlog=200_000, write_timeout=0.5) as live:
            slow, good = (
                await raw(live, "/ws/slow?topic=t", context),
                await client_of(live, "/ws/good?topic=t", context),
            )
            slow.writer.transport.pause_reading()  # type: ignore[attr-defined]
            n = 0
            while len(live.manager.active_connections) == 2:
                for _ in range(20):
                    await live.manager.send("t", {"n": n, "pad": "x" * 1000})
                    n += 1
                for _ in range(20):
                    await good.recv()
                assert n < 30_000
            assert current_fanout().slow_closed == 1
            slow.writer.transport.resume_reading()  # type: ignore[attr-defined]
            found = []
            while True:
                opcode, payload = await slow.read()
                if opcode == CLOSE:
                    break
                found.append(json.loads(payload)["n"])
            assert found == list(range(len(found))) and payload[:2] == b"\x03\xf5"
            await slow.end()
            await good.close()
            await until_async(lambda: not live.protocols, 3.0)

    uvrun(main())
