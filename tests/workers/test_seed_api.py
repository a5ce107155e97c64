"""What users of fastapi-distributed-websocket have written, with the import changed: it runs, and does what was meant.

In process, by Starlette's test client, with the memory broker: also where every client has an event loop of its own.
"""

from __future__ import annotations

import asyncio
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi import WebSocket as FastAPIWebSocket
from fastapi import WebSocketDisconnect as FastAPIWebSocketDisconnect
from starlette.websockets import WebSocket

from workers import (
    Connection,
    InMemoryBroker,
    InvalidSubscription,
    InvalidSubscriptionMessage,
    Message,
    WebSocketException,
    WebSocketManager,
    ahandle,
    handle,
    handle_subscription_message,
    is_valid_broker,
    matches,
    subscribe,
    unsubscribe,
)


@contextmanager
def client_of(app: Any) -> Iterator[Any]:
    """Starlette's test client, not entered: every WebSocket has a thread and a loop of its own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from starlette.testclient import TestClient

        yield TestClient(app)


def receive_json(session: Any, timeout: float = 5.0) -> Any:
    """The test client's waits for ever."""
    got: list[Any] = []
    thread = threading.Thread(target=lambda: got.append(session.receive_json()), daemon=True)
    thread.start()
    thread.join(timeout)
    assert got, "nothing came"
    return got[0]


def new_manager() -> WebSocketManager:
    """On a channel of its own, since memory is shared by all managers of the process."""
    return WebSocketManager(f"channel:{id(object())}", broker_url="memory://")


# --- the README's basic usage, corrected as its issue 30 asks ---


def test_basic_usage() -> None:
    manager = WebSocketManager("channel:1", broker_url="memory://")

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> Any:
        await manager.startup()
        yield
        await manager.shutdown()

    app = FastAPI(lifespan=lifespan)

    @app.websocket("/ws/{conn_id}")
    async def websocket_endpoint(ws: FastAPIWebSocket, conn_id: str, *, topic: str | None = None) -> None:
        connection: Connection = await manager.new_connection(ws, conn_id, topic)
        try:
            async for msg in connection.iter_json():
                await manager.broadcast(msg)
        except FastAPIWebSocketDisconnect:
            await manager.remove_connection(connection)
        manager.remove_connection(connection)

    @app.websocket("/receive/{conn_id}")
    async def receiving_endpoint(ws: FastAPIWebSocket, conn_id: str, topic: str | None = None) -> None:
        connection = await manager.new_connection(ws, conn_id, topic)
        async for msg in connection.iter_json():
            await manager.receive(connection, msg)
        manager.remove_connection(connection)

    with client_of(app) as client, client:
        with client.websocket_connect("/ws/a") as a, client.websocket_connect("/receive/b?topic=t/%2B") as b:
            a.send_json({"msg": "hello"})
            assert receive_json(a) == receive_json(b) == {"msg": "hello"}
            b.send_json({"type": "send", "topic": "t/1", "msg": "to the topic"})
            assert receive_json(b) == {"msg": "to the topic"}
            b.send_json({"type": "send_by_conn_id", "conn_id": "a", "msg": "to a"})
            assert receive_json(a) == {"msg": "to a"}
        assert manager.active_connections == []


# --- test clients whose sockets each have an event loop ---


def receiving_app(manager: WebSocketManager) -> Any:
    """The endpoint of the original's tests."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        websocket = WebSocket(scope, receive, send)
        connection = await manager.new_connection(websocket, websocket.query_params["myid"])
        connection.topics.add("tests/1")
        async for message in connection.iter_json():
            await manager.receive(connection, message)
        manager.remove_connection(connection)

    return app


@pytest.mark.parametrize("started", [False, True])
def test_messages_cross_between_loops_whoever_started_the_manager(started: bool) -> None:
    """Here the loop that ``startup`` ran on is blocked by the test itself while messages must pass."""
    manager = new_manager()

    async def main() -> None:
        if started:
            await manager.startup()
        with client_of(receiving_app(manager)) as client:
            with client.websocket_connect("/?myid=c1") as w1, client.websocket_connect("/?myid=c2") as w2:
                w1.send_json({"type": "broadcast", "topic": "tests/1", "conn_id": "c1", "msg": "all"})
                assert receive_json(w1) == receive_json(w2) == {"msg": "all"}
                w2.send_json({"type": "send", "topic": "tests/1", "msg": "topic"})
                assert receive_json(w1) == receive_json(w2) == {"msg": "topic"}
                w2.send_json({"type": "send", "topic": "tests/2", "msg": "nobody's"})
                w2.send_json({"type": "send_by_conn_id", "conn_id": "c3", "msg": "nobody's"})
                w2.send_json({"type": "send_by_conn_id", "topic": None, "conn_id": "c1", "msg": "yours"})
                assert receive_json(w1) == {"msg": "yours"}
                manager.broadcast({"msg": "from the test"})
                assert receive_json(w1) == receive_json(w2) == {"msg": "from the test"}
        assert manager.active_connections == []
        await manager.shutdown()

    asyncio.run(main())


def test_an_endpoint_that_sends_at_once_and_returns() -> None:
    manager = new_manager()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        connection = await manager.new_connection(WebSocket(scope, receive, send), "conn1")
        connection.topics.add("tests/1")
        manager.send(Message(data={"msg": "hello"}, typ="send", topic="tests/1"))

    with client_of(app) as client:
        with client.websocket_connect("/") as websocket:
            assert receive_json(websocket) == {"msg": "hello"}
        with client.websocket_connect("/") as w1:
            # The first one's loop is gone, and it was never removed.
            assert receive_json(w1) == {"msg": "hello"}


def test_shutdown_tells_clients_on_other_loops_too() -> None:
    manager = new_manager()

    async def main() -> None:
        await manager.startup()
        with client_of(receiving_app(manager)) as client, client.websocket_connect("/?myid=c1") as session:
            await manager.shutdown()
            assert manager.active_connections == []
            message = session.receive()
            assert (message["type"], message["code"]) == ("websocket.close", 1012)

    asyncio.run(main())


# --- connections made by hand ---


def by_hand(use: Callable[[Connection], Any]) -> Any:
    """An application that makes its connection itself, as the original's tests do."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        websocket = WebSocket(scope, receive=receive, send=send)
        await websocket.accept()
        await use(Connection(websocket, "test"))

    return app


def test_a_connection_by_hand_sends_iterates_and_answers() -> None:
    async def use(connection: Connection) -> None:
        await connection.send_json({"your_id": connection.id})
        async for data in connection.iter_json():
            await connection.send_json({"msg": data})
            break
        async for msg in connection:
            if msg is not None:  # the original yielded None for invalid ones
                await connection.send_json({**msg.data})

    with client_of(by_hand(use)) as client, client.websocket_connect("/") as websocket:
        assert receive_json(websocket) == {"your_id": "test"}
        websocket.send_json({"n": 1})
        assert receive_json(websocket) == {"msg": {"n": 1}}
        websocket.send_json({"msg": "hello"})
        assert "error" in receive_json(websocket)
        websocket.send_json({"type": "broadcast", "msg": "hello"})
        assert receive_json(websocket) == {"msg": "hello"}


def test_subscription_messages_as_functions() -> None:
    seen: list[Any] = []

    async def use(connection: Connection) -> None:
        async for data in connection.iter_json():
            message = Message.from_client_message(data=data)
            try:
                {"s": subscribe, "u": unsubscribe, "h": handle_subscription_message}[message.data["by"]](
                    connection, message
                )
                seen.append(set(connection.topics))
            except WebSocketException as exc:
                assert exc.connection is connection and exc.message
                seen.append(type(exc))
        seen.append("end")

    steps = [
        ("s", "subscribe", "test/1", {"test/1"}),
        ("h", "subscribe", "test", {"test/1", "test"}),  # a topic needs no slash
        ("h", "subscribe", "#", {"test/1", "test", "#"}),
        ("u", "unsubscribe", "test/1", {"test", "#"}),
        ("h", "unsubscribe", "#", {"test"}),
        ("u", "unsubscribe", "unknown", {"test"}),
        ("s", "unsubscribe", "test", InvalidSubscriptionMessage),
        ("u", "subscribe", "test", InvalidSubscriptionMessage),
        ("h", "send", "test", InvalidSubscriptionMessage),
        ("h", "subscribe", None, InvalidSubscriptionMessage),
        ("h", "subscribe", "", InvalidSubscriptionMessage),
        ("h", "subscribe", "a/#/b", InvalidSubscription),
        ("h", "subscribe", "x" * 300, InvalidSubscription),
    ]
    with client_of(by_hand(use)) as client, client.websocket_connect("/") as websocket:
        for by, kind, topic, _ in steps:
            websocket.send_json({"type": kind, "topic": topic, "by": by})
    assert seen == [*[wanted for *_, wanted in steps], "end"]


# --- the other names ---


def test_messages_in_both_spellings() -> None:
    message = Message(data={"msg": 1}, typ="send", topic="a/b")
    assert (message.typ, message.type, message.topic, message.conn_id) == ("send", "send", "a/b", None)
    assert message == Message(type="send", topic="a/b", data={"msg": 1})
    assert message.__serialize__() == {"type": "send", "topic": "a/b", "conn_id": None, "msg": 1}
    assert message.data == {"msg": 1}, "it was changed by serialising"
    raw = {"type": "send_by_conn_id", "conn_id": ["x"], "msg": 1}
    made = Message.from_client_message(data=raw)
    assert (made.type, made.conn_id, made.data) == ("send_by_conn_id", ["x"], {"msg": 1})
    assert raw == {"type": "send_by_conn_id", "conn_id": ["x"], "msg": 1}


def test_exceptions_and_decorators() -> None:
    connection: Any = object()

    @handle(WebSocketException, lambda exc: f"handled {exc.message}")
    def fails() -> str:
        raise InvalidSubscription("this", connection=connection)

    async def handler(exc: WebSocketException) -> str:
        return f"handled {exc.message}"

    @ahandle(WebSocketException, handler)
    async def fails_too() -> str:
        raise InvalidSubscriptionMessage("that", connection=connection)

    assert fails() == "handled this"
    assert asyncio.run(fails_too()) == "handled that"
    assert issubclass(WebSocketException, Exception)


def test_brokers_and_matching() -> None:
    async def main() -> None:
        async with InMemoryBroker() as broker:
            await broker.subscribe("channel")
            assert broker.has_subscribers("channel") and not broker.has_subscribers("other")
            published = {"type": "send", "topic": "t", "n": 1}
            await broker.publish("channel", published)
            await broker.publish("other", published)
            assert await broker.get_message(timeout=5) == Message(type="send", topic="t", data={"n": 1})
            assert await broker.get_message(timeout=0.01) is None
            assert published == {"type": "send", "topic": "t", "n": 1}
            await broker.unsubscribe("channel")

    asyncio.run(main())
    assert is_valid_broker(InMemoryBroker) and not is_valid_broker(int)
    assert matches("a/b", {"a/+"}) and matches("a", ["a/#"]) and not matches("$SYS/x", {"#"})
