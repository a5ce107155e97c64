"""A FastAPI application with WebSocket endpoints of its own, an HTTP route that publishes, and a token check.

pip install fastapi
python -m supervisor --app fastapi_app:app --workers 4      (in this directory)
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

from fastapi import Depends, FastAPI, WebSocket

from workers import WebSocketManager, WebSocketOAuth2PasswordBearer

# Under the supervisor None would do; with a URL the same file also runs under plain `uvicorn --workers 4`.
manager = WebSocketManager(
    "example", os.environ.get("BROKER_URL") or (None if "FLOCKWIRE_RUNTIME_DIR" in os.environ else "ipc://")
)
bearer = WebSocketOAuth2PasswordBearer("/token")


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Connect the manager for as long as the application runs."""
    async with manager:
        yield


app = FastAPI(lifespan=lifespan)


@app.websocket("/ws/{conn_id}")
async def endpoint(websocket: WebSocket, conn_id: str, topic: str | None = None) -> None:
    """Everything a client sends: subscriptions take effect, publications reach all workers."""
    connection = await manager.new_connection(websocket, conn_id, topic)
    async for message in connection.iter_json():
        await manager.receive(connection, message)


@app.websocket("/private")
async def private(websocket: WebSocket, token: Annotated[str, Depends(bearer)]) -> None:
    """Only with `Authorization: Bearer …`; check the token as you do elsewhere."""
    connection = await manager.new_connection(websocket, token)
    await connection.send_json({"hello": token})
    async for message in connection.iter_json():
        await manager.receive(connection, message)


@app.post("/notify/{topic:path}")
async def notify(topic: str, data: dict[str, Any]) -> dict[str, bool]:
    """An HTTP request that reaches WebSocket clients on every worker."""
    await manager.send(topic, data)
    return {"sent": True}
