"""What one run of the benchmarks found, as it is kept: one JSON file with machine, versions, command and runs."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec

from bench.places import ROOT
from bench.stats import Spread, spread

SCHEMA = 1


class Run(msgspec.Struct, kw_only=True):
    """One scenario, on one server, once. ``metrics`` are numbers by name, units in the name."""

    scenario: str
    server: str
    round: int
    metrics: dict[str, float]
    wrong: str | None = None
    """Loss, disorder, duplicates, strangers: words; None when every message arrived as it should."""
    detail: dict[str, Any] = {}
    """The generator's whole answer."""


class Results(msgspec.Struct, kw_only=True):
    """Everything of one run of ``python -m bench``."""

    schema: int = SCHEMA
    started: str
    command: list[str]
    machine: dict[str, str]
    versions: dict[str, str]
    seconds: float = 0.0
    missing: dict[str, str] = {}
    """Servers that were skipped, and why."""
    runs: list[Run] = []

    def add(self, run: Run) -> None:
        """Keep one more run."""
        self.runs = [*self.runs, run]

    def spread(self, scenario: str, server: str, metric: str) -> Spread | None:
        """Median, least and most of a figure over the rounds; None when it was not measured."""
        return spread(
            run.metrics[metric]
            for run in self.runs
            if run.scenario == scenario and run.server == server and metric in run.metrics
        )

    def save(self, directory: Path) -> Path:
        """Write the file, named by the time the run began."""
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / f"{self.started.replace(':', '').replace('-', '')}.json"
        path.write_bytes(msgspec.json.format(msgspec.json.encode(self), indent=1))
        return path


def load(path: Path) -> Results:
    """Read a file that :meth:`Results.save` wrote.

    Raises:
        msgspec.ValidationError: it is of another schema.
    """
    return msgspec.json.decode(path.read_bytes(), type=Results)


def begin() -> Results:
    """Results without runs, of this machine, now."""
    started = time.strftime("%Y-%m-%dT%H:%M:%S")
    return Results(
        started=started,
        command=["python", "-m", "bench", *sys.argv[1:]],
        machine=machine(),
        versions=versions(),
    )


def machine() -> dict[str, str]:
    """What the figures depend on: processor, cores, kernel, memory, and settings of the network."""
    return {
        "processor": first_value("/proc/cpuinfo", "model name"),
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": first_value("/proc/meminfo", "MemTotal"),
        "kernel": platform.release(),
        "congestion_control": read("/proc/sys/net/ipv4/tcp_congestion_control"),
        "mitigations": read("/sys/devices/system/cpu/vulnerabilities/spec_rstack_overflow"),
    }


def versions() -> dict[str, str]:
    """Python, the packages in the way of a message, and our own commit."""
    found = {"python": platform.python_version()}
    for name in (
        "flockwire",
        "uvicorn",
        "uvloop",
        "websockets",
        "httptools",
        "starlette",
        "msgspec",
        "pyzmq",
    ):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if commit.returncode == 0:
        found["commit"] = commit.stdout.strip()
    return found


def read(path: str) -> str:
    """A one-line file, empty when it is not there."""
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def first_value(path: str, key: str) -> str:
    """The value of the first ``key : value`` line of a file of /proc."""
    for line in read(path).splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return ""
