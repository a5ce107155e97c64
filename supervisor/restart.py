"""When to start a worker again, and when a worker's silence or failure is final. Pure: no clock, no process.

Stands beside the way of a message: :mod:`supervisor.arbiter` asks here and acts.
"""

from __future__ import annotations

import enum
import os
import signal
from dataclasses import dataclass

RESTART_DELAYS = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0)
"""Seconds before the first, second, ... restart in a row; the last one repeats."""

STABLE_AFTER = 10.0
"""Seconds a worker must have been ready for its end not to count as a failure."""

MAX_FAILED_STARTS = 5
"""So many starts may fail before all workers were ready once; then the hub gives up."""

STALE_AFTER = 2.0
"""Seconds without a heartbeat after which new connections are steered away."""

KILL_AFTER_ABORT = 1.0
"""Seconds between SIGABRT (which prints where the worker hangs) and SIGKILL."""

EXIT_OK = 0
EXIT_FAILURE = 1
EXIT_USAGE = 2
EXIT_CANNOT_START = 3
EXIT_IN_USE = 4
EXIT_INTERRUPTED = 130
EXIT_QUIT = 131


class Backoff:
    """The restart delay of one listener index: 0, 1, 2, 4 ... 30 seconds.

    The count rises when a worker ends before it was ready or within :data:`STABLE_AFTER` seconds of it, and
    returns to zero otherwise.
    """

    def __init__(self) -> None:
        self.failures = 0

    def ended(self, ready_for: float | None) -> float:
        """Note that a worker ended and return the delay in seconds before the next start.

        Args:
            ready_for: seconds since it was ready, None if it never was.
        """
        if ready_for is not None and ready_for >= STABLE_AFTER:
            self.failures = 0
            return RESTART_DELAYS[0]
        self.failures += 1
        return RESTART_DELAYS[min(self.failures, len(RESTART_DELAYS)) - 1]

    def reset(self) -> None:
        """Forget the failures: somebody asked for a new start (a reload)."""
        self.failures = 0


class StartVerdict:
    """Whether the hub can start at all: judged until every worker was ready once."""

    def __init__(self) -> None:
        self.failed_starts = 0
        self.booted = False

    def all_ready(self) -> None:
        """Every listener index has had a ready worker: from here on only a signal ends the hub."""
        self.booted = True

    def start_failed(self, exit_code: int | None) -> bool:
        """Note a worker that ended before it was ready; True means that the hub must give up.

        Args:
            exit_code: its exit code, None when a signal ended it.
        """
        if self.booted:
            return False
        self.failed_starts += 1
        return exit_code == EXIT_CANNOT_START or self.failed_starts >= MAX_FAILED_STARTS


class Health(enum.Enum):
    """What a worker's heartbeat says."""

    FRESH = enum.auto()
    STALE = enum.auto()
    """Older than :data:`STALE_AFTER`: no new connections for it."""
    HUNG = enum.auto()
    """Older than ``--worker-timeout``: it is aborted."""


@dataclass(frozen=True)
class HealthPolicy:
    """Judges the age of a heartbeat, in seconds."""

    worker_timeout: float

    def judge(self, age: float) -> Health:
        """Fresh, stale or hung."""
        if age > self.worker_timeout:
            return Health.HUNG
        return Health.STALE if age > STALE_AFTER else Health.FRESH


class Clockwork:
    """Notices that this process itself stood still, so that it does not blame the workers for it.

    After a suspended machine or a stopped process group (Ctrl-Z, ``fg``) every heartbeat looks old at once;
    ages are then counted from the moment of waking.
    """

    def __init__(self, now: float, tolerance: float) -> None:
        self._last = now
        self._woke = now
        self._tolerance = tolerance

    def tick(self, now: float) -> None:
        """To be called at every turn of the main loop, with the monotonic time."""
        if now - self._last > self._tolerance:
            self._woke = now
        self._last = now

    def age(self, heartbeat: float, now: float) -> float:
        """Seconds since ``heartbeat`` during which the worker could have shown another one."""
        return max(0.0, now - max(heartbeat, self._woke))


def describe_end(status: int, *, ordered: bool = False) -> str:
    """Words for a wait status: how a process ended.

    Args:
        status: what ``waitpid`` gave.
        ordered: whether the supervisor itself killed it, so that nobody need guess why.
    """
    code = os.waitstatus_to_exitcode(status)
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:  # a real-time signal has no name of its own
        name = f"signal {-code}"
    hint = "; perhaps out of memory?" if -code == signal.SIGKILL and not ordered else ""
    return f"was killed by {name}{hint}"
