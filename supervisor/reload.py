"""A reload: every worker gets a successor on its own socket, one after the other.

Beside the way of a message: connections wait in the socket's queue or are served by either of the two, so none is
refused or reset.
"""

from __future__ import annotations

import logging

from supervisor.flock import Flock
from supervisor.rolling import Rolling
from supervisor.seat import Seat, counted
from supervisor.worker_process import Phase, WorkerProcess

logger = logging.getLogger("supervisor")

MAX_DRAINING = 16
"""Predecessors that may drain at once: the board has 32 slots more than there are workers."""


class Reload:
    """Drives the rounds of :class:`supervisor.rolling.Rolling` through the flock."""

    def __init__(self, flock: Flock) -> None:
        self._flock = flock
        self.rounds = Rolling()

    def advance(self, now: float) -> None:
        """Begin a round that was asked for, or go on with the present one: one successor at a time."""
        if self.rounds.wanted:
            seats = self._flock.wanted_seats()
            logger.info("reload: %s to be replaced, one after the other", counted(len(seats)))
            self.rounds.begin(seat.index for seat in seats)
        if not self.rounds.active or any(seat.successor for seat in self._flock.seats.values()):
            return
        draining = sum(process.phase is Phase.DRAINING for process in self._flock.processes.values())
        if draining < MAX_DRAINING:
            self._replace_next(now)

    def _replace_next(self, now: float) -> None:
        while (index := self.rounds.next()) is not None:
            seat = self._flock.seats.get(index)
            if seat is not None and not seat.retiring:
                self._start_successor(seat, now)
                return
        self.rounds.finish()
        logger.info("reload: done, %s new", counted(len(self._flock.wanted_seats())))

    def _start_successor(self, seat: Seat, now: float) -> None:
        """Fork a worker on the socket of a running one; a seat that is backing off tries at once."""
        try:
            seat.successor = self._flock.spawn(seat, now)
        except OSError as error:
            self.abandon(f"no successor for worker {seat.index}: {error}")
            return
        seat.spawn_at = None
        seat.backoff.reset()

    def promote(self, seat: Seat, process: WorkerProcess, now: float) -> None:
        """A worker is ready; if it is a successor, its predecessor may go."""
        if seat.successor is process:
            predecessor, seat.worker, seat.successor = seat.worker, process, None
            if predecessor is not None:
                self._flock.drain(predecessor, "replaced", now)

    def abandon(self, reason: str) -> None:
        """A successor failed: who runs, goes on."""
        logger.error("reload stopped, the running workers stay: %s", reason)
        self.rounds.finish(reason)
