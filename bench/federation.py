"""What it costs to leave a host: processor time of the bridge per message, added latency, commands to Redis.

Two hubs of ours on one machine share a Redis; beside them the usual way, one PUBLISH per message, by redis-py with
hiredis in this process. `redis-server` must be installed; a run without it is left out.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import websockets

from bench import proc
from bench.places import ROOT
from bench.results import Results, Run
from bench.stats import figure, table

MESSAGES = 30_000
PACED = 400
RATE = 200
PAYLOAD = "x" * 60


class Missing(Exception):
    """There is no redis-server here."""


def once(turn: int) -> list[Run]:
    """Everything once.

    Raises:
        Missing: Redis is not installed.
    """
    if shutil.which("redis-server") is None:
        raise Missing("redis-server is not installed")
    with tempfile.TemporaryDirectory(prefix="fw-bench-") as directory, redis_server(directory) as port:
        with hub(directory, "a", port) as here, hub(directory, "b", port) as there:
            figures = asyncio.run(measure(here, there, port))
        plain = asyncio.run(one_publish_each(port))
    return [
        Run(scenario="federation", server="flockwire", round=turn, metrics=figures),
        Run(scenario="federation", server="redis-publish", round=turn, metrics=plain),
    ]


@contextlib.contextmanager
def redis_server(directory: str) -> Iterator[int]:
    """A Redis that saves nothing."""
    port = free_port()
    options = ["--port", str(port), "--save", "", "--appendonly", "no", "--dir", directory]
    process = subprocess.Popen(["redis-server", *options], stdout=subprocess.DEVNULL)
    try:
        wait_for(port)
        yield port
    finally:
        process.terminate()
        process.wait(10)


@contextlib.contextmanager
def hub(directory: str, name: str, redis_port: int) -> Iterator[tuple[int, str]]:
    """A hub of one worker; its port and runtime directory."""
    port, runtime = free_port(), str(Path(directory) / name)
    log = Path(directory, f"{name}.log").open("wb")
    process = subprocess.Popen(
        [
            sys.executable, "-m", "supervisor", "--port", str(port), "--workers", "1", "--runtime-dir", runtime,
            "--redis-url", f"redis://127.0.0.1:{redis_port}",
        ],
        cwd=ROOT, stdout=log, stderr=log,
    )  # fmt: skip
    try:
        wait_for(port)
        deadline = time.monotonic() + 20
        while bridge(runtime).get("link") != "ready":
            if time.monotonic() > deadline:
                raise RuntimeError(Path(directory, f"{name}.log").read_text())
            time.sleep(0.05)
        yield port, runtime
    finally:
        process.terminate()
        process.wait(20)
        log.close()


def bridge(runtime: str) -> dict[str, Any]:
    """What the hub says of its bridge."""
    from supervisor.control import ask

    try:
        answer = ask(runtime, {"command": "status"}, 10)
    except Exception:
        return {}
    return dict(answer["bridge"]) if answer else {}


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_for(port: int) -> None:
    """Until somebody accepts connections there."""
    deadline = time.monotonic() + 20
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)


async def measure(here: tuple[int, str], there: tuple[int, str], redis_port: int) -> dict[str, float]:
    """A flood for the processor time and the commands, then a steady trickle for the latency."""
    import redis.asyncio as redis

    options: dict[str, Any] = {"compression": None, "max_size": None, "ping_interval": None, "proxy": None}
    async with (
        redis.Redis(port=redis_port) as client,
        websockets.connect(f"ws://127.0.0.1:{here[0]}/ws/near?topic=a/%23", **options) as near,
        websockets.connect(f"ws://127.0.0.1:{there[0]}/ws/far?topic=a/%23", **options) as far,
        websockets.connect(f"ws://127.0.0.1:{here[0]}/ws/publisher", **options) as publisher,
    ):
        bridges = [bridge(here[1])["pid"], bridge(there[1])["pid"]]
        before = [proc.cpu_us(pid) for pid in bridges]
        commands = (await client.info("stats"))["total_commands_processed"]
        await asyncio.gather(read(near, MESSAGES), read(far, MESSAGES), flood(publisher))
        out_us, in_us = (proc.cpu_us(pid) - at for pid, at in zip(bridges, before, strict=True))
        commands = (await client.info("stats"))["total_commands_processed"] - commands
        near_delays, far_delays, _ = await asyncio.gather(
            read(near, PACED), read(far, PACED), trickle(publisher)
        )
    added = statistics.median(far_delays) - statistics.median(near_delays)
    return {
        "out_us": out_us / MESSAGES,
        "in_us": in_us / MESSAGES,
        "commands": commands / MESSAGES,
        "added_ms": added * 1e3,
        "far_p99_ms": sorted(far_delays)[int(len(far_delays) * 0.99)] * 1e3,
    }


async def flood(publisher: Any) -> None:
    """As fast as this process can."""
    for number in range(MESSAGES):
        await publisher.send(text(number))


async def trickle(publisher: Any) -> None:
    """At a fixed rate."""
    began = time.monotonic()
    for number in range(PACED):
        await asyncio.sleep(max(0.0, began + number / RATE - time.monotonic()))
        await publisher.send(text(number))


def text(number: int) -> str:
    """A message with its number and time."""
    return json.dumps(
        {"type": "send", "topic": f"a/{number % 20}", "n": number, "at": time.monotonic(), "x": PAYLOAD}
    )


async def read(client: Any, count: int) -> list[float]:
    """So many messages, in each topic's order; how long each took."""
    delays = []
    last: dict[int, int] = {}
    for _ in range(count):
        message = json.loads(await client.recv())
        delays.append(time.monotonic() - message["at"])
        topic = message["n"] % 20
        assert message["n"] == last.get(topic, topic - 20) + 20, "lost, twice or out of order"
        last[topic] = message["n"]
    return delays


async def one_publish_each(port: int) -> dict[str, float]:
    """The same number of messages, each a PUBLISH that is awaited; and what it costs to read them."""
    import redis.asyncio as redis

    count = MESSAGES // 10
    async with redis.Redis(port=port) as client, client.pubsub() as pubsub:
        await pubsub.subscribe("a")
        before = time.process_time()
        for number in range(count):
            await client.publish("a", text(number))
        out = time.process_time() - before
        got, before = 0, time.process_time()
        while got < count:
            message = await pubsub.get_message(ignore_subscribe_messages=True, timeout=5)
            got += message is not None
        into = time.process_time() - before
    return {"out_us": out / count * 1e6, "in_us": into / count * 1e6, "commands": 1.0}


def report(results: Results) -> str:
    """The table of federation."""
    columns = {
        "out_us": "CPU out, µs",
        "in_us": "CPU in, µs",
        "commands": "commands per message",
        "added_ms": "added latency, median ms",
        "far_p99_ms": "p99 to the other host, ms",
    }
    lines = []
    for server, name in (("flockwire", "the bridge"), ("redis-publish", "one PUBLISH per message")):
        found = [results.spread("federation", server, metric) for metric in columns]
        if found[0]:
            lines.append([name, *(figure(one.median if one else None) for one in found)])
    return table(["between hosts", *columns.values()], lines) if lines else ""
