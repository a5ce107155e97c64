"""The scenarios: what the generator is asked to do, and which figures of its answer count.

The letters are those of the published table: A one topic with 1,000 subscribers and 16 messages outstanding, A1 with
one, A16 with 16 KiB, B100 at 100 messages a second, C 500 rooms of two (CN, CF: where their members are is chosen),
E echo, D idle connections.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from bench import proc
from bench.generator import Event, Generator, LoadFailed, Placement, healthy, measure
from bench.placed_rooms import CONNECTIONS, Pairs, apart, placement, together
from bench.results import Run
from bench.servers import Running


@dataclass(frozen=True)
class Timing:
    """How long is measured, in seconds; and how many connections scenario D opens."""

    window: float = 1.0
    warmup: float = 0.3
    idle_connections: int = 5000

    def longer(self, factor: float) -> Timing:
        """For a server so slow that a message takes most of the window to reach everybody."""
        return replace(self, window=self.window * factor, warmup=self.warmup * factor)

    def options(self) -> list[str]:
        """For the generator."""
        return ["--window", str(self.window), "--warmup", str(self.warmup)]


@dataclass(frozen=True)
class Scenario:
    """One column of the table."""

    name: str
    title: str
    unit: str
    metric: str
    run: Callable[[Running, Timing], Event]
    fresh: bool = False
    """The server must be new: memory is measured."""

    def once(self, server: Running, timing: Timing, turn: int) -> Run:
        """Run it once; what the generator could not do is said in the run, not raised."""
        try:
            event = self.run(server, timing)
        except LoadFailed as error:
            wrong = f"failed: {error}"
            return Run(scenario=self.name, server=server.spec.name, round=turn, metrics={}, wrong=wrong)
        wrong_words = healthy(event) if "lost" in event else None
        return Run(
            scenario=self.name,
            server=server.spec.name,
            round=turn,
            metrics=metrics(event),
            wrong=wrong_words,
            detail=event,
        )


def metrics(event: Event) -> dict[str, float]:
    """The figures of a result, per delivery where that is how they are compared."""
    if event["event"] != "result":
        return {name: float(value) for name, value in event.items() if isinstance(value, int | float)}
    if event["deliveries"] == 0:
        return {"lost": float(event["lost"])}
    deliveries, latency = event["deliveries"], event["latency_us"]
    return {
        "cpu_us": event["cpu_total_us"] / deliveries,
        "generator_cpu_us": event["generator_cpu_us"] / deliveries,
        "deliveries_per_s": event["deliveries"] / event["seconds"],
        "messages_per_s": event["sent"] / event["seconds"],
        "deliveries_per_cpu_s": event["deliveries"] / max(1, event["cpu_total_us"]) * 1e6,
        "p50_ms": latency["p50"] / 1000,
        "p99_ms": latency["p99"] / 1000,
        "p999_ms": latency["p999"] / 1000,
        "lost": float(event["lost"]),
    }


def hub(*options: str) -> Callable[[Running, Timing], Event]:
    """One topic, 1,000 subscribers, one publisher of its own."""

    def run(server: Running, timing: Timing) -> Event:
        return measure(
            [*server.target(), *server.spec.dialect.hub, "--mode", "fanout", *timing.options(), *options]
        )

    return run


def rooms(server: Running, timing: Timing, where: Placement | None = None, *options: str) -> Event:
    """500 rooms of two; each member publishes, one message each under way."""
    mode = ["--mode", "rooms", "--outstanding", "1"]
    return measure([*server.target(), *server.spec.dialect.rooms, *mode, *timing.options(), *options], where)


def placed(pairs: Pairs) -> Callable[[Running, Timing], Event]:
    """The same on two workers, with the members of a room where ``pairs`` puts them."""

    def run(server: Running, timing: Timing) -> Event:
        return rooms(server, timing, placement(server, pairs), "--connections", str(CONNECTIONS))

    return run


def echo(server: Running, timing: Timing) -> Event:
    """100 connections, each waiting for its own message before it sends the next."""
    how = server.spec.dialect.echo
    if how is None:
        raise LoadFailed("it has no echo")
    shape = ["--mode", "rooms", "--rooms", "1", "--connections", "100", "--outstanding", "1"]
    return measure([*server.target(), *how, *shape, *timing.options()])


def idle(server: Running, timing: Timing, *, concurrency: int = 256) -> Event:
    """Open connections that then say nothing: how fast, how dear, and how large."""
    count = timing.idle_connections
    pids = server.pids()
    memory, cpu = proc.pss_bytes(pids), sum(map(proc.cpu_us, pids))
    options = ["--port", str(server.port), *server.spec.dialect.hub, "--mode", "idle"]
    with Generator([*options, "--connections", str(count), "--concurrency", str(concurrency)]) as generator:
        opened = generator.event("connected")
        used = sum(map(proc.cpu_us, server.pids())) - cpu
        # What the handshakes left behind is given back within a moment; connections stay.
        time.sleep(0.5)
        after = proc.pss_bytes(server.pids())
        generator.say("count")
        closed = generator.event("count")["closed"]
        generator.say("end")
    return {
        "event": "idle",
        "connections": opened["connections"],
        "refused": opened["failed"],
        "closed_idle": closed,
        "connects_per_s": opened["connections"] / max(1e-6, opened["seconds"]),
        "cpu_us_per_connect": used / max(1, opened["connections"]),
        "bytes_per_connection": (after - memory) / max(1, opened["connections"]),
    }


def storm(server: Running, timing: Timing) -> Event:
    """As idle, with every connection begun at once."""
    return idle(server, timing, concurrency=timing.idle_connections)


SCENARIOS: dict[str, Scenario] = {
    scenario.name: scenario
    for scenario in (
        Scenario("A", "128 B to 1,000, 16 outstanding", "µs", "cpu_us", hub()),
        Scenario("A1", "128 B to 1,000, 1 outstanding", "µs", "cpu_us", hub("--outstanding", "1")),
        Scenario("A16", "16 KiB to 1,000, 16 outstanding", "µs", "cpu_us", hub("--size", "16384")),
        Scenario("B100", "100 messages/s to 1,000", "µs", "cpu_us", hub("--rate", "100")),
        Scenario("C", "500 rooms of two", "µs", "cpu_us", rooms),
        Scenario("CN", "500 rooms of two, each on one of two workers", "µs", "cpu_us", placed(together)),
        Scenario("CF", "500 rooms of two, each on both of two workers", "µs", "cpu_us", placed(apart)),
        Scenario("E", "echo, 100 connections", "µs", "cpu_us", echo),
        Scenario("D", "idle connections", "bytes", "bytes_per_connection", idle, fresh=True),
        Scenario("storm", "all connections at once", "1/s", "connects_per_s", storm, fresh=True),
    )
}
GROUPS: dict[str, tuple[str, ...]] = {
    "fanout": ("A", "A1", "A16"),
    "latency": ("B100",),
    "rooms": ("C", "CN", "CF"),
    "echo": ("E",),
    "connections": ("D", "storm"),
}
"""The names of the command line; each letter is a name too."""
