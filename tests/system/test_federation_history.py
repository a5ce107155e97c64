"""History across hosts: what came from others is in each host's log, and a position is good on its own host only."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from pathlib import Path
from typing import Any

from tests.federation import hosts, linked, play, publisher
from tests.hub import Hub, acked, read_json, say
from tests.redis_server import redis_server

RULES = '[topics."chat/#"]\nhistory_size = 100000\n[topics."a/#"]\nhistory_size = 100000\n'


async def subscribe(
    hub: Hub, channel: str, position: dict[str, Any] | None = None
) -> tuple[Any, dict[str, Any]]:
    """A client of the Centrifuge protocol on one topic, from a position if it has one; and what it is told."""
    client = await hub.connect("/connection/websocket")
    await client.send('{"id":1,"connect":{}}')
    assert "connect" in await read_json(client)
    request: dict[str, Any] = {"channel": channel, "recoverable": True}
    if position is not None:
        request |= {"recover": True, "epoch": position["epoch"], "offset": position.get("offset", 0)}
    await client.send(json.dumps({"id": 2, "subscribe": request}))
    while True:
        answer = await read_json(client)
        if answer.get("id") == 2:
            return client, answer["subscribe"]


async def recovered(client: Any, answer: dict[str, Any], count: int) -> list[int]:
    """The numbers of so many messages: those in the answer, and those that follow it."""
    found = [publication["data"]["n"] for publication in answer.get("publications", [])]
    while len(found) < count:
        push = (await read_json(client)).get("push", {})
        if "pub" in push:
            found.append(push["pub"]["data"]["n"])
    return found


def test_recovery_covers_other_hosts_and_is_refused_on_another(tmp_path: Path) -> None:
    with redis_server(tmp_path) as redis, hosts([redis.url] * 2, config=RULES) as (here, there):

        async def main() -> None:
            client, position = await subscribe(there, "chat/1")
            await client.close()
            watcher = await there.connect("/ws/watcher?topic=chat/%23")
            near = await here.connect("/ws/near")
            far = await there.connect("/ws/far")
            for number in range(30):
                await say(near if number % 3 else far, type="send", topic="chat/1", n=number)
            seen = [(await read_json(watcher))["n"] for _ in range(30)]
            assert sorted(seen) == list(range(30))

            again, answer = await subscribe(there, "chat/1", position)
            assert answer["recovered"] is True
            assert await recovered(again, answer, 30) == seen
            _, answer = await subscribe(here, "chat/1", position)
            assert answer.get("recovered", False) is False
            assert answer["epoch"] != position["epoch"]

        play([here, there], main())


def test_a_killed_bridge_stores_nothing_twice_and_forgets_nothing(tmp_path: Path) -> None:
    with redis_server(tmp_path) as redis, hosts([redis.url] * 2, config=RULES) as (here, there):

        async def main() -> None:
            client, position = await subscribe(there, "a/#")
            await client.close()
            watcher = await there.connect("/ws/watcher?topic=a/%23")
            steady = await publisher(here, 0, rate=500)
            for _ in range(3):
                await asyncio.sleep(0.5)
                status = await asyncio.to_thread(there.status)
                os.kill(status["bridge"]["pid"], signal.SIGKILL)
                async with asyncio.timeout(20):
                    while not await asyncio.to_thread(replaced, there, status):
                        await asyncio.sleep(0.02)
                await linked([there])
            sent = await steady.stop()
            live = [(await read_json(watcher))["n"] for _ in range(sent)]
            again, answer = await subscribe(there, "a/#", position)
            stored = await recovered(again, answer, sent)
            assert answer["recovered"] is True
            assert sorted(live) == list(range(sent))
            assert stored == live

        play([here, there], main())


def replaced(hub: Hub, old: dict[str, Any]) -> bool:
    return hub.status()["bridge"]["pid"] not in (None, old["bridge"]["pid"])


def test_a_host_that_was_down_reads_on_where_it_was(tmp_path: Path) -> None:
    data = ("--data-dir", str(tmp_path / "data"))
    with redis_server(tmp_path) as redis, hosts([redis.url], config=RULES) as (other,):
        options = ("--redis-url", redis.url, *data)

        async def before(hub: Hub) -> None:
            await linked([hub])
            client, found = await subscribe(hub, "chat/1")
            await client.close()
            position.update(found)
            sender = await other.connect("/ws/sender")
            watcher = await hub.connect("/ws/watcher?topic=chat/1")
            await say(sender, type="send", topic="chat/1", n=0)
            assert (await read_json(watcher))["n"] == 0

        async def between() -> None:
            sender = await other.connect("/ws/sender")
            for number in range(1, 50):
                await acked(sender, type="send", topic="chat/1", n=number)

        async def after(hub: Hub) -> None:
            await linked([hub])
            client, answer = await subscribe(hub, "chat/1", position)
            assert answer["recovered"] is True
            assert await recovered(client, answer, 50) == list(range(50))

        position: dict[str, Any] = {}
        with Hub(2, options=options, config=RULES) as hub:
            identity = hub.status()["bridge"]["host_id"]
            play([hub, other], before(hub))
        play([other], between())
        with Hub(2, options=options, config=RULES) as hub:
            assert hub.status()["bridge"]["host_id"] == identity
            play([hub, other], after(hub))
