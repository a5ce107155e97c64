"""Which web pages may open a WebSocket here: the check of the `Origin` header (RFC 6455 section 10.2).

It stands before everything else a handshake meets. A browser lets any page connect anywhere, with the cookies
of the target; the `Origin` header, which a page cannot forge, is what tells the own pages from foreign ones.
Programs that are no browsers send none, and are accepted.

`origin_allowed` and its parts are pure; `OriginMiddleware` applies them to any ASGI application.
"""

from __future__ import annotations

import functools
import ipaddress
import logging
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:  # the settings import this module, and the supervisor is to stay small
    from starlette.types import ASGIApp, Receive, Scope, Send

logger = logging.getLogger("workers")

_DEFAULT_PORTS = {"http": 80, "ws": 80, "https": 443, "wss": 443}
_ORIGIN = re.compile(r"([a-z][a-z0-9+.-]*)://(\*\.)?(.+)")
_AUTHORITY = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9_-]+(?:\.[a-z0-9_-]+)*\.?)(?::([0-9]{1,5}))?")
_SHOWN_CHARACTERS = 120


class _Authority(NamedTuple):
    host: str
    port: int | None


class _Origin(NamedTuple):
    scheme: str
    host: str
    port: int | None
    subdomains: bool = False


def origin_allowed(origin: bytes | str | None, host: bytes | str | None, allowed: Sequence[str] = ()) -> bool:
    """Whether a handshake with this `Origin` may go on.

    It may without an `Origin`; if host and port equal those of `Host`; or if it is listed. A missing port is
    the default of the `Origin`'s own scheme on both sides, so that a proxy that ends TLS changes nothing.

    Args:
        origin: The header `Origin`, None if there is none.
        host: The header `Host`, None if there is none.
        allowed: Entries as `check_allowed_origin` accepts them; others match nothing.
    """
    if origin is None:
        return True
    return origin_listed(origin, allowed) or _same_host(origin, host)


def origin_listed(origin: bytes | str, allowed: Sequence[str]) -> bool:
    """Whether an origin is covered by a list: named in it, a subdomain of a `*.` entry, or all are by `*`."""
    if "*" in allowed:
        return True
    text = _text(origin)
    if text == "null":
        return "null" in allowed
    parsed = _parse_origin(text)
    if parsed is None or parsed.subdomains:
        return False
    return any(_covers(entry, parsed) for entry in map(_parse_entry, allowed) if entry is not None)


def check_allowed_origin(entry: str) -> None:
    """Check an entry of the list of allowed origins.

    Raises:
        ValueError: in words, unless it is `*`, `null`, `scheme://host[:port]` or `scheme://*.host[:port]`.
    """
    if entry in ("*", "null") or _parse_entry(entry) is not None:
        return
    wanted = "* or null or https://host[:port] or https://*.host[:port]"
    hint = ""
    if not entry.isascii():
        hint = "; write an international host name in its xn-- form"
    elif "://" not in entry:
        hint = "; the scheme is missing"
    elif "/" in entry.partition("://")[2]:
        hint = "; an origin has no path and no slash at its end"
    raise ValueError(f"{_shown(entry)} is not an origin, write {wanted}{hint}")


class OriginMiddleware:
    """Refuses WebSocket handshakes of foreign pages with 403, before the application sees them.

    What it lets through it hands on untouched, `receive` and `send` included.

    Args:
        app: Any ASGI application.
        allowed: Origins accepted besides the same host; see `check_allowed_origin`.

    Raises:
        ValueError: an entry of `allowed` is no origin.
    """

    def __init__(self, app: ASGIApp, allowed: Sequence[str] = ()) -> None:
        for entry in allowed:
            check_allowed_origin(entry)
        self.app = app
        self.allowed = tuple(allowed)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket" and not self._accepts(scope):
            await _refuse(receive, send)
        else:
            await self.app(scope, receive, send)

    def _accepts(self, scope: Scope) -> bool:
        origins = [value for name, value in scope["headers"] if name == b"origin"]
        hosts = [value for name, value in scope["headers"] if name == b"host"]
        # A repeated header is one whose meaning depends on who reads it.
        if len(origins) > 1 or len(hosts) > 1:
            accepted = False
        else:
            accepted = origin_allowed(
                origins[0] if origins else None, hosts[0] if hosts else None, self.allowed
            )
        if not accepted:
            shown = _shown(b", ".join(origins).decode("latin-1"))
            logger.info(
                "handshake refused: origin %s is neither the host itself nor in --allow-origin", shown
            )
        return accepted


async def _refuse(receive: Receive, send: Send) -> None:
    """Close before accept, which every server answers with 403."""
    await receive()  # "websocket.connect", which ASGI wants to be taken before it is answered
    await send({"type": "websocket.close", "code": 1008, "reason": "origin not allowed"})


def _same_host(origin: bytes | str, host: bytes | str | None) -> bool:
    parsed = _parse_origin(_text(origin))
    if parsed is None or parsed.subdomains or host is None:
        return False
    default = _DEFAULT_PORTS.get(parsed.scheme)
    here = _parse_authority(_text(host))
    if default is None or here is None:
        return False
    return (parsed.host, parsed.port) == (here.host, default if here.port is None else here.port)


def _covers(entry: _Origin, origin: _Origin) -> bool:
    if (entry.scheme, entry.port) != (origin.scheme, origin.port):
        return False
    return origin.host.endswith("." + entry.host) if entry.subdomains else origin.host == entry.host


@functools.lru_cache(maxsize=256)
def _parse_entry(entry: str) -> _Origin | None:
    return _parse_origin(_text(entry))


def _parse_origin(text: str) -> _Origin | None:
    """The parts of a serialised origin (RFC 6454 section 6), None if it is none; `*.` is for entries only."""
    match = _ORIGIN.fullmatch(text)
    authority = _parse_authority(match[3]) if match else None
    if match is None or authority is None:
        return None
    if match[2] and authority.host.startswith("["):
        return None
    port = _DEFAULT_PORTS.get(match[1]) if authority.port is None else authority.port
    return _Origin(match[1], authority.host, port, subdomains=bool(match[2]))


def _parse_authority(text: str) -> _Authority | None:
    match = _AUTHORITY.fullmatch(text)
    if match is None:
        return None
    host, port = match[1], None if match[2] is None else int(match[2])
    if port is not None and port > 65535:
        return None
    if host.startswith("["):
        try:
            # One address can be written in many ways.
            host = f"[{ipaddress.IPv6Address(host[1:-1])}]"
        except ValueError:
            return None
    return _Authority(host, port)


def _text(value: bytes | str) -> str:
    """A header in lower case; "" for what holds other than ASCII, which no origin and no host does."""
    try:
        text = value.decode("ascii") if isinstance(value, bytes) else value
    except UnicodeDecodeError:
        return ""
    return text.lower() if text.isascii() else ""


def _shown(value: object) -> str:
    """A foreign value for a log line or an error: escaped, and no longer than a line."""
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "…"
