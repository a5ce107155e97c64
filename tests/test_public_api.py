"""Contract section 6: every name is there, typed and explained, and importing what is cheap stays cheap."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import ipc
import workers

ROOT = Path(__file__).parent.parent

NAMES = """
    WebSocketManager create_hub Connection Message subscribe unsubscribe handle_subscription_message matches handle
    ahandle WebSocketException InvalidSubscription InvalidSubscriptionMessage BrokerInterface InMemoryBroker RedisBroker
    IpcBroker create_broker is_valid_broker BrokerT WebSocketOAuth2PasswordBearer WebSocketProxy
""".split()

MEMBERS = {
    "WebSocketManager": """startup shutdown new_connection close_connection remove_connection set_conn_id send broadcast
        send_by_conn_id send_msg publish receive active_connections""",
    "Connection": "id topics websocket accept close receive_json send_json send_text send_bytes iter_json",
    "Message": "typ from_client_message __serialize__",
    "BrokerInterface": "connect disconnect subscribe unsubscribe publish get_message",
}


@pytest.mark.parametrize("name", NAMES)
def test_the_name_is_there_and_has_a_docstring(name: str) -> None:
    value = getattr(workers, name)
    assert name in workers.__all__ and name in dir(workers)
    assert inspect.getdoc(value), name


@pytest.mark.parametrize(
    ("name", "member"), [(n, m) for n, members in MEMBERS.items() for m in members.split()]
)
def test_the_member_is_there_annotated_and_has_a_docstring(name: str, member: str) -> None:
    owner = getattr(workers, name)
    if member == "websocket":
        assert "websocket" in owner.__slots__
        return
    value: Any = inspect.getattr_static(owner, member)
    assert inspect.getdoc(getattr(owner, member)), f"{name}.{member}"
    function: Any = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
    signature = inspect.signature(function)
    assert signature.return_annotation is not inspect.Signature.empty
    for parameter in list(signature.parameters.values())[1:]:
        assert parameter.annotation is not inspect.Parameter.empty, f"{name}.{member}({parameter.name})"


def test_the_publisher_is_ipc_s() -> None:
    assert inspect.getdoc(ipc.Publisher) and issubclass(ipc.BusTimeout, Exception)
    parameters = inspect.signature(ipc.Publisher).parameters
    assert list(parameters)[:2] == ["runtime_dir", "channel"]
    assert parameters["channel"].default == "hub" and parameters["timeout"].default == 5


def test_signatures() -> None:
    def of(value: Any) -> list[str]:
        return [str(parameter).split(":")[0] for parameter in inspect.signature(value).parameters.values()]

    manager = workers.WebSocketManager
    assert of(manager) == ["broker_channel", "broker_url", "broker_class", "**kwargs"]
    assert of(manager.new_connection)[1:] == ["websocket", "conn_id", "topic"]
    assert of(manager.close_connection)[1:] == ["connection", "code"]
    assert of(manager.set_conn_id)[1:] == ["connection", "conn_id"]
    assert of(manager.receive)[1:] == ["connection", "message"]
    assert of(manager.publish)[1:] == ["topic", "data", "idempotency_key"]
    for name in ("send", "broadcast", "send_by_conn_id"):
        assert inspect.signature(getattr(manager, name)).parameters["local"].default is False
    assert of(workers.Connection.close)[1:] == ["code", "reason"]
    assert of(workers.Message) == ["type", "data", "topic", "conn_id", "typ"]
    assert all(p.kind is p.KEYWORD_ONLY for p in inspect.signature(workers.Message).parameters.values())
    assert of(workers.create_hub) == ["manager", "hooks"]
    assert of(workers.WebSocketProxy)[:2] == ["client", "server_endpoint"]
    assert of(workers.WebSocketException) == ["message", "connection"] or of(workers.WebSocketException)[
        :2
    ] == [
        "message",
        "connection",
    ]


def test_what_is_not_there_says_so() -> None:
    with pytest.raises(AttributeError, match="workers.*Nonsense"):
        workers.Nonsense  # noqa: B018
    with pytest.raises(ImportError):
        from workers import Nonsense  # noqa: F401


SNIPPET = """
from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, WebSocket
from ipc import BusTimeout, Publisher
from workers import (
    BrokerInterface, BrokerT, Connection, InMemoryBroker, InvalidSubscription, InvalidSubscriptionMessage, IpcBroker,
    Message, RedisBroker, WebSocketException, WebSocketManager, WebSocketOAuth2PasswordBearer, WebSocketProxy, ahandle,
    create_broker, create_hub, handle, handle_subscription_message, is_valid_broker, matches, subscribe, unsubscribe,
)

manager = WebSocketManager("chat", "memory://")
other: WebSocketManager = WebSocketManager(broker_channel="chat", broker_class=InMemoryBroker)
bearer = WebSocketOAuth2PasswordBearer(token_url="/token", auto_error=False)
broker: BrokerT = create_broker("ipc:///dev/shm/x")
hub = create_hub(manager)


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    async with manager:
        yield


app = FastAPI(lifespan=lifespan)
app.mount("/realtime", hub)


async def on_error(exc: WebSocketException) -> None:
    await exc.connection.send_json({"error": exc.message})


@app.websocket("/ws/{conn_id}")
async def endpoint(websocket: WebSocket, conn_id: str, topic: str | None = None) -> None:
    token: str | None = await bearer(websocket)
    connection: Connection = await manager.new_connection(websocket, conn_id, topic=topic)
    connection.topics.add("a/+")
    connection.topics |= {"b"}
    async for message in connection:
        kind: str = message.type
        manager.send("a/b", {"kind": kind, "token": token})
        await manager.send(message)
        await manager.send_by_conn_id([connection.id], message.data, local=True)
        await manager.broadcast(message)
        manager.send_msg(Message(type="send", topic="a", data=1))
        await manager.receive(connection, message)
        await manager.set_conn_id(connection, "new")
    async for value in connection.iter_json():
        await manager.publish("a/b", value)
    ids: list[str] = [c.id for c in manager] + [c.id for c in manager.active_connections]
    await connection.close(1000, "bye" + ids[0])
    await manager.close_connection(connection, code=1000)
    manager.remove_connection(connection)


@ahandle(WebSocketException, on_error)
async def guarded(connection: Connection, message: Message) -> None:
    subscribe(connection, message)
    unsubscribe(connection, message)
    handle_subscription_message(connection, message)
    raise InvalidSubscription("no", connection=connection)


@app.websocket("/proxy")
async def proxied(websocket: WebSocket) -> None:
    await websocket.accept()
    await WebSocketProxy(websocket, "ws://127.0.0.1:9000/")()


def cron() -> None:
    with Publisher("/dev/shm/x", channel="hub") as publisher:
        try:
            publisher.publish("room/1", {"x": 1})
        except BusTimeout:
            pass


async def acron() -> None:
    async with Publisher() as publisher:
        await publisher.publish("room/1", {"x": 1})


ok: bool = matches("a/b", {"a/+"}) and is_valid_broker(RedisBroker)
"""


def test_an_application_that_uses_it_all_passes_mypy_strict(tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(SNIPPET)
    # Without the foreign packages it takes a second instead of twenty; our own types are what is looked at.
    quick = [
        "--no-site-packages",
        "--ignore-missing-imports",
        "--follow-imports=silent",
        "--allow-untyped-decorators",
    ]
    result = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", *quick, "--cache-dir", str(tmp_path / "cache"), "app.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=55,
        env={"PATH": "/usr/bin:/bin", "MYPYPATH": str(ROOT)},
    )
    assert result.returncode == 0, result.stdout + result.stderr
