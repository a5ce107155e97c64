"""The built-in hub: an ASGI application of routes, to run as it is or to mount in one's own.

``/ws`` and ``/ws/{conn_id}`` speak the plain protocol, ``/connection/websocket`` that of Centrifuge; ``/events`` serves
Server-Sent Events; ``/healthz`` says that this process lives, ``/readyz`` that it is on the bus.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import parse_qsl

from starlette._utils import get_route_path
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.types import Receive, Scope, Send
from starlette.websockets import WebSocket, WebSocketDisconnect

from ipc.board import Board, PeerKind
from ipc.federation import LinkState
from ipc.store_records import StoreError
from workers import jsontext
from workers.brokers import IpcBroker
from workers.centrifuge_hooks import CentrifugeHooks
from workers.centrifuge_hub import CentrifugeHub
from workers.connection import Connection
from workers.cross_origin import CrossOriginMiddleware
from workers.envelopes import EnvelopeFeed
from workers.events import events_response
from workers.manager import WebSocketManager
from workers.plain import PlainSession, subscribe_at_connect

if TYPE_CHECKING:
    from ipc.history import HostLog

#: The broker channel of the built-in hub.
HUB_CHANNEL: Final = "hub"
#: The longest conn_id a client may choose, in bytes of UTF-8.
MAX_CONN_ID_BYTES: Final = 255


def create_hub(manager: WebSocketManager | None = None, hooks: CentrifugeHooks | None = None) -> Starlette:
    """The built-in hub as an application.

    Args:
        manager: whose connections and channel it serves; None makes one for the channel ``hub`` on the supervisor's
            runtime directory. A manager that nobody started is started with the first request, since a mounted
            application's lifespan does not run.
        hooks: what the application decides about clients of the Centrifuge protocol.

    Raises:
        ValueError: no manager, and not under the supervisor.
    """
    return _HubApplication(_Hub(manager or WebSocketManager(HUB_CHANNEL), own=manager is None, hooks=hooks))


class _HubApplication(Starlette):
    """The routes, with a short way for the handshakes of the plain protocol: connecting is most of what they do."""

    def __init__(self, hub: _Hub) -> None:
        self._hub = hub
        super().__init__(
            routes=[
                WebSocketRoute("/ws", hub.plain),
                WebSocketRoute("/ws/{conn_id}", hub.plain),
                WebSocketRoute("/connection/websocket", hub.centrifuge.serve),
                Route("/events", hub.events),
                Route("/healthz", hub.healthz),
                Route("/readyz", hub.readyz),
            ],
            lifespan=hub.lifespan,
        )
        self._http = CrossOriginMiddleware(super().__call__, hub.allowed_origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket" and not self.user_middleware:
            path = get_route_path(scope)
            conn_id = path[4:] if path.startswith("/ws/") else None
            if path == "/ws" or (conn_id and "/" not in conn_id):
                scope["path_params"] = {} if conn_id is None else {"conn_id": conn_id}
                await self._hub.plain(WebSocket(scope, receive, send))
                return
        await (self._http if scope["type"] == "http" else super().__call__)(scope, receive, send)


class _Hub:
    def __init__(self, manager: WebSocketManager, own: bool, hooks: CentrifugeHooks | None) -> None:
        self._manager = manager
        self.centrifuge = CentrifugeHub(manager, hooks)
        self._own = own

    def allowed_origins(self) -> Sequence[str]:
        """The origins of pages that may use this hub, beside its own."""
        return self._manager.settings.allow_origin

    @contextlib.asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        mine = self._own or not self._manager.started
        await self._manager.startup()
        try:
            yield
        finally:
            await self.centrifuge.close()
            if mine:
                await self._manager.shutdown()

    async def plain(self, websocket: WebSocket) -> None:
        """One client of the plain protocol. Its task ends once the connection is served without one."""
        manager = self._manager
        if not manager.started:
            await manager.startup()
        if not manager.settings.allow_anonymous:
            await _refuse(websocket, 401, "anonymous clients are not allowed")
            return
        conn_id = websocket.path_params.get("conn_id")
        if conn_id is not None and len(conn_id.encode("utf-8", "replace")) > MAX_CONN_ID_BYTES:
            await _refuse(websocket, 400, f"a conn_id has at most {MAX_CONN_ID_BYTES} bytes")
            return
        connection = self._register(websocket, conn_id)
        query = websocket.scope["query_string"]
        if query:
            await self._begin(connection, parse_qsl(query.decode("latin-1"), True))
        await manager.accept(connection)
        session = PlainSession(manager, connection)
        if connection.serve(session.on_message):
            if self._own:
                connection.forget_request()
        else:
            await _serve_asgi(manager, connection, session)

    async def _begin(self, connection: Connection, query: list[tuple[str, str]]) -> None:
        """What a handshake asks for: topics, envelopes, and what was missed since a position."""
        topics = [value for name, value in query if name == "topic"]
        wishes = dict(query)
        if wishes.get("envelope") in ("1", "true"):
            feed = connection.feed = EnvelopeFeed(self._manager, connection)
            subscribe_at_connect(self._manager, connection, topics)
            await feed.begin(sorted(connection.topics), wishes.get("since"))
        else:
            subscribe_at_connect(self._manager, connection, topics)

    def _register(self, websocket: WebSocket, conn_id: str | None) -> Connection:
        if conn_id is not None:
            return self._manager.register(websocket, conn_id)
        made = secrets.token_urlsafe(12)
        first = jsontext.encode({"type": "set_conn_id", "conn_id": made})
        return self._manager.register(websocket, made, first)

    async def events(self, request: Request) -> Any:
        """Server-Sent Events: the messages of some topics, from where the client left them."""
        if not self._manager.started:
            await self._manager.startup()
        return events_response(self._manager, request)

    async def healthz(self, request: Request) -> Response:
        """This process lives and its event loop turns."""
        return JSONResponse({"status": "ok", "pid": os.getpid()})

    async def readyz(self, request: Request) -> Response:
        """200 when this worker is on the bus, else 503; details as JSON."""
        if not self._manager.started:
            # Who waits for readiness before the first client would wait for ever where no lifespan runs.
            await self._manager.startup()
        details = readiness(self._manager)
        return JSONResponse(details, status_code=200 if details["ready"] else 503)


def readiness(manager: WebSocketManager) -> dict[str, Any]:
    """Whether messages of ``manager`` cross, and what it is connected to."""
    details: dict[str, Any] = {
        "ready": manager.started,
        "pid": os.getpid(),
        "channel": manager.broker_channel,
        "connections": len(manager.active_connections),
    }
    peer = manager.broker.peer if isinstance(manager.broker, IpcBroker) else None
    if peer is not None:
        details |= {
            "slot": peer.slot,
            "epoch": peer.epoch,
            "peers": len(peer.runtime.board.live_full_slots()),
        }
        if peer.log is not None:
            details["history"] = _history_state(peer.log)
        if peer.rules.federate is not None:
            details["bridge"] = link_state(peer.runtime.board)
    return details


def _history_state(log: HostLog) -> dict[str, Any]:
    """What the store says of itself; ``state`` is "ok", "full" or "failed" (live delivery goes on in any case)."""
    waiting = log.appender.waiting
    try:
        stats = log.store.stats()
    except StoreError as error:
        return {"state": "failed", "error": str(error), "epoch": log.epoch, "waiting": waiting}
    return {
        "state": _state(stats.trouble),
        "error": stats.trouble,
        "epoch": stats.epoch,
        "offset": stats.top,
        "bytes": stats.used,
        "size": stats.size,
        "evicted": stats.evicted,
        "waiting": waiting,
    }


def link_state(board: Board) -> str:
    """How the host's bridge stands with Redis; ``away`` when there is no bridge. Local service goes on either way."""
    for slot, _ in board.live_full_slots():
        record = board.record(slot)
        if record.kind is PeerKind.BRIDGE:
            return LinkState.of(record.condition).words
    return "away"


def _state(trouble: str) -> str:
    if not trouble:
        return "ok"
    return "full" if "full" in trouble or "used up" in trouble else "failed"


async def _serve_asgi(manager: WebSocketManager, connection: Connection, session: PlainSession) -> None:
    """The loop for servers whose sockets we cannot read ourselves."""
    try:
        while True:
            session.on_message(*await connection.receive_raw())
            await manager.transport.accepted()
    except WebSocketDisconnect:
        pass
    finally:
        manager.remove_connection(connection)


async def _refuse(websocket: WebSocket, status: int, words: str) -> None:
    """Answer a handshake with an HTTP error."""
    if "websocket.http.response" in websocket.scope.get("extensions", {}):
        await websocket.send_denial_response(
            JSONResponse({"error": {"code": status, "message": words}}, status_code=status)
        )
    else:
        await websocket.close(1008, words)
