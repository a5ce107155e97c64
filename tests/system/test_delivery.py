"""Who gets what, how often and in which order, with real processes (R11, R12)."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
from collections import Counter, defaultdict

import pytest
from websockets.asyncio.client import ClientConnection

from tests.hub import Hub, acked, read_json, say
from tests.support import until


async def collect(client: ClientConnection, count: int, timeout: float = 40.0) -> list[dict[str, object]]:
    """Exactly so many messages."""
    async with asyncio.timeout(timeout):
        return [json.loads(await client.recv()) for _ in range(count)]


def test_four_hundred_clients_get_exactly_what_is_theirs() -> None:
    async def main(hub: Hub) -> None:
        clients = await hub.connect_many([f"/ws/c{n}?topic=room/{n % 10}&topic=all/%23" for n in range(400)])
        try:
            on_each = [worker["connections"] for worker in hub.wait_ready()]
            assert len(on_each) == 4
            for n in range(10):
                await say(clients[n * 7], type="send", topic=f"room/{n}", room=n)
            for n in range(20):
                await say(
                    clients[n], type="send_by_conn_id", conn_id=[f"c{n + 100}", f"c{n + 200}"], direct=n
                )
            await say(clients[0], type="broadcast", end=1)
            await say(clients[1], type="send", topic="all/x", end=2)
            for number, client in enumerate(clients):
                expected = 3 + (1 if 100 <= number < 120 or 200 <= number < 220 else 0)
                got = await collect(client, expected)
                wanted: list[dict[str, object]] = [{"room": number % 10}, {"end": 1}, {"end": 2}]
                if expected == 4:
                    wanted.append({"direct": number % 100})
                assert sorted(map(str, got)) == sorted(map(str, wanted)), number
            # Whatever was doubled would come before the answers to these.
            await asyncio.gather(*[acked(client, type="connect") for client in clients])
        finally:
            await asyncio.gather(*[client.close() for client in clients])

    with Hub(workers=4) as hub:
        hub.run(main(hub), 55)


async def ordered(hub: Hub, each: int) -> None:
    publishers = await hub.connect_many([f"/ws/p{n}" for n in range(4)])
    subscribers = await hub.connect_many(
        ["/ws/s?topic=order/%2B"] * 20 + ["/ws/s?topic=order/1&topic=order/2"] * 20
    )
    window = 100

    async def publish(number: int, client: ClientConnection) -> None:
        for n in range(each):
            for topic in range(4):
                message = {"type": "send", "topic": f"order/{topic}", "p": number, "t": topic, "n": n}
                if (n + 1) % window == 0 and topic == 3:
                    message["ack"] = n
                await client.send(json.dumps(message))
            if (n + 1) % window == 0:
                assert (await read_json(client, 60))["ack"] == n

    async def check(client: ClientConnection, topics: set[int]) -> None:
        following: dict[tuple[int, int], int] = defaultdict(int)
        for _ in range(each * 4 * len(topics)):
            message = json.loads(await client.recv())
            key = (message["p"], message["t"])
            assert message["n"] == following[key], (key, message["n"], following[key])
            following[key] += 1
        assert Counter(following.values()) == {each: 4 * len(topics)}
        await acked(client, type="connect")

    async with asyncio.TaskGroup() as group:
        for number, client in enumerate(publishers):
            group.create_task(publish(number, client))
        for number, client in enumerate(subscribers):
            group.create_task(check(client, set(range(4)) if number < 20 else {1, 2}))
    await asyncio.gather(*[client.close() for client in publishers + subscribers])


@pytest.mark.timeout(300)
def test_r12_nothing_lost_doubled_or_reordered() -> None:
    with Hub(workers=4) as hub:
        hub.run(ordered(hub, 2500), 280)
        dropped = [worker["bus_gaps"] for worker in hub.status()["workers"]]
        assert not any(dropped)


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_r12_long() -> None:
    with Hub(workers=4) as hub:
        hub.run(ordered(hub, 25000), 1150)


def test_an_acknowledged_subscribe_misses_nothing_published_elsewhere() -> None:
    """Ten thousand times: subscribe, and as soon as it is acknowledged publish through another connection."""

    async def pair(hub: Hub, lane: int, rounds: int) -> None:
        async with await hub.connect("/ws/sub") as subscriber, await hub.connect("/ws/pub") as publisher:
            for n in range(rounds):
                topic = f"race/{lane}/{n}"
                pattern = random.choice([topic, f"race/{lane}/+", f"race/{lane}/{n}/#"])
                await acked(subscriber, type="subscribe", topic=pattern)
                await say(publisher, type="send", topic=topic, n=n)
                assert await read_json(subscriber) == {"n": n}
                await acked(subscriber, type="unsubscribe", topic=pattern)

    async def main(hub: Hub) -> None:
        async with asyncio.TaskGroup() as group:
            for lane in range(20):
                group.create_task(pair(hub, lane, 500))

    with Hub(workers=4) as hub:
        hub.run(main(hub), 55)


def test_messages_to_a_connection_are_in_force_when_the_handshake_is_answered() -> None:
    async def main(hub: Hub) -> None:
        async with await hub.connect("/ws/pub") as publisher:
            for n in range(200):
                async with await hub.connect(f"/ws/new{n}?topic=born/{n}") as client:
                    await say(publisher, type="send", topic=f"born/{n}", a=n)
                    await say(publisher, type="send_by_conn_id", conn_id=f"new{n}", b=n)
                    await say(publisher, type="broadcast", c=n)
                    assert await read_json(client) == {"a": n}
                    assert await read_json(client) == {"b": n}
                    assert await read_json(client) == {"c": n}
                assert await read_json(publisher) == {"c": n}

    with Hub(workers=4) as hub:
        hub.run(main(hub))


async def burst_after_start(hub: Hub) -> None:
    subscribers = await hub.connect_many(["/ws/s?topic=start"] * 6)
    publishers = await hub.connect_many(["/ws/p"] * 6)
    for number, publisher in enumerate(publishers):
        for n in range(5):
            await say(publisher, type="send", topic="start", p=number, n=n)
    for subscriber in subscribers:
        got = await collect(subscriber, 30)
        assert Counter(m["p"] for m in got) == dict.fromkeys(range(6), 5)
    await asyncio.gather(*[client.close() for client in subscribers + publishers])


def replaced(hub: Hub, victim: int) -> None:
    """Wait for the successor of a killed worker, which may be backing off."""

    def look() -> bool:
        pids = hub.worker_pids()
        return victim not in pids and len(pids) == hub.workers

    until(look, 40, "the successor")


def restarts(hubs: int, kills: int) -> None:
    """A worker that is killed again and again backs off, so there are several hubs."""
    for _ in range(hubs):
        with Hub(workers=3) as hub:
            for _ in range(kills):
                hub.run(burst_after_start(hub))
                victim = random.choice(hub.worker_pids())
                os.kill(victim, signal.SIGKILL)
                replaced(hub, victim)
            hub.run(burst_after_start(hub))


def test_r11_publishing_right_after_a_restart_loses_nothing() -> None:
    restarts(2, 4)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_r11_hundred_times() -> None:
    restarts(20, 5)
