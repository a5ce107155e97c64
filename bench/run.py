"""Run scenarios on servers, interleaved: each round gives every server its turn before the next round begins."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from bench.results import Results, Run
from bench.scenarios import SCENARIOS, Scenario, Timing
from bench.servers import SERVERS, Fleet, Running

SLOW = frozenset({"socketio", "uvicorn", "redis", "original"})
"""Peers so far from the targets that one round tells enough, unless all rounds are asked for."""
ECHO_ONLY = frozenset({"connection", "connection-receive", "starlette"})
PLACED = frozenset({"CN", "CF"})
"""Scenarios about two workers."""
NOT_IN = {
    "A": frozenset({"c-each"}),
    "A1": frozenset({"c-joined"}),
    "A16": frozenset({"flockwire-2", "c-each", "redis", "original"}),
    "B100": frozenset({"flockwire-2", "c-each", "redis", "original"}),
    "C": frozenset({"original"}),
    "E": frozenset({"flockwire-2", "c-joined"}),
    "D": frozenset({"flockwire-2", "c-each", "redis", "original", "socketio"}),
}
"""What the default table leaves out for the sake of its five minutes (and the original in C, where it stalls)."""


@dataclass(frozen=True)
class Turn:
    """One scenario on one server in one round."""

    round: int
    scenario: Scenario
    server: str


def plan(scenarios: Iterable[str], servers: Iterable[str], rounds: int, *, everything: bool) -> list[Turn]:
    """All turns in order. ``everything``: also what the default table leaves out."""
    chosen = list(servers)
    return [
        Turn(number, SCENARIOS[scenario], server)
        for number in range(1, rounds + 1)
        for scenario in scenarios
        for server in chosen
        if wanted(scenario, server, number, everything=everything)
    ]


def wanted(scenario: str, server: str, number: int, *, everything: bool) -> bool:
    """Whether this server has a turn at this scenario in this round."""
    if server in ECHO_ONLY or (scenario == "E" and SERVERS[server].dialect.echo is None):
        return scenario == "E" and SERVERS[server].dialect.echo is not None
    if scenario in PLACED:
        return server == "flockwire-2"
    if everything:
        return True
    return server not in NOT_IN.get(scenario, ()) and (number == 1 or server not in SLOW or scenario == "D")


def take(turn: Turn, fleet: Fleet, timing: Timing) -> Run | None:
    """One turn; None when the server is missing here. A run in which no message counted is repeated once."""
    for attempt in (1, 2):
        server = fleet.get(turn.server, fresh=turn.scenario.fresh)
        if server is None:
            return None
        run = turn.scenario.once(server, timing.longer(3) if turn.server in SLOW else timing, turn.round)
        if turn.scenario.fresh:
            fleet.stop(turn.server)
        fleet.done_with(turn.server)
        if run.metrics or attempt == 2:
            return run
        fleet.stop(turn.server)
    return None


def run_all(turns: Sequence[Turn], timing: Timing, results: Results, seconds: float | None = None) -> None:
    """Take all turns, showing which, and keep what they found in ``results``.

    The first round is always taken whole; ``seconds`` after the beginning the later ones end, on a busy machine.
    """
    began = time.monotonic()
    with Fleet() as fleet:
        for number, turn in enumerate(turns, 1):
            gone = time.monotonic() - began
            if seconds is not None and gone > seconds and turn.round > 1:
                progress(f"time is up in round {turn.round}: the medians are of what there is")
                break
            known = set(fleet.missing)
            run = take(turn, fleet, timing)
            for name in fleet.missing.keys() - known:
                progress(f"{name} is skipped: {fleet.missing[name]}")
            if run is None:
                continue
            results.add(run)
            left = (time.monotonic() - began) / number * (len(turns) - number)
            progress(f"[{number}/{len(turns)}, {left:3.0f} s left] {words(run)}")
        results.missing = dict(fleet.missing)


def words(run: Run) -> str:
    """One line about a run."""
    scenario = SCENARIOS[run.scenario]
    value = run.metrics.get(scenario.metric)
    shown = "no figure" if value is None else f"{value:,.2f} {scenario.unit}"
    return f"{run.scenario:5} {run.server:12} {shown}{f'  ({run.wrong})' if run.wrong else ''}"


def progress(line: str) -> None:
    """Progress goes to standard error: the tables stay clean."""
    print(line, file=sys.stderr, flush=True)


def start(name: str) -> Running:
    """One server outside a fleet, for the scenarios that need only ours.

    Raises:
        Missing: it is not installed.
        DidNotStart: it ended or did not answer.
    """
    return Running(SERVERS[name])
