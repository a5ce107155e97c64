"""``/connection/websocket``: clients of the Centrifuge protocol, all of one manager's in this worker.

Stands where their connections come in, and holds what they share: settings, groups, the application's hooks.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any, NamedTuple

from starlette.responses import JSONResponse
from starlette.websockets import WebSocket, WebSocketDisconnect

from workers import codes
from workers.centrifuge_client import CentrifugeClient
from workers.centrifuge_effects import Config
from workers.centrifuge_groups import Groups
from workers.centrifuge_hooks import CentrifugeHooks

if TYPE_CHECKING:
    from ipc.presence import PresenceBoard
    from workers.manager import WebSocketManager

JSON_PROTOCOL = "centrifuge-json"
PROTOBUF_PROTOCOL = "centrifuge-protobuf"
MIN_PING_MARGIN = 0.8
"""The time for a pong is at most this part of the interval, so that there is never more than one under way."""


class Asks(NamedTuple):
    """Which decisions the application takes."""

    connect: bool
    subscribe: bool
    publish: bool
    rpc: bool
    message: bool
    disconnect: bool


class CentrifugeHub:
    """The Centrifuge side of a hub."""

    def __init__(self, manager: WebSocketManager, hooks: CentrifugeHooks | None = None) -> None:
        self.manager = manager
        self.hooks = hooks or CentrifugeHooks()
        self.asks = Asks(*[_overridden(self.hooks, f"on_{name}") for name in Asks._fields])
        self.groups = Groups(manager)
        self.clients: set[CentrifugeClient] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._config: Config | None = None
        self._config_with_frames: Config | None = None

    @property
    def presence(self) -> PresenceBoard | None:
        """Who is on which topic of the host; None where no topic has presence."""
        peer = self.manager.peer
        return peer.presence if peer is not None else None

    def config(self, frame_pings: bool) -> Config:
        """What all connections have in common; ``frame_pings``: the WebSocket's own pings instead of ours."""
        if self._config is None or self._config_with_frames is None:
            settings = self.manager.settings
            common = {
                "max_subscriptions": settings.max_subscriptions,
                "max_buffered": settings.max_backlog,
                "rpc": self.asks.rpc,
                "messages": self.asks.message,
            }
            interval = max(1.0, float(round(settings.ping_interval)))
            timeout = min(settings.ping_timeout, MIN_PING_MARGIN * interval)
            self._config = Config(ping_interval=interval, ping_timeout=timeout, **common)  # type: ignore[arg-type]
            self._config_with_frames = Config(ping_interval=0, **common)  # type: ignore[arg-type]
            self.manager.on_presence = self.groups.tell
        return self._config_with_frames if frame_pings else self._config

    async def serve(self, websocket: WebSocket) -> None:
        """One client. Its task ends once the connection is served without one."""
        if not self.manager.started:
            await self.manager.startup()
        offered = websocket.scope.get("subprotocols") or []
        query = websocket.query_params
        if _wants_protobuf(offered, query.get("format"), query.get("cf_protocol")):
            await _refuse(websocket, "the protobuf variant is not spoken here, use JSON")
            return
        frame_pings = query.get("cf_ws_frame_ping_pong") == "true"
        client = CentrifugeClient(self, websocket, self.config(frame_pings))
        self.clients.add(client)
        try:
            await client.connection.accept(JSON_PROTOCOL if JSON_PROTOCOL in offered else None)
        except BaseException:
            client.finish()
            raise
        if client.protocol is not None:
            client.protocol.use_codes(codes.SHUTDOWN, codes.BAD_REQUEST, frame_pings)
        client.begin()
        if not client.connection.serve(client.on_message):
            await self._serve_asgi(client)

    async def _serve_asgi(self, client: CentrifugeClient) -> None:
        """The loop for servers whose sockets we cannot read ourselves."""
        try:
            while True:
                client.on_message(*await client.connection.receive_raw())
                await client.calm()
                await self.manager.transport.accepted()
        except WebSocketDisconnect:
            pass
        finally:
            client.finish()

    def run(self, work: Coroutine[Any, Any, None]) -> None:
        """Do something that takes its time."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Send all clients away; they come back, to another worker."""
        for client in list(self.clients):
            client.disconnect(*codes.SHUTDOWN)
        if self._tasks:
            _, late = await asyncio.wait(list(self._tasks), timeout=1.0)
            for task in late:
                task.cancel()


def _overridden(hooks: CentrifugeHooks, name: str) -> bool:
    return getattr(type(hooks), name) is not getattr(CentrifugeHooks, name)


def _wants_protobuf(offered: list[str], *formats: str | None) -> bool:
    return "protobuf" in formats or (PROTOBUF_PROTOCOL in offered and JSON_PROTOCOL not in offered)


async def _refuse(websocket: WebSocket, words: str) -> None:
    if "websocket.http.response" in websocket.scope.get("extensions", {}):
        answer = JSONResponse({"error": {"code": 400, "message": words}}, status_code=400)
        await websocket.send_denial_response(answer)
    else:
        await websocket.close(*codes.INAPPROPRIATE_PROTOCOL)
