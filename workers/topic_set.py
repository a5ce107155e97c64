"""The patterns of one connection as a set that acts: what is added is subscribed, what is removed is unsubscribed.

Between an application (``connection.topics``) or the plain protocol and the manager's index.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from ipc.topics import check_pattern

if TYPE_CHECKING:
    from workers.connection import Connection


class TopicSet(set[str]):
    """The patterns of one connection. Adding one subscribes, removing one unsubscribes."""

    def __init__(self, connection: Connection) -> None:
        super().__init__()
        self._connection = connection

    def add(self, pattern: str) -> None:
        """Subscribe.

        Raises:
            InvalidTopic: not a pattern (MQTT 5 section 4.7); nothing changed.
        """
        if pattern not in self:
            check_pattern(pattern)
            owner = self._connection.owner
            if owner is not None:
                owner.connection_subscribed(self._connection, pattern)
            super().add(pattern)

    def discard(self, pattern: object) -> None:
        if isinstance(pattern, str) and pattern in self:
            super().discard(pattern)
            owner = self._connection.owner
            if owner is not None:
                owner.connection_unsubscribed(self._connection, pattern)

    def remove(self, pattern: str) -> None:
        if pattern not in self:
            raise KeyError(pattern)
        self.discard(pattern)

    def pop(self) -> str:
        for pattern in self:
            self.discard(pattern)
            return pattern
        raise KeyError("pop from an empty set")

    def clear(self) -> None:
        for pattern in list(self):
            self.discard(pattern)

    def update(self, *others: Iterable[str]) -> None:
        for other in others:
            for pattern in list(other):
                self.add(pattern)

    def difference_update(self, *others: Iterable[Any]) -> None:
        for other in others:
            for pattern in list(other):
                self.discard(pattern)

    def intersection_update(self, *others: Iterable[Any]) -> None:
        self.difference_update(set(self) - set(self).intersection(*others))

    def symmetric_difference_update(self, other: Iterable[str]) -> None:
        wanted = set(self) ^ set(other)
        self.difference_update(set(self) - wanted)
        self.update(wanted)

    def __ior__(self, other: Any) -> TopicSet:  # type: ignore[override, misc]
        self.update(other)
        return self

    def __isub__(self, other: Any) -> TopicSet:  # type: ignore[misc]
        self.difference_update(other)
        return self

    def __iand__(self, other: Any) -> TopicSet:  # type: ignore[misc]
        self.intersection_update(other)
        return self

    def __ixor__(self, other: Any) -> TopicSet:  # type: ignore[override, misc]
        self.symmetric_difference_update(other)
        return self

    __hash__ = None
