"""Connections, channels, start and end of a ``WebSocketManager``, and which broker it takes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed

from ipc.runtime import RuntimeDirError
from tests.support import until_async
from tests.workers.server_fixture import runtime_dir, serving, uvrun
from tests.workers.test_manager import BROKERS, application, live_on, next_json
from workers.broker_interface import BrokerInterface
from workers.brokers import InMemoryBroker, IpcBroker, create_broker
from workers.connection import Connection
from workers.manager import WebSocketManager

# --- connections ---


def test_connections_come_and_go_without_complaint() -> None:
    async def main() -> None:
        async with live_on("ipc") as live:
            m = live.manager
            clients = [await live.client(f"/{n}") for n in range(3)]
            await until_async(lambda: len(m.active_connections) == 3, 3.0)
            connections = list(m)
            assert [c.id for c in connections] == ["0", "1", "2"] == [c.id for c in m.active_connections]
            m.active_connections.clear()  # a copy
            assert len(m.active_connections) == 3
            m.remove_connection(connections[0])
            await m.remove_connection(connections[0])
            m.broadcast(1)
            await m.close_connection(connections[1], 4000)
            await m.close_connection(connections[1])
            m.remove_connection(connections[1])
            with pytest.raises(ConnectionClosed):
                assert await next_json(clients[1]) == 1
                await clients[1].recv()
            assert clients[1].close_code == 4000
            assert [c.id for c in m] == ["2"]
            # Who was only removed is still connected, and gets nothing more.
            await clients[0].ping()
            m.set_conn_id(connections[2], "x")
            await m.set_conn_id(connections[2], "y")
            assert [await next_json(clients[2]) for _ in range(3)] == [
                1,
                {"type": "set_conn_id", "conn_id": "x"},
                {"type": "set_conn_id", "conn_id": "y"},
            ]
            m.send_by_conn_id(["0", "2", "x", "y"], "direct")
            assert await next_json(clients[2]) == "direct"
            stranger = Connection(connections[2].websocket, "by hand")
            m.remove_connection(stranger)
            del stranger, connections
            for client in clients:
                await client.close()

    uvrun(main())


def test_a_thousand_come_and_go_and_nothing_is_kept() -> None:
    async def main() -> None:
        async with live_on("ipc") as live:
            tasks = len(asyncio.all_tasks())
            for round_ in range(5):
                clients = await asyncio.gather(
                    *[live.client(f"/{n % 7}?topic=t/{n % 5}/%23") for n in range(40)]
                )
                live.manager.send(f"t/{round_}/x", round_)
                for client in clients[round_::5]:
                    assert await next_json(client) == round_
                for number, client in enumerate(clients):
                    if number % 2:
                        await client.close()
                    else:
                        client.transport.abort()
                await until_async(lambda: not live.manager.active_connections, 5.0)
                clients.clear()
            await until_async(lambda: len(asyncio.all_tasks()) <= tasks, 5.0, "the end of all tasks")

    uvrun(main())


# --- channels, and managers beside each other ---


@BROKERS
def test_managers_on_one_channel_share_and_others_do_not(broker: str) -> None:
    async def main() -> None:
        with runtime_dir() as path:
            url = "memory://" if broker == "memory" else f"ipc://{path}"
            async with serving(application, broker=url, channel="one") as live:
                async with WebSocketManager("one", url) as twin, WebSocketManager("two", url) as stranger:
                    async with serving(lambda _: application(twin), broker=url, channel="unused") as other:
                        here, there = await live.client("/c?topic=t"), await other.client("/c?topic=t")
                        stranger.send("t", "no")
                        stranger.broadcast("no")
                        stranger.send_by_conn_id("c", "no")
                        for number, m in enumerate((live.manager, twin, live.manager)):
                            await m.send("t", number)
                            await m.broadcast(number)
                            await m.send_by_conn_id("c", number)
                        twin.send("t", "local", local=True)
                        twin.broadcast("end")
                        # In one process both are "this process".
                        for client in (here, there):
                            got = [await next_json(client) for _ in range(11)]
                            assert got == [0, 0, 0, 1, 1, 1, 2, 2, 2, "local", "end"]
                        await here.close()
                        await there.close()
                    await until_async(lambda: not twin.active_connections, 3.0)

    uvrun(main())


@BROKERS
def test_one_of_two_may_end_first(broker: str) -> None:
    async def main() -> None:
        async with live_on(broker) as live:
            url = "memory://" if broker == "memory" else f"ipc://{live.manager.broker.path}"  # type: ignore[attr-defined]
            client = await live.client("/c?topic=t")
            for _ in range(2):
                twin = WebSocketManager("hub", url)
                await twin.startup()
                twin.send("t", 1)
                await twin.shutdown()
                await twin.shutdown()
                live.manager.send("t", 2)
                assert [await next_json(client) for _ in range(2)] == [1, 2]
            await client.close()

    uvrun(main())


# --- life ---


@BROKERS
def test_startup_shutdown_startup(broker: str) -> None:
    async def main() -> None:
        async with live_on(broker) as live:
            m = live.manager
            await asyncio.gather(m.startup(), m.startup())
            for round_ in range(3):
                client = await live.client("/c?topic=t")
                await m.send("t", round_)
                assert await next_json(client) == round_
                await m.shutdown()
                assert (m.started, m.active_connections) == (False, [])
                with pytest.raises(ConnectionClosed):
                    await client.recv()
                assert client.close_code == 1012
                await m.shutdown()
                await m.startup()
                assert m.started

    uvrun(main())


def test_as_a_context_manager_and_what_it_leaves() -> None:
    async def main() -> None:
        with runtime_dir() as path:
            tasks = asyncio.all_tasks()
            async with WebSocketManager("c", f"ipc://{path}") as m:
                assert m.started and isinstance(m.broker, IpcBroker) and m.broker.peer is not None
            assert asyncio.all_tasks() == tasks
            assert m.broker.peer is None
            with pytest.raises(RuntimeError, match="startup"):
                m.send("t", 1)
            with pytest.raises(ZeroDivisionError):
                async with m:
                    raise ZeroDivisionError
            assert not m.started

    uvrun(main())


def test_before_startup() -> None:
    async def main() -> None:
        with runtime_dir() as path:
            m = WebSocketManager("c", f"ipc://{path}")
            sends: list[Callable[[], Any]] = [
                lambda: m.send("t", 1),
                lambda: m.broadcast(1),
                lambda: m.send_by_conn_id("c", 1),
            ]
            for send in sends:
                with pytest.raises(RuntimeError, match="startup"):
                    send()
            m.send("t", 1, local=True)
            assert m.active_connections == []
            await m.shutdown()
            unstarted = WebSocketManager("c", "memory://")
            await unstarted.send("t", 1)

    uvrun(main())


def test_a_directory_that_cannot_be_used_is_a_clear_error_and_may_be_tried_again(tmp_path: Any) -> None:
    async def main() -> None:
        path = tmp_path / "run"
        path.write_text("in the way")
        m = WebSocketManager("c", f"ipc://{path}")
        with pytest.raises(RuntimeDirError, match="run"):
            await m.startup()
        assert not m.started
        await m.shutdown()
        path.unlink()
        await m.startup()
        assert m.started
        await m.shutdown()

    uvrun(main())


# --- which broker ---


def test_broker_urls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FLOCKWIRE_RUNTIME_DIR", raising=False)
    makes: list[Callable[[str | None], Any]] = [create_broker, lambda url: WebSocketManager("c", url)]
    for make in makes:
        for bad in (None, "", "nonsense", "http://x", "kafka://x", "ipc://relative/path"):
            with pytest.raises(ValueError, match="Unknown broker url") as error:
                make(bad)
            assert repr(bad) in str(error.value)
            assert "ipc:///" in str(error.value) and (
                "memory://" in str(error.value) or bad == "ipc://relative/path"
            )
    monkeypatch.setenv("FLOCKWIRE_RUNTIME_DIR", "/dev/shm/some-hub")
    broker = WebSocketManager("c").broker
    assert isinstance(broker, IpcBroker) and broker.path == "/dev/shm/some-hub"
    assert isinstance(create_broker("memory://"), InMemoryBroker)
    default = create_broker("ipc://")
    assert isinstance(default, IpcBroker) and default.path.endswith("/default")
    elsewhere = create_broker("ipc:///some/where")
    assert isinstance(elsewhere, IpcBroker) and elsewhere.path == "/some/where"


def test_a_broker_class_is_looked_at_and_gets_the_keywords() -> None:
    class Incomplete:
        async def connect(self) -> None: ...

    class Abstract(BrokerInterface):
        pass

    for bad in (Incomplete, Abstract, int):
        with pytest.raises(ValueError, match="publish and get_message"):
            WebSocketManager("c", broker_class=bad)
    manager = WebSocketManager("c", broker_class=InMemoryBroker)
    assert isinstance(manager.broker, InMemoryBroker)
    with pytest.raises(TypeError):
        WebSocketManager("c", broker_class=InMemoryBroker, unknown=1)
