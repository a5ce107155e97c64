"""The opening handshake of a WebSocket, server side (RFC 6455 section 4.2), from a head that is parsed already.

Pure: headers in, bytes out. ``workers/http_protocol.py`` has read the request; reading it a second time would be most
of what a connection costs.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Iterable, Sequence
from email.utils import formatdate
from http import HTTPStatus
from typing import Final, NamedTuple

HeaderList = Sequence[tuple[bytes, bytes]]

_MAGIC: Final = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
_SWITCHING: Final = (
    b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: "
)


class Refusal(NamedTuple):
    """Why a handshake cannot be answered with 101."""

    status: int
    words: str
    headers: tuple[tuple[bytes, bytes], ...] = ()


def check(method: str, http_version: str, headers: HeaderList) -> bytes | Refusal:
    """The client's key, or why there will be no WebSocket. Header names are lower case."""
    if method != "GET":
        return Refusal(405, "a WebSocket handshake is a GET request", ((b"allow", b"GET"),))
    if http_version != "1.1":
        return Refusal(400, f"a WebSocket handshake is HTTP/1.1, not {http_version}")
    keys: list[bytes] = []
    versions: list[bytes] = []
    upgrades: list[bytes] = []
    connection: list[bytes] = []
    for name, value in headers:
        if name == b"sec-websocket-key":
            keys.append(value.strip())
        elif name == b"sec-websocket-version":
            versions.append(value.strip())
        elif name == b"upgrade":
            upgrades.append(value.strip().lower())
        elif name == b"connection":
            connection += [token.strip() for token in value.lower().split(b",")]
    if b"upgrade" not in connection or upgrades != [b"websocket"]:
        return Refusal(
            426,
            "a WebSocket handshake has Connection: Upgrade and Upgrade: websocket",
            ((b"upgrade", b"websocket"),),
        )
    if versions != [b"13"]:
        return Refusal(426, "only version 13 of the protocol is spoken", ((b"sec-websocket-version", b"13"),))
    if len(keys) != 1 or not _is_key(keys[0]):
        return Refusal(400, "Sec-WebSocket-Key must be 16 bytes in base64, once")
    return keys[0]


def _is_key(key: bytes) -> bool:
    try:
        return len(base64.b64decode(key, validate=True)) == 16
    except (binascii.Error, ValueError):
        return False


def accept(key: bytes, subprotocol: str | None, headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """The answer that makes it a WebSocket.

    Raises:
        ValueError: a header of the application holds a line end.
    """
    parts = [
        _SWITCHING,
        base64.b64encode(hashlib.sha1(key + _MAGIC, usedforsecurity=False).digest()),
        b"\r\n",
    ]
    if subprotocol:
        parts += [b"Sec-WebSocket-Protocol: ", _clean(subprotocol.encode("latin-1")), b"\r\n"]
    for name, value in headers:
        parts += [_clean(name), b": ", _clean(value), b"\r\n"]
    parts.append(b"\r\n")
    return b"".join(parts)


def http_response(status: int, headers: Iterable[tuple[bytes, bytes]], body: bytes) -> bytes:
    """A whole HTTP response after which the connection is closed.

    Raises:
        ValueError: a header of the application holds a line end.
    """
    try:
        phrase = HTTPStatus(status).phrase
    except ValueError:
        phrase = ""
    lines = [f"HTTP/1.1 {status} {phrase}\r\n".encode()]
    seen = set()
    for name, value in headers:
        seen.add(name.lower())
        lines += [_clean(name), b": ", _clean(value), b"\r\n"]
    defaults = (
        (b"date", formatdate(usegmt=True).encode()),
        (b"connection", b"close"),
        (b"content-length", str(len(body)).encode()),
        (b"content-type", b"text/plain; charset=utf-8"),
    )
    for name, value in defaults:
        if name not in seen:
            lines += [name, b": ", value, b"\r\n"]
    return b"".join([*lines, b"\r\n", body])


def _clean(text: bytes) -> bytes:
    if b"\r" in text or b"\n" in text:
        raise ValueError(f"a response header may not hold a line end: {text[:80]!r}")
    return text
