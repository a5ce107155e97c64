"""A real target, an application that proxies to it, and a client of that: for the tests of the proxy."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocket
from websockets.asyncio.client import ClientConnection, connect
from websockets.asyncio.server import Server, ServerConnection
from websockets.asyncio.server import serve as serve_target
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request

from tests.servers import serve
from tests.support import until_async
from workers.proxy import WebSocketProxy

MIB = 1024 * 1024


class Rig:
    """A target, an application that proxies to it, and what happened to both."""

    def __init__(self) -> None:
        self.proxy_options: dict[str, Any] = {}
        self.accept_first = True
        self.endpoint: str | None = None
        self.target: Server | None = None
        self.requests: list[Request] = []
        self.proxies: list[asyncio.Task[Any]] = []
        self.outcomes: list[BaseException | None] = []
        self.target_ends: list[tuple[int | None, str | None]] = []
        self.address = ""

    async def relay(self, websocket: WebSocket) -> None:
        if self.accept_first:
            await websocket.accept()
        assert self.endpoint is not None
        task = asyncio.current_task()
        assert task is not None
        self.proxies.append(task)
        try:
            await WebSocketProxy(websocket, self.endpoint, **self.proxy_options)()
        except BaseException as error:
            self.outcomes.append(error)
            raise
        self.outcomes.append(None)

    async def ended(self, count: int = 1) -> None:
        await until_async(lambda: len(self.outcomes) == count, what="the end of the proxy")

    async def target_ended(self, count: int = 1) -> tuple[int | None, str | None]:
        await until_async(lambda: len(self.target_ends) == count, what="the end of the target's connection")
        return self.target_ends[-1]


async def echo(connection: ServerConnection) -> None:
    async for message in connection:
        await connection.send(message)


@contextlib.asynccontextmanager
async def rig(
    handler: Callable[[ServerConnection], Awaitable[None]] = echo,
    target_options: dict[str, Any] | None = None,
    **proxy_options: Any,
) -> AsyncIterator[Rig]:
    this = Rig()
    this.proxy_options = proxy_options

    async def serve_one(connection: ServerConnection) -> None:
        assert connection.request is not None
        this.requests.append(connection.request)
        try:
            await handler(connection)
        except ConnectionClosed:
            pass
        finally:
            await connection.wait_closed()
            this.target_ends.append((connection.close_code, connection.close_reason))

    before = asyncio.all_tasks()
    app = Starlette(routes=[WebSocketRoute("/proxy", this.relay)])
    options = {"max_size": None, "close_timeout": 1, **(target_options or {})}
    async with serve_target(serve_one, "127.0.0.1", 0, **options) as target:
        this.target = target
        host, port = target.sockets[0].getsockname()[:2]
        this.endpoint = f"ws://{host}:{port}/live?x=1"
        async with serve(app, ws_ping_interval=None) as this.address:
            yield this
        await until_async(lambda: all(task.done() for task in this.proxies), what="the end of all proxies")
    await until_async(lambda: asyncio.all_tasks() <= before, what="the end of all tasks")


def client(this: Rig, **options: Any) -> connect:
    return connect(
        f"ws://{this.address}/proxy", **{"max_size": None, "close_timeout": 2, "compression": None, **options}
    )


async def closed(connection: ClientConnection) -> tuple[int | None, str | None]:
    await asyncio.wait_for(connection.wait_closed(), 15)
    return connection.close_code, connection.close_reason


async def held_back(count: Callable[[], int]) -> None:
    """Wait until a count that grew has stood still for a while."""
    before, quiet = -1, 0

    def still() -> bool:
        nonlocal before, quiet
        quiet = quiet + 1 if count() == before else 0
        before = count()
        return before > 0 and quiet >= 30

    await until_async(still)
