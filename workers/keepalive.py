"""When the connections of one server are pinged, and how long they may take to answer (RFC 6455 section 5.5.2)."""

from __future__ import annotations

import asyncio
from typing import Any, Protocol

from uvicorn.config import Config
from uvicorn.server import ServerState

from workers.deadlines import Deadlines


class Pinged(Protocol):
    """A connection that can be asked whether it lives."""

    def ping(self) -> None:
        """Ask."""

    def keepalive_timeout(self) -> None:
        """It has not answered in time."""


class Keepalive:
    """When the connections of one server are pinged, and when their pongs are overdue; 0 seconds: never."""

    def __init__(self, loop: asyncio.AbstractEventLoop, interval: float, timeout: float) -> None:
        self.pings: Deadlines[Pinged] = Deadlines(loop, interval, _ping)
        self.pongs: Deadlines[Pinged] = Deadlines(loop, timeout, _overdue)


class NoKeepalive(Deadlines[Any]):
    """No pings at all."""

    def set(self, item: Any) -> None:
        pass


def keepalive_of(server_state: ServerState, config: Config, loop: asyncio.AbstractEventLoop) -> Keepalive:
    """The one keepalive of a server."""
    state: Any = server_state
    if not hasattr(state, "keepalive"):
        state.keepalive = Keepalive(loop, config.ws_ping_interval or 0.0, config.ws_ping_timeout or 0.0)
        if not config.ws_ping_interval:
            state.keepalive.pings = NoKeepalive(loop, 0.0, _ping)
    found: Keepalive = state.keepalive
    return found


def _ping(connection: Pinged) -> None:
    connection.ping()


def _overdue(connection: Pinged) -> None:
    connection.keepalive_timeout()
