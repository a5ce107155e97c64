"""Signals of the supervisor: handlers only enqueue, the main loop acts. No message passes here.

A byte in a pipe wakes the loop's ``poll`` however a signal arrives (``signal.set_wakeup_fd``).
"""

from __future__ import annotations

import os
import signal
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

MAX_QUEUED = 1024
"""Beyond so many unhandled signals, those that do not end the hub are forgotten."""

HANDLED = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGQUIT,
    signal.SIGHUP,
    signal.SIGTTIN,
    signal.SIGTTOU,
    signal.SIGCHLD,
)
ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)
IGNORED = (signal.SIGUSR1, signal.SIGUSR2)
"""They mean nothing here, and their default would end the supervisor without a word."""
IGNORED_BY_WORKERS = (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP)
"""Ctrl-C and a closed terminal reach the whole process group; only the supervisor answers."""


class SignalQueue:
    """Signals in the order of their arrival, to be taken by the main loop."""

    def __init__(self) -> None:
        self._queue: deque[signal.Signals] = deque()
        self._read_fd, self._write_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def install(self) -> None:
        """Handle all signals of this process from here on."""
        signal.set_wakeup_fd(self._write_fd, warn_on_full_buffer=False)
        for signum in HANDLED:
            signal.signal(signum, self._enqueue)
        for signum in IGNORED:
            signal.signal(signum, signal.SIG_IGN)

    def fileno(self) -> int:
        """What to poll for reading."""
        return self._read_fd

    def take(self) -> list[signal.Signals]:
        """All signals that arrived since the last call."""
        try:
            while os.read(self._read_fd, 4096):
                pass
        except BlockingIOError:
            pass
        taken = []
        while self._queue:
            taken.append(self._queue.popleft())
        return taken

    def _enqueue(self, signum: int, frame: FrameType | None) -> None:
        if len(self._queue) < MAX_QUEUED or signum in ENDING:
            self._queue.append(signal.Signals(signum))


@contextmanager
def all_blocked() -> Iterator[None]:
    """No handler runs inside: a forked child must reset its own before it could write to its parent's pipe."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def reset_in_child() -> None:
    """Give a forked child the signals a worker starts with, and let them through."""
    signal.set_wakeup_fd(-1)
    for signum in (*HANDLED, *IGNORED):
        signal.signal(signum, signal.SIG_DFL)
    for signum in IGNORED_BY_WORKERS:
        signal.signal(signum, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
