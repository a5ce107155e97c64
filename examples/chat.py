"""A chat with a page: the built-in hub, mounted in an application of one's own.

    python -m supervisor --app chat:app --workers 4      (in this directory)

Then open http://127.0.0.1:8000/ in two windows. Whichever worker each window lands on, they see each other.
"""

from __future__ import annotations

from pathlib import Path

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse
from starlette.routing import Mount, Route

from workers import create_hub

PAGE = Path(__file__).with_name("chat.html")


async def page(request: Request) -> FileResponse:
    """The page; its script speaks the plain protocol with /realtime/ws."""
    return FileResponse(PAGE)


hub = create_hub()
app = Starlette(
    routes=[Route("/", page), Mount("/realtime", hub)],
    lifespan=hub.router.lifespan_context,
)
