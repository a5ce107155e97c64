"""Rooms meet on one worker when their members name them in the handshake; and nothing else about them changes."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from itertools import count

import pytest
import websockets
from websockets.asyncio.client import ClientConnection

from bench.proc import place
from tests.hub import Hub, acked, read_json, say
from tests.support import until_async
from workers.gathering import FEW, home

CROWD = FEW + 8


async def crowd(hub: Hub) -> list[ClientConnection]:
    """So many clients without a topic on each worker that they give others away."""
    pids = hub.worker_pids()
    held: dict[int | None, list[ClientConnection]] = {pid: [] for pid in pids}
    while min(map(len, held.values())) < CROWD:
        new = await hub.connect_many(["/ws/crowd"] * 20)
        ports = [client.transport.get_extra_info("sockname")[1] for client in new]
        for client, pid in zip(new, place(hub.port, ports, pids), strict=True):
            if len(held[pid]) < CROWD:
                held[pid].append(client)
            else:
                await client.close()
    return [client for clients in held.values() for client in clients]


def topics(hub: Hub, each: int) -> list[str]:
    """So many topics whose home is each of the listeners, in turn."""
    listeners = range(hub.workers)
    found: dict[int, list[str]] = {listener: [] for listener in listeners}
    for number in count():
        topic = f"room/{number}"
        found[home(topic, listeners)].append(topic)
        if min(map(len, found.values())) >= each:
            return [found[listener][at] for at in range(each) for listener in listeners]
    raise AssertionError


def sent_over_the_bus(hub: Hub) -> int:
    return sum(worker["bus_sent"] for worker in hub.status()["workers"])


def test_members_of_a_room_meet_and_what_they_say_does_not_cross() -> None:
    async def main(hub: Hub) -> None:
        await crowd(hub)
        rooms = {}
        for topic in topics(hub, 5):
            rooms[topic] = [await hub.connect(f"/ws/{topic[5:]}?topic={topic}") for _ in range(3)]
        for topic, members in rooms.items():
            assert len({hub.worker_of(client) for client in members}) == 1, topic
        assert len({hub.worker_of(members[0]) for members in rooms.values()}) == hub.workers
        before = sent_over_the_bus(hub)
        for topic, members in rooms.items():
            for number, client in enumerate(members):
                await acked(client, type="subscribe", topic="everywhere/else")
                await say(client, type="send", topic=topic, n=number, text="x" * 20_000)
                for other in members:
                    assert await read_json(other) == {"n": number, "text": "x" * 20_000}
        assert sent_over_the_bus(hub) == before

    with Hub(workers=2) as hub:
        hub.run(main(hub))


def test_who_was_handed_over_is_served_as_anybody_else() -> None:
    async def main(hub: Hub) -> None:
        await crowd(hub)
        for topic in topics(hub, 3):
            client = await hub.connect(f"/ws?topic={topic}")
            first = await read_json(client)
            assert first["type"] == "set_conn_id"
            other = await hub.connect("/ws/other")
            await acked(other, type="send_by_conn_id", conn_id=first["conn_id"], n=1)
            await acked(other, type="send", topic=topic, n=2)
            await say(other, type="broadcast", n=3)
            assert [await read_json(client) for _ in range(3)] == [{"n": 1}, {"n": 2}, {"n": 3}]
            assert (await client.ping()) is not None
            # A long head, cookies, a subprotocol that nobody speaks, another pattern, a wrong topic.
            odd = await hub.connect(
                f"/ws/odd?topic={topic}&topic=a/%23&topic=a/%23/b",
                additional_headers={"Cookie": "c" * 5000, "X-Name": "Zoë"},
                subprotocols=["none.such"],
            )
            assert (await read_json(odd))["code"] == 107
            assert odd.subprotocol is None
            with pytest.raises(websockets.InvalidStatus) as refused:
                await hub.connect(f"/ws?topic={topic}", origin="https://elsewhere.example")
            assert refused.value.response.status_code == 403
            # What Centrifuge clients subscribe to they say later; the address may give a hint.
            hinted = await hub.connect(f"/connection/websocket?topic={topic}")
            await hinted.send('{"id":1,"connect":{}}')
            assert json.loads(str(await hinted.recv()))["connect"]["ping"] > 0
            assert len({hub.worker_of(each) for each in (client, odd, hinted)}) == 1

    with Hub(workers=3) as hub:
        hub.run(main(hub))


def test_few_clients_stay_where_they_came() -> None:
    async def main(hub: Hub) -> None:
        for pid in hub.worker_pids():
            for topic in topics(hub, 2):
                await hub.connect_to(pid, f"/ws/x?topic={topic}")

    with Hub(workers=2) as hub:
        hub.run(main(hub))


def test_a_worker_that_is_fuller_gets_no_more() -> None:
    async def main(hub: Hub) -> None:
        await crowd(hub)
        homes = home("one", range(2))
        owner = hub.ready_workers()[homes]
        assert owner["listener"] == homes
        members = [await hub.connect("/ws/x?topic=one") for _ in range(CROWD)]
        there = sum(hub.worker_of(client) == owner["pid"] for client in members)
        assert CROWD // 4 <= there < CROWD, "some came to the other, and stayed with those who had"

    with Hub(workers=2) as hub:
        hub.run(main(hub))


def test_a_home_that_stands_still_or_dies_gets_nobody() -> None:
    async def main(hub: Hub) -> None:
        await crowd(hub)
        stopped, other = hub.ready_workers()
        rooms = [topic for topic in topics(hub, 10) if home(topic, range(2)) == stopped["listener"]]
        os.kill(stopped["pid"], signal.SIGSTOP)
        try:
            # From then on the kernel gives the stopped one nobody; nor must the other.
            await until_async(
                lambda: len(hub.ready_workers()) < 2, 10, "the stopped worker counts as stalled"
            )
            for topic in rooms:
                assert hub.worker_of(await hub.connect(f"/ws/x?topic={topic}")) == other["pid"]
        finally:
            os.kill(stopped["pid"], signal.SIGKILL)
        for topic in rooms:
            await hub.connect(f"/ws/y?topic={topic}-again")
        await asyncio.to_thread(hub.wait_ready)

    with Hub(workers=2) as hub:
        hub.run(main(hub))


def test_what_a_home_was_offered_before_it_was_killed_is_served_all_the_same() -> None:
    async def main(hub: Hub) -> None:
        await crowd(hub)
        stopped, other = hub.ready_workers()
        rooms = [topic for topic in topics(hub, 20) if home(topic, range(2)) == stopped["listener"]]
        before = len(os.listdir(f"/proc/{other['pid']}/fd"))
        os.kill(stopped["pid"], signal.SIGSTOP)  # its last heartbeat still counts
        clients = [asyncio.create_task(hub.connect(f"/ws/x?topic={topic}")) for topic in rooms]
        # Those that the other has accepted are offered to it, and wait.
        await until_async(
            lambda: len(os.listdir(f"/proc/{other['pid']}/fd")) > before, what="some came to the other"
        )
        os.kill(stopped["pid"], signal.SIGKILL)
        for topic, client in zip(rooms, await asyncio.gather(*clients), strict=True):
            await acked(client, type="subscribe", topic="y")
            await say(client, type="send", topic=topic, n=1)
            assert await read_json(client) == {"n": 1}

    with Hub(workers=2) as hub:
        hub.run(main(hub))


def test_a_reload_under_a_storm_of_rooms_refuses_nobody() -> None:
    async def main(hub: Hub) -> None:
        await crowd(hub)
        old = set(hub.worker_pids())
        done = asyncio.Event()
        served = 0

        async def storm(number: int) -> None:
            nonlocal served
            for turn in count():
                if done.is_set():
                    return
                client = await hub.connect(f"/ws/s?topic=storm/{number}/{turn // 2}")
                served += 1
                if turn % 4:
                    await client.close()

        storms = [asyncio.create_task(storm(number)) for number in range(8)]
        reload = await asyncio.to_thread(hub.command, "reload")
        assert reload.returncode == 0, reload.stderr
        await until_async(lambda: not old & set(hub.worker_pids()), 30, "all workers are new")
        done.set()
        await asyncio.gather(*storms)
        assert served > 100
        await until_async(lambda: len(hub.ready_workers()) == 2)

    with Hub(workers=2, options=("--drain-timeout", "5")) as hub:
        hub.run(main(hub))
        assert "Traceback" not in hub.log()
