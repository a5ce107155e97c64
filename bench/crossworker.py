"""What crossing from worker to worker costs: added latency at a low rate, processor time on each side at full rate.

Connections are opened until there are enough on each of two workers; /proc says which process holds the other end,
so the server need not be asked and need not be prepared.
"""

from __future__ import annotations

from collections.abc import Sequence

from bench import proc
from bench.generator import Event, LoadFailed, Placement, healthy, measure
from bench.results import Results, Run
from bench.scenarios import Timing
from bench.servers import Running
from bench.stats import figure, table

CANDIDATES = 24
FULL = ("--outstanding", "256")
LOW = ("--rate", "200")
SHAPES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "near": (("pa", "sa"), FULL),
    "near2": (("pa", "sa", "la"), FULL),
    "cross": (("pa", "sa", "lb"), FULL),
    "latency-near": (("pa", "sa"), LOW),
    "latency-far": (("pa", "sb"), LOW),
}
"""Who stands where: p publishes, s subscribes, l listens without being waited for, on worker a or b.

The closed loop turns with the near subscriber alone in all three, so that worker a has the same to do."""


class Stage:
    """Puts the connections of one run on workers a and b, and remembers which processes these are."""

    def __init__(self, server: Running, shape: Sequence[str], swap: bool) -> None:
        self.server = server
        self.shape = shape
        self.swap = swap
        self.workers: list[int] = []

    def placement(self) -> Placement:
        """For :func:`bench.generator.measure`."""

        def roles(ports: list[int]) -> list[str]:
            owners = proc.place(self.server.port, ports, self.server.pids())
            self.workers = sorted({owner for owner in owners if owner is not None}, reverse=self.swap)
            if len(self.workers) < 2:
                raise LoadFailed("all connections came to one worker")
            chosen = ["-"] * len(ports)
            for wish in self.shape:
                worker = self.workers[0 if wish[1] == "a" else 1]
                free = [i for i, owner in enumerate(owners) if owner == worker and chosen[i] == "-"]
                if not free:
                    raise LoadFailed("too few connections came to one of the workers")
                chosen[free[0]] = f"{wish[0]}0"
            return chosen

        return roles

    def side(self, event: Event, which: int) -> float:
        """Processor time of worker a (0) or b (1) per message, in microseconds."""
        messages = max(1, event["deliveries"] / max(1, sum(wish[0] in "sl" for wish in self.shape)))
        return float(event["cpu_us"].get(str(self.workers[which]), 0) / messages)


def once(server: Running, timing: Timing, turn: int) -> Run:
    """All shapes once; the differences are the cost of crossing."""
    sides: dict[str, tuple[float, float]] = {}
    events: dict[str, Event] = {}
    wrong = []
    for name, (shape, options) in SHAPES.items():
        stage = Stage(server, shape, swap=turn % 2 == 0)
        arguments = [
            *server.target(),
            *server.spec.dialect.hub,
            "--mode",
            "fanout",
            *timing.options(),
            *options,
        ]
        event = measure([*arguments, "--connections", str(CANDIDATES)], stage.placement())
        events[name] = event
        sides[name] = (stage.side(event, 0), stage.side(event, 1))
        if words := healthy(event):
            wrong.append(f"{name}: {words}")
    return Run(
        scenario="X",
        server=server.spec.name,
        round=turn,
        metrics=differences(sides, events),
        wrong="; ".join(wrong) or None,
        detail=events,
    )


def differences(sides: dict[str, tuple[float, float]], events: dict[str, Event]) -> dict[str, float]:
    """The cost of crossing, from the shapes with and without it.

    Sending side: worker a with a subscriber of its own and a far one, less the same without the far one.
    Receiving side: worker b, less what one more near subscriber costs worker a.
    """
    one_more = sides["near2"][0] - sides["near"][0]
    near, far = (events[f"latency-{where}"]["latency_us"] for where in ("near", "far"))
    return {
        "send_cpu_us": sides["cross"][0] - sides["near"][0],
        "receive_cpu_us": sides["cross"][1] - one_more,
        "receive_all_cpu_us": sides["cross"][1],
        "near_cpu_us": sides["near"][0],
        "uninterested_cpu_us": sides["near"][1],
        "near_p50_us": near["p50"],
        "far_p50_us": far["p50"],
        "added_p50_us": far["p50"] - near["p50"],
        "added_p99_us": far["p99"] - near["p99"],
        "messages_per_s": events["cross"]["sent"] / events["cross"]["seconds"],
    }


ROWS: tuple[tuple[str, str, str], ...] = (
    ("send_cpu_us", "CPU of the sending worker per message and destination, µs", "≤ 1"),
    ("receive_cpu_us", "CPU of the receiving worker per message, less the delivery, µs", "≤ 1"),
    ("receive_all_cpu_us", "the same with the delivery to one client, µs", ""),
    ("near_cpu_us", "one worker alone, one subscriber, per message, µs", ""),
    ("uninterested_cpu_us", "a worker without interest, per message, µs", "0"),
    ("near_p50_us", "median latency within a worker, 200 messages/s, µs", ""),
    ("added_p50_us", "median latency added by crossing, µs", "≤ 150"),
    ("added_p99_us", "p99 latency added by crossing, µs", ""),
    ("messages_per_s", "messages/s at full rate", ""),
)


def report(results: Results) -> str:
    """The table of crossing."""
    lines = []
    for metric, words, wanted in ROWS:
        found = results.spread("X", "flockwire-2", metric)
        if found:
            lines.append(
                [words, f"{figure(found.median)} ({figure(found.least)}–{figure(found.most)})", wanted]
            )
    return table(["crossing workers", "median (min–max)", "wanted"], lines) if lines else ""
