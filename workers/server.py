"""uvicorn's server without its signals and its stampede: it drains.

Stands around all connections of a worker. A drain stops accepting, lets handshakes under way finish, closes clients in
batches spread over a window with the code of their protocol, waits for what is under way, and ends the application.
"""

from __future__ import annotations

import asyncio
import logging
import select
import socket
import time
from collections.abc import Callable, Iterator
from email.utils import formatdate
from typing import Any, Final

import uvicorn

from workers.accepting import Accepting
from workers.http_protocol import HttpProtocol
from workers.protocol import WebSocketProtocol

logger = logging.getLogger("workers")

#: Seconds in which handshakes under way may finish when a drain begins.
HANDSHAKE_GRACE: Final = 5.0
#: Seconds between two batches of closes.
BATCH_INTERVAL: Final = 0.05
#: Clients closed a second at least; a drain that would take longer than its window closes faster.
CLOSE_RATE: Final = 200.0
#: The part of the drain time-out over which closes are spread at most; the rest is for the answers.
WINDOW_SHARE: Final = 0.7


def drain_batches(clients: int, timeout: float) -> Iterator[int]:
    """How many clients to close in each step of :data:`BATCH_INTERVAL` seconds. Pure.

    Small hubs are done at once; large ones are spread over at most ``WINDOW_SHARE`` of ``timeout``.
    """
    window = min(clients / CLOSE_RATE, WINDOW_SHARE * timeout)
    steps = max(1, round(window / BATCH_INTERVAL))
    done = 0
    for step in range(1, steps + 1):
        due = clients * step // steps
        if due > done:
            yield due - done
        else:
            yield 0
        done = due


class DrainState(uvicorn.server.ServerState):
    """uvicorn's shared state, which tells whoever drains that a connection has got further or has ended."""

    def __init__(self) -> None:
        super().__init__()
        self.event: asyncio.Event | None = None
        self.taken: Callable[[int], None] = _nobody_counts
        """Told the descriptor of each connection."""

    def changed(self) -> None:
        """Called by the protocols when a handshake is answered and when a connection ends."""
        if self.event is not None:
            self.event.set()


class DrainingServer(uvicorn.Server):
    """One worker's server, on a socket that the supervisor made and keeps."""

    def __init__(self, config: uvicorn.Config, listener: socket.socket) -> None:
        super().__init__(config)
        self.server_state: DrainState = DrainState()
        self._listener = listener
        self._accepting = Accepting(listener, self._serve_on)
        self.server_state.taken = self._accepting.taken
        self._ticker: asyncio.TimerHandle | None = None

    async def open(self) -> None:
        """Start the application, then accept.

        Raises:
            SystemExit: the application could not start; the code is 3.
        """
        if not self.config.loaded:
            self.config.load()
        self.lifespan = self.config.lifespan_class(self.config)
        self._tick()
        await self.startup(sockets=[])
        await self._accepting.start()

    async def _serve_on(self, sock: socket.socket) -> asyncio.AbstractServer:
        """As uvicorn's ``startup`` does for a socket, which it can do only once."""
        config = self.config
        server = await asyncio.get_running_loop().create_server(
            lambda: config.http_protocol_class(  # type: ignore[call-arg]
                config=config, server_state=self.server_state, app_state=self.lifespan.state
            ),
            sock=sock,
            ssl=config.ssl,
            backlog=config.backlog,
        )
        self.servers = [server]
        return server

    def _tick(self) -> None:
        """The Date header and the limit of descriptors, once a second."""
        date = [(b"date", formatdate(time.time(), usegmt=True).encode())] if self.config.date_header else []
        self._accepting.look()
        self.server_state.default_headers = date + self.config.encoded_headers
        self._ticker = asyncio.get_running_loop().call_later(1.0, self._tick)

    async def drain(self, code: int, timeout: float) -> None:
        """Stop accepting and end all connections with close code ``code`` within ``timeout`` seconds, then the app."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout
        await self._accept_queued()
        self._accepting.end()
        self._end_idle_http()
        await self._until(lambda: not self._handshaking(), min(HANDSHAKE_GRACE, timeout / 2))
        clients = self._clients()
        for batch in drain_batches(len(clients), timeout):
            for client in clients[:batch]:
                client.drain(code)
            del clients[:batch]
            if clients:
                await asyncio.sleep(BATCH_INTERVAL)
        for connection in list(self.server_state.connections):
            if isinstance(connection, WebSocketProtocol):
                connection.drain(code)
            else:
                connection.shutdown()
        await self._until(lambda: not self.server_state.connections, deadline - loop.time())
        left = len(self.server_state.connections)
        if left:
            logger.warning("%d connections did not end within %g s and are cut", left, timeout)
            for connection in list(self.server_state.connections):
                connection.transport.abort()
        await self._finish_tasks(max(0.5, deadline - loop.time()))
        await self._end_application(max(1.0, deadline - loop.time()))
        if self._ticker is not None:
            self._ticker.cancel()

    async def _accept_queued(self) -> None:
        """Connections that wait in the socket's queue are this worker's if nobody else accepts from it."""
        end = asyncio.get_running_loop().time() + 1.0
        while self._is_waited_for() and asyncio.get_running_loop().time() < end:  # noqa: ASYNC110
            await asyncio.sleep(0)  # a turn of the loop is what accepts

    def _is_waited_for(self) -> bool:
        return not self._accepting.pausing and bool(select.select([self._listener], [], [], 0)[0])

    def _handshaking(self) -> list[Any]:
        return [c for c in self.server_state.connections if getattr(c, "handshaking", False)]

    def _clients(self) -> list[WebSocketProtocol]:
        return [c for c in self.server_state.connections if isinstance(c, WebSocketProtocol)]

    def _end_idle_http(self) -> None:
        for connection in list(self.server_state.connections):
            if isinstance(connection, HttpProtocol) and not connection.handshaking:
                connection.shutdown()

    async def _until(self, done: Callable[[], bool], timeout: float) -> None:
        event = self.server_state.event = asyncio.Event()
        try:
            async with asyncio.timeout(max(timeout, 0.0)):
                while not done():
                    event.clear()
                    await event.wait()
        except TimeoutError:
            pass  # the caller deals with what is left
        finally:
            self.server_state.event = None

    async def _finish_tasks(self, timeout: float) -> None:
        tasks = set(self.server_state.tasks)
        if not tasks:
            return
        _, late = await asyncio.wait(tasks, timeout=timeout)
        for task in late:
            task.cancel()
        if late:
            logger.warning(
                "%d endpoints had not returned at the end of the drain and were cancelled", len(late)
            )
            await asyncio.wait(late, timeout=1.0)

    async def _end_application(self, timeout: float) -> None:
        try:
            async with asyncio.timeout(timeout):
                await self.lifespan.shutdown()
        except TimeoutError:
            logger.warning("the application's shutdown took longer than %g s and was given up", timeout)


def _nobody_counts(descriptor: int) -> None:
    pass
