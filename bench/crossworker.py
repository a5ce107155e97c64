"""What crossing from worker to worker costs: added latency at a low rate, processor time on each side at full rate.

Connections are opened until there are enough on each of two workers; /proc says which process holds the other end,
so the server need not be asked and need not be prepared. Beside it, in the same run, stands the floor: bare ZeroMQ
between two processes (``apps/bare_bus.py``).

The costs are differences between runs with and without crossing, of a few hundredths of a run each: so every shape is
measured in each round, and the medians of all rounds are subtracted.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence

from bench import proc
from bench.generator import Event, LoadFailed, Placement, healthy, measure
from bench.places import ROOT
from bench.results import Results, Run
from bench.scenarios import Timing
from bench.servers import Running
from bench.stats import figure, table

CANDIDATES = 48
LOW_RATE = 200
AWAKE_RATE = 1000
"""Still a two-hundredth of what is possible, but so often that an idle machine does not put its cores to sleep between
two messages: what is added then is ours, where at the low rate most of it is waking up, see docs/performance.md."""
SIZE = 128
FULL = ("--outstanding", "256")
LOW = ("--rate", str(LOW_RATE))
AWAKE = ("--rate", str(AWAKE_RATE))
FLOOR_SECONDS = 0.8
FLOOR_WINDOW = 1.5
FLOOR_TURN = 64
"""Messages that the floor sends in one turn of its loop at full rate; each is a ZeroMQ message, ours joins a turn's."""
MORE = 8
"""Near listeners whose cost tells what one costs: less noise than the cost of a single one."""
SHAPES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "near": (("pa", "sa"), FULL),
    "near more": (("pa", "sa", *["la"] * MORE), FULL),
    "cross": (("pa", "sa", "lb"), FULL),
    "latency-near": (("pa", "sa"), LOW),
    "latency-far": (("pa", "sb"), LOW),
    "awake-near": (("pa", "sa"), AWAKE),
    "awake-far": (("pa", "sb"), AWAKE),
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
    metrics = measured(sides, events)
    return Run(
        scenario="X",
        server=server.spec.name,
        round=turn,
        metrics={**metrics, **differences(metrics), **floor(metrics["messages_per_s"])},
        wrong="; ".join(wrong) or None,
        detail=events,
    )


def floor(rate: float) -> dict[str, float]:
    """Bare ZeroMQ: at the rate that was reached, and at the low rate."""
    full = bare(int(FLOOR_SECONDS * rate), int(rate), FLOOR_TURN)
    low, awake = (bare(int(FLOOR_WINDOW * each), each, 1) for each in (LOW_RATE, AWAKE_RATE))
    return {
        "floor_send_cpu_us": full["send_cpu_us"],
        "floor_receive_cpu_us": full["cpu_us"],
        "floor_p50_us": low["p50_us"],
        "floor_p99_us": low["p99_us"],
        "floor_awake_p50_us": awake["p50_us"],
    }


def bare(messages: int, rate: int, turn: int) -> dict[str, float]:
    """One run of the floor: what the receiver says, and the sender's processor time."""
    with tempfile.TemporaryDirectory() as directory:
        line = [sys.executable, "-m", "bench.apps.bare_bus"]
        endpoint = f"ipc://{directory}/bus"
        receiver = subprocess.Popen([*line, "receive", endpoint], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        try:
            assert receiver.stdout is not None
            receiver.stdout.readline()  # it is bound
            numbers = [str(number) for number in (messages, rate, SIZE, turn)]
            sent = subprocess.run(
                [*line, "send", endpoint, *numbers],
                cwd=ROOT,
                capture_output=True,
                text=True,
                check=True,
                timeout=60,
            )
            found: dict[str, float] = json.loads(receiver.communicate(timeout=30)[0])
        finally:
            receiver.kill()
            receiver.wait()
    return {**found, "send_cpu_us": json.loads(sent.stdout)["cpu_us"]}


def measured(sides: Mapping[str, tuple[float, float]], events: Mapping[str, Event]) -> dict[str, float]:
    """What the shapes say by themselves; :func:`differences` is made of these."""
    near, far = (events[f"latency-{where}"]["latency_us"] for where in ("near", "far"))
    awake_near, awake_far = (events[f"awake-{where}"]["latency_us"] for where in ("near", "far"))
    return {
        "near_cpu_us": sides["near"][0],
        "near_more_cpu_us": sides["near more"][0],
        "cross_cpu_us": sides["cross"][0],
        "receive_all_cpu_us": sides["cross"][1],
        "uninterested_cpu_us": sides["near"][1],
        "near_p50_us": near["p50"],
        "near_p99_us": near["p99"],
        "far_p50_us": far["p50"],
        "far_p99_us": far["p99"],
        "awake_near_p50_us": awake_near["p50"],
        "awake_far_p50_us": awake_far["p50"],
        "messages_per_s": events["cross"]["sent"] / events["cross"]["seconds"],
    }


def differences(figures: Mapping[str, float]) -> dict[str, float]:
    """The cost of crossing, from the shapes with and without it.

    Sending side: worker a with a subscriber of its own and a far one, less the same without the far one.
    Receiving side: worker b, less what one more near subscriber costs worker a.
    """
    one_more = (figures["near_more_cpu_us"] - figures["near_cpu_us"]) / MORE
    return {
        "send_cpu_us": figures["cross_cpu_us"] - figures["near_cpu_us"],
        "receive_cpu_us": figures["receive_all_cpu_us"] - one_more,
        "added_p50_us": figures["far_p50_us"] - figures["near_p50_us"],
        "added_p99_us": figures["far_p99_us"] - figures["near_p99_us"],
        "awake_added_p50_us": figures["awake_far_p50_us"] - figures["awake_near_p50_us"],
    }


ROWS: tuple[tuple[str, str, str, str], ...] = (
    ("send_cpu_us", "floor_send_cpu_us", "CPU of the sending worker per message and destination, µs", "≤ 1"),
    (
        "receive_cpu_us",
        "floor_receive_cpu_us",
        "CPU of the receiving worker per message, less the delivery, µs",
        "≤ 1",
    ),
    ("receive_all_cpu_us", "", "the same with the delivery to one client, µs", ""),
    ("near_cpu_us", "", "one worker alone, one subscriber, per message, µs", ""),
    ("uninterested_cpu_us", "", "a worker without interest, per message, µs", "0"),
    ("near_p50_us", "", "median latency within a worker, 200 messages/s, µs", ""),
    ("added_p50_us", "floor_p50_us", "the median that crossing adds, µs", "≤ 150"),
    ("added_p99_us", "floor_p99_us", "the p99 that crossing adds, µs", ""),
    ("awake_near_p50_us", "", "median latency within a worker, 1,000 messages/s, µs", ""),
    ("awake_added_p50_us", "floor_awake_p50_us", "the median that crossing adds, µs", "≤ 150"),
    ("messages_per_s", "", "messages/s at full rate", ""),
)
"""Ours, the floor's, words, the aim."""


def report(results: Results) -> str:
    """The table of crossing."""
    runs = [run.metrics for run in results.runs if run.scenario == "X" and run.metrics]
    if not runs:
        return ""
    # Small differences of large figures: of the medians of all rounds, not the median of each round's differences.
    middle = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    middle |= differences(middle)
    lines = []
    for metric, bare_metric, words, wanted in ROWS:
        found = results.spread("X", "flockwire-2", metric)
        lowest = results.spread("X", "flockwire-2", bare_metric) if bare_metric else None
        if found:
            times = middle[metric] / lowest.median if lowest else None
            lines.append(
                [
                    words,
                    f"{figure(middle[metric])} ({figure(found.least)}–{figure(found.most)})",
                    wanted,
                    figure(lowest.median) if lowest else "",
                    figure(times) if times is not None else "",
                ]
            )
    return table(["crossing workers", "median (min–max)", "wanted", "bare ZeroMQ", "×"], lines)
