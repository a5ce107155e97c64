"""How a proxied connection ends: from either side, with its code, and nothing outlives anything."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator

import pytest
from websockets.asyncio.client import ClientConnection
from websockets.asyncio.server import ServerConnection
from websockets.asyncio.server import serve as serve_target
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response

from tests.support import free_port, run, until_async
from tests.workers.proxy_rig import MIB, client, closed, echo, held_back, rig


@pytest.mark.parametrize("code", [1000, 1001, 1003, 1008, 1011, 3000, 4001, 4999])
def test_the_clients_close_code_and_reason_reach_the_target(code: int) -> None:
    async def main() -> None:
        async with rig() as this:
            async with client(this) as connection:
                await connection.send("last")
                assert await connection.recv() == "last"
                await connection.close(code, "because ☂")
            assert await this.target_ended() == (code, "because ☂")
            await this.ended()
            assert this.outcomes == [None]

    run(main())


@pytest.mark.parametrize("code", [1000, 1001, 1002, 1008, 1012, 1014, 3500, 4321])
def test_the_targets_close_code_and_reason_reach_the_client(code: int) -> None:
    async def close(connection: ServerConnection) -> None:
        await connection.send("last")
        await connection.close(code, "because ☂")

    async def main() -> None:
        async with rig(close) as this, client(this) as connection:
            assert await connection.recv() == "last"
            assert await closed(connection) == (code, "because ☂")
            await this.ended()
            assert this.outcomes == [None]

    run(main())


def test_a_close_without_a_code_is_a_normal_one() -> None:
    async def close(connection: ServerConnection) -> None:
        connection.protocol.send_close()
        connection.send_data()

    async def main() -> None:
        async with rig(close) as this, client(this) as connection:
            assert (await closed(connection))[0] == 1000

    run(main())


def test_what_the_target_sent_before_it_closed_arrives_before_the_close() -> None:
    async def burst(connection: ServerConnection) -> None:
        for number in range(200):
            await connection.send(str(number))
        await connection.close(4000, "done")

    async def main() -> None:
        async with rig(burst) as this, client(this) as connection:
            await connection.send("ignored")
            assert [message async for message in in_spite_of_close(connection)] == [
                str(n) for n in range(200)
            ]
            assert (await closed(connection))[0] == 4000

    run(main())


async def in_spite_of_close(connection: ClientConnection) -> AsyncIterator[str | bytes]:
    with contextlib.suppress(ConnectionClosed):
        while True:
            yield await connection.recv()


def test_a_client_that_vanishes_ends_the_target() -> None:
    async def main() -> None:
        async with rig() as this:
            connection = await client(this)
            await connection.send("hi")
            await connection.recv()
            connection.transport.abort()
            code, _ = await this.target_ended()
            assert code in (1000, 1001)
            await this.ended()

    run(main())


def test_a_client_that_vanishes_while_the_target_talks_ends_the_target() -> None:
    async def talk(connection: ServerConnection) -> None:
        while True:
            await connection.send("x" * 1000)

    async def main() -> None:
        async with rig(talk) as this:
            connection = await client(this)
            await connection.recv()
            connection.transport.abort()
            await this.target_ended()
            await this.ended()

    run(main())


def test_a_target_that_vanishes_ends_the_client_with_1014() -> None:
    async def vanish(connection: ServerConnection) -> None:
        await connection.recv()
        connection.transport.abort()

    async def main() -> None:
        async with rig(vanish) as this, client(this) as connection:
            await connection.send("go")
            assert (await closed(connection))[0] == 1014
            await this.ended()

    run(main())


def test_a_target_that_vanishes_ends_a_client_that_does_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CLOSE_TIMEOUT", "PING_INTERVAL", "PING_TIMEOUT"):
        monkeypatch.setattr(f"workers.proxy.{name}", 0.5)

    async def pour_and_vanish(connection: ServerConnection) -> None:
        pouring = asyncio.create_task(pour(connection))
        await held_back(lambda: sent)
        connection.transport.abort()
        await asyncio.gather(pouring, return_exceptions=True)

    sent = 0

    async def pour(connection: ServerConnection) -> None:
        nonlocal sent
        while True:
            await connection.send(b"x" * MIB)
            sent += 1

    async def main() -> None:
        async with rig(pour_and_vanish) as this:
            connection = await client(this, max_queue=1)
            await this.target_ended()
            await this.ended()
            assert connection.close_code is None
            connection.transport.abort()

    run(main())


def test_an_unreachable_target_closes_the_client_with_1014(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        for accept_first in (True, False):
            async with rig() as this:
                this.accept_first = accept_first
                this.endpoint = f"ws://user:secret@127.0.0.1:{free_port()}/"
                async with client(this) as connection:
                    assert await closed(connection) == (1014, "Bad Gateway")
                await this.ended()
                assert this.outcomes == [None]

    run(main())
    assert "unreachable" in caplog.text
    assert "secret" not in caplog.text
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_a_target_that_refuses_or_redirects_closes_the_client_with_1014() -> None:
    async def main() -> None:
        reached: list[str] = []

        def elsewhere(connection: ServerConnection, request: Request) -> Response:
            reached.append(request.path)
            return connection.respond(403, "no\n")

        async with serve_target(echo, "127.0.0.1", 0, process_request=elsewhere) as other:
            location = f"ws://127.0.0.1:{other.sockets[0].getsockname()[1]}/stolen"

            def redirect(connection: ServerConnection, request: Request) -> Response:
                response = connection.respond(302, "there\n")
                response.headers["Location"] = location
                return response

            for answer in (elsewhere, redirect):
                async with (
                    rig(target_options={"process_request": answer}) as this,
                    client(this) as connection,
                ):
                    assert (await closed(connection))[0] == 1014
        assert reached == ["/live?x=1"]

    run(main())


def test_cancelling_the_proxy_closes_both_sides() -> None:
    async def main() -> None:
        async with rig() as this, client(this) as connection:
            await connection.send("hi")
            await connection.recv()
            this.proxies[0].cancel()
            assert (await closed(connection))[0] == 1001
            assert (await this.target_ended())[0] == 1001
            assert [type(outcome) for outcome in this.outcomes] == [asyncio.CancelledError]

    run(main())


def test_an_error_in_the_proxy_closes_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with rig() as this, client(this) as connection:
            monkeypatch.setattr("workers.proxy._longer", lambda *_: 1 / 0)
            await connection.send("hi")
            assert (await closed(connection))[0] == 1011
            assert (await this.target_ended())[0] == 1001
            assert [type(outcome) for outcome in this.outcomes] == [ZeroDivisionError]

    run(main())


def test_the_end_of_the_server_reaches_the_target() -> None:
    async def main() -> None:
        async with rig() as this:
            connection = await client(this)
            await connection.send("hi")
            await connection.recv()
        assert (await closed(connection))[0] == 1012
        assert (await this.target_ended())[0] == 1012

    run(main())


def test_many_clients_leave_nothing_behind() -> None:
    async def main() -> None:
        async with rig() as this:
            before = len(asyncio.all_tasks())
            for _ in range(20):
                async with client(this) as connection:
                    await connection.send("hi")
                    assert await connection.recv() == "hi"
            await this.ended(20)
            await this.target_ended(20)
            await until_async(lambda: len(asyncio.all_tasks()) <= before)

    run(main())
