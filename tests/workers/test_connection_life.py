"""The life of a ``Connection``: endpoints that end or fail, clients that go, and connections made by hand."""

from __future__ import annotations

import asyncio
import json
import logging

import pytest
from starlette.websockets import WebSocket

from tests.support import until_async
from tests.workers.server_fixture import TEXT, frame, serving, uvrun
from tests.workers.test_connection import BOTH, app_of
from workers.connection import MAX_INBOX, Connection
from workers.manager import WebSocketManager

# --- endpoints that end ---


@BOTH
def test_an_endpoint_that_returns_closes_its_client_and_is_forgotten(wrapped: bool) -> None:
    async def body(manager: WebSocketManager, websocket: WebSocket) -> None:
        connection = await manager.new_connection(websocket, "c")
        await connection.send_text("bye")

    async def main() -> None:
        async with serving(app_of(body, wrapped)) as live:
            client = await live.client()
            assert await client.recv() == "bye"
            await client.wait_closed()
            assert client.close_code == (1006 if wrapped else 1000)

    uvrun(main())


@BOTH
def test_an_endpoint_that_fails_is_logged_closed_and_forgotten(
    wrapped: bool, caplog: pytest.LogCaptureFixture
) -> None:
    async def body(manager: WebSocketManager, websocket: WebSocket) -> None:
        connection = await manager.new_connection(websocket, "c", "t")
        await connection.receive_json()
        raise ZeroDivisionError("a fault of the application")

    async def main() -> None:
        async with serving(app_of(body, wrapped), leaves=False) as live:
            client = await live.client()
            await client.send("1")
            await client.wait_closed()
            assert client.close_code == 1011

    uvrun(main(), complaints=True)
    assert "a fault of the application" in caplog.text


@BOTH
def test_a_client_that_goes_is_no_failure_of_the_application(
    wrapped: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """An endpoint without try and except, as in a hurry: no traceback, nothing kept."""

    async def receives(manager: WebSocketManager, websocket: WebSocket) -> None:
        connection = await manager.new_connection(websocket, "c")
        while True:
            await connection.receive_json()

    async def sends(manager: WebSocketManager, websocket: WebSocket) -> None:
        connection = await manager.new_connection(websocket, "c")
        while True:
            await connection.send_text("x" * 1000)
            await asyncio.sleep(0)

    async def main() -> None:
        for body in (receives, sends):
            async with serving(app_of(body, wrapped)) as live:
                for _ in range(3):
                    client = await live.raw()
                    await client.end()
                await until_async(lambda: not live.server.server_state.tasks, 3.0)

    with caplog.at_level(logging.INFO, "workers"):
        uvrun(main())
    assert "Traceback" not in caplog.text


@BOTH
def test_receiving_may_be_given_up_and_done_by_one_task_only(wrapped: bool) -> None:
    async def body(manager: WebSocketManager, websocket: WebSocket) -> None:
        connection = await manager.new_connection(websocket, "c")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(connection.receive_json(), 0.01)
        if not wrapped:
            first = asyncio.create_task(connection.receive_json())
            await asyncio.sleep(0)
            with pytest.raises(RuntimeError, match="another task"):
                await connection.receive_json()
            await connection.send_text("now")
            await connection.send_json(await first)
        else:
            await connection.send_text("now")
            await connection.send_json(await connection.receive_json())
        await connection.close()

    async def main() -> None:
        async with serving(app_of(body, wrapped)) as live:
            client = await live.client()
            assert await client.recv() == "now"
            await client.send("7")
            assert await client.recv() == "7"
            await client.wait_closed()
            assert client.close_code == 1000

    uvrun(main())


def test_a_client_is_not_read_while_its_endpoint_does_not_receive() -> None:
    gate = asyncio.Event()

    async def body(manager: WebSocketManager, websocket: WebSocket) -> None:
        connection = await manager.new_connection(websocket, "c")
        got = [await connection.receive_json()]
        await gate.wait()
        while len(got) < 20_000:
            got.append(await connection.receive_json())
        assert got == list(range(20_000))
        await connection.send_text("all")

    async def main() -> None:
        async with serving(app_of(body, False)) as live:
            client = await live.raw()
            client.writer.write(b"".join(frame(TEXT, b"%d" % n) for n in range(20_000)))
            await until_async(lambda: live.manager.active_connections[0]._inbox, 3.0)
            await until_async(lambda: live.protocols[0]._holds, 3.0)
            assert len(live.manager.active_connections[0]._inbox or ()) <= MAX_INBOX
            gate.set()
            assert await client.text() == "all"
            await client.end()

    uvrun(main())


def test_two_managers_may_share_a_socket() -> None:
    async def body(manager: WebSocketManager, websocket: WebSocket) -> None:
        async with WebSocketManager("second", "memory://") as second:
            one = await manager.new_connection(websocket, "one", "t")
            two = await second.new_connection(websocket, "two", "t")
            manager.send("t", {"from": 1})
            second.send("t", {"from": 2})
            assert [value async for value in one.iter_json()] == [3]
            assert second.active_connections == [] and two.closed

    async def main() -> None:
        async with serving(app_of(body, False)) as live:
            client = await live.client()
            assert [await client.recv(), await client.recv()] == ['{"from":1}', '{"from":2}']
            await client.send("3")
            await client.close()
            await until_async(lambda: not live.server.server_state.tasks, 3.0)

    uvrun(main())


# --- made by hand ---


@BOTH
def test_a_connection_made_by_hand(wrapped: bool) -> None:
    """Without a manager, as the original's tests make it: everything works but its topics have no effect."""

    async def body(manager: WebSocketManager, websocket: WebSocket) -> None:
        await websocket.accept()
        connection = Connection(websocket, "mine", "a/#")
        assert (connection.id, connection.topics, connection.target) == ("mine", {"a/#"}, ())
        connection.id = "other"
        connection.topics.add("b")
        await connection.send_json({"your_id": connection.id})
        await connection.send_text("text")
        await connection.send_bytes(b"bytes")
        async for message in connection:
            await connection.send_json(message.data)
            await connection.close(4000, "enough")
        assert connection.closed
        assert manager.active_connections == []

    async def main() -> None:
        async with serving(app_of(body, wrapped)) as live:
            client = await live.client()
            assert await client.recv() == '{"your_id":"other"}'
            assert [await client.recv(), await client.recv()] == ["text", b"bytes"]
            await client.send("no json")
            assert json.loads(await client.recv())["code"] == 107
            await client.send('{"msg":"no type"}')
            assert json.loads(await client.recv())["code"] == 107
            await client.send('{"type":"broadcast","msg":"hi"}')
            assert await client.recv() == '{"msg":"hi"}'
            await client.wait_closed()
            assert (client.close_code, client.close_reason) == (4000, "enough")
            await until_async(lambda: not live.server.server_state.tasks, 3.0)

    uvrun(main())


def test_by_hand_it_may_accept_too() -> None:
    async def body(manager: WebSocketManager, websocket: WebSocket) -> None:
        connection = Connection(websocket, "mine")
        await connection.accept(headers=[(b"x-hello", b"there")])
        await connection.accept()
        await connection.close()

    async def main() -> None:
        async with serving(app_of(body, False)) as live:
            client = await live.raw()
            assert await client.close_code() == 1000
            await client.end()

    uvrun(main())
