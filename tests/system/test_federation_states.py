"""What Redis refuses has a name: on the board, in `status` and `/readyz`, and in one line of the log."""

from __future__ import annotations

import asyncio
import json
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import redis as redis_client
from redis import exceptions

from ipc.bridge_link import Refused, Silent, judge
from ipc.federation import LinkState
from tests.federation import hosts, linked, play, reader, total
from tests.hub import Hub, acked
from tests.redis_server import redis_server
from tests.support import until_async

Act = Callable[[Any, str], object]

TROUBLES: dict[str, tuple[Act, Act]] = {
    "read-only": (
        lambda redis, host: redis.execute_command("REPLICAOF", "127.0.0.1", "1"),
        lambda redis, host: redis.execute_command("REPLICAOF", "NO", "ONE"),
    ),
    "wrong-type": (
        lambda redis, host: [redis.set(f"flockwire:{shard}", "mine") for shard in range(16)],
        lambda redis, host: redis.delete(*[f"flockwire:{shard}" for shard in range(16)]),
    ),
    "out-of-memory": (
        lambda redis, host: redis.config_set("maxmemory", 1),
        lambda redis, host: redis.config_set("maxmemory", 0),
    ),
    "refused": (
        lambda redis, host: redis.set(f"flockwire:host:{host}", "another", px=2000),
        lambda redis, host: None,  # the lease of the other one expires
    ),
}


def readyz(hub: Hub) -> dict[str, Any]:
    with urllib.request.urlopen(f"http://127.0.0.1:{hub.port}/readyz") as answer:
        details: dict[str, Any] = json.load(answer)
    return details


def test_each_trouble_has_a_name_and_ends_with_its_cause(tmp_path: Path) -> None:
    with redis_server(tmp_path) as server, hosts([server.url] * 2, workers=1) as (here, there):

        async def main() -> None:
            near, far = await reader(here, "a"), await reader(there, "a")
            client = await here.connect("/ws/publisher")
            host = here.status()["bridge"]["host_id"]
            sent = 0

            def balanced() -> bool:
                return len(far.got) + total(there, "gaps") >= sent

            with redis_client.Redis(port=server.port) as redis:
                for state, (begin, end) in TROUBLES.items():
                    begin(redis, host)
                    for _ in range(20):
                        await acked(client, type="send", topic="a", n=sent)
                        sent += 1
                    await linked([here], state=state)
                    assert (await asyncio.to_thread(readyz, here))["bridge"] == state
                    await near.has(sent)
                    end(redis, host)
                    await linked([here, there])
                    await until_async(balanced, 20, state)
            assert [m["n"] for m in near.got] == list(range(sent))
            assert len(far.got) + total(there, "gaps") == sent
            assert len({m["n"] for m in far.got}) == len(far.got)
            for state in TROUBLES:
                assert here.log().count(f"bridge: {state} ") == 1

        play([here, there], main())
        assert here.status()["state"] == "ready"
        assert total(here, "dropped") == 0


def test_a_wrong_password_is_said_and_never_shown(tmp_path: Path) -> None:
    with redis_server(tmp_path, "--requirepass", "right") as server:
        url = f"redis://:s3cr3t@127.0.0.1:{server.port}"
        with Hub(1, options=("--redis-url", url)) as hub:
            asyncio.run(linked([hub], state="denied"))
            with redis_client.Redis(port=server.port, password="right") as redis:
                redis.config_set("requirepass", "s3cr3t")
            asyncio.run(linked([hub]))
            said = hub.log() + json.dumps(hub.status()) + hub.command("status", "--json").stdout
        assert "s3cr3t" not in said
    refused = Hub(1, options=("--redis-url", "reddis://:s3cr3t@x:1"), wait_ready=False)
    with refused:
        assert refused.wait() == 2
        assert "--redis-url" in refused.log()
        assert "s3cr3t" not in refused.log()


def test_a_hub_starts_without_redis_and_brings_out_what_waited(tmp_path: Path) -> None:
    with redis_server(tmp_path) as server, hosts([server.url], workers=1) as (there,):
        server.stop()
        with Hub(2, options=("--redis-url", server.url)) as here:

            async def main() -> None:
                await linked([here], state="connecting")
                client = await here.connect("/ws/publisher")
                for n in range(100):
                    await acked(client, type="send", topic="a", n=n)
                far = await reader(there, "a")
                server.start()
                await linked([here, there])
                assert [m["n"] for m in await far.has(100)] == list(range(100))

            play([here, there], main())


def test_an_ordered_stop_brings_everything_out(tmp_path: Path) -> None:
    with redis_server(tmp_path) as server, hosts([server.url] * 2, workers=2) as (here, there):

        async def main() -> None:
            far = await reader(there, "a")
            client = await here.connect("/ws/publisher")
            for n in range(2000):
                await client.send(json.dumps({"type": "send", "topic": "a", "n": n}))
            await acked(client, type="connect", ack="end")
            stopped = await asyncio.to_thread(here.command, "stop")
            assert stopped.returncode == 0, stopped.stderr
            assert [m["n"] for m in await far.has(2000)] == list(range(2000))

        play([here, there], main())
        with redis_client.Redis(port=server.port) as redis:
            assert len(redis.keys("flockwire:host:*")) == 1


@pytest.mark.parametrize(
    ("error", "state"),
    [
        (exceptions.AuthenticationError("WRONGPASS"), LinkState.DENIED),
        (exceptions.NoPermissionError("no"), LinkState.DENIED),
        (exceptions.BusyLoadingError("Redis is loading"), LinkState.LOADING),
        (exceptions.ReadOnlyError("You can't write"), LinkState.READ_ONLY),
        (exceptions.OutOfMemoryError("command not allowed"), LinkState.OUT_OF_MEMORY),
        (exceptions.ResponseError("MISCONF Errors writing to the AOF file"), LinkState.OUT_OF_MEMORY),
        (exceptions.ResponseError("WRONGTYPE Operation against"), LinkState.WRONG_TYPE),
        (exceptions.ResponseError("ERR something new"), LinkState.FAULTY),
        (exceptions.ConnectionError("closed"), LinkState.CONNECTING),
        (ConnectionRefusedError(111, "refused"), LinkState.CONNECTING),
        (exceptions.TimeoutError("late"), LinkState.SILENT),
        (Silent("no answer"), LinkState.SILENT),
        (Refused("another"), LinkState.REFUSED),
    ],
)
def test_errors_have_states(error: Exception, state: LinkState) -> None:
    assert judge(error) is state
    assert LinkState.of(int(state)) is state


def test_an_unknown_number_is_no_error() -> None:
    assert LinkState.of(4711) is LinkState.FAULTY
