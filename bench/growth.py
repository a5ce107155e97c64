"""How cost grows: with workers, clients, topics and message size. Ours alone; each series is one table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from bench.generator import LoadFailed, healthy, measure
from bench.results import Results, Run
from bench.run import progress
from bench.scenarios import Timing, metrics
from bench.servers import Fleet, Running
from bench.stats import figure, table


@dataclass(frozen=True)
class Point:
    """One point of a series: its place on the axis, the server, and what the generator is told."""

    series: str
    at: int
    server: str
    options: tuple[str, ...]

    def once(self, server: Running, timing: Timing, turn: int) -> Run:
        """Measure it once."""
        arguments = [*server.target(), *server.spec.dialect.hub, *timing.options(), *self.options]
        name = f"{self.series}-{self.at}"
        try:
            event = measure(arguments)
        except LoadFailed as error:
            return Run(scenario=name, server=self.server, round=turn, metrics={}, wrong=f"failed: {error}")
        return Run(
            scenario=name,
            server=self.server,
            round=turn,
            metrics=metrics(event),
            wrong=healthy(event),
            detail=event,
        )


FANOUT = ("--mode", "fanout")
ROOMS = ("--mode", "rooms", "--outstanding", "1")


def points() -> list[Point]:
    """All series."""
    workers = {1: "flockwire", 2: "flockwire-2", 4: "flockwire-4"}
    return [
        *(Point("workers", n, name, FANOUT) for n, name in workers.items()),
        *(
            Point("workers one outstanding", n, name, (*FANOUT, "--outstanding", "1"))
            for n, name in workers.items()
        ),
        *(Point("workers rooms", n, name, ROOMS) for n, name in workers.items()),
        *(
            Point("clients", n, "flockwire", (*FANOUT, "--connections", str(n)))
            for n in (10, 100, 1000, 5000)
        ),
        *(
            Point(
                "clients one outstanding",
                n,
                "flockwire",
                (*FANOUT, "--outstanding", "1", "--connections", str(n)),
            )
            for n in (10, 100, 1000, 5000)
        ),
        *(
            Point("topics", n, "flockwire", (*FANOUT, "--outstanding", "4", "--topics", str(n)))
            for n in (1, 10, 100, 500)
        ),
        *(
            Point("size", n, "flockwire", (*FANOUT, "--size", str(n)))
            for n in (128, 1024, 4096, 16384, 60000)
        ),
    ]


TITLES: dict[str, tuple[str, str]] = {
    "workers": ("workers, one topic, 1,000 subscribers, 16 outstanding", "workers"),
    "workers one outstanding": ("workers, one topic, 1,000 subscribers, 1 outstanding", "workers"),
    "workers rooms": ("workers, 500 rooms of two", "workers"),
    "clients": ("subscribers of one topic, 16 outstanding", "clients"),
    "clients one outstanding": ("subscribers of one topic, 1 outstanding", "clients"),
    "topics": ("topics that share 1,000 subscribers, one publisher each with 4 outstanding", "topics"),
    "size": ("bytes of a message, 1,000 subscribers, 16 outstanding", "bytes"),
}


def run(results: Results, timing: Timing, rounds: int) -> None:
    """All points, all rounds."""
    todo = points()
    with Fleet() as fleet:
        for turn in range(1, rounds + 1):
            for number, point in enumerate(todo, 1):
                server = fleet.get(point.server)
                if server is None:
                    progress(f"{point.server} is skipped: {fleet.missing[point.server]}")
                    continue
                found = point.once(server, timing, turn)
                results.add(found)
                shown = figure(found.metrics.get("cpu_us"))
                progress(f"[round {turn}/{rounds}, {number}/{len(todo)}] {found.scenario}: {shown} µs")
        results.missing |= fleet.missing


def report(results: Results) -> str:
    """One table a series."""
    value: Callable[[Point, str], float | None] = lambda point, metric: (  # noqa: E731
        found.median
        if (found := results.spread(f"{point.series}-{point.at}", point.server, metric))
        else None
    )
    tables = []
    for series, (title, axis) in TITLES.items():
        lines = [
            [f"{point.at:,}", *(figure(value(point, metric)) for metric in COLUMNS)]
            for point in points()
            if point.series == series and value(point, "cpu_us") is not None
        ]
        if lines:
            tables.append(f"{title}\n\n" + table([axis, *COLUMNS.values()], lines))
    return "\n\n".join(tables)


COLUMNS = {
    "cpu_us": "µs per delivery",
    "deliveries_per_cpu_s": "deliveries per CPU-second",
    "deliveries_per_s": "deliveries/s",
    "p50_ms": "p50 ms",
    "p99_ms": "p99 ms",
}
