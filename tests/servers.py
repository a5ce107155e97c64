"""Real servers for tests: an ASGI application behind uvicorn, on a free port, in the loop of the test."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Iterator
from typing import Any

import uvicorn

from tests.support import until_async


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield  # signals belong to pytest


@contextlib.asynccontextmanager
async def serve(app: Any, **options: Any) -> AsyncIterator[str]:
    """Serve ``app`` inside the block; gives ``host:port``. ``options`` are those of ``uvicorn.Config``.

    Leaving the block shuts down as uvicorn does: open WebSockets are closed with 1012.
    """
    settings: dict[str, Any] = {
        "ws": "websockets-sansio",
        "lifespan": "auto",
        "log_config": None,
        "timeout_graceful_shutdown": 5,
        **options,
    }
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(100)
        server = _Server(uvicorn.Config(app, **settings))
        running = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            await until_async(lambda: server.started or running.done(), what="the start of the server")
            if running.done():
                running.result()
                raise AssertionError("the application did not start, see the log")
            host, port = listener.getsockname()
            yield f"{host}:{port}"
        finally:
            server.should_exit = True
            await asyncio.gather(running)
