"""A hub with hooks, for the tests with the official clients: what a test cannot do from outside, it asks by `rpc`."""

from __future__ import annotations

import asyncio
import os
from typing import Any

from workers import (
    CentrifugeError,
    CentrifugeHooks,
    ClientSession,
    ConnectReply,
    ConnectRequest,
    Disconnect,
    PublishReply,
    SubscribeReply,
    WebSocketManager,
    create_hub,
)

DROP = float(os.environ.get("TEST_DROP_FRACTION", "0"))


class Hooks(CentrifugeHooks):
    async def on_connect(self, session: ClientSession, request: ConnectRequest) -> ConnectReply | None:
        if request.token == "bad":
            raise Disconnect(3500, "invalid token")
        if request.token == "expired":
            raise CentrifugeError(109)
        if request.token == "slow":
            await asyncio.sleep(30)
        subscriptions = ["h/server"] if request.token == "subs" else []
        return ConnectReply(
            user=request.name or "anon", info={"n": 1}, data={"hi": 1}, subscriptions=subscriptions
        )

    async def on_subscribe(self, session: ClientSession, channel: str, data: Any) -> SubscribeReply | None:
        if channel == "secret":
            raise CentrifugeError(103)
        if channel == "wrong":
            raise RuntimeError("a hook of the test fails")
        return SubscribeReply(data={"you": data}) if data else None

    async def on_publish(self, session: ClientSession, channel: str, data: Any) -> PublishReply | None:
        if channel == "upper":
            return PublishReply(str(data).upper())
        return None

    async def on_rpc(self, session: ClientSession, method: str, data: Any) -> Any:
        match method:
            case "echo":
                return data
            case "pid":
                return os.getpid()
            case "unsub":
                session.unsubscribe(data["channel"], data["code"])
            case "subscribe":
                session.subscribe(data["channel"])
            case "disconnect":
                session.disconnect(data["code"], data.get("reason", "r"))
            case "drop":
                session._client.websocket.scope["extensions"]["flockwire"].transport.abort()
            case "pub":
                for number in range(data["n"]):
                    await manager.publish(data["channel"], {"i": number, **data.get("with", {})})
            case "presence":
                return await manager.presence(data["channel"])
            case "history":
                page = await manager.history(data["channel"])
                return [message.data for message in page]
            case "gone":
                return gone
            case _:
                raise CentrifugeError(104)
        return {}

    async def on_message(self, session: ClientSession, data: Any) -> None:
        session.send({"echo": data})

    async def on_disconnect(self, session: ClientSession, code: int, reason: str) -> None:
        gone.append([session.user, code])


gone: list[list[Any]] = []
manager = WebSocketManager("hub")


class Dropping:
    """The hub's lifespan, with a bus that loses some of what it is given."""

    def __init__(self) -> None:
        self.hub = create_hub(manager, Hooks())

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan" and DROP:
            await manager.startup()
            assert manager.peer is not None
            manager.peer.bus.drop_fraction = DROP
        await self.hub(scope, receive, send)


app = Dropping()
