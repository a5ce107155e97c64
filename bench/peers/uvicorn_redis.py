"""What one is told to do for more than one process: the loop of ``uvicorn_loop.py`` with Redis in between. A peer."""

from __future__ import annotations

import asyncio
import json
import sys
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import uvicorn
from redis.asyncio import BlockingConnectionPool, Redis
from starlette.applications import Starlette
from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

members: defaultdict[str, set[WebSocket]] = defaultdict(set)
redis: Any = Redis(connection_pool=BlockingConnectionPool.from_url(sys.argv[2], max_connections=50))


async def listen() -> None:
    """One subscription to everything; what comes goes to the local members."""
    async with redis.pubsub() as channel:
        await channel.psubscribe("bench/*")
        async for message in channel.listen():
            if message["type"] != "pmessage":
                continue
            text = message["data"].decode()
            for member in tuple(members[message["channel"].decode()]):
                await member.send_text(text)


@asynccontextmanager
async def lifespan(app: Starlette) -> AsyncIterator[None]:
    """The listener lives as long as the application."""
    task = asyncio.create_task(listen())
    yield
    task.cancel()


async def hub(websocket: WebSocket) -> None:
    """Subscribe here, send through Redis."""
    await websocket.accept()
    topics: set[str] = set()
    try:
        while True:
            message = json.loads(await websocket.receive_text())
            kind, topic = message.pop("type"), message.pop("topic")
            if kind == "subscribe":
                topics.add(topic)
                members[topic].add(websocket)
            elif kind == "send":
                await redis.publish(topic, json.dumps(message))
    except WebSocketDisconnect:
        pass
    finally:
        for topic in topics:
            members[topic].discard(websocket)


app = Starlette(routes=[WebSocketRoute("/ws", hub)], lifespan=lifespan)

if __name__ == "__main__":
    uvicorn.run(
        app, port=int(sys.argv[1]), loop="uvloop", ws="websockets-sansio", log_level="error", backlog=4096
    )
