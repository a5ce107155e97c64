"""The Centrifuge protocol under a server that is not ours: plain ASGI, by Starlette's test client."""

from __future__ import annotations

import json
import warnings
from typing import Any

import pytest
from starlette.websockets import WebSocketDisconnect

from workers import CentrifugeError, CentrifugeHooks, ClientSession, WebSocketManager, create_hub

with warnings.catch_warnings():
    warnings.simplefilter(
        "ignore"
    )  # it would like another package for HTTP, which is not what is tested here
    from starlette.testclient import TestClient, WebSocketTestSession

PATH = "/connection/websocket"


class Hooks(CentrifugeHooks):
    def __init__(self) -> None:
        self.gone: list[int] = []

    async def on_rpc(self, session: ClientSession, method: str, data: Any) -> Any:
        if method == "no":
            raise CentrifugeError(404, "there is no such thing")
        session.send({"seen": data})
        return [session.user, session.channels]

    async def on_disconnect(self, session: ClientSession, code: int, reason: str) -> None:
        self.gone.append(code)


def receive(socket: WebSocketTestSession, count: int) -> list[Any]:
    found: list[Any] = []
    while len(found) < count:
        found += map(json.loads, socket.receive_text().split("\n"))
    return found


def test_everything_works_through_asgi() -> None:
    hooks = Hooks()
    app = create_hub(WebSocketManager("asgi", "memory://"), hooks)
    with TestClient(app) as client, client.websocket_connect(PATH) as socket:
        socket.send_text('{"id":1,"connect":{}}\n{"id":2,"subscribe":{"channel":"a/+","recoverable":true}}')
        connected, subscribed = receive(socket, 2)
        assert connected["connect"]["pong"] is True and connected["connect"]["ping"] == 25
        assert subscribed == {"id": 2, "subscribe": {}}
        socket.send_text('{"id":3,"publish":{"channel":"a/b","data":{"n":1}}}')
        answers = receive(socket, 2)
        assert {"id": 3, "publish": {}} in answers
        (push,) = [answer["push"] for answer in answers if "push" in answer]
        assert push["channel"] == "a/+" and push["pub"]["tags"] == {"topic": "a/b"}
        socket.send_text('{"id":4,"rpc":{"method":"x","data":7}}\n{"id":5,"rpc":{"method":"no"}}')
        answers = receive(socket, 3)
        assert {"push": {"message": {"data": {"seen": 7}}}} in answers
        assert {"id": 4, "rpc": {"data": ["", ["a/+"]]}} in answers
        assert {"id": 5, "error": {"code": 404, "message": "there is no such thing"}} in answers
        socket.send_text('{"id":6,"presence":{"channel":"a/b"}}\n{"id":7,"history":{"channel":"a/b"}}')
        assert [answer["error"]["code"] for answer in receive(socket, 2)] == [108, 108]
        socket.send_bytes(b"{}")
        with pytest.raises(WebSocketDisconnect) as closed:
            receive(socket, 1)
        assert (closed.value.code, closed.value.reason) == (3501, "bad request")
    assert hooks.gone == [3501]


def test_without_hooks_rpc_is_unknown_and_messages_are_ignored() -> None:
    app = create_hub(WebSocketManager("asgi", "memory://"))
    with TestClient(app) as client, client.websocket_connect(PATH) as socket:
        socket.send_text('{"id":1,"connect":{}}\n{"send":{"data":1}}\n{"id":2,"rpc":{"method":"x"}}')
        _, rpc = receive(socket, 2)
        assert rpc["error"]["code"] == 104
