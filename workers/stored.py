"""What applications see of history: the pending store of a message, and pages of what is kept.

On the way of a message whose topic has history, between :class:`~workers.manager.WebSocketManager` and the host's log.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from ipc.positions import Position
from ipc.store_records import EntryTooLarge, StoreError, StoreFull
from workers import jsontext
from workers.brokers import running_loop
from workers.codes import ErrorCode
from workers.transport import Accepted

if TYPE_CHECKING:
    from ipc.history import HostLog

logger = logging.getLogger("workers")

Result = Position | StoreError


class NoHistory(ValueError):
    """The topic has no history: no rule gives it any, or the broker keeps none."""


class Storing(Accepted):
    """A message on its way into the store. Awaiting it gives its position; it may also be ignored.

    Awaiting raises:
        StoreError: it could not be stored, and was delivered to nobody.
    """

    __slots__ = ("_callbacks", "_result", "_topic")

    def __init__(self, topic: str) -> None:
        self._wait = None
        self._topic = topic
        self._result: Result | None = None
        self._callbacks: list[Callable[[Result], None]] | None = None

    def finish(self, result: Result) -> None:
        """It was stored, or was not."""
        self._result = result
        callbacks, self._callbacks = self._callbacks, None
        if callbacks:
            for callback in callbacks:
                callback(result)
        elif isinstance(result, StoreError):
            logger.warning("a message to %r was not stored, and so not delivered: %s", self._topic, result)

    def when_done(self, callback: Callable[[Result], None]) -> None:
        """Call back with its position or the error, from the loop, or at once if it is known."""
        if self._result is None:
            if self._callbacks is None:
                self._callbacks = []
            self._callbacks.append(callback)
        else:
            callback(self._result)

    def __await__(self) -> Generator[Any, None, Position]:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Position] = loop.create_future()

        def told(result: Result) -> None:
            if running_loop() is not loop:
                loop.call_soon_threadsafe(told, result)
            elif future.done():
                return
            elif isinstance(result, StoreError):
                future.set_exception(result)
            else:
                future.set_result(result)

        self.when_done(told)
        return (yield from future.__await__())


class StoredMessage(msgspec.Struct, frozen=True):
    """A message that is kept."""

    topic: str
    data: Any
    offset: int
    time: float
    """When it was stored, in seconds since 1970."""
    info: Any = None
    """Who published it, where that is known: ``{"user", "client", ...}``."""


class HistoryPage(msgspec.Struct, frozen=True):
    """Part of a topic's history; iterating gives its messages."""

    messages: Sequence[StoredMessage]
    position: Position
    """The top of the host's log when it was read."""

    def __iter__(self) -> Iterator[StoredMessage]:
        return iter(self.messages)

    def __len__(self) -> int:
        return len(self.messages)


def read_history(
    log: HostLog, channel: str, topic: str, limit: int, since: Position | None, reverse: bool
) -> HistoryPage:
    """A page of a topic's history, decoded."""
    found = log.history(channel, topic, limit, since, reverse)
    messages = [
        StoredMessage(
            entry.topic,
            jsontext.decode(entry.data),
            entry.offset,
            entry.time / 1000,
            jsontext.decode(entry.info) if entry.info else None,
        )
        for entry in found.entries
    ]
    return HistoryPage(messages, Position(found.top, found.epoch))


def refusal(error: StoreError) -> tuple[ErrorCode, str]:
    """What a client is told: not where the store lies."""
    if isinstance(error, EntryTooLarge):
        return ErrorCode.BAD_REQUEST, "the message was not stored: it is too large for history"
    if isinstance(error, StoreFull):
        return ErrorCode.INTERNAL, "the message was not stored: there is no room for history"
    return ErrorCode.INTERNAL, "the message was not stored: history is busy or failed, try again"
