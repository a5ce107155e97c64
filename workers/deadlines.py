"""Deadlines that are the same number of seconds for everybody: one timer for all of them.

A timer of its own for each connection would be a good part of an idle connection's memory. Since all deadlines of one
kind are equally long, they fall due in the order in which they were set.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Generic, TypeVar

logger = logging.getLogger("workers")

T = TypeVar("T")


class Deadlines(Generic[T]):
    """Calls ``overdue(item)`` once ``seconds`` after :meth:`set`, unless :meth:`clear` comes first.

    It is exact to a tenth of ``seconds``: late by so much at most.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, seconds: float, overdue: Callable[[T], None]) -> None:
        self._loop = loop
        self.seconds = seconds
        self._overdue = overdue
        self._due: dict[T, float] = {}
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._due)

    def __contains__(self, item: T) -> bool:
        return item in self._due

    def set(self, item: T) -> None:
        """The deadline of ``item`` is ``seconds`` from now, whatever it was."""
        self._due.pop(item, None)
        self._due[item] = self._loop.time() + self.seconds
        if self._timer is None:
            self._timer = self._loop.call_later(self.seconds, self._look)

    def clear(self, item: T) -> None:
        """``item`` has no deadline any more; it may have had none."""
        self._due.pop(item, None)

    def _look(self) -> None:
        self._timer = None
        now = self._loop.time()
        ripe = []
        for item, due in self._due.items():
            if due > now:
                break
            ripe.append(item)
        for item in ripe:
            # What an earlier one did may have cleared or moved a later one.
            if self._due.get(item, now + 1.0) <= now:
                del self._due[item]
                try:
                    self._overdue(item)
                except Exception:
                    logger.exception("what was to be done at a deadline failed")
        if self._timer is None and self._due:
            first = next(iter(self._due.values()))
            self._timer = self._loop.call_later(max(first - self._loop.time(), self.seconds / 10), self._look)
