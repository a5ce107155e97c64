"""Which web pages may read what the hub's HTTP endpoints answer (Fetch standard, "HTTP CORS protocol").

Stands before ``/events`` and its neighbours. Beside the check of WebSocket handshakes in ``origin.py``, with the same
list: a browser sends the requests of foreign pages all the same, and keeps the answers from them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from workers.origin import origin_listed

_REQUEST_HEADERS: Final = ("Authorization", "Cache-Control", "Last-Event-ID", "X-API-Key")


class CrossOriginMiddleware(CORSMiddleware):
    """Answers preflights, and adds CORS headers for listed origins. What is not HTTP passes untouched.

    Args:
        app: any ASGI application.
        allowed: returns the list, which is not known before the application runs; see
            :func:`workers.origin.check_allowed_origin`.
    """

    def __init__(self, app: ASGIApp, allowed: Callable[[], Sequence[str]]) -> None:
        super().__init__(app, allow_methods=("GET", "POST", "DELETE"), allow_headers=_REQUEST_HEADERS)
        self._allowed = allowed

    def is_allowed_origin(self, origin: str) -> bool:
        """Whether the list covers it."""
        return origin_listed(origin, self._allowed())
