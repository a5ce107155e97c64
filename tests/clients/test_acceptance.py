"""Nothing missed: official clients through killed workers, a rolling reload, and a bus that loses messages."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from typing import Any

import pytest

from tests.clients.support import HOOKED, RULES, address, needs_node, needs_python, node, python
from tests.hub import Hub

pytestmark = [needs_node, needs_python]

KILL_EVERY = 5.0


class Flock:
    """60 subscribers, half of them through a wildcard, a third of them Python, and 4 publishers."""

    def __init__(self, hub: Hub, subscribers: int = 60, rate: int = 50) -> None:
        common = {"url": address(hub.port), "topic": "acc/x", "pattern": "acc/#"}
        third = subscribers // 3
        script = {**common, "subscribers": subscribers - third, "publishers": 4, "rate": rate}
        self._python = python("flock.py", json.dumps({**common, "subscribers": third}))
        self._wait(self._python)
        self._node = node("flock.mjs", json.dumps(script))
        self._wait(self._node)

    def _wait(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None and process.stderr is not None
        if process.stdout.readline() != "ready\n":
            process.kill()
            raise AssertionError(process.stderr.read())

    def finish(self) -> tuple[dict[str, Any], dict[str, Any]]:
        out, errors = self._node.communicate("stop\n", 60)
        assert self._node.returncode == 0, errors
        published = json.loads(out)
        out, errors = self._python.communicate("stop\n", 60)
        assert self._python.returncode == 0, errors
        return published, json.loads(out)

    def kill(self) -> None:
        for process in (self._python, self._node):
            if process.poll() is None:
                process.kill()
            process.communicate()


def judge(published: dict[str, Any], other: dict[str, Any]) -> None:
    """Each client has each acknowledged message exactly once, any other at most once, all in one same order."""
    acknowledged, sent = set(published["acknowledged"]), set(published["sent"])
    assert len(acknowledged) > 100
    assert published["unrecovered"] == [] and other["unrecovered"] == []
    logs = [*published["got"], *other["got"]]
    for log in logs:
        offsets = [offset for offset, _ in log]
        assert all(before < after for before, after in zip(offsets, offsets[1:], strict=False))
        ids = [name for _, name in log]
        assert len(ids) == len(set(ids)), "something came twice"
        assert acknowledged - set(ids) == set(), "something acknowledged is missing"
        assert set(ids) <= sent
    longest = max(logs, key=len)
    for log in logs:
        assert log == longest, "not all have the same"


def storm(seconds: float, every: float = KILL_EVERY, env: dict[str, str] | None = None) -> Hub:
    with Hub(workers=4, config=RULES, app=HOOKED, env=env) as hub:
        flock = Flock(hub)
        try:
            end = time.monotonic() + seconds
            while time.monotonic() + every < end:
                time.sleep(every)
                pids = hub.worker_pids()
                if pids:
                    os.kill(random.choice(pids), signal.SIGKILL)
            hub.wait_ready()
            assert hub.command("reload").returncode == 0
            published, other = flock.finish()
        finally:
            flock.kill()
        judge(published, other)
        assert published["recoveries"] + other["recoveries"] > 60
    return hub


def test_killed_workers_and_a_reload_miss_nothing() -> None:
    storm(9.0, 3.0)


def test_a_bus_that_loses_one_batch_in_a_hundred_misses_nothing() -> None:
    storm(4.0, 3.0, {"TEST_DROP_FRACTION": "0.01"})


@pytest.mark.long
@pytest.mark.timeout(240)
def test_a_minute_of_killed_workers_and_a_reload() -> None:
    storm(62.0)


@pytest.mark.long
@pytest.mark.timeout(240)
def test_a_minute_with_a_bus_that_loses_one_batch_in_a_hundred() -> None:
    storm(62.0, env={"TEST_DROP_FRACTION": "0.01"})
