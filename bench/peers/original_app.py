"""The library flockwire replaces, fastapi-distributed-websocket 0.2.0 with Redis, as its documentation shows it."""

# mypy: ignore-errors

from __future__ import annotations

import sys
from contextlib import asynccontextmanager
from uuid import uuid4

import uvicorn
from distributed_websocket import WebSocketManager
from fastapi import FastAPI, WebSocket

manager: WebSocketManager = WebSocketManager("bench", broker_url=sys.argv[2])


@asynccontextmanager
async def lifespan(app: FastAPI):
    """The manager lives as long as the application."""
    async with manager:
        yield


app = FastAPI(lifespan=lifespan)


# The annotation must be a real type here: FastAPI reads it at run time.
async def hub(websocket):
    """A connection: everything it says goes through Redis."""
    connection = await manager.new_connection(websocket, str(uuid4()))
    try:
        async for message in connection.iter_json():
            await manager.receive(connection, message)
    finally:
        manager.remove_connection(connection)


hub.__annotations__ = {"websocket": WebSocket}
app.websocket("/ws")(hub)

if __name__ == "__main__":
    uvicorn.run(
        app, port=int(sys.argv[1]), loop="uvloop", ws="websockets-sansio", log_level="critical", backlog=4096
    )
