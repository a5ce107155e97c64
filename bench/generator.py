"""Drive the load generator in C: start it, answer it, and read its JSON lines."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

from bench.build import build

Event = dict[str, Any]
Placement = Callable[[list[int]], list[str]]
"""Given the client ports of the connections, the role of each: ``p0``, ``s0``, ``b0`` or ``-``."""


class LoadFailed(RuntimeError):
    """The generator gave up; the words say at what, and what the server said."""


class Generator:
    """One run of ``bench/bin/load``; a context manager that ends it."""

    def __init__(self, arguments: Sequence[str]) -> None:
        command = [str(build("load")), *arguments]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def __enter__(self) -> Generator:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None and kind is not None:
            self.process.kill()
        self.process.communicate()

    def say(self, line: str) -> None:
        """Write one line to its standard input."""
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def event(self, name: str) -> Event:
        """The next event of that name.

        Raises:
            LoadFailed: it reports a failure or ends before.
        """
        assert self.process.stdout is not None
        for line in self.process.stdout:
            event: Event = json.loads(line)
            if event["event"] == name:
                return event
            if event["event"] == "failed":
                raise LoadFailed(f"{event['why']} ({self._errors()})")
        raise LoadFailed(f"ended without saying {name!r} ({self._errors()})")

    def _errors(self) -> str:
        assert self.process.stderr is not None
        self.process.wait(timeout=10)
        return " ".join(self.process.stderr.read().split())[:400] or "no further words"


def measure(arguments: Sequence[str], placement: Placement | None = None) -> Event:
    """Run one scenario to its end and return the generator's result.

    Raises:
        LoadFailed: connections or subscriptions were refused, or the generator died.
    """
    with Generator([*arguments, "--assign"] if placement else arguments) as generator:
        if placement:
            generator.say(" ".join(placement(generator.event("ports")["ports"])))
        return generator.event("result")


def healthy(result: Event) -> str | None:
    """What is wrong with a result's messages (loss, order, duplicates, strangers), or None."""
    wrong = [
        f"{name} {result[name]}" for name in ("lost", "gaps", "repeats", "stray", "closed") if result[name]
    ]
    if result["stalled"]:
        wrong.append("stalled")
    return ", ".join(wrong) or None
