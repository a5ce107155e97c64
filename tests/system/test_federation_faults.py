"""R19: Redis, or the way to it, fails under load. The host serves on; afterwards all comes once, or is counted."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import redis as redis_client

from tests.federation import Proxy, hosts, linked, play, publisher, reader, total
from tests.hub import Hub
from tests.redis_server import RedisServer, redis_server
from tests.support import until, until_async

Fault = Callable[[RedisServer, Hub, float], Awaitable[None]]

LOCAL_BOUND = 2.0
"""Seconds within which 99 of 100 local messages arrive, whatever Redis does, on a busy test machine."""


async def kill_and_restart(server: RedisServer, hub: Hub, seconds: float) -> None:
    await asyncio.to_thread(server.stop)
    await linked([hub], state="connecting")
    await asyncio.sleep(seconds)
    await asyncio.to_thread(server.start)


async def stand_still(server: RedisServer, hub: Hub, seconds: float) -> None:
    server.pause()
    await linked([hub], state="silent")
    await asyncio.sleep(seconds)
    server.resume()


async def kill_clients(server: RedisServer, hub: Hub, seconds: float) -> None:
    with redis_client.Redis(port=server.port) as client:
        for _ in range(3):
            assert client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
            await asyncio.sleep(0.3)


async def pause_clients(server: RedisServer, hub: Hub, seconds: float) -> None:
    with redis_client.Redis(port=server.port) as client:
        client.execute_command("CLIENT", "PAUSE", int(seconds * 1000), "ALL")
    await asyncio.sleep(seconds)


async def sleep(server: RedisServer, hub: Hub, seconds: float) -> None:
    with redis_client.Redis(port=server.port, socket_timeout=60) as client:
        await asyncio.to_thread(client.execute_command, "DEBUG", "SLEEP", str(seconds))


async def replaced(hub: Hub) -> None:
    """Kill the bridge and wait for its successor."""
    pid = await bridge_pid(hub)
    assert pid is not None
    os.kill(pid, signal.SIGKILL)

    async with asyncio.timeout(20):
        while await bridge_pid(hub) in (None, pid):
            await asyncio.sleep(0.02)


async def bridge_pid(hub: Hub) -> int | None:
    status = await asyncio.to_thread(hub.status)
    pid: int | None = status["bridge"]["pid"]
    return pid


async def kill_bridge(server: RedisServer, hub: Hub, seconds: float) -> None:
    for _ in range(3):
        await replaced(hub)
        await linked([hub])


async def kill_bridge_while_redis_is_away(server: RedisServer, hub: Hub, seconds: float) -> None:
    server.pause()
    await asyncio.sleep(0.5)
    await replaced(hub)
    await asyncio.sleep(0.5)
    server.resume()


async def flush(server: RedisServer, hub: Hub, seconds: float) -> None:
    with redis_client.Redis(port=server.port) as client:
        client.flushall()


KEPT = [kill_and_restart, stand_still, kill_clients, pause_clients, sleep]
"""After these nothing may be missing, where Redis keeps its data."""


async def suffer(
    server: RedisServer, hubs: list[Hub], fault: Fault, seconds: float, rate: float = 200.0
) -> list[int]:
    """Publish on both hosts, let something happen, and balance the books; answers what each host counts as missing."""
    readers = [await reader(hub, "a/#") for hub in hubs]
    publishers = [await publisher(hub, number, rate) for number, hub in enumerate(hubs)]
    await asyncio.sleep(0.5)
    await fault(server, hubs[0], seconds)
    await linked(hubs)
    await asyncio.sleep(0.5)
    sent = [await each.stop() for each in publishers]
    gaps = []
    for number, (hub, listener) in enumerate(zip(hubs, readers, strict=True)):

        def balanced(hub: Hub = hub, number: int = number) -> bool:
            return len(readers[number].got) + total(hub, "gaps") == sum(sent)

        await until_async(balanced, 20, f"host {number}: {len(listener.got)}, {total(hub, 'gaps')} of {sent}")
        assert listener.numbers(number) == list(range(sent[number]))
        others = listener.numbers(1 - number)
        assert len(set(others)) == len(others)
        for topic in range(5):
            there = [n for n in others if n % 5 == topic]
            assert there == sorted(there)
        local = sorted(listener.delays[i] for i, m in enumerate(listener.got) if m["p"] == number)
        assert local[int(len(local) * 0.99)] < LOCAL_BOUND
        gaps.append(total(hub, "gaps"))
    return gaps


SECONDS = [2.0, pytest.param(10.0, marks=pytest.mark.long)]


@pytest.mark.parametrize("seconds", SECONDS)
@pytest.mark.parametrize("fault", KEPT, ids=lambda fault: fault.__name__)
def test_redis_fails_and_keeps_its_data(tmp_path: Path, fault: Fault, seconds: float) -> None:
    keeps = ("--appendonly", "yes", "--appendfsync", "always", "--enable-debug-command", "yes")
    with redis_server(tmp_path, *keeps) as server, hosts([server.url] * 2, workers=1) as hubs:

        async def main() -> None:
            assert await suffer(server, hubs, fault, seconds) == [0, 0]

        play(hubs, main(), 55 if seconds < 5 else 200)
        assert [total(hub, "dropped") for hub in hubs] == [0, 0]


@pytest.mark.parametrize("fault", [kill_and_restart, flush], ids=lambda fault: fault.__name__)
def test_redis_loses_its_data_and_what_is_missing_is_counted(tmp_path: Path, fault: Fault) -> None:
    with redis_server(tmp_path) as server, hosts([server.url] * 2, workers=1) as hubs:

        async def main() -> None:
            await suffer(server, hubs, fault, 1.0)  # the books balance: that is the test

        play(hubs, main())


@pytest.mark.parametrize("seconds", SECONDS)
def test_a_way_that_swallows_everything_is_noticed(tmp_path: Path, seconds: float) -> None:
    with redis_server(tmp_path) as server, Proxy(server.port) as proxy:

        async def swallow(server: RedisServer, hub: Hub, seconds: float) -> None:
            proxy.hold()
            await linked([hub], state="silent")
            await asyncio.sleep(seconds)
            proxy.resume()

        with hosts([f"redis://127.0.0.1:{proxy.port}", server.url], workers=1) as hubs:

            async def main() -> None:
                assert await suffer(server, hubs, swallow, seconds) == [0, 0]

            play(hubs, main())


@pytest.mark.parametrize(
    "fault", [kill_bridge, kill_bridge_while_redis_is_away], ids=lambda fault: fault.__name__
)
def test_a_killed_bridge_has_a_successor_that_forgets_nothing(tmp_path: Path, fault: Fault) -> None:
    with redis_server(tmp_path) as server, hosts([server.url] * 2, workers=2) as hubs:

        async def main() -> None:
            assert await suffer(server, hubs, fault, 0, rate=1000) == [0, 0]

        play(hubs, main())
        assert [total(hub, "dropped") for hub in hubs] == [0, 0]


def test_what_was_trimmed_before_it_was_read_is_counted(tmp_path: Path) -> None:
    with redis_server(tmp_path) as server, Proxy(server.port) as proxy:

        async def trim(server: RedisServer, hub: Hub, seconds: float) -> None:
            proxy.hold()
            await asyncio.sleep(1.5)
            with redis_client.Redis(port=server.port) as client:
                for shard in range(16):
                    client.xtrim(f"flockwire:{shard}", maxlen=2, approximate=False)
            proxy.resume()

        with hosts([f"redis://127.0.0.1:{proxy.port}", server.url], workers=1) as hubs:

            async def main() -> None:
                assert (await suffer(server, hubs, trim, 0))[0] > 50

            play(hubs, main())
            until(lambda: "did not arrive: trimmed" in hubs[0].log())  # it is counted first
