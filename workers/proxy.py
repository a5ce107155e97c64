"""A WebSocket passed on to another server: what a client sends goes to the target, and back.

It stands in an endpoint of the application, instead of the manager: no message of a proxied connection
touches topics or the bus.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple
from urllib.parse import urlsplit

from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidURI, WebSocketException
from websockets.typing import Subprotocol
from websockets.uri import parse_uri

logger = logging.getLogger("workers")

MAX_SIZE = 16 * 1024 * 1024
OPEN_TIMEOUT = 10.0
CLOSE_TIMEOUT = 5.0
"""Seconds for a closing handshake with the target, and for delivering what a closed target had sent."""
PING_INTERVAL = PING_TIMEOUT = 20.0
"""Seconds between pings to the target, and for its answer: how a target is found dead that says nothing, or of
which nothing is read because the client does not read either."""
MAX_QUEUE = 4
"""Frames from the target that may wait for the client before reading from the target pauses."""

NORMAL, GOING_AWAY, NO_CODE, TOO_BIG, INTERNAL_ERROR, BAD_GATEWAY = 1000, 1001, 1005, 1009, 1011, 1014

# The handshake with the target has its own, and those of another would spoil it (RFC 9110 section 7.6.1).
_OWN_HEADERS = frozenset(
    "connection host keep-alive content-length proxy-authenticate proxy-authorization proxy-connection te "
    "trailer transfer-encoding upgrade".split()
)


class _Close(NamedTuple):
    code: int
    reason: str = ""


class _End(NamedTuple):
    """How each side is told that it is over; a side that is closed already is told nothing."""

    client: _Close
    target: _Close


class WebSocketProxy:
    """Connects a client to another WebSocket server, until either of them closes.

    `await WebSocketProxy(websocket, "ws://10.0.0.5:9000/live")()`. Text and binary messages pass both ways,
    no faster than the slower side takes them. Close codes and reasons pass too. When it returns, also by an
    exception or by being cancelled, both sides are closed.

    The target's handshake carries none of the client's headers, credentials least of all, but only `headers`.
    Redirects are not followed and no HTTP proxy is used: the target is what `server_endpoint` names. Don't
    build that from what a client sent, or quote it (`urllib.parse.quote(part, safe="")`).

    Args:
        client: The client. If it is not accepted yet, it is, with the subprotocol the target chose.
        server_endpoint: The target, a `ws://` or `wss://` address.
        headers: Headers for the target's handshake.
        subprotocols: Subprotocols to offer to the target.
        max_size: The largest message either way, in bytes; None for no limit.

    Raises:
        ValueError: `server_endpoint` is no WebSocket address, or a header holds a line break.
    """

    def __init__(
        self,
        client: WebSocket,
        server_endpoint: str,
        *,
        headers: Mapping[str, str] | Iterable[tuple[str, str]] | None = None,
        subprotocols: Sequence[str] | None = None,
        max_size: int | None = MAX_SIZE,
    ) -> None:
        _check_endpoint(server_endpoint)
        self.client = client
        self.server_endpoint = server_endpoint
        self.headers = _passed_on(headers)
        self.subprotocols = subprotocols
        self.max_size = max_size

    async def __call__(self) -> None:
        """Pass messages on until one side closes; an unreachable target closes the client with 1014."""
        end = _End(client=_Close(INTERNAL_ERROR), target=_Close(GOING_AWAY))
        target: ClientConnection | None = None
        try:
            target = await self._connect()
            if target is None:
                await self._accept(None)  # a close code needs a connection to travel on
                end = _End(client=_Close(BAD_GATEWAY, "Bad Gateway"), target=_Close(GOING_AWAY))
            else:
                await self._accept(target.subprotocol)
                end = await self._relay(target)
        except asyncio.CancelledError:
            end = _End(client=_Close(GOING_AWAY), target=_Close(GOING_AWAY))
            raise
        finally:
            await self._finish(target, end)

    async def _connect(self) -> ClientConnection | None:
        offered = None if self.subprotocols is None else [Subprotocol(name) for name in self.subprotocols]
        try:
            return await _DirectConnect(
                self.server_endpoint,
                additional_headers=self.headers,
                subprotocols=offered,
                compression=None,
                proxy=None,
                open_timeout=OPEN_TIMEOUT,
                ping_interval=PING_INTERVAL,
                ping_timeout=PING_TIMEOUT,
                close_timeout=CLOSE_TIMEOUT,
                max_size=self.max_size,
                max_queue=MAX_QUEUE,
            )
        except (OSError, TimeoutError, WebSocketException) as error:
            address = urlsplit(self.server_endpoint)
            logger.warning("proxy target %s:%s unreachable: %s", address.hostname, address.port, error)
            return None

    async def _accept(self, subprotocol: str | None) -> None:
        if self.client.application_state is WebSocketState.CONNECTING:
            await self.client.accept(subprotocol)

    async def _relay(self, target: ClientConnection) -> _End:
        """Run both directions; the one that sees its own side end tells how it ended."""
        to_target = asyncio.create_task(self._client_to_target(target))
        to_client = asyncio.create_task(self._target_to_client(target))
        target_closed = asyncio.create_task(target.wait_closed())
        ways = {to_target, to_client}
        try:
            await asyncio.wait({*ways, target_closed}, return_when=asyncio.FIRST_COMPLETED)
            if not to_target.done():
                # What the target sent before it closed still goes to the client, if the client takes it.
                await asyncio.wait(ways, timeout=CLOSE_TIMEOUT, return_when=asyncio.FIRST_COMPLETED)
            ended = next((way for way in (to_target, to_client) if way.done()), None)
            return _lost_target() if ended is None else ended.result()
        finally:
            for task in (*ways, target_closed):
                task.cancel()
            await asyncio.gather(*ways, target_closed, return_exceptions=True)

    async def _client_to_target(self, target: ClientConnection) -> _End:
        while True:
            event = await self.client.receive()
            if event["type"] == "websocket.disconnect":
                code, reason = event.get("code") or NO_CODE, event.get("reason") or ""
                return _End(client=_Close(NORMAL), target=_Close(sendable_code(code, GOING_AWAY), reason))
            text = event.get("text")
            message: str | bytes = event["bytes"] if text is None else text
            if self.max_size is not None and _longer(message, self.max_size):
                words = f"message over {self.max_size} bytes"
                return _End(client=_Close(TOO_BIG, words), target=_Close(GOING_AWAY))
            try:
                await target.send(message)
            except ConnectionClosed:
                pass  # the other direction delivers what the target still had to say, and tells how it ended

    async def _target_to_client(self, target: ClientConnection) -> _End:
        while True:
            try:
                message = await target.recv()
            except ConnectionClosed as error:
                return _closed_target(error)
            try:
                if isinstance(message, str):
                    await self.client.send_text(message)
                else:
                    await self.client.send_bytes(message)
            except (WebSocketDisconnect, RuntimeError):
                pass  # the other direction reads with which code the client went

    async def _finish(self, target: ClientConnection | None, end: _End) -> None:
        try:
            # First the client: its close is only sent, while the target's waits for the answer.
            await self._close_client(end.client)
        finally:
            if target is not None:
                await _close_target(target, end.target)

    async def _close_client(self, close: _Close) -> None:
        connected = WebSocketState.CONNECTED
        if self.client.client_state is connected and self.client.application_state is connected:
            try:
                # A server may hold the close back behind what a client that does not read has not taken.
                async with asyncio.timeout(CLOSE_TIMEOUT):
                    await self.client.close(*close)
            except (WebSocketDisconnect, RuntimeError, TimeoutError):
                pass  # it went at this moment, or the server ends it when the endpoint returns


async def _close_target(target: ClientConnection, close: _Close) -> None:
    """Do the closing handshake, in its time whatever the target does."""
    # Its answer comes behind what it has sent so far, which has to be read to get there.
    discarding = asyncio.create_task(_discard(target))
    try:
        # A target that does not read does not let the close frame out either.
        async with asyncio.timeout(CLOSE_TIMEOUT):
            await target.close(*close)
    except TimeoutError:
        pass
    finally:
        target.transport.abort()  # does nothing after a closing handshake
        await target.wait_closed()
        await asyncio.gather(discarding, return_exceptions=True)


async def _discard(target: ClientConnection) -> None:
    with contextlib.suppress(ConnectionClosed):
        while True:
            await target.recv()


class _DirectConnect(connect):
    """`connect`, but a redirect is a failure: it would let the target choose another target."""

    def process_redirect(self, exc: Exception) -> Exception:
        return exc


def sendable_code(code: int, lost: int) -> int:
    """The close code to pass on for one that was received (RFC 6455 section 7.4).

    Args:
        code: What was received; 1005 means that the close had no code.
        lost: What to send when there was no close (1006, 1015), or a code that may not be sent.
    """
    if code == NO_CODE:
        return NORMAL
    if 1000 <= code <= 1003 or 1007 <= code <= 1014 or 3000 <= code <= 4999:
        return code
    return lost


def _closed_target(error: ConnectionClosed) -> _End:
    if error.rcvd is not None:
        close = _Close(sendable_code(error.rcvd.code, BAD_GATEWAY), error.rcvd.reason)
        return _End(client=close, target=_Close(NORMAL))
    if error.sent is not None and error.sent.code == TOO_BIG:
        return _End(client=_Close(TOO_BIG, "the target sent too big a message"), target=_Close(NORMAL))
    return _lost_target()


def _lost_target() -> _End:
    return _End(client=_Close(BAD_GATEWAY, "target lost"), target=_Close(GOING_AWAY))


def _longer(message: str | bytes, limit: int) -> bool:
    if isinstance(message, bytes) or len(message) > limit or message.isascii():
        return len(message) > limit
    return len(message.encode()) > limit


def _check_endpoint(endpoint: str) -> None:
    try:
        parse_uri(endpoint)
    except (InvalidURI, ValueError) as error:
        raise ValueError(f"{endpoint!r} is not a WebSocket address such as ws://host:port/path") from error
    if any(character <= " " or character == "\x7f" for character in endpoint):
        raise ValueError(f"{endpoint!r} holds a space or a control character; quote what is put into it")


def _passed_on(headers: Mapping[str, str] | Iterable[tuple[str, str]] | None) -> list[tuple[str, str]]:
    pairs = headers.items() if isinstance(headers, Mapping) else headers or ()
    passed = []
    for name, value in pairs:
        if any(character in "\r\n\0" for character in name + value):
            raise ValueError(f"the header {name!r} holds a line break or NUL")
        if name.lower() not in _OWN_HEADERS and not name.lower().startswith("sec-websocket-"):
            passed.append((name, value))
    return passed
