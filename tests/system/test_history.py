"""Topics with history over the plain protocol and the library: stored, ordered, acknowledged, healed."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import urllib.request
from typing import Any

import pytest

from ipc.publisher import Publisher
from tests.hub import Hub, acked, read_json, say

RULES = """
[topics."chat/#"]
history_size = 1000
history_ttl = 300

[topics."last/#"]
history_size = 1
"""


def readyz(hub: Hub) -> dict[str, Any]:
    with urllib.request.urlopen(f"http://127.0.0.1:{hub.port}/readyz", timeout=10) as answer:
        found: dict[str, Any] = json.load(answer)
        return found


def test_one_order_for_all_workers_and_patterns() -> None:
    with Hub(workers=3, config=RULES) as hub:

        async def main() -> None:
            readers = await hub.connect_many(
                [f"/ws/r{number}?topic={'chat/1' if number % 2 else 'chat/%23'}" for number in range(12)]
            )
            others = await hub.connect_many([f"/ws/o{number}?topic=plain" for number in range(3)])
            writers = await hub.connect_many([f"/ws/w{number}" for number in range(4)])

            async def publish(number: int) -> None:
                for count in range(50):
                    await acked(writers[number], ack=count, type="send", topic="chat/1", by=number, n=count)
                    await say(writers[number], type="send", topic="last/x", n=count)

            await asyncio.gather(*[publish(number) for number in range(4)])
            orders = []
            for reader in readers:
                orders.append([tuple((await read_json(reader)).values()) for _ in range(200)])
            assert all(order == orders[0] for order in orders)
            for number in range(4):
                assert [n for by, n in orders[0] if by == number] == list(range(50))
            await acked(writers[0], type="send", topic="plain", x=1)
            for other in others:
                assert await read_json(other) == {"x": 1}

        hub.run(main())
        state = readyz(hub)["history"]
        assert state["state"] == "ok"
        assert state["offset"] == 400
        assert "history            on" in hub.log()
    assert not os.path.exists(hub.runtime_dir)


def test_a_publisher_stores_too_and_idempotency_keys_hold() -> None:
    with Hub(workers=2, config=RULES) as hub:

        async def main() -> None:
            reader = await hub.connect("/ws/r?topic=chat/%23")

            def publish() -> None:
                with Publisher(hub.runtime_dir) as publisher:
                    first = publisher.publish("chat/a", {"n": 1}, idempotency_key="k")
                    again = publisher.publish("chat/a", {"n": 2}, idempotency_key="k")
                    second = publisher.publish("chat/a", {"n": 3})
                    assert first is not None and second is not None
                    assert first == again
                    assert second.offset == first.offset + 1
                    assert publisher.publish("plain", 1) is None

            await asyncio.to_thread(publish)
            async with Publisher(hub.runtime_dir) as publisher:
                position = await publisher.publish("chat/b", {"n": 4})
                assert position is not None
                assert position.epoch == readyz(hub)["history"]["epoch"]
            assert [(await read_json(reader))["n"] for _ in range(3)] == [1, 3, 4]

        hub.run(main())
        assert hub.command("publish", "chat/a", '{"n": 5}').returncode == 0
        assert readyz(hub)["history"]["offset"] == 4


DROPPING = """
from starlette.applications import Starlette
from workers import WebSocketManager, create_hub

manager = WebSocketManager("hub")
hub = create_hub(manager)

import contextlib

@contextlib.asynccontextmanager
async def lifespan(app):
    async with manager:
        manager.broker.peer.bus.drop_fraction = 0.2
        yield

app = Starlette(routes=hub.routes, lifespan=lifespan)
"""


def test_what_the_bus_loses_comes_from_the_store(tmp_path: Any) -> None:
    (tmp_path / "dropping.py").write_text(DROPPING)
    with Hub(workers=3, config=RULES, app="dropping:app", cwd=tmp_path) as hub:

        async def main() -> None:
            readers = await hub.connect_many([f"/ws/r{number}?topic=chat/1" for number in range(9)])
            writers = await hub.connect_many([f"/ws/w{number}" for number in range(3)])

            async def publish(number: int) -> None:
                for count in range(100):
                    await acked(writers[number], ack=count, type="send", topic="chat/1", by=number, n=count)

            await asyncio.gather(*[publish(number) for number in range(3)])
            orders = []
            for reader in readers:
                orders.append([tuple((await read_json(reader)).values()) for _ in range(300)])
            assert len(set(orders[0])) == 300
            assert all(order == orders[0] for order in orders)

        hub.run(main())
        assert hub.status()["totals"]["bus_gaps"] > 0


STOPPING = """
import os, signal
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route
from workers import WebSocketManager, create_hub

manager = WebSocketManager("hub")
hub = create_hub(manager)

async def stop(request):
    manager.broker.peer.log.store.transact(lambda writer: os.kill(os.getpid(), signal.SIGSTOP))

app = Starlette(
    routes=[Route("/stop", stop), Mount("/", hub)], lifespan=hub.router.lifespan_context
)
"""


def test_a_process_that_stops_inside_a_transaction_is_ended(tmp_path: Any) -> None:
    (tmp_path / "stopping.py").write_text(STOPPING)
    with Hub(workers=3, config=RULES, app="stopping:app", cwd=tmp_path) as hub:

        async def main() -> None:
            reader = await hub.connect("/ws/r?topic=chat/1&topic=plain")
            worker = hub.worker_of(reader)
            assert worker is not None
            _, one = await asyncio.open_connection("127.0.0.1", hub.port)
            stopped: set[int] = set()
            while not stopped:
                one.close()
                _, one = await asyncio.open_connection("127.0.0.1", hub.port)
                inode_pid = hub.worker_of_socket(one.get_extra_info("sockname")[1])
                if inode_pid not in (worker, None):
                    stopped.add(inode_pid)
            writer = await hub.connect_to(worker, "/ws/w")
            one.write(b"GET /stop HTTP/1.1\r\nHost: x\r\n\r\n")
            await one.drain()
            loop = asyncio.get_running_loop()
            while "(stopped)" not in _state(next(iter(stopped))):
                await asyncio.sleep(0.01)
            began = loop.time()
            await say(writer, type="send", topic="chat/1", n=1, ack=1)
            await acked(writer, ack="plain", type="send", topic="plain", n=2)
            assert loop.time() - began < 0.5
            assert await read_json(reader) == {"n": 2}
            assert (await read_json(writer, 3)) == {"type": "ack", "ack": 1}
            assert await read_json(reader) == {"n": 1}
            assert loop.time() - began < 3
            one.close()

        hub.run(main())
        hub.wait_ready()
        assert "stands still while it writes to the store" in hub.log()


def _state(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/status") as file:
            return next(line for line in file if line.startswith("State"))
    except OSError:
        return "(stopped)"


def test_a_full_store_is_an_error_for_the_publisher_and_live_delivery_goes_on() -> None:
    config = '[topics."chat/#"]\nhistory_size = 100000\n[topics."big"]\nhistory_size = 10\n'
    with Hub(workers=2, config=config, options=["--store-size", "2MiB", "--max-message-size", "4MiB"]) as hub:

        async def main() -> None:
            reader = await hub.connect("/ws/r?topic=plain&topic=big&topic=chat/1")
            writer = await hub.connect("/ws/w")
            await say(writer, type="send", topic="big", text="x" * 3_000_000, ack=1)
            answer = await read_json(writer)
            assert (answer["type"], answer["code"], answer["ack"]) == ("error", 107, 1)
            assert "too large" in answer["error"]
            await acked(writer, ack=2, type="send", topic="plain", n=1)
            assert await read_json(reader) == {"n": 1}
            for count in range(1000):
                answer = await acked(writer, ack=count, type="send", topic="chat/1", n=count, text="y" * 6000)
                assert answer["type"] == "ack"
                assert (await read_json(reader))["n"] == count

        hub.run(main())
        state = readyz(hub)["history"]
        assert state["evicted"] > 500
        assert state["bytes"] <= 2 << 20


def test_data_dir_outlives_the_hub(tmp_path: Any) -> None:
    data = tmp_path / "data"
    options = ["--data-dir", str(data)]
    epochs = []
    for ending in ("kill", "stop", "stop"):
        with Hub(workers=2, config=RULES, options=options) as hub:
            if ending == "kill":
                with Hub(workers=1, config=RULES, options=options, wait_ready=False) as other:
                    assert other.wait() == 4
                    assert "in use by another hub" in other.log()

            async def main() -> None:
                writer = await hub.connect("/ws/w")
                await acked(writer, type="send", topic="chat/1", n=1)

            hub.run(main())
            state = readyz(hub)["history"]
            epochs.append((state["epoch"], state["offset"]))
            if ending == "kill":
                os.killpg(hub.pid, signal.SIGKILL)
                hub.wait()
        assert data.exists()
    assert len({epoch for epoch, _ in epochs}) == 1
    assert [offset for _, offset in epochs] == [1, 2, 3]


@pytest.mark.parametrize("value", ["/proc/nothing/here"])
def test_a_data_dir_that_cannot_be_used_is_a_start_error(value: str) -> None:
    with Hub(workers=1, config=RULES, options=["--data-dir", value], wait_ready=False) as hub:
        assert hub.wait() == 3
        assert value in hub.log()
