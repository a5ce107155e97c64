"""Several hosts through one Redis: every message everywhere once, in its publisher's order, and never back."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.federation import hosts, linked, play, reader, total
from tests.hub import ROOT, Hub, acked, read_json, say
from tests.redis_server import redis_server


def check_everything(got: list[dict[str, Any]], publishers: int, each: int) -> None:
    """Each message once, each publisher's in order."""
    assert len(got) == publishers * each
    for publisher in range(publishers):
        assert [m["n"] for m in got if m["p"] == publisher] == list(range(each))


async def pour(hub: Hub, publisher: int, count: int) -> None:
    """Publish, waiting for an acknowledgement now and then."""
    client = await hub.connect("/ws/publisher")
    for number in range(count):
        await say(client, type="send", topic="a/b", p=publisher, n=number)
        if number % 200 == 199:
            await acked(client, type="connect", ack=number)
    await acked(client, type="connect", ack="end")


async def crowd(hubs: list[Hub], each: int) -> None:
    listening = [await reader(hub, "a/#") for hub in hubs for _ in range(2)]
    await asyncio.gather(*[pour(hub, n, each) for n, hub in enumerate(hubs)])
    for listener in listening:
        check_everything(await listener.has(len(hubs) * each, 400), len(hubs), each)


@pytest.mark.parametrize("each", [2000, pytest.param(33_334, marks=pytest.mark.long)])
def test_three_hosts_two_workers_each_message_once_everywhere(tmp_path: Path, each: int) -> None:
    with redis_server(tmp_path) as redis, hosts([redis.url] * 3) as hubs:
        play(hubs, crowd(hubs, each), 50 if each < 10_000 else 600)
        for hub in hubs:
            assert total(hub, "gaps") == total(hub, "dropped") == total(hub, "duplicates") == 0
            assert (total(hub, "out"), total(hub, "in")) == (each, 2 * each)


def test_broadcasts_and_direct_messages_cross(tmp_path: Path) -> None:
    with redis_server(tmp_path) as redis, hosts([redis.url] * 2, workers=1) as (here, there):

        async def main() -> None:
            anna, bert = await here.connect("/ws/anna"), await there.connect("/ws/bert")
            await say(anna, type="send_by_conn_id", conn_id=["bert"], text="hi")
            assert await read_json(bert) == {"text": "hi"}
            await say(bert, type="broadcast", text="all")
            assert await read_json(anna) == {"text": "all"}
            assert await read_json(bert) == {"text": "all"}

        play([here, there], main())


def test_a_publishing_program_reaches_the_other_host(tmp_path: Path) -> None:
    with redis_server(tmp_path) as redis, hosts([redis.url] * 2, workers=1) as (here, there):

        async def main() -> None:
            listener = await reader(there, "a/#")
            result = await asyncio.to_thread(here.command, "publish", "a/b", '{"x": 1}')
            assert (result.returncode, result.stderr) == (0, "")
            assert await listener.has(1) == [{"x": 1}]

        play([here, there], main())


def test_only_what_is_to_be_federated_leaves_the_host(tmp_path: Path) -> None:
    config = '[topics."chat/secret/#"]\nfederate = false\n'
    with (
        redis_server(tmp_path) as redis,
        Hub(1, options=("--redis-url", redis.url, "--federate", "chat/#"), config=config) as here,
        Hub(1, options=("--redis-url", redis.url)) as there,
    ):

        async def main() -> None:
            await linked([here, there])
            listener = await reader(there, "#&topic=$sys/#")
            client = await here.connect("/ws/publisher")
            for topic in ("news", "chat/secret/1", "$sys/x", "chat/1"):
                await acked(client, type="send", topic=topic, name=topic)
            assert await listener.has(1) == [{"name": "chat/1"}]

        play([here, there], main())
        assert total(here, "out") == total(there, "in") == 1


def test_prefixes_keep_hubs_apart_and_the_state_shows(tmp_path: Path) -> None:
    with (
        redis_server(tmp_path) as redis,
        hosts([redis.url], workers=1) as (here,),
        hosts([redis.url], "--redis-prefix", "other", workers=1) as (there,),
    ):

        async def main() -> None:
            listener = await reader(there, "#")
            client = await here.connect("/ws/publisher")
            await acked(client, type="send", topic="a", name="here")
            client = await there.connect("/ws/publisher")
            await acked(client, type="send", topic="a", name="there")
            assert await listener.has(1) == [{"name": "there"}]

        play([here, there], main())
        assert "federation: bridge ready, link ready" in here.command("status").stdout
        assert f"{redis.url}, prefix other, #" in there.log()


def test_without_redis_nothing_of_it_is_loaded() -> None:
    program = (
        "import sys, supervisor.serve, supervisor.cli, workers.worker, ipc.publisher\n"
        "print(*sorted(m for m in sys.modules if m.startswith(('redis', 'hiredis')) or 'bridge' in m))"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=30
    )
    assert (result.stdout.split(), result.stderr) == ([], "")
