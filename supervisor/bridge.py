"""Keeps one bridge process running, as the seats keep workers: started, judged by its heartbeat, started again.

Beside the way of a message. Only in a hub with ``--redis-url``; what the bridge does stands in
:mod:`ipc.redis_bridge`, which only the forked child loads.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
from typing import Any

from ipc.bridge_state import host_id
from ipc.federation import LinkState
from supervisor.flock import Flock
from supervisor.restart import Backoff
from supervisor.worker_process import Phase, WorkerProcess

logger = logging.getLogger("supervisor")

NO_LISTENER = -1


class BridgeProcess(WorkerProcess):
    """The bridge as the supervisor sees it."""

    def __str__(self) -> str:
        return f"bridge (pid {self.pid})"


class BridgeKeeper:
    """The one place for a bridge, and when to fill it.

    Attributes:
        process: the bridge that runs or boots.
        spawn_at: when the next start is due, as monotonic time.
        restarts: how often a bridge ended without being told to.
    """

    def __init__(self, flock: Flock) -> None:
        self.process: WorkerProcess | None = None
        self.spawn_at: float | None = 0.0
        self.restarts = 0
        self._flock = flock
        self._backoff = Backoff()
        self._was_ready = False
        self._directory = flock.settings.rules.data_dir or flock.runtime.path
        os.makedirs(self._directory, mode=0o700, exist_ok=True)
        self._host_id = host_id(self._directory)
        self._start = secrets.token_hex(4)

    @property
    def serves(self) -> bool:
        """Whether it is on the bus; Redis may be away all the same."""
        return self.process is not None and self.process.phase is Phase.READY and not self.process.stale

    @property
    def is_missed(self) -> bool:
        """Whether there was or should have been one, and is none."""
        return not self.serves and (self._was_ready or self._backoff.failures > 0)

    def owns(self, process: WorkerProcess) -> bool:
        """Whether this process is a bridge of ours."""
        return isinstance(process, BridgeProcess)

    def spawn_due(self, now: float) -> None:
        """Start the bridge when it is time."""
        if self.spawn_at is None or now < self.spawn_at:
            return
        self.spawn_at = None
        try:
            self.process = self._flock.start(self._live, (), _make_process, now)
        except OSError as error:
            logger.error("the bridge can not be started: %s", error)
            self._reschedule(None, now)

    def _live(self, control: socket.socket, supervisor_pid: int) -> int:
        """A bridge's life, in the child."""
        from ipc.redis_bridge import BridgeOptions, run

        self._flock.configure_logging("bridge")
        settings, runtime = self._flock.settings, self._flock.runtime
        options = BridgeOptions(
            url=settings.redis_url or "",
            prefix=settings.redis_prefix,
            host_id=self._host_id,
            start=self._start,
            directory=self._directory,
            bus_backlog=settings.bus_backlog,
            rules=settings.rules,
        )
        return run(options, control=control, runtime_dir=runtime.path, supervisor_pid=supervisor_pid)

    def promote(self) -> None:
        """It is on the bus."""
        self._was_ready = True

    def ended(self, process: WorkerProcess, now: float) -> None:
        """A bridge was reaped that nobody had told to end."""
        if process is self.process:
            self.process = None
            self._reschedule(process.ready_for(now), now)

    def _reschedule(self, ready_for: float | None, now: float) -> None:
        delay = self._backoff.ended(ready_for)
        self.restarts += 1
        self.spawn_at = now + delay
        if delay:
            logger.warning("the bridge is started again in %g s", delay)

    def stop_last(self, now: float) -> None:
        """The hub stops: the bridge goes when the workers have gone, whose last messages it still takes out."""
        self.spawn_at = None
        process = self.process
        others = any(other is not process for other in self._flock.processes.values())
        if process is not None and not others and process.phase is not Phase.DRAINING:
            self._flock.drain(process, "stop", now)

    def describe(self, now: float) -> dict[str, Any]:
        """What ``status`` says of it."""
        process = self.process
        record = None
        if process is not None and process.slot is not None:
            record = self._flock.runtime.board.record(process.slot)
            record = record if record.epoch == process.epoch else None
        state = "backoff" if process is None else process.phase.name.lower()
        return {
            "pid": None if process is None else process.pid,
            "state": "stale" if process is not None and process.stale else state,
            "link": "away" if record is None else LinkState.of(record.condition).words,
            "restarts": self.restarts,
            "host_id": self._host_id,
            "uptime": 0.0 if process is None else round(now - process.started, 3),
        }


def _make_process(pid: int, channel: socket.socket, now: float) -> WorkerProcess:
    return BridgeProcess(pid, NO_LISTENER, channel, now)
