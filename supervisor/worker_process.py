"""One worker as the supervisor sees it: its process, the line to it, and where it is in its life.

Beside the way of a message: the supervisor tells a worker to drain here and hears that it is ready.
"""

from __future__ import annotations

import enum
import logging
import os
import signal
import socket
from typing import Final

import msgspec

logger = logging.getLogger("supervisor")

MAX_LINE = 64 * 1024
"""Bytes of one line from a worker; what is longer is not ours and is thrown away."""


MAX_READS = 16
"""Reads from one worker in one turn of the loop: a chatty one must not keep the others waiting."""


class Phase(enum.Enum):
    """Where a worker is in its life."""

    BOOTING = enum.auto()
    READY = enum.auto()
    DRAINING = enum.auto()


class Report(msgspec.Struct):
    """One line from a worker."""

    forked: bool = False
    """It has closed what is not its own."""
    claimed: tuple[int, int] | None = None
    """Its slot on the board and its epoch."""
    ready: bool = False
    draining: bool = False
    """It drains of its own accord: somebody sent it SIGTERM."""
    failed: str = ""
    """Why it can not start."""


class WorkerProcess:
    """A forked worker that has not been reaped: until then its pid can not be another's, and signals may go to it."""

    def __init__(self, pid: int, index: int, channel: socket.socket, now: float) -> None:
        self.pid: Final = pid
        self.index: Final = index
        """The listener index that it serves."""
        self.channel: Final = channel
        self.phase = Phase.BOOTING
        self.started: Final = now
        self.ready_at: float | None = None
        self.slot: int | None = None
        self.epoch = 0
        self.forked = False
        self.failed = ""
        self.stale = False
        self.abort_at: float | None = None
        """When to end it by SIGABRT because it is not ready, as monotonic time."""
        self.kill_at: float | None = None
        """When to end it by SIGKILL, as monotonic time."""
        self.kill_reason = ""
        self.killed = False
        """Whether the supervisor sent SIGABRT or SIGKILL."""
        self._buffer = bytearray()

    def __str__(self) -> str:
        return f"worker {self.index} (pid {self.pid})"

    def become_ready(self, now: float) -> None:
        """It accepts clients."""
        if self.phase is Phase.BOOTING:
            self.phase = Phase.READY
            self.ready_at = now
            self.abort_at = None

    def ready_for(self, now: float) -> float | None:
        """Seconds since it was ready, None if it never was."""
        return None if self.ready_at is None else now - self.ready_at

    def start_draining(self, deadline: float) -> None:
        """It has been told to end or does so by itself; SIGKILL at ``deadline``."""
        self.phase = Phase.DRAINING
        self.abort_at = None
        self.kill_by(deadline, "has not drained in time")

    def kill_by(self, deadline: float, reason: str) -> None:
        """SIGKILL at ``deadline``, unless it is to be earlier already."""
        if self.kill_at is None or deadline < self.kill_at:
            self.kill_at = deadline
            self.kill_reason = reason

    def tell(self, line: str) -> None:
        """Send it one line; a worker that does not listen is ended by its deadline."""
        try:
            self.channel.send(line.encode() + b"\n")
        except OSError as error:
            logger.debug("%s does not take %r: %s", self, line, error)

    def signal(self, signum: signal.Signals) -> None:
        """Send a signal; only to an unreaped child, as all in the arbiter's table are."""
        if signum in (signal.SIGABRT, signal.SIGKILL):
            self.killed = True
        os.kill(self.pid, signum)

    def reports(self) -> tuple[list[Report], bool]:
        """What it has said since the last call, and whether it has hung up."""
        found: list[Report] = []
        for _ in range(MAX_READS):
            try:
                data = self.channel.recv(65536)
            except BlockingIOError:
                return found, False
            except OSError:
                return found, True
            if not data:
                return found, True
            self._buffer += data
            found += self._complete_lines()
        return found, False

    def _complete_lines(self) -> list[Report]:
        *lines, rest = bytes(self._buffer).split(b"\n")
        self._buffer = bytearray(rest if len(rest) <= MAX_LINE else b"")
        reports = []
        for line in lines:
            try:
                reports.append(_decoder.decode(line))
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                logger.warning("%s says what is not understood: %r (%s)", self, line[:200], error)
        return reports


_decoder = msgspec.json.Decoder(Report)
