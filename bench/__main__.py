"""The command line: `python -m bench`, what `make bench` runs. Tables go to standard output, progress to the other."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

from bench import crossworker, federation, growth, plot, publish
from bench.build import NoCompiler, build
from bench.generator import LoadFailed
from bench.places import RESULTS, ROOT
from bench.report import details, faults, generator_line, peers_table, targets_table
from bench.results import Results, begin
from bench.run import plan, progress, run_all, start
from bench.scenarios import GROUPS, SCENARIOS, Timing
from bench.servers import OURS, SERVERS, DidNotStart, Missing, Running

TABLE = ("A", "A1", "A16", "B100", "C", "E", "D")
SERVERS_OF_TABLE = tuple(name for name in SERVERS if name not in ("flockwire-4", "connection-receive"))
SECONDS_OF_EXTRAS = 50
"""What crossworker, publish and index take of the minutes of the default table."""
EXTRA = ("crossworker", "publish", "index", "growth", "federation")


def options(arguments: list[str] | None = None) -> argparse.Namespace:
    """What is asked for."""
    names = (*GROUPS, *SCENARIOS, *EXTRA)
    parser = argparse.ArgumentParser(
        prog="python -m bench", description="Measure flockwire beside its peers."
    )
    parser.add_argument(
        "--scenario",
        action="append",
        choices=names,
        metavar="NAME",
        help=f"only this one (repeatable): {', '.join(names)}; default: the table, crossworker, publish and index",
    )
    parser.add_argument(
        "--peer",
        action="append",
        choices=tuple(SERVERS),
        metavar="NAME",
        help=f"only these servers beside ours (repeatable): {', '.join(SERVERS)}",
    )
    parser.add_argument(
        "--only", action="store_true", help="with --peer: not even ours, only the servers named"
    )
    parser.add_argument("--rounds", type=int, default=3, help="rounds, each with every server (3)")
    parser.add_argument("--window", type=float, default=0.8, help="seconds measured in each run (0.8)")
    parser.add_argument("--idle", type=int, default=5000, help="connections of scenario D (5000)")
    parser.add_argument(
        "--full", action="store_true", help="every server in every scenario and round, also the slow"
    )
    parser.add_argument("--quick", action="store_true", help="one short round: does everything run?")
    parser.add_argument(
        "--minutes", type=float, default=5, help="the default table ends its rounds in time for it (5)"
    )
    parser.add_argument("--output", type=Path, default=RESULTS, help="directory of the result files")
    parser.add_argument("--plot", type=Path, help="draw the picture beside the peers to this PNG")
    parser.add_argument("--growth-plot", type=Path, help="draw growth with workers to this PNG")
    return parser.parse_args(arguments)


def chosen_scenarios(names: list[str] | None) -> tuple[list[str], list[str]]:
    """Scenarios of the table, and those that have a module of their own."""
    if not names:
        return list(TABLE), ["crossworker", "publish", "index"]
    wide = [scenario for name in names for scenario in GROUPS.get(name, (name,))]
    return [name for name in wide if name in SCENARIOS], [name for name in wide if name in EXTRA]


def chosen_servers(asked: argparse.Namespace) -> list[str]:
    """Ours and the peers, in the order of the table."""
    if not asked.peer:
        return list(SERVERS_OF_TABLE)
    ours = set() if asked.only else {"flockwire", "flockwire-2", "connection", "starlette"}
    return [name for name in SERVERS if name in ours or name in asked.peer]


def with_server(name: str, results: Results, work: Callable[[Running], None]) -> None:
    """Do something with one of our servers; that it is missing is said, not raised."""
    try:
        server = start(name)
    except (Missing, DidNotStart) as error:
        results.missing = {**results.missing, name: str(error)}
        progress(f"{name} is skipped: {error}")
        return
    try:
        work(server)
    except LoadFailed as error:
        progress(f"{name}: {error}")
    finally:
        server.stop()


def run_extra(names: list[str], results: Results, timing: Timing, rounds: int) -> None:
    """The scenarios beyond the table; only ours have them."""

    def crossing(server: Running) -> None:
        for turn in range(1, rounds + 1):
            progress(f"crossworker, round {turn}/{rounds}")
            results.add(crossworker.once(server, timing, turn))

    def publishing(server: Running) -> None:
        for turn in range(1, rounds + 1):
            progress(f"publish, round {turn}/{rounds}")
            for run in publish.once(server, turn):
                results.add(run)

    if "crossworker" in names:
        with_server("flockwire-2", results, crossing)
    if "publish" in names:
        with_server("flockwire", results, publishing)
    if "index" in names:
        from bench import index  # it imports our own index, the others do without our packages

        progress("index")
        for run in index.once(1):
            results.add(run)
    if "federation" in names:
        try:
            for turn in range(1, rounds + 1):
                progress(f"federation, round {turn}/{rounds}")
                for run in federation.once(turn):
                    results.add(run)
        except federation.Missing as error:
            progress(f"federation is skipped: {error}")
    if "growth" in names:
        growth.run(results, timing, rounds)


def show(results: Results) -> None:
    """All tables that have something to say."""
    sections = [
        peers_table(results) if any(r.scenario in SCENARIOS for r in results.runs) else "",
        targets_table(results),
    ]
    sections += [crossworker.report(results), publish.report(results), growth.report(results)]
    sections.append(federation.report(results))
    if any(run.scenario.startswith("index-") for run in results.runs):
        from bench import index

        sections.append(index.report(results))
    sections.append(details(results))
    print("\n\n".join(section for section in sections if section))
    for line in (
        *(f"skipped: {name}: {why}" for name, why in results.missing.items()),
        generator_line(results),
    ):
        print(line)
    wrong = faults(results)
    print(
        "every message arrived once and in order in every run"
        if not wrong
        else "\n".join(["FAULTS:", *wrong])
    )


def pictures(asked: argparse.Namespace, results: Results) -> None:
    """The plots, if asked for and matplotlib is there."""
    try:
        if asked.plot:
            plot.plot_peers(results, asked.plot)
        if asked.growth_plot:
            plot.plot_growth(results, asked.growth_plot)
    except plot.NoMatplotlib as error:
        progress(str(error))


def main() -> int:
    """Measure, store, show. 1: one of ours did not start. 2: there is no compiler for the load generator."""
    asked = options()
    try:
        build("load")
    except NoCompiler as error:
        print(error, file=sys.stderr)
        return 2
    timing = (
        Timing(window=0.3, warmup=0.1, idle_connections=500)
        if asked.quick
        else Timing(asked.window, 0.2, asked.idle)
    )
    rounds = 1 if asked.quick else asked.rounds
    scenarios, extra = chosen_scenarios(asked.scenario)
    results, began = begin(), time.monotonic()
    everything = asked.full or bool(asked.scenario)
    seconds = None if everything else asked.minutes * 60 - SECONDS_OF_EXTRAS
    try:
        run_all(
            plan(scenarios, chosen_servers(asked), rounds, everything=everything), timing, results, seconds
        )
        run_extra(extra, results, timing, rounds)
    except KeyboardInterrupt:
        progress("interrupted: what was measured so far follows")
    results.seconds = time.monotonic() - began
    path = results.save(asked.output)
    show(results)
    pictures(asked, results)
    print(
        f"stored in {path.relative_to(ROOT) if path.is_relative_to(ROOT) else path}; {results.seconds:.0f} s"
    )
    return 1 if any(name in OURS for name in results.missing) else 0


if __name__ == "__main__":
    raise SystemExit(main())
