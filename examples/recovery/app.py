"""A page that shows recovery: it counts what it gets, and a button kills the worker it is connected to.

    cd examples/recovery && npm install && python -m supervisor --config hub.toml

Then open http://127.0.0.1:8000/ in a browser.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, PlainTextResponse, Response
from starlette.routing import Mount, Route

from workers import CentrifugeHooks, ClientSession, StoreError, WebSocketManager, create_hub

HERE = Path(__file__).parent
LIBRARY = HERE / "node_modules" / "centrifuge" / "dist" / "centrifuge.js"


class Hooks(CentrifugeHooks):
    """Two things a page may ask for."""

    async def on_rpc(self, session: ClientSession, method: str, data: Any) -> Any:
        if method == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        return {"worker": os.getpid()}


manager = WebSocketManager("hub")
hub = create_hub(manager, Hooks())


async def tick() -> None:
    """Every worker counts for itself; what it has published it has published for all."""
    count = 0
    while True:
        with contextlib.suppress(StoreError):
            await manager.publish(f"ticks/{os.getpid()}", {"worker": os.getpid(), "count": count})
            count += 1
        await asyncio.sleep(0.25)


@contextlib.asynccontextmanager
async def lifespan(app: Starlette) -> AsyncIterator[None]:
    async with hub.router.lifespan_context(hub):
        ticking = asyncio.create_task(tick())
        yield
        ticking.cancel()


async def library(request: Request) -> Response:
    """The official JavaScript client, as npm has brought it."""
    if LIBRARY.exists():
        return FileResponse(LIBRARY, media_type="text/javascript")
    return PlainTextResponse("run `npm install` in examples/recovery first", status_code=404)


async def page(request: Request) -> Response:
    return FileResponse(HERE / "page.html")


app = Starlette(
    routes=[Route("/", page), Route("/centrifuge.js", library), Mount("/", hub)], lifespan=lifespan
)
