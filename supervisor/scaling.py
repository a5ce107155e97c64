"""More and fewer workers while the hub runs: seats that are added, and seats that are given up.

Beside the way of a message: a seat that is given up gets no new connections, its worker accepts what is queued and
drains, and only then is its socket closed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from supervisor.control import Refused
from supervisor.flock import Flock
from supervisor.listeners import AddressError
from supervisor.seat import Seat, counted
from workers.options import MAX_WORKERS

logger = logging.getLogger("supervisor")

SETTLE = 0.5
"""Seconds after steering away in which handshakes under way still arrive at a listener that is given up."""
SETTLE_LIMIT = 5.0
"""Seconds after which a worker that is given up drains whatever still waits in its queue."""


class Scaling:
    """Changes the number of seats.

    Args:
        flock: the seats and processes.
        spawn: starts a worker on a seat that has none.
    """

    def __init__(self, flock: Flock, spawn: Callable[[Seat, float], None]) -> None:
        self._flock = flock
        self._spawn = spawn

    def scale(self, workers: int, now: float) -> None:
        """Have so many workers from now on.

        Raises:
            Refused: the number is out of range, or no socket can be bound.
        """
        if not 1 <= workers <= MAX_WORKERS:
            raise Refused(f"workers = {workers}: must be an integer from 1 to {MAX_WORKERS}")
        seats = self._flock.wanted_seats()
        logger.info("scale: from %d to %s", len(seats), counted(workers))
        for _ in range(workers - len(seats)):
            self._grow(now)
        for seat in seats[workers:]:
            self._retire(seat, now)

    def _grow(self, now: float) -> None:
        """One worker more: on a seat that is just being given up, or on a new one."""
        retiring = sorted(
            (seat for seat in self._flock.seats.values() if seat.retiring), key=lambda seat: seat.index
        )
        try:
            seat = retiring[0] if retiring else self._flock.grow()
        except (AddressError, OSError) as error:
            raise Refused(f"no further listening socket: {error}") from error
        seat.retired_at = None
        if seat.worker is None:
            seat.backoff.reset()
            self._spawn(seat, now)

    def _retire(self, seat: Seat, now: float) -> None:
        """Give a seat up: no new connections; :meth:`advance` does the rest."""
        seat.retired_at = now
        seat.spawn_at = None
        if seat.successor is not None:
            successor = seat.successor
            seat.vacate(successor)
            self._flock.drain(successor, "replaced", now)
        self._flock.steer()

    def advance(self, now: float) -> None:
        """Let the workers of seats that are given up accept what is queued, then drain; close the socket last."""
        for seat in [seat for seat in self._flock.seats.values() if seat.retiring]:
            if seat.worker is None:
                self._flock.close_seat(seat)
            elif self._may_go(seat, now):
                worker = seat.worker
                seat.vacate(worker)
                self._flock.drain(worker, "replaced", now)

    def _may_go(self, seat: Seat, now: float) -> bool:
        waited = now - (seat.retired_at or now)
        return waited >= SETTLE_LIMIT or (waited >= SETTLE and seat.listener.waiting() == 0)
