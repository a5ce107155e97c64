"""Rooms of two with both members on one worker, or on two: what a second worker costs, and what crossing adds to it.

As scenario C, but the connections are given their roles when it is known on which worker each has landed.
"""

from __future__ import annotations

from collections.abc import Callable

from bench import proc
from bench.generator import LoadFailed, Placement
from bench.servers import Running

ROOMS = 500
CONNECTIONS = 2 * ROOMS + 100
"""Some are left over, since the kernel does not spread them evenly."""


Pairs = Callable[[list[int], list[int]], list[tuple[int, int]]]
"""Given the connections on the first and on the second worker, the members of each room."""


def together(first: list[int], second: list[int]) -> list[tuple[int, int]]:
    """Pairs within each worker. Pure."""
    return [pair for side in (first, second) for pair in zip(side[::2], side[1::2], strict=False)]


def apart(first: list[int], second: list[int]) -> list[tuple[int, int]]:
    """Pairs of one from each worker. Pure."""
    return list(zip(first, second, strict=False))


def placement(server: Running, pairs: Pairs) -> Placement:
    """Roles for so many connections, each pair a room."""

    def roles(ports: list[int]) -> list[str]:
        owners = proc.place(server.port, ports, server.pids())
        workers = sorted({owner for owner in owners if owner is not None})
        if len(workers) != 2:
            raise LoadFailed(f"the connections came to {len(workers)} workers, not to two")
        first, second = ([at for at, owner in enumerate(owners) if owner == worker] for worker in workers)
        chosen = ["-"] * len(ports)
        for room, pair in enumerate(pairs(first, second)[:ROOMS]):
            for member in pair:
                chosen[member] = f"b{room}"
        return chosen

    return roles
