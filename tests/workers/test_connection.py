"""``Connection`` as applications use it, on our own protocol and by plain ASGI alike."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState
from websockets.exceptions import ConnectionClosed, InvalidStatus

from ipc.topics import InvalidTopic
from tests.support import until_async
from tests.workers.server_fixture import BINARY, TEXT, close_frame, frame, serving, uvrun
from tests.workers.test_sinks import Wrapped
from workers.manager import WebSocketManager
from workers.message import Message
from workers.sinks import AsgiSink, SocketSink

Body = Callable[[WebSocketManager, WebSocket], Awaitable[None]]


def app_of(body: Body, wrapped: bool) -> Callable[[WebSocketManager], Any]:
    """An application whose one endpoint is ``body``; ``wrapped`` puts a middleware before it."""

    def make(manager: WebSocketManager) -> Any:
        async def endpoint(websocket: WebSocket) -> None:
            await body(manager, websocket)

        app = Starlette(routes=[WebSocketRoute("/ws", endpoint)])
        return Wrapped(app) if wrapped else app

    return make


BOTH = pytest.mark.parametrize("wrapped", [False, True], ids=["socket", "asgi"])


@BOTH
def test_json_text_and_bytes_both_ways(wrapped: bool) -> None:
    async def body(manager: WebSocketManager, websocket: WebSocket) -> None:
        connection = await manager.new_connection(websocket, "c")
        assert isinstance(connection.target[0], AsgiSink if wrapped else SocketSink)
        async for value in connection.iter_json():
            await connection.send_json(value)
            await connection.send_json(value, mode="binary")
            await connection.send_text("ä" + str(value))
            await connection.send_bytes(b"\x00\xff")
        assert connection.closed
        assert websocket.client_state is WebSocketState.DISCONNECTED

    async def main() -> None:
        async with serving(app_of(body, wrapped)) as live:
            client = await live.client()
            values: list[Any] = [{"a": [1, None, "ö"]}, [], "text", 1.5, None]
            for value in values:
                await client.send(json.dumps(value))
                assert json.loads(await client.recv()) == value
                assert json.loads(await client.recv(decode=False)) == value
                assert await client.recv() == "ä" + str(value)
                assert await client.recv() == b"\x00\xff"
            await client.close()

    uvrun(main())


@BOTH
def test_order_is_kept_over_all_ways_of_sending(wrapped: bool) -> None:
    async def body(manager: WebSocketManager, websocket: WebSocket) -> None:
        connection = await manager.new_connection(websocket, "c", "t")
        for n in range(0, 50, 5):
            await connection.send_json(n)
            await websocket.send_json(n + 1)
            await connection.send_bytes(str(n + 2).encode())
            await websocket.send_bytes(str(n + 3).encode())
            await connection.send_text(str(n + 4))
        await connection.close()

    async def main() -> None:
        async with serving(app_of(body, wrapped)) as live:
            client = await live.client()
            assert [int(await client.recv()) for _ in range(50)] == list(range(50))
            await client.wait_closed()
            assert client.close_code == 1000

    uvrun(main())


@BOTH
def test_order_is_kept_while_the_client_is_behind(wrapped: bool) -> None:
    async def body(manager: WebSocketManager, websocket: WebSocket) -> None:
        connection = await manager.new_connection(websocket, "c")
        for n in range(0, 3000, 2):
            await connection.send_json({"n": n, "pad": "x" * 2000})
            await websocket.send_json({"n": n + 1, "pad": "x" * 2000})

    async def main() -> None:
        async with serving(app_of(body, wrapped)) as live:
            client = await live.raw(receive_buffer=4096)
            for n in range(3000):
                assert json.loads(await client.text())["n"] == n
            await client.end()

    uvrun(main())


@BOTH
def test_reading_by_the_connection_and_by_its_websocket_in_turns(wrapped: bool) -> None:
    got: list[Any] = []

    async def body(manager: WebSocketManager, websocket: WebSocket) -> None:
        connection = await manager.new_connection(websocket, "c")
        for _ in range(5):
            got.append(await connection.receive_json())
            got.append(json.loads(await websocket.receive_text()))
            got.append(await websocket.receive_json())
            got.append(json.loads((await connection.receive_raw())[0]))
        await connection.send_text("done")
        with pytest.raises(WebSocketDisconnect):
            await websocket.receive_text()

    async def main() -> None:
        async with serving(app_of(body, wrapped)) as live:
            client = await live.raw()
            await client.write(b"".join(frame(TEXT, b"%d" % n) for n in range(20)))
            assert await client.text() == "done"
            await client.write(close_frame())
            await client.gone()
            await client.end()
            await until_async(lambda: not live.server.server_state.tasks, 3.0)

    uvrun(main())
    assert got == list(range(20))


@BOTH
def test_what_is_no_json_is_answered_and_passed_over(wrapped: bool) -> None:
    async def body(manager: WebSocketManager, websocket: WebSocket) -> None:
        connection = await manager.new_connection(websocket, "c")
        async for value in connection.iter_json():
            await connection.send_json({"got": value})

    async def main() -> None:
        async with serving(app_of(body, wrapped)) as live:
            client = await live.client()
            for bad in ("nonsense", "", "{", "[" * 100_000, "NaN", '"\\ud800"'[:-1]):
                await client.send(bad[:60_000])
                answer = json.loads(await client.recv())
                assert (answer["type"], answer["code"]) == ("error", 107), bad
            await client.send("1")
            assert await client.recv() == '{"got":1}'
            for _ in range(10):
                await client.send("bad")
            with pytest.raises(ConnectionClosed):
                while True:
                    await client.recv()
            assert client.close_code == 3509

    uvrun(main())


@BOTH
def test_binary_where_json_is_awaited_closes_with_1003(wrapped: bool) -> None:
    async def body(manager: WebSocketManager, websocket: WebSocket) -> None:
        connection = await manager.new_connection(websocket, "c")
        with pytest.raises(WebSocketDisconnect):
            await connection.receive_json()
        assert connection.closed

    async def main() -> None:
        async with serving(app_of(body, wrapped)) as live:
            client = await live.raw()
            await client.write(frame(BINARY, b"1") + frame(TEXT, b"2"))
            assert await client.close_code() == 1003
            await client.end()
            await until_async(lambda: not live.server.server_state.tasks, 3.0)

    uvrun(main())


@BOTH
def test_iterating_gives_valid_messages(wrapped: bool) -> None:
    got: list[Message] = []

    async def body(manager: WebSocketManager, websocket: WebSocket) -> None:
        async for message in await manager.new_connection(websocket, "c"):
            got.append(message)

    async def main() -> None:
        async with serving(app_of(body, wrapped)) as live:
            client = await live.client()
            await client.send('{"type":"broadcast","msg":"hi"}')
            for bad in ('{"msg":"hi"}', "[]", '{"type":"nonsense"}', '{"type":"send"}', '{"type":["send"]}'):
                await client.send(bad)
                assert json.loads(await client.recv())["code"] == 107
            await client.send('{"type":"send","topic":"a/b","n":1}')
            await client.close()
            await until_async(lambda: len(got) == 2, 3.0)

    uvrun(main())
    assert got == [
        Message(type="broadcast", data={"msg": "hi"}),
        Message(type="send", topic="a/b", data={"n": 1}),
    ]


@BOTH
def test_closing(wrapped: bool) -> None:
    async def body(manager: WebSocketManager, websocket: WebSocket) -> None:
        connection = await manager.new_connection(websocket, "c")
        with pytest.raises(ValueError, match="1005"):
            await connection.close(1005)
        for n in range(3):
            await connection.send_json(n)
        await connection.close(4001, "because " + "x" * 200)
        await connection.close(4002)
        await manager.close_connection(connection)
        manager.remove_connection(connection)
        with pytest.raises(WebSocketDisconnect):
            await connection.receive_json()
        with pytest.raises(WebSocketDisconnect):
            await connection.send_json(1)
        assert [value async for value in connection.iter_json()] == []

    async def main() -> None:
        async with serving(app_of(body, wrapped)) as live:
            client = await live.client()
            with pytest.raises(ConnectionClosed):
                for n in range(4):
                    assert await client.recv() == str(n)
            assert client.close_code == 4001
            assert client.close_reason == ("because " + "x" * 200)[:123]

    uvrun(main())


@BOTH
def test_closing_before_accept_refuses_the_handshake(wrapped: bool) -> None:
    async def body(manager: WebSocketManager, websocket: WebSocket) -> None:
        connection = manager.register(websocket, "c")
        await connection.close(1008)
        assert manager.active_connections == []

    async def main() -> None:
        async with serving(app_of(body, wrapped)) as live:
            with pytest.raises(InvalidStatus) as refused:
                await live.client()
            assert refused.value.response.status_code == 403

    uvrun(main())


def test_the_set_of_topics() -> None:
    async def body(manager: WebSocketManager, websocket: WebSocket) -> None:
        connection = await manager.new_connection(websocket, "c", "first/#")
        topics = connection.topics

        def are(*wanted: str) -> None:
            assert connection.topics == set(wanted)
            assert len(manager._index) == len(wanted)
            assert all(manager._index.count(pattern) == 1 for pattern in wanted)

        are("first/#")
        topics.add("a")
        topics.add("a")
        are("first/#", "a")
        topics.discard("a")
        topics.discard("never")
        topics.discard(7)
        with pytest.raises(KeyError):
            topics.remove("a")
        topics.remove("first/#")
        are()
        with pytest.raises(KeyError):
            topics.pop()
        topics.update({"a", "b"}, ["c"])
        are("a", "b", "c")
        gone = topics.pop()
        are(*({"a", "b", "c"} - {gone}))
        topics.clear()
        are()
        connection.topics |= {"a", "b", "c", "d"}
        connection.topics -= {"a", "x"}
        are("b", "c", "d")
        connection.topics &= {"b", "c", "x"}
        are("b", "c")
        connection.topics ^= {"b", "e"}
        are("c", "e")
        topics.symmetric_difference_update(["e", "f"])
        topics.difference_update(["c"], ["nothing"])
        topics.intersection_update({"f", "g"}, {"f"})
        are("f")
        connection.topics = {"g", "f"}
        are("f", "g")
        for derived in (
            topics | {"x"},
            topics & {"f"},
            topics - {"f"},
            topics ^ {"x"},
            topics.copy(),
            set(topics),
        ):
            derived.add("not subscribed")
        are("f", "g")
        for bad in ("", "a/#/b", "a+", "x" * 256, "\0", "a/" * 40):
            with pytest.raises(InvalidTopic):
                topics.add(bad)
            with pytest.raises(InvalidTopic):
                topics.update([bad])
        with pytest.raises(InvalidTopic):
            await manager.new_connection(websocket, "c2")
            connection.topics |= {"ok", "a/#/b"}
        topics.discard("ok")
        are("f", "g")

    async def main() -> None:
        async with serving(app_of(body, False)) as live:
            client = await live.client()
            await client.wait_closed()
            assert client.close_code == 1000, "see the log"

    uvrun(main())


def test_an_invalid_first_topic_is_told_and_the_rest_works() -> None:
    async def body(manager: WebSocketManager, websocket: WebSocket) -> None:
        connection = await manager.new_connection(websocket, "c", "a/#/b")
        assert connection.topics == set()
        await connection.send_text("hello")
        await connection.receive_json()

    async def main() -> None:
        async with serving(app_of(body, False)) as live:
            client = await live.client()
            assert json.loads(await client.recv())["code"] == 107
            assert await client.recv() == "hello"
            await client.close()

    uvrun(main())


def test_another_id_moves_it() -> None:
    async def body(manager: WebSocketManager, websocket: WebSocket) -> None:
        connection = await manager.new_connection(websocket, "old")
        connection.id = "new"
        connection.id = "new"
        manager.send_by_conn_id("old", {"to": "old"})
        manager.send_by_conn_id(["new", "new", "old"], {"to": "new"})
        with pytest.raises(TypeError, match="string, not int"):
            connection.id = 7  # type: ignore[assignment]
        assert connection.id == "new"
        with pytest.raises(TypeError, match="string, not int"):
            await manager.new_connection(websocket, 7)  # type: ignore[arg-type]
        assert manager.active_connections == [connection]
        await manager.set_conn_id(connection, "third")
        await connection.close()

    async def main() -> None:
        async with serving(app_of(body, False)) as live:
            client = await live.client()
            assert await client.recv() == '{"to":"new"}'
            assert json.loads(await client.recv()) == {"type": "set_conn_id", "conn_id": "third"}
            await client.wait_closed()
            assert client.close_code == 1000

    uvrun(main())
