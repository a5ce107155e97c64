"""The code everybody writes: a dict of sets, and one ``await send_text`` per member. A peer, not our library."""

from __future__ import annotations

import json
import sys
from collections import defaultdict

import uvicorn
from starlette.applications import Starlette
from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

members: defaultdict[str, set[WebSocket]] = defaultdict(set)


async def hub(websocket: WebSocket) -> None:
    """Subscribe and send, with the messages of flockwire's plain protocol."""
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
                text = json.dumps(message)
                for member in tuple(members[topic]):
                    await member.send_text(text)
    except WebSocketDisconnect:
        pass
    finally:
        for topic in topics:
            members[topic].discard(websocket)


async def echo(websocket: WebSocket) -> None:
    """Send back what came."""
    await websocket.accept()
    try:
        while True:
            await websocket.send_text(await websocket.receive_text())
    except WebSocketDisconnect:
        pass


app = Starlette(routes=[WebSocketRoute("/ws", hub), WebSocketRoute("/echo", echo)])

if __name__ == "__main__":
    uvicorn.run(
        app,
        port=int(sys.argv[1]),
        loop="uvloop",
        ws="websockets-sansio",
        log_level="error",
        lifespan="off",
        backlog=4096,
    )
