"""The flock: all seats and all worker processes, and what can be done to them. Mechanism; the arbiter decides.

Beside the way of a message: here workers are forked, told to drain, watched by their heartbeats and killed, and
here the listeners get their steering.
"""

from __future__ import annotations

import logging
import os
import selectors
import signal
import socket
from collections.abc import Callable, Iterable
from typing import Protocol

from ipc.board import SLOTS, SlotState
from ipc.runtime import RuntimeDir
from supervisor.child import fork
from supervisor.listeners import Listener, ListenerGroup
from supervisor.restart import KILL_AFTER_ABORT, Clockwork, Health, HealthPolicy
from supervisor.seat import Seat
from supervisor.worker_process import Phase, Report, WorkerProcess
from workers import logging_setup
from workers.settings import Settings

logger = logging.getLogger("supervisor")

DRAIN_GRACE = 2.0
"""Seconds more than the drain timeout before a worker is killed: it has a timer of its own."""
APPEND_BOUND = 1.0
"""Seconds that a worker may take to write to the store; it has the lock that all others need."""
BOOTING_GRACE = 1.0
"""Seconds that a worker has to end which never was ready."""


class WorkerMain(Protocol):
    """What a forked worker runs; returns its exit code."""

    def __call__(
        self,
        settings: Settings,
        *,
        listener: socket.socket,
        listener_index: int,
        control: socket.socket,
        runtime_dir: str,
        supervisor_pid: int,
        app: object | None = None,
    ) -> int: ...


class Flock:
    """Seats and processes.

    Attributes:
        seats: by listener index.
        processes: every unreaped worker, by pid; nobody else ever gets a signal.
    """

    def __init__(
        self,
        settings: Settings,
        group: ListenerGroup,
        runtime: RuntimeDir,
        selector: selectors.BaseSelector,
        *,
        worker_main: WorkerMain | None = None,
        app: object | None = None,
    ) -> None:
        self.seats: dict[int, Seat] = {}
        self.processes: dict[int, WorkerProcess] = {}
        self.settings = settings
        self.runtime = runtime
        self.group = group
        self._selector = selector
        self._worker_main = worker_main
        self._app = app
        self._health = HealthPolicy(settings.worker_timeout)
        self.on_ready: Callable[[WorkerProcess, float], None] = lambda process, now: None
        """Called when a worker says that it is ready."""
        self.on_departure: Callable[[WorkerProcess, float], None] = lambda process, now: None
        """Called when a ready worker drains without having been told to."""

    # Seats

    def add_seat(self, listener: Listener) -> Seat:
        """Take a listener in."""
        seat = self.seats[listener.index] = Seat(listener)
        return seat

    def grow(self) -> Seat:
        """A new seat at the lowest free index.

        Raises:
            AddressError: its socket can not be bound.
        """
        index = next(index for index in range(len(self.seats) + 1) if index not in self.seats)
        return self.add_seat(self.group.add(index))

    def close_seat(self, seat: Seat) -> bool:
        """Close the listener of a seat that nobody serves; False while a process may still hold its socket."""
        held = any(process.index == seat.index or not process.forked for process in self.processes.values())
        if not held:
            self.group.remove(seat.index)
            del self.seats[seat.index]
        return not held

    def wanted_seats(self) -> list[Seat]:
        """The seats that are not being given up, by index."""
        return sorted(
            (seat for seat in self.seats.values() if not seat.retiring), key=lambda seat: seat.index
        )

    def steer(self) -> None:
        """Send new connections where they are accepted; nowhere alive: to all that are wanted."""
        live = [seat.index for seat in self.seats.values() if seat.serves and not seat.retiring]
        self.group.steer(live or [seat.index for seat in self.wanted_seats()])

    # Processes

    def spawn(self, seat: Seat, now: float) -> WorkerProcess:
        """Fork a worker for a seat; the caller puts it there.

        Raises:
            OSError: there is no process or descriptor left.
        """
        listener = seat.listener
        return self.start(
            lambda control, supervisor_pid: self._live(listener, control, supervisor_pid),
            (listener.socket.fileno(),),
            lambda pid, channel, now: WorkerProcess(pid, seat.index, channel, now),
            now,
        )

    def start(
        self,
        life: Callable[[socket.socket, int], int],
        keep: Iterable[int],
        make: Callable[[int, socket.socket, float], WorkerProcess],
        now: float,
    ) -> WorkerProcess:
        """Fork a process that reports over a line of its own, and watch over it.

        Args:
            life: all that the child does, given its end of the line and our pid.
            keep: descriptors that it keeps, beside that end.
            make: what we know the process by, of its pid, our end of the line and the time.
            now: monotonic time.

        Raises:
            OSError: there is no process or descriptor left.
        """
        ours, theirs = socket.socketpair()
        try:
            supervisor_pid = os.getpid()
            pid = fork(lambda: self._begin(life, theirs, supervisor_pid), keep=(theirs.fileno(), *keep))
        except OSError:
            ours.close()
            raise
        finally:
            theirs.close()
        ours.setblocking(False)
        process = make(pid, ours, now)
        process.abort_at = now + self.settings.boot_timeout
        self.processes[pid] = process
        self._selector.register(ours, selectors.EVENT_READ, lambda now: self.listen(process, now))
        return process

    def _begin(
        self, life: Callable[[socket.socket, int], int], control: socket.socket, supervisor_pid: int
    ) -> int:
        control.send(b'{"forked":true}\n')
        os.environ["FLOCKWIRE_RUNTIME_DIR"] = self.runtime.path
        return life(control, supervisor_pid)

    def configure_logging(self, process: str) -> None:
        """In a child: log as the settings say, under this name."""
        settings = self.settings
        logging_setup.configure(
            settings.log_level, settings.log_format, process, access_log=settings.access_log
        )

    def _live(self, listener: Listener, control: socket.socket, supervisor_pid: int) -> int:
        """A worker's life, in the child."""
        settings = self.settings
        self.configure_logging(f"worker {listener.index}")
        return (self._worker_main or _default_worker_main())(
            settings,
            listener=listener.socket,
            listener_index=listener.index,
            control=control,
            runtime_dir=self.runtime.path,
            supervisor_pid=supervisor_pid,
            app=self._app,
        )

    def listen(self, process: WorkerProcess, now: float) -> None:
        """Take in what a worker says."""
        reports, hung_up = process.reports()
        for report in reports:
            self._take(process, report, now)
        if hung_up and process.channel in self._selector.get_map():
            self._selector.unregister(process.channel)

    def _take(self, process: WorkerProcess, report: Report, now: float) -> None:
        process.forked |= report.forked
        if report.claimed is not None and 0 <= report.claimed[0] < SLOTS:
            process.slot, process.epoch = report.claimed
        if report.failed:
            process.failed = report.failed
        if report.ready and process.phase is Phase.BOOTING:
            process.become_ready(now)
            self.on_ready(process, now)
        if report.draining and process.phase is Phase.READY:
            self._depart(process, now)

    def _depart(self, process: WorkerProcess, now: float) -> None:
        process.start_draining(now + self.settings.drain_timeout + DRAIN_GRACE)
        self.on_departure(process, now)

    def forget(self, process: WorkerProcess, now: float) -> None:
        """A worker has been reaped: hear its last words and let it go."""
        self.listen(process, now)
        if process.channel in self._selector.get_map():
            self._selector.unregister(process.channel)
        process.channel.close()
        del self.processes[process.pid]

    def drain(self, process: WorkerProcess, how: str, now: float) -> None:
        """Tell a worker to drain, ``stop`` or ``replaced``; one that boots is ended, as nobody is connected to it."""
        booting = process.phase is Phase.BOOTING
        process.tell(f"drain {how}")
        if booting:
            process.start_draining(now + BOOTING_GRACE)
            process.signal(signal.SIGTERM)
        else:
            process.start_draining(now + self.settings.drain_timeout + DRAIN_GRACE)

    def kill_all(self) -> None:
        """SIGKILL to every worker."""
        for process in self.processes.values():
            process.signal(signal.SIGKILL)

    def watch(self, now: float, clock: Clockwork) -> None:
        """Judge heartbeats, and end those whose time is up."""
        for process in list(self.processes.values()):
            if process.kill_at is not None and now >= process.kill_at:
                self._kill(process)
            elif process.abort_at is not None and now >= process.abort_at:
                self._abort(process, f"was not ready within {self.settings.boot_timeout:g} s", now)
            elif process.phase is not Phase.BOOTING:
                self._judge(process, now, clock)

    def _kill(self, process: WorkerProcess) -> None:
        logger.warning("%s %s: SIGKILL", process, process.kill_reason)
        process.kill_at = None
        process.signal(signal.SIGKILL)

    def _abort(self, process: WorkerProcess, reason: str, now: float) -> None:
        logger.error("%s %s: SIGABRT", process, reason)
        process.abort_at = None
        process.signal(signal.SIGABRT)
        process.kill_by(now + KILL_AFTER_ABORT, f"{reason} and ignores SIGABRT")

    def _judge(self, process: WorkerProcess, now: float, clock: Clockwork) -> None:
        if process.slot is None or process.killed:
            return
        record = self.runtime.board.record(process.slot)
        if record.epoch != process.epoch:
            return  # it has given its slot back already
        age = clock.age(max(record.heartbeat / 1e9, process.ready_at or 0.0), now)
        health = self._health.judge(age)
        if health is Health.STALE and not process.stale:
            logger.warning("%s has shown no heartbeat for %.1f s: no new connections for it", process, age)
        process.stale = health is not Health.FRESH
        since = record.append_since
        if since and clock.age(since / 1e9, now) > APPEND_BOUND:
            # Nobody can store anything while it stands still with the store's lock.
            process.kill_by(now, "stands still while it writes to the store")
            self._kill(process)
        elif health is Health.HUNG:
            self._abort(process, f"has shown no heartbeat for {age:.1f} s", now)
        elif process.phase is Phase.READY and record.state is SlotState.DRAINING:
            self._depart(process, now)

    # Time

    def next_deadline(self) -> float:
        """The nearest moment at which something is due, as monotonic time; infinity when nothing is."""
        return min(self._deadlines(), default=float("inf"))

    def _deadlines(self) -> Iterable[float]:
        for process in self.processes.values():
            yield from (at for at in (process.kill_at, process.abort_at) if at is not None)
        for seat in self.seats.values():
            if seat.spawn_at is not None:
                yield seat.spawn_at


def _default_worker_main() -> WorkerMain:
    """The real worker; imported in the child only, as it loads the event loop and ZeroMQ."""
    from workers.worker import run

    return run
