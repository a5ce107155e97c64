"""The benchmarks' own parts: statistics, /proc, the result file, and the generator against the limit server."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest

from bench import proc
from bench.build import NoCompiler, build, compiler
from bench.crossworker import Stage, differences, measured
from bench.generator import LoadFailed, healthy, measure
from bench.placed_rooms import apart, together
from bench.report import Target, peers_table, targets_table
from bench.results import Results, Run, begin, load
from bench.run import plan
from bench.scenarios import GROUPS, SCENARIOS, metrics
from bench.servers import SERVERS, Running
from bench.stats import figure, ratio, spread, table

needs_compiler = pytest.mark.skipif(compiler() is None, reason="no C compiler (cc, gcc or clang)")


def test_a_spread_is_median_least_and_most() -> None:
    assert spread([3.0, 1.0, 2.0]) == (2.0, 1.0, 3.0, 3)
    assert spread([]) is None


def test_a_ratio_needs_both_sides() -> None:
    assert ratio(spread([2.0]), spread([4.0])) == 0.5
    assert ratio(spread([2.0]), None) is None
    assert ratio(spread([2.0]), spread([0.0])) is None


@pytest.mark.parametrize(
    ("value", "shown"),
    [(None, "–"), (0.234, "0.23"), (4.1, "4.10"), (12.0, "12"), (12.34, "12.3"), (2600, "2,600")],
)
def test_figures_have_about_three_digits(value: float | None, shown: str) -> None:
    assert figure(value) == shown


def test_a_table_is_markdown_with_equal_columns() -> None:
    lines = table(["server", "µs"], [["ours", "0.23"], ["another", "12"]]).splitlines()
    assert lines[1] == "| ------- | ---: |"
    assert len({len(line) for line in lines}) == 1


def test_proc_sees_this_process_and_its_child() -> None:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(writing)
        os.read(reading, 1)
        os._exit(0)
    try:
        pids = proc.tree([os.getpid()])
        assert {os.getpid(), child} <= set(pids)
        assert proc.tree([child]) == [child]
        assert proc.pss_bytes([os.getpid()]) > 1_000_000
        assert proc.cpu_us(os.getpid()) > 0
    finally:
        os.close(writing)
        os.close(reading)
        os.waitpid(child, 0)
    assert proc.cpu_us(child) == 0
    assert child not in proc.tree([child])


def test_place_names_the_process_at_the_other_end() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as client:
            accepted, _ = listener.accept()
            with accepted:
                here = client.getsockname()[1]
                assert proc.place(port, [here, 1], [os.getpid()]) == [os.getpid(), None]


def test_results_come_back_as_they_were_saved(tmp_path: Path) -> None:
    results = begin()
    for number, value in enumerate((3.0, 1.0, 2.0), 1):
        results.add(Run(scenario="A", server="flockwire", round=number, metrics={"cpu_us": value}))
    again = load(results.save(tmp_path))
    assert again == results
    assert again.machine["cores"]
    assert again.versions["python"]
    assert again.spread("A", "flockwire", "cpu_us") == (2.0, 1.0, 3.0, 3)


def results_of(**figures: float) -> Results:
    """Results with one figure of scenario A for each server."""
    results = begin()
    for server, value in figures.items():
        run = Run(scenario="A", server=server.replace("_", "-"), round=1, metrics={"cpu_us": value})
        results.add(run)
    return results


def test_a_target_is_reached_or_not() -> None:
    target = Target("A", "cpu_us", "flockwire", "bun", 1.0)
    better, worse = (
        target.line(results_of(flockwire=0.2, bun=0.25)),
        target.line(results_of(flockwire=0.3, bun=0.25)),
    )
    assert better is not None and better[-1] == "yes"
    assert worse is not None and worse[-1] == "NO"
    assert target.line(results_of(flockwire=0.2)) is None


def test_the_tables_hold_only_what_was_measured() -> None:
    shown = peers_table(results_of(flockwire=0.2, c_joined=0.25))
    assert "flockwire (1)" in shown and "C, joined" in shown and "Bun" not in shown
    assert "flockwire" in targets_table(results_of(flockwire=0.2, flockwire_2=0.21))


def test_the_default_plan_gives_slow_peers_one_round_and_others_all() -> None:
    turns = plan(["A", "E"], SERVERS, 3, everything=False)
    count = {
        name: sum(turn.server == name and turn.scenario.name == "A" for turn in turns) for name in SERVERS
    }
    assert count["flockwire"] == count["bun"] == 3
    assert count["uvicorn"] == 1
    assert count["connection"] == 0
    placed = {
        turn.server
        for turn in plan(GROUPS["rooms"], SERVERS, 1, everything=True)
        if turn.scenario.name != "C"
    }
    assert placed == {"flockwire-2"}
    assert sum(turn.server == "connection" and turn.scenario.name == "E" for turn in turns) == 3
    assert all(name in SCENARIOS for names in GROUPS.values() for name in names)


def test_rooms_are_put_on_one_worker_or_on_two() -> None:
    first, second = [0, 3, 4, 7, 8], [1, 2, 5, 6]
    assert together(first, second) == [(0, 3), (4, 7), (1, 2), (5, 6)]
    assert apart(first, second) == [(0, 1), (3, 2), (4, 5), (7, 6)]


def test_crossing_is_what_the_far_subscriber_adds() -> None:
    latency = {"p50": 100.0, "p99": 200.0}
    events: dict[str, Any] = {
        "latency-near": {"latency_us": latency},
        "latency-far": {"latency_us": {"p50": 180.0, "p99": 290.0}},
        "awake-near": {"latency_us": latency},
        "awake-far": {"latency_us": {"p50": 140.0, "p99": 290.0}},
        "cross": {"sent": 1000, "seconds": 2.0},
    }
    found = differences(measured({"near": (5.0, 0.0), "near more": (17.0, 0.0), "cross": (5.5, 2.0)}, events))
    assert (found["send_cpu_us"], found["receive_cpu_us"], found["added_p50_us"]) == (0.5, 0.5, 80.0)
    assert found["awake_added_p50_us"] == 40.0


def test_without_a_compiler_the_reason_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("bench.build.BIN", tmp_path / "bin")
    monkeypatch.setattr("bench.build.compiler", lambda: None)
    with pytest.raises(NoCompiler, match="no C compiler"):
        build("load")


@pytest.fixture
def limit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The limit server, joined, built anew in a place of this test."""
    monkeypatch.setattr("bench.build.BIN", tmp_path / "bin")
    server = Running(SERVERS["c-joined"])
    yield server
    server.stop()


SHORT = ("--window", "0.2", "--warmup", "0.05")


@needs_compiler
def test_the_generator_counts_every_message_of_the_limit_server(limit: Running) -> None:
    fanout = measure([*limit.target(), "--mode", "fanout", "--connections", "50", *SHORT])
    assert healthy(fanout) is None
    assert fanout["delivered_all"] == fanout["expected_all"] > 0
    figures = metrics(fanout)
    assert figures["deliveries_per_s"] > 1000 and figures["p99_ms"] >= figures["p50_ms"] > 0
    threads = measure([*limit.target(), "--mode", "fanout", "--connections", "50", "--threads", "2", *SHORT])
    assert healthy(threads) is None
    rooms = measure([*limit.target(), "--mode", "rooms", "--connections", "40", "--outstanding", "1", *SHORT])
    assert healthy(rooms) is None and rooms["sent"] > 0
    echo = [
        "--mode",
        "rooms",
        "--rooms",
        "1",
        "--connections",
        "10",
        "--path",
        "/echo",
        "--dialect",
        "raw",
        *SHORT,
    ]
    assert healthy(measure([*limit.target(), *echo])) is None
    rate = measure([*limit.target(), "--mode", "fanout", "--connections", "10", "--rate", "200", *SHORT])
    assert healthy(rate) is None and abs(rate["sent"] / rate["seconds"] - 200) < 60


@needs_compiler
def test_the_generator_takes_roles_and_says_what_failed(limit: Running) -> None:
    roles = ["p0", "s0", "l0", *["-"] * 5]
    found = measure([*limit.target(), "--mode", "fanout", "--connections", "8", *SHORT], lambda ports: roles)
    assert healthy(found) is None
    stage = Stage(limit, ("pa", "sa"), swap=False)
    with pytest.raises(LoadFailed, match="one worker"):
        measure([*limit.target(), "--connections", "4", *SHORT], stage.placement())
    gone = ["--port", "1", "--connections", "1"]
    with pytest.raises(LoadFailed, match="refused"):
        measure(gone)
