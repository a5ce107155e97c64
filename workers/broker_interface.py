"""What a broker is: the six methods by which a `WebSocketManager` reaches the other processes.

A message of the manager goes to `publish`; what `get_message` returns, the manager delivers to the
connections of its own process. Whoever writes a broker implements this interface, or just the same methods.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self, TypeAlias

from workers.message import Message

_METHODS = ("connect", "disconnect", "subscribe", "unsubscribe", "publish", "get_message")


class BrokerError(Exception):
    """A broker cannot do what it was asked to; the text says what and why."""


class BrokerUnavailable(BrokerError, ConnectionError):
    """What carries the broker's messages cannot be reached."""


class BrokerInterface(ABC):
    """Carries messages between the processes that name the same channel.

    A broker promises at most once: what was published while a process was not connected is not delivered to
    it later. As an async context manager it is connected inside the block.
    """

    @abstractmethod
    async def connect(self) -> None:
        """Get ready; raises if that cannot be done. After `disconnect` it may be called again."""

    @abstractmethod
    async def disconnect(self) -> None:
        """Let go of everything; calling it twice does no harm."""

    @abstractmethod
    async def subscribe(self, channel: str) -> None:
        """Receive what is published on a channel; on return nothing published from then on is missed."""

    @abstractmethod
    async def unsubscribe(self, channel: str) -> None:
        """Stop receiving from a channel."""

    @abstractmethod
    async def publish(self, channel: str, message: Mapping[str, Any]) -> None:
        """Give a message to all subscribers of a channel, this process too.

        Args:
            channel: The manager's `broker_channel`.
            message: A flat dict with `type`, `topic` and `conn_id`, and the data as its other keys. It is
                not to be changed or kept.
        """

    @abstractmethod
    async def get_message(self, **kwargs: Any) -> Message | dict[str, Any] | None:
        """Wait for the next message of the subscribed channels, as a `Message` or as the flat dict.

        It should wait and not return None at once when there is nothing; None is skipped. What it raises is
        logged, and it is called again.
        """

    async def __aenter__(self) -> Self:
        await self.connect()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.disconnect()


BrokerT: TypeAlias = BrokerInterface
"""The name of the interface in annotations, as in fastapi-distributed-websocket."""


def is_valid_broker(broker: object) -> bool:
    """Whether a class or an object has the six methods of `BrokerInterface`; it need not derive from it."""
    if inspect.isclass(broker) and inspect.isabstract(broker):
        return False
    return all(callable(getattr(broker, name, None)) for name in _METHODS)
