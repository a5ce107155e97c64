"""A user's endpoint that knows nothing of us: plain Starlette ``WebSocket`` under our supervisor."""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect


async def echo(websocket: WebSocket) -> None:
    """Send back what came."""
    await websocket.accept()
    try:
        while True:
            await websocket.send_text(await websocket.receive_text())
    except WebSocketDisconnect:
        pass


async def ready(request: Request) -> PlainTextResponse:
    """An application has its own readiness."""
    return PlainTextResponse("ready")


app = Starlette(routes=[WebSocketRoute("/echo", echo), Route("/readyz", ready)])
