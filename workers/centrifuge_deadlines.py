"""The time-outs of one Centrifuge connection: moments that pass, and the schedule of pings and pongs.

Used by `workers/centrifuge.py`, which is told the time by its shell. Where a moment is noticed late, it was us who
missed it, not the client: what it sent in time may lie unread in its socket. So it gets a second more, once.
"""

from __future__ import annotations

import math
from typing import Final

LATE: Final = 1.0
"""Noticed so many seconds after it passed, a deadline is put off by as much, once."""


class Deadline:
    """A moment by which the client has to do something; infinity when it has not."""

    __slots__ = ("_put_off", "at")

    def __init__(self, at: float = math.inf) -> None:
        self.at = at
        self._put_off = False

    def set(self, at: float) -> None:
        """Begin anew."""
        self.at = at
        self._put_off = False

    def clear(self) -> None:
        """Wait for nothing."""
        self.at = math.inf

    def passed(self, now: float) -> bool:
        """Tell whether the client has missed it."""
        if now < self.at:
            return False
        if now - self.at > LATE and not self._put_off:
            self._put_off = True
            self.at = now + LATE
            return False
        return True


class Heartbeat:
    """When to ping, and until when a pong has to come. An interval of 0 means never."""

    __slots__ = ("_held", "_paused_at", "_pong", "interval", "ping_at", "timeout")

    def __init__(self, interval: float, timeout: float) -> None:
        self.interval = interval
        self.timeout = timeout
        self.ping_at = math.inf
        self._pong = Deadline()
        self._paused_at: float | None = None
        self._held: float | None = None

    @property
    def next_deadline(self) -> float:
        """When to look again."""
        return min(self.ping_at, self._pong.at)

    def start(self, now: float, jitter: float) -> None:
        """Schedule the first ping after half to a whole interval: clients that came together part here."""
        if self.interval > 0:
            self.ping_at = now + self.interval * (0.5 + jitter / 2)

    def ping_due(self, now: float) -> bool:
        """Tell whether a ping is to be sent, and take it as sent."""
        if now < self.ping_at:
            return False
        self.ping_at = now + self.interval
        if self._paused_at is not None:
            if self._held is None:
                self._held = self.timeout
        elif self._pong.at == math.inf:
            # The oldest unanswered ping counts, also where the time-out is longer than the interval.
            self._pong.set(now + self.timeout)
        return True

    def pong(self) -> None:
        """The client answered."""
        self._pong.clear()
        self._held = None

    def pong_missed(self, now: float) -> bool:
        """Tell whether the client is gone."""
        return self._pong.passed(now)

    def pause(self, now: float) -> None:
        """Nothing is read from the client: until `resume` its time stands still."""
        if self._paused_at is None:
            self._paused_at = now
            if self._pong.at < math.inf:
                self._held = max(0.0, self._pong.at - now)
                self._pong.clear()

    def resume(self, now: float) -> None:
        """It is read again. What it sent meanwhile needs a moment to get here."""
        if self._paused_at is not None:
            self._paused_at = None
            if self._held is not None:
                self._pong.set(now + max(self._held, min(LATE, self.timeout)))
                self._held = None
