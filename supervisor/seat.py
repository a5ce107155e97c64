"""A seat: one listener index and who serves it. Beside the way of a message; the arbiter moves workers through it."""

from __future__ import annotations

from dataclasses import dataclass, field

from supervisor.listeners import Listener
from supervisor.restart import Backoff
from supervisor.worker_process import Phase, WorkerProcess


def counted(workers: int) -> str:
    """``1 worker``, ``2 workers``."""
    return f"{workers} worker{'' if workers == 1 else 's'}"


@dataclass
class Seat:
    """One listener index.

    Attributes:
        listener: its socket.
        worker: who serves it or boots to do so; None between a death and the next start.
        successor: who boots to take over from ``worker`` during a reload.
        backoff: how soon a failed worker is started again.
        spawn_at: when the next start is due, as monotonic time.
        was_ready: whether a worker of this seat has ever been ready.
        retired_at: since when it is being given up (``scale``); None while it is wanted.
        restarts: how often a worker ended here without being told to.
    """

    listener: Listener
    worker: WorkerProcess | None = None
    successor: WorkerProcess | None = None
    backoff: Backoff = field(default_factory=Backoff)
    spawn_at: float | None = None
    was_ready: bool = False
    retired_at: float | None = None
    restarts: int = 0

    @property
    def index(self) -> int:
        """The listener index."""
        return self.listener.index

    @property
    def retiring(self) -> bool:
        """Whether it is being given up."""
        return self.retired_at is not None

    @property
    def serves(self) -> bool:
        """Whether its connections are accepted now."""
        worker = self.worker
        return worker is not None and worker.phase is Phase.READY and not worker.stale

    def vacate(self, process: WorkerProcess) -> None:
        """``process`` is no longer the one that serves or will serve."""
        if self.worker is process:
            self.worker = None
        if self.successor is process:
            self.successor = None
