"""The rolling replacement of all workers, one listener index after the other. Pure: no process, no clock.

Beside the way of a message: the arbiter asks which index is next and says how it went.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

MAX_REMEMBERED = 16
"""Outcomes of so many past rounds are kept for those who wait for one."""


class Rolling:
    """One round at a time; a request during a round means one more round after it, however many there are."""

    def __init__(self) -> None:
        self._number = 0
        self._queue: deque[int] | None = None
        self._requested = False
        self._outcomes: dict[int, str] = {}

    @property
    def active(self) -> bool:
        """Whether a round is under way."""
        return self._queue is not None

    @property
    def wanted(self) -> bool:
        """Whether a round is to begin now."""
        return self._requested and not self.active

    def request(self) -> int:
        """Ask for a round that begins after this moment; returns its number."""
        self._requested = True
        return self._number + 1

    def begin(self, indexes: Iterable[int]) -> None:
        """Start the round that was asked for."""
        self._number += 1
        self._requested = False
        self._queue = deque(indexes)

    def next(self) -> int | None:
        """The listener index whose worker is to be replaced next; None when all have been."""
        return self._queue.popleft() if self._queue else None

    def finish(self, failure: str = "") -> None:
        """End the round, with the words of what stopped it if something did."""
        self._queue = None
        self._outcomes[self._number] = failure
        while len(self._outcomes) > MAX_REMEMBERED:
            del self._outcomes[min(self._outcomes)]

    def cancel(self) -> None:
        """The hub stops: no round any more."""
        self._requested = False
        if self.active:
            self.finish("the hub stops")

    def outcome(self, number: int) -> str | None:
        """How a round ended: None while it has not, "" when it went well, else what stopped it."""
        return self._outcomes.get(number)
