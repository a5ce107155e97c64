"""The supervisor's one thread: it reaps, manages, reloads, scales and stops the flock, and answers commands.

Beside the way of a message: connections and messages go to the workers; here is decided which workers there are. One
``poll`` waits for signals, workers, commands and the next deadline; everything else is a verb that returns at once.
"""

from __future__ import annotations

import logging
import os
import selectors
import time
from typing import TYPE_CHECKING

from supervisor import status
from supervisor.banner import notice
from supervisor.control import Answer, ControlServer, Pending, Refused, Request
from supervisor.flock import Flock
from supervisor.reload import Reload
from supervisor.reloader import SourceWatcher
from supervisor.restart import (
    EXIT_CANNOT_START,
    EXIT_INTERRUPTED,
    EXIT_OK,
    EXIT_QUIT,
    Clockwork,
    StartVerdict,
    describe_end,
)
from supervisor.scaling import Scaling
from supervisor.seat import Seat, counted
from supervisor.signals import SignalQueue
from supervisor.worker_process import Phase, WorkerProcess

if TYPE_CHECKING:
    from supervisor.bridge import BridgeKeeper

logger = logging.getLogger("supervisor")

TICK = 0.25
"""Seconds between two looks at the heartbeats."""
ASLEEP = 1.0
"""Seconds without a turn of the loop after which the supervisor itself must have stood still."""
QUIT_GRACE = 1.0
"""Seconds that workers have to end when the hub gives up."""
REAP_TIMEOUT = 5.0
"""Seconds to wait for killed workers to be gone."""


class Arbiter:
    """Runs the flock until a signal, a command or a failed start ends it."""

    def __init__(
        self,
        flock: Flock,
        selector: selectors.BaseSelector,
        signals: SignalQueue,
        *,
        address: str,
        watcher: SourceWatcher | None = None,
        bridge: BridgeKeeper | None = None,
    ) -> None:
        now = time.monotonic()
        self.flock = flock
        self.control: ControlServer | None = None
        self.started = now
        self.failure = ""
        """The words that belong last on stderr, when the hub could not start."""
        self.address = address
        self.bridge = bridge
        self._selector = selector
        self._signals = signals
        self._clock = Clockwork(now, ASLEEP)
        self._verdict = StartVerdict()
        self._reload = Reload(flock)
        self._scaling = Scaling(flock, self.spawn)
        self._stopping = False
        self._interrupts = 0
        self._exit_code = EXIT_OK
        self._reported = "starting"
        flock.on_ready = self.promote
        flock.on_departure = self.replace_departed
        self._watcher = watcher
        selector.register(signals, selectors.EVENT_READ, lambda now: None)
        if watcher is not None:
            selector.register(watcher.channel, selectors.EVENT_READ, lambda now: self.listen_to_watcher())

    # The loop

    def run(self) -> int:
        """Spawn a worker for every seat, and stay until the last process is gone.

        Returns:
            The exit code of the hub.
        """
        for seat in self.flock.wanted_seats():
            seat.spawn_at = time.monotonic()
        while self.flock.processes or not self._stopping:
            self.turn()
        return self._exit_code

    def turn(self) -> None:
        """Wait for something to happen, and do what follows from it."""
        deadline = min(self.flock.next_deadline(), time.monotonic() + TICK)
        for key, _ in self._selector.select(max(0.0, deadline - time.monotonic())):
            key.data(time.monotonic())
        now = time.monotonic()
        self._clock.tick(now)
        self.handle_signals(now)
        self.reap(now)
        self.manage(now)

    @property
    def state(self) -> str:
        """starting, ready, degraded, reloading or stopping."""
        if self._stopping:
            return "stopping"
        if not self._verdict.booted:
            return "starting"
        if self._reload.rounds.active:
            return "reloading"
        missing = (self.bridge is not None and self.bridge.is_missed) or any(
            not seat.serves and (seat.was_ready or seat.backoff.failures)
            for seat in self.flock.wanted_seats()
        )
        return "degraded" if missing else "ready"

    # Signals

    def handle_signals(self, now: float) -> None:
        """Act on what arrived, in order."""
        for signum in self._signals.take():
            getattr(self, f"handle_{signum.name.removeprefix('SIG').lower()}")(now)

    def handle_term(self, now: float) -> None:
        """Drain and end; again while draining: no more than that."""
        self.stop(now)

    def handle_int(self, now: float) -> None:
        """Drain and end; the second time: end at once."""
        self._interrupts += 1
        if self._interrupts > 1:
            self.halt(EXIT_INTERRUPTED)
        else:
            self.stop(now)

    def handle_quit(self, now: float) -> None:
        """End at once."""
        self.halt(EXIT_QUIT)

    def handle_hup(self, now: float) -> None:
        """Replace all workers, one after the other."""
        if not self._stopping:
            self._reload.rounds.request()

    def handle_ttin(self, now: float) -> None:
        """One worker more."""
        self.scale_by_signal(+1, now)

    def handle_ttou(self, now: float) -> None:
        """One worker less."""
        self.scale_by_signal(-1, now)

    def handle_chld(self, now: float) -> None:
        """Nothing: children are reaped at every turn."""

    def listen_to_watcher(self) -> None:
        """Source files have changed, or nobody watches them any more."""
        assert self._watcher is not None
        changed = self._watcher.changed()
        if changed is None:
            self._selector.unregister(self._watcher.channel)
            logger.error("the source files are no longer watched; SIGHUP still reloads")
        elif changed and not self._stopping:
            self._reload.rounds.request()

    def scale_by_signal(self, change: int, now: float) -> None:
        """TTIN and TTOU; what can not be done is logged."""
        if self._stopping:
            return
        try:
            self._scaling.scale(len(self.flock.wanted_seats()) + change, now)
        except Refused as error:
            logger.warning("%s", error)

    # Commands

    def handle_request(self, request: Request) -> Answer | Pending:
        """Answer a command, or return what will have the answer.

        Raises:
            Refused: it can not be done.
        """
        now = time.monotonic()
        if request.command == "status":
            return status.describe(self, now)
        if request.command == "stop":
            self.stop(now)
            return lambda: None  # the answer is that the hub hangs up
        if self._stopping:
            raise Refused("the hub stops")
        if request.command == "reload":
            return self._awaited_reload(self._reload.rounds.request())
        self._scaling.scale(request.workers, now)
        return lambda: self._scaled(request.workers)

    def _awaited_reload(self, number: int) -> Pending:
        def outcome() -> Answer | None:
            failure = self._reload.rounds.outcome(number)
            if failure is None and self._stopping:
                failure = "the hub stops"
            if failure:
                raise Refused(failure)
            return None if failure is None else {"ok": True, "workers": len(self.flock.wanted_seats())}

        return outcome

    def _scaled(self, workers: int) -> Answer | None:
        if self._stopping:
            raise Refused("the hub stops")
        if len(self.flock.wanted_seats()) != workers:
            raise Refused("another command or signal has changed the number of workers meanwhile")
        failing = [seat for seat in self.flock.wanted_seats() if seat.backoff.failures and not seat.was_ready]
        if failing:
            raise Refused(f"worker {failing[0].index} can not start; see the log of the hub")
        done = all(seat.serves and not seat.retiring for seat in self.flock.seats.values())
        return {"ok": True, "workers": workers} if done else None

    # Spawning and ending

    def spawn(self, seat: Seat, now: float) -> None:
        """Start a worker on a seat that has none."""
        seat.spawn_at = None
        try:
            seat.worker = self.flock.spawn(seat, now)
        except OSError as error:
            logger.error("worker %d can not be started: %s", seat.index, error)
            self.reschedule(seat, None, now)
            if self._verdict.start_failed(None):
                self.give_up(f"worker {seat.index} can not be started: {error}", now)

    def reschedule(self, seat: Seat, ready_for: float | None, now: float) -> None:
        """Set the next start of a seat whose worker ended, or left, on its own."""
        delay = seat.backoff.ended(ready_for)
        seat.restarts += 1
        seat.spawn_at = now + delay
        if delay:
            logger.warning("worker %d is started again in %g s", seat.index, delay)

    def promote(self, process: WorkerProcess, now: float) -> None:
        """A worker is ready: it serves its seat, and whom it succeeds may go."""
        if self.bridge is not None and self.bridge.owns(process):
            self.bridge.promote()
            return
        seat = self.flock.seats[process.index]
        seat.was_ready = True
        logger.debug("%s is ready", process)
        self._reload.promote(seat, process, now)
        self.flock.steer()

    def replace_departed(self, process: WorkerProcess, now: float) -> None:
        """A worker drains because somebody sent it SIGTERM: its seat must not wait for its end."""
        if process.index not in self.flock.seats:
            return  # the bridge, whose successor takes over when it is gone
        seat = self.flock.seats[process.index]
        logger.warning("%s drains without having been told to", process)
        if seat.worker is process:
            seat.vacate(process)
            if seat.successor is None and not seat.retiring and not self._stopping:
                self.reschedule(seat, process.ready_for(now), now)

    def reap(self, now: float) -> None:
        """Collect ended children; unknown ones (this may be process 1 of a container) are only collected."""
        while True:
            try:
                pid, wait_status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            process = self.flock.processes.get(pid)
            if process is not None:
                self.flock.forget(process, now)
                self.bury(process, wait_status, now)
            elif self._watcher is None or pid != self._watcher.pid:
                logger.debug("reaped pid %d, which is none of ours", pid)

    def bury(self, process: WorkerProcess, wait_status: int, now: float) -> None:
        """A worker is gone: say so, and see to its seat."""
        seat = self.flock.seats.get(process.index)
        end = describe_end(wait_status, ordered=process.killed)
        words = f"{process} {end}{': ' if process.failed else ''}{process.failed}"
        if process.phase is Phase.DRAINING and wait_status == 0:
            words = f"{process} has drained"
        if process.phase is Phase.DRAINING or self._stopping:
            logger.info("%s", words)
        else:
            logger.error("%s", words)
        if self.bridge is not None and self.bridge.owns(process) and not self._stopping:
            self.bridge.ended(process, now)
        if self._stopping or seat is None or process not in (seat.worker, seat.successor):
            return
        was_successor = seat.successor is process
        seat.vacate(process)
        exit_code = os.waitstatus_to_exitcode(wait_status)
        if process.ready_at is None and self._verdict.start_failed(exit_code):
            self.give_up(process.failed or words, now)
            return
        if was_successor:
            self._reload.abandon(f"the successor of worker {seat.index} is not ready: {words}")
        if seat.worker is None and seat.successor is None and not seat.retiring:
            self.reschedule(seat, process.ready_for(now), now)

    # Managing

    def manage(self, now: float) -> None:
        """Everything that the passing of time or the last events make due."""
        self.flock.watch(now, self._clock)
        if not self._stopping:
            self.judge_start()
            self._scaling.advance(now)
            if self._verdict.booted:
                self._reload.advance(now)
            self.spawn_due(now)
            if self.bridge is not None:
                self.bridge.spawn_due(now)
        elif self.bridge is not None:
            self.bridge.stop_last(now)
        if not self._stopping:
            self.flock.steer()
        if self.control is not None:
            self.control.advance(now)
        self.report()

    def judge_start(self) -> None:
        """See whether every seat has had a ready worker."""
        if not self._verdict.booted and all(seat.was_ready for seat in self.flock.wanted_seats()):
            self._verdict.all_ready()

    def spawn_due(self, now: float) -> None:
        """Start the workers whose back-off is over."""
        for seat in self.flock.wanted_seats():
            if seat.spawn_at is not None and now >= seat.spawn_at and not self._stopping:
                self.spawn(seat, now)

    def report(self) -> None:
        """Log a change of the state."""
        state = self.state
        if state == self._reported:
            return
        seats = self.flock.wanted_seats()
        serving = sum(seat.serves for seat in seats)
        if state == "degraded":
            bridge = ", no bridge" if self.bridge is not None and not self.bridge.serves else ""
            logger.warning("degraded: %d of %s serve%s", serving, counted(len(seats)), bridge)
        elif state == "ready":
            again = "" if self._reported == "starting" else " again"
            notice.info("ready%s: %s on %s", again, counted(len(seats)), self.address)
        self._reported = state

    # Stopping

    def stop(self, now: float) -> None:
        """Drain all workers and end with exit code 0; nothing happens when called again."""
        if self._stopping:
            return
        logger.info("stopping: workers drain within %g s", self.flock.settings.drain_timeout)
        self._end_service()
        for process in list(self.flock.processes.values()):
            if self.bridge is None or not self.bridge.owns(process):
                self.flock.drain(process, "stop", now)

    def give_up(self, reason: str, now: float) -> None:
        """The hub can not start: end it with exit code 3 and this reason."""
        self._end_service()
        self._exit_code = EXIT_CANNOT_START
        self.failure = reason
        for process in self.flock.processes.values():
            process.tell("quit")
            process.kill_by(now + QUIT_GRACE, "has not quit")

    def halt(self, exit_code: int) -> None:
        """Kill everything and end with this exit code."""
        self._end_service()
        self._exit_code = exit_code
        self.flock.kill_all()
        deadline = time.monotonic() + REAP_TIMEOUT
        while self.flock.processes and time.monotonic() < deadline:
            self._selector.select(TICK)
            self._signals.take()
            self.reap(time.monotonic())
        self.flock.processes.clear()

    def _end_service(self) -> None:
        self._stopping = True
        self._reload.rounds.cancel()
        for seat in self.flock.seats.values():
            seat.spawn_at = None
        self.flock.group.close()
