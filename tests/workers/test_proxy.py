"""The proxy between two real servers: what passes through it, and what does not (S21)."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from starlette.websockets import WebSocket
from websockets.asyncio.server import ServerConnection
from websockets.typing import Subprotocol

from tests.support import run
from tests.workers.proxy_rig import MIB, client, closed, echo, held_back, rig
from workers.proxy import WebSocketProxy, sendable_code

# Messages


def test_text_and_binary_pass_both_ways() -> None:
    async def main() -> None:
        async with rig() as this, client(this) as connection:
            for message in ("hi", b"\x00\xff", "", b"", "ünïcode ☂", "x" * 200_000):
                await connection.send(message)
                assert await connection.recv() == message

    run(main())


def test_messages_keep_their_order_both_ways() -> None:
    async def main() -> None:
        async with rig() as this, client(this) as connection:

            async def send_all() -> None:
                for number in range(3000):
                    await connection.send(str(number))

            sending = asyncio.create_task(send_all())
            assert [await connection.recv() for _ in range(3000)] == [str(number) for number in range(3000)]
            await sending

    run(main())


def test_a_message_just_below_the_limit_passes_both_ways() -> None:
    async def main() -> None:
        async with rig() as this, client(this) as connection:
            message = b"x" * (16 * MIB)
            await connection.send(message)
            assert await connection.recv() == message

    run(main())


@pytest.mark.parametrize("message", ["x" * 101, "ü" * 51, b"x" * 101])
def test_too_big_a_message_from_the_client_ends_it(message: str | bytes) -> None:
    async def main() -> None:
        async with rig(max_size=100) as this, client(this) as connection:
            for fits in ("x" * 100, "ü" * 50, b"x" * 100):
                await connection.send(fits)
                assert await connection.recv() == fits
            await connection.send(message)
            assert (await closed(connection))[0] == 1009
            assert (await this.target_ended())[0] == 1001

    run(main())


def test_too_big_a_message_from_the_target_ends_it() -> None:
    async def too_big(connection: ServerConnection) -> None:
        await connection.send("x" * 101)
        await connection.wait_closed()

    async def main() -> None:
        async with rig(too_big, max_size=100) as this, client(this) as connection:
            assert (await closed(connection))[0] == 1009
            await this.target_ended()

    run(main())


def test_a_client_that_does_not_read_holds_the_target_back() -> None:
    sent = 0

    async def pour(connection: ServerConnection) -> None:
        nonlocal sent
        while True:
            await connection.send(b"x" * MIB)
            sent += 1

    async def main() -> None:
        async with rig(pour) as this:
            async with client(this, max_queue=1) as connection:
                await held_back(lambda: sent)
                assert sent < 40
                for _ in range(60):
                    assert len(await connection.recv()) == MIB
            await this.target_ended()

    run(main())


def test_a_target_that_does_not_read_holds_the_client_back() -> None:
    sent = 0
    release = asyncio.Event()

    async def read_later(connection: ServerConnection) -> None:
        await release.wait()
        async for _ in connection:
            pass

    async def main() -> None:
        nonlocal sent
        async with rig(read_later, {"max_queue": 1}) as this, client(this) as connection:

            async def pour() -> None:
                nonlocal sent
                for _ in range(60):
                    await connection.send(b"x" * MIB)
                    sent += 1

            pouring = asyncio.create_task(pour())
            await held_back(lambda: sent)
            assert sent < 40
            release.set()
            await pouring
            assert sent == 60

    run(main())


# The handshake with the target


def test_nothing_of_the_clients_handshake_reaches_the_target() -> None:
    async def main() -> None:
        credentials = {"Authorization": "Bearer secret", "Cookie": "session=secret", "X-Other": "secret"}
        async with (
            rig() as this,
            client(this, additional_headers=credentials, origin="http://page.example") as one,
        ):
            await one.send("hi")
            await one.recv()
            (request,) = this.requests
            assert request.path == "/live?x=1"
            assert "secret" not in str(request.headers)
            assert "Origin" not in request.headers

    run(main())


def test_headers_that_are_given_reach_the_target() -> None:
    async def main() -> None:
        headers = {
            "Authorization": "Bearer given",
            "X-User": "ada",
            "Connection": "close",
            "Host": "evil.example",
        }
        async with rig(headers=headers) as this, client(this) as connection:
            await connection.send("hi")
            await connection.recv()
            (request,) = this.requests
            assert request.headers["Authorization"] == "Bearer given"
            assert request.headers["X-User"] == "ada"
            assert request.headers.get_all("Connection") == ["Upgrade"]
            assert request.headers["Host"].startswith("127.0.0.1:")

    run(main())


def test_the_subprotocol_the_target_chose_is_told_to_a_client_that_is_not_accepted_yet() -> None:
    async def main() -> None:
        options = {"subprotocols": [Subprotocol("chat.v2")]}
        async with rig(echo, options, subprotocols=["chat.v1", "chat.v2"]) as this:
            this.accept_first = False
            async with client(
                this, subprotocols=[Subprotocol("chat.v1"), Subprotocol("chat.v2")]
            ) as connection:
                assert connection.subprotocol == "chat.v2"
                await connection.send("hi")
                assert await connection.recv() == "hi"

    run(main())


# Pure parts


@pytest.mark.parametrize(
    ("endpoint", "headers", "words"),
    [
        ("http://127.0.0.1/", None, "not a WebSocket address"),
        ("127.0.0.1:80", None, "not a WebSocket address"),
        ("ws://127.0.0.1:port/", None, "not a WebSocket address"),
        ("ws://127.0.0.1/a b", None, "quote what is put into it"),
        ("ws://127.0.0.1/a\r\nX: y", None, "quote what is put into it"),
        ("ws://127.0.0.1/", {"X-Name": "a\r\nX-Admin: 1"}, "line break"),
        ("ws://127.0.0.1/", [("X-Na\nme", "a")], "line break"),
    ],
)
def test_addresses_and_headers_that_cannot_be_meant_are_refused(
    endpoint: str, headers: Any, words: str
) -> None:
    websocket = WebSocket({"type": "websocket"}, None, None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=words):
        WebSocketProxy(websocket, endpoint, headers=headers)


@pytest.mark.parametrize(
    ("received", "sent"),
    [
        (1000, 1000),
        (1003, 1003),
        (1004, 1014),
        (1005, 1000),
        (1006, 1014),
        (1015, 1014),
        (1016, 1014),
        (2999, 1014),
    ]
    + [(1007, 1007), (1014, 1014), (3000, 3000), (4999, 4999), (5000, 1014), (0, 1014), (999, 1014)],
)
def test_only_codes_that_may_be_sent_are_passed_on(received: int, sent: int) -> None:
    assert sendable_code(received, 1014) == sent
