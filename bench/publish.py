"""What another program pays to publish: ``ipc.Publisher``, synchronous and asynchronous, to one subscriber."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from bench.generator import Event, Generator, LoadFailed, healthy
from bench.places import ROOT
from bench.results import Results, Run
from bench.servers import Running, runtime_dir
from bench.stats import figure, table

FORMS: dict[str, int] = {"sync": 8_000, "async": 2_000}
"""Form to the messages of a run: about two seconds of either."""


def once(server: Running, turn: int) -> list[Run]:
    """Both forms once, each message checked at the subscriber."""
    return [form_once(server, form, turn, messages) for form, messages in FORMS.items()]


def form_once(server: Running, form: str, turn: int, messages: int) -> Run:
    """One form: start the listening client, then the publishing program."""
    name = f"P {form}"
    options = [
        *server.target(),
        *server.spec.dialect.hub,
        "--mode",
        "listen",
        "--connections",
        "1",
        "--window",
        "60",
    ]
    try:
        with Generator([*options, "--expect", str(messages)]) as generator:
            generator.event("listening")
            published = publish(server, form, messages)
            event = generator.event("result")
    except LoadFailed as error:
        return Run(scenario=name, server=server.spec.name, round=turn, metrics={}, wrong=f"failed: {error}")
    return Run(
        scenario=name,
        server=server.spec.name,
        round=turn,
        metrics={
            "publisher_cpu_us": published["cpu_us_per_message"],
            "publishes_per_s": published["messages"] / published["seconds"],
            "server_cpu_us": event["cpu_total_us"] / messages,
            "p50_us": event["latency_us"]["p50"],
            "p99_us": event["latency_us"]["p99"],
        },
        wrong=healthy(event),
        detail={"publisher": published, "subscriber": event},
    )


def publish(server: Running, form: str, messages: int) -> Event:
    """Run the publishing program to its end.

    Raises:
        LoadFailed: it failed; the words are its last line.
    """
    directory = runtime_dir(server.port, server.directory)
    line = [sys.executable, "-m", "bench.apps.publish_rate", str(directory), str(messages), "128", form]
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(line, env=environ, capture_output=True, text=True, check=False, timeout=120)
    if done.returncode != 0:
        raise LoadFailed((done.stderr.strip().splitlines() or ["the publisher said nothing"])[-1])
    found: Event = json.loads(done.stdout)
    return found


def report(results: Results) -> str:
    """The table of publishing."""
    columns = {
        "publishes_per_s": "publishes/s",
        "publisher_cpu_us": "publisher's CPU µs",
        "server_cpu_us": "server's CPU µs",
        "p50_us": "p50 µs",
        "p99_us": "p99 µs",
    }
    lines = []
    for form in FORMS:
        found = [results.spread(f"P {form}", "flockwire", metric) for metric in columns]
        if found[0]:
            lines.append([form, *(figure(one.median if one else None) for one in found)])
    return table(["ipc.Publisher", *columns.values()], lines) if lines else ""
