"""A user's endpoint with our library: ``Connection.iter_json`` and ``send_json`` behind FastAPI-like routes.

``/echo`` iterates, ``/receive`` calls ``receive_json`` in a loop; ``/readyz`` says that the worker serves.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from uuid import uuid4

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from workers import WebSocketManager

manager = WebSocketManager("echo")


@asynccontextmanager
async def lifespan(app: Starlette) -> AsyncIterator[None]:
    """The manager lives as long as the application."""
    async with manager:
        yield


async def echo(websocket: WebSocket) -> None:
    """Send back what came, iterating."""
    connection = await manager.new_connection(websocket, str(uuid4()))
    try:
        async for data in connection.iter_json():
            await connection.send_json(data)
    finally:
        await manager.remove_connection(connection)


async def receive(websocket: WebSocket) -> None:
    """Send back what came, asking for each message."""
    connection = await manager.new_connection(websocket, str(uuid4()))
    try:
        while True:
            await connection.send_json(await connection.receive_json())
    except WebSocketDisconnect:
        pass
    finally:
        await manager.remove_connection(connection)


async def ready(request: Request) -> PlainTextResponse:
    """An application has its own readiness."""
    return PlainTextResponse("ready")


app = Starlette(
    routes=[WebSocketRoute("/echo", echo), WebSocketRoute("/receive", receive), Route("/readyz", ready)],
    lifespan=lifespan,
)
