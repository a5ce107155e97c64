"""Where connections come in: accepting from the supervisor's socket, and a pause while descriptors are nearly used up.

The first station of a connection in a worker. Without a pause a process at its limit of descriptors (``ulimit -n``)
does worse than refuse: libuv accepts what waits only to close it, and ZeroMQ ends the process when another process
of the hub connects. So clients never get the last ones; who comes then waits in the socket's queue.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable
from typing import Final

from ipc.descriptors import ceiling

logger = logging.getLogger("workers")

#: Seconds until a listener that pauses looks whether there is room again.
RETRY: Final = 0.25
#: Seconds between two log lines about it.
COMPLAIN_EVERY: Final = 60.0


class Accepting:
    """One listening socket and the server that accepts from it, or none while it pauses.

    The server gets a duplicate of the socket, so that closing it pauses and a new one goes on where it stopped.
    """

    def __init__(
        self,
        listener: socket.socket,
        serve: Callable[[socket.socket], Awaitable[asyncio.AbstractServer]],
    ) -> None:
        self._listener = listener
        self._serve = serve
        self._server: asyncio.AbstractServer | None = None
        self._ceiling = ceiling()
        self._retry: asyncio.TimerHandle | None = None
        self._starting: asyncio.Task[None] | None = None
        self._complained = -COMPLAIN_EVERY
        self._ended = False

    async def start(self) -> None:
        """Accept."""
        await self._start(self._listener.dup())

    async def _start(self, sock: socket.socket) -> None:
        self._server = await self._serve(sock)
        if self._ended:
            self.end()

    @property
    def pausing(self) -> bool:
        """Nobody accepts here just now."""
        return self._server is None

    def look(self) -> None:
        """See what the limit is now: it may be changed from outside (``prlimit``)."""
        self._ceiling = ceiling()

    def taken(self, descriptor: int) -> None:
        """A client has got this descriptor. The kernel gives the lowest free one, so its number tells what is left."""
        if descriptor >= self._ceiling and self._server is not None:
            self._server.close()
            self._server = None
            self._complain(descriptor)
            self._retry = asyncio.get_running_loop().call_later(RETRY, self._resume)

    def _complain(self, descriptor: int) -> None:
        now = asyncio.get_running_loop().time()
        if now - self._complained >= COMPLAIN_EVERY:
            self._complained = now
            logger.warning(
                "%d descriptors are in use, the last below the limit are kept for the hub itself: new connections wait "
                "until others end; raise the limit (ulimit -n, LimitNOFILE=)",
                descriptor + 1,
            )

    def _resume(self) -> None:
        self._retry = None
        self.look()
        try:
            sock = self._listener.dup()
        except OSError:  # not even one: something else than clients has taken the rest
            sock = None
        if sock is not None and sock.fileno() < self._ceiling:
            self._starting = asyncio.ensure_future(self._start(sock))
            return
        if sock is not None:
            sock.close()
        self._retry = asyncio.get_running_loop().call_later(RETRY, self._resume)

    def end(self) -> None:
        """Accept nothing any more; the socket itself stays the supervisor's."""
        self._ended = True
        if self._retry is not None:
            self._retry.cancel()
            self._retry = None
        if self._server is not None:
            self._server.close()
            self._server = None
        self._listener.close()
