"""Clients that read too slowly, on real sockets (R9): what they get, when they go, and that nobody else notices."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from ipc.rules import Rules, TopicRule
from tests.support import until_async
from tests.workers.server_fixture import PING, TEXT, Live, RawClient, serving, uvrun
from workers.connection import Connection
from workers.fanout import current_fanout
from workers.hub import create_hub
from workers.manager import WebSocketManager
from workers.sinks import AsgiSink, SocketSink

FOREVER = 3600.0


class Wrapped:
    """A middleware that wraps ``send``, as many do: what is behind it is served by plain ASGI."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def passing(message: Any) -> None:
            await send(message)

        await self.app(scope, receive, passing)


def hub_behind_a_middleware(manager: WebSocketManager) -> Any:
    """The built-in hub by plain ASGI."""
    return Wrapped(create_hub(manager))


WAYS = pytest.mark.parametrize(
    ("app", "kind"), [(create_hub, SocketSink), (hub_behind_a_middleware, AsgiSink)], ids=["socket", "asgi"]
)


def sink_of(live: Live, conn_id: str) -> Any:
    """The sink of the one connection with this id."""
    (connection,) = [c for c in live.manager if c.id == conn_id]
    return connection.target[0]


async def stuck(live: Live, path: str) -> RawClient:
    """A client that reads nothing after its handshake."""
    client = await live.raw(path, receive_buffer=4096)
    client.writer.transport.pause_reading()  # type: ignore[attr-defined]
    return client


async def publish(live: Live, topic: str, first: int, last: int, size: int = 1000) -> None:
    """Numbered messages, with a turn of the loop after each few, as clients' would come."""
    for number in range(first, last):
        await live.manager.send(topic, {"n": number, "pad": "x" * size})
        if number % 16 == 0:
            await asyncio.sleep(0)


async def numbers(client: RawClient) -> tuple[list[int], int]:
    """What a client that reads again finds: the numbers, and the close code behind them."""
    client.writer.transport.resume_reading()  # type: ignore[attr-defined]
    found: list[int] = []
    while True:
        opcode, payload = await client.read()
        if opcode != TEXT:
            return found, int.from_bytes(payload[:2], "big")
        found.append(json.loads(payload)["n"])


@WAYS
def test_more_bytes_than_the_bound_close_it_whatever_the_time(
    app: Any, kind: type, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with serving(app, max_backlog=200_000, write_timeout=FOREVER) as live:
            slow, good = await stuck(live, "/ws/slow?topic=t"), await live.client("/ws/good?topic=t")
            assert type(sink_of(live, "slow")) is kind
            sent = 0
            most = 0
            while len(live.manager.active_connections) == 2:
                await publish(live, "t", sent, sent + 50)
                sent += 50
                most = max(most, sink_of(live, "slow").backlog_bytes if len(list(live.manager)) == 2 else 0)
                for _ in range(50):
                    await good.recv()
                assert sent < 30_000, "it is never closed"
            assert 0 < most <= 200_000 + (64 * 1024 + 1100 if kind is AsgiSink else 0)
            assert current_fanout().slow_closed == 1
            if kind is SocketSink:
                found, code = await numbers(slow)
                assert code == 1013
                assert found == list(range(len(found))) and len(found) > 100
            await slow.end()
            await publish(live, "t", sent, sent + 1)
            assert json.loads(await good.recv())["n"] == sent, "others were affected"
            await good.close()

    with caplog.at_level(logging.WARNING, "workers"):
        uvrun(main())
    assert "closed as slow (1013): more than 200000 bytes wait for it" in caplog.text


@WAYS
def test_no_byte_leaving_for_so_long_closes_it_whatever_the_size(
    app: Any, kind: type, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with serving(app, max_backlog=1 << 30, write_timeout=0.4) as live:
            slow, good = await stuck(live, "/ws/slow?topic=t"), await live.client("/ws/good?topic=t")
            sent = 0
            while sink_of(live, "slow").flowing:
                await publish(live, "t", sent, sent + 50)
                sent += 50
                for _ in range(50):
                    await good.recv()
            start = asyncio.get_running_loop().time()
            await until_async(lambda: len(live.manager.active_connections) == 1, 5.0, "the deadline")
            assert 0.3 < asyncio.get_running_loop().time() - start < 2.0
            assert current_fanout().slow_closed == 1
            if kind is SocketSink:
                found, code = await numbers(slow)
                assert code == 1013
                assert found == list(range(len(found)))
            await slow.end()
            await publish(live, "t", 1, 2)
            assert json.loads(await good.recv())["n"] == 1
            await good.close()

    with caplog.at_level(logging.WARNING, "workers"):
        uvrun(main())
    assert "closed as slow (1013): nothing left for 0.4 s" in caplog.text


def test_a_client_that_reads_little_by_little_is_not_slow() -> None:
    """The kernel wants more only when a third of its buffer is free; meanwhile bytes do leave."""

    async def main() -> None:
        async with serving(max_backlog=1 << 30, write_timeout=0.6) as live:
            client = await stuck(live, "/ws/slow?topic=t")
            sent = 0
            while sink_of(live, "slow").flowing:
                await publish(live, "t", sent, sent + 50)
                sent += 50
            loop = asyncio.get_running_loop()
            end = loop.time() + 2.0
            while loop.time() < end:
                client.writer.transport.resume_reading()  # type: ignore[attr-defined]
                await asyncio.sleep(0)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(0.05):
                        await client.reader.readexactly(20_000)
                client.writer.transport.pause_reading()  # type: ignore[attr-defined]
                waiting = loop.time() + 0.05
                await until_async(lambda: loop.time() > waiting, 1.0)  # noqa: B023
            assert len(live.manager.active_connections) == 1, "closed though it reads"
            assert not sink_of(live, "slow").flowing
            await client.end()

    uvrun(main())


def test_pings_do_not_count_as_progress() -> None:
    async def main() -> None:
        async with serving(max_backlog=1 << 30, write_timeout=0.6) as live:
            client = await stuck(live, "/ws/slow?topic=t")
            sent = 0
            while sink_of(live, "slow").flowing:
                await publish(live, "t", sent, sent + 50)
                sent += 50
            loop = asyncio.get_running_loop()
            end = loop.time() + 5.0
            while live.manager.active_connections:
                assert loop.time() < end, "its pings keep it"
                await client.send(PING, b"x")
                waiting = loop.time() + 0.05
                await until_async(lambda: loop.time() > waiting, 1.0)  # noqa: B023
            await client.end()

    uvrun(main())


@WAYS
def test_drop_oldest_keeps_it_and_gives_it_the_newest(app: Any, kind: type) -> None:
    rules = Rules(topics={"t": TopicRule(slow_consumer="drop_oldest")})

    async def main() -> None:
        async with serving(app, rules=rules, max_backlog=100_000, write_timeout=0.4) as live:
            slow = await stuck(live, "/ws/slow?topic=t")
            sent = 0
            while current_fanout().slow_dropped < 100:
                await publish(live, "t", sent, sent + 100)
                sent += 100
                assert sent < 30_000
            loop = asyncio.get_running_loop()
            waiting = loop.time() + 1.0
            await until_async(lambda: loop.time() > waiting, 3.0)
            assert len(live.manager.active_connections) == 1, "the policy is to drop, not to close"
            await live.manager.send("t", {"n": -1})
            slow.writer.transport.resume_reading()  # type: ignore[attr-defined]
            found = []
            while -1 not in found:
                found.append(json.loads(await slow.text())["n"])
            assert found[:-1] == sorted(found[:-1]) and found[-2] == sent - 1
            missing = sent - (len(found) - 1)
            assert missing == current_fanout().slow_dropped
            assert current_fanout().slow_closed == 0
            await slow.end()

    uvrun(main())


@WAYS
def test_latest_keeps_one_of_each_topic(app: Any, kind: type) -> None:
    rules = Rules(topics={"l/#": TopicRule(slow_consumer="latest")})

    async def main() -> None:
        async with serving(app, rules=rules, max_backlog=1 << 20, write_timeout=FOREVER) as live:
            slow = await stuck(live, "/ws/slow?topic=l/%23")
            sent = 0
            while sink_of(live, "slow").flowing:
                await publish(live, "l/a", sent, sent + 50)
                sent += 50
            for number in range(sent, sent + 3000):
                await live.manager.send(f"l/{'abc'[number % 3]}", {"n": number, "pad": "x" * 1000})
                await asyncio.sleep(0)
            assert sink_of(live, "slow")._backlog.size < 5000
            slow.writer.transport.resume_reading()  # type: ignore[attr-defined]
            found: list[int] = []
            while not found or found[-1] != sent + 2999:
                found.append(json.loads(await slow.text())["n"])
            assert found[-3:] == [sent + 2997, sent + 2998, sent + 2999]
            assert current_fanout().slow_closed == 0
            await slow.end()

    uvrun(main())


def test_a_policy_holds_also_where_a_turn_has_messages_of_several_topics() -> None:
    rules = Rules(topics={"l/#": TopicRule(slow_consumer="latest")})

    async def main() -> None:
        async with serving(rules=rules, max_backlog=1 << 20, write_timeout=0.4) as live:
            slow = await stuck(live, "/ws/slow?topic=l/%23")
            sent = 0
            while sink_of(live, "slow").flowing:
                for _ in range(20):
                    live.manager.send(f"l/{sent % 5}", {"n": sent, "pad": "x" * 1000})
                    sent += 1
                await asyncio.sleep(0)
            for number in range(sent, sent + 20):
                live.manager.send(f"l/{number % 5}", {"n": number, "pad": "x" * 1000})
            loop = asyncio.get_running_loop()
            waiting = loop.time() + 1.0
            await until_async(lambda: loop.time() > waiting, 3.0)
            assert len(live.manager.active_connections) == 1, "the policy is to keep the latest, not to close"
            found = await numbers_until(slow, sent + 19)
            assert found[-5:] == list(range(sent + 15, sent + 20))
            await slow.end()

    uvrun(main())


async def numbers_until(client: RawClient, last: int) -> list[int]:
    """What a client that reads again finds, up to this."""
    client.writer.transport.resume_reading()  # type: ignore[attr-defined]
    found: list[int] = []
    while not found or found[-1] != last:
        found.append(json.loads(await client.text())["n"])
    return found


def test_what_may_not_be_dropped_still_closes_a_client_that_also_has_what_may() -> None:
    rules = Rules(topics={"l/#": TopicRule(slow_consumer="latest")})

    async def main() -> None:
        async with serving(rules=rules, max_backlog=1 << 20, write_timeout=0.4) as live:
            slow = await stuck(live, "/ws/slow?topic=%23")
            sent = 0
            while sink_of(live, "slow").flowing:
                await publish(live, "l/a", sent, sent + 50)
                sent += 50
            await live.manager.send("other", {"n": 0})
            await until_async(lambda: not live.manager.active_connections, 5.0, "the deadline")
            await slow.end()

    uvrun(main())


def test_a_slow_client_without_a_manager_s_topic_is_the_endpoint_s_own_pace() -> None:
    """What an endpoint sends itself waits for its client, and is no backlog."""
    got: list[str] = []

    def app(manager: WebSocketManager) -> Any:
        async def endpoint(websocket: WebSocket) -> None:
            connection = await manager.new_connection(websocket, "paced")
            try:
                for number in range(100_000):
                    await connection.send_json({"n": number, "pad": "x" * 1000})
            except WebSocketDisconnect:
                got.append("disconnect")

        return Starlette(routes=[WebSocketRoute("/ws", endpoint)])

    async def main() -> None:
        for wrap in (False, True):
            async with serving(
                (lambda manager: Wrapped(app(manager))) if wrap else app,
                max_backlog=1 << 20,
                write_timeout=FOREVER,
            ) as live:
                client = await stuck(live, "/ws")
                await until_async(lambda: not sink_of(live, "paced").flowing, 5.0)
                assert sink_of(live, "paced").backlog_bytes < 1 << 20
                client.writer.transport.resume_reading()  # type: ignore[attr-defined]
                for number in range(6000):
                    assert json.loads(await client.text())["n"] == number
                await client.end()
                await until_async(lambda: len(got) == 1 + wrap, 5.0)  # noqa: B023

    uvrun(main())
    assert got == ["disconnect"] * 2


def test_a_publisher_that_awaits_lets_clients_by_asgi_read() -> None:
    """Megabytes in one go, to a client that reads: it is not slow, it has not been asked."""

    async def main() -> None:
        async with serving(hub_behind_a_middleware, max_backlog=1 << 20) as live:
            client = await live.client("/ws/x?topic=t")

            async def read() -> None:
                for number in range(3000):
                    assert json.loads(await client.recv())["n"] == number

            reading = asyncio.create_task(read())
            await asyncio.sleep(0)
            for number in range(3000):
                await live.manager.send("t", {"n": number, "pad": "x" * 1000})
            await reading
            await client.close()

    uvrun(main())


def test_shutdown_does_not_wait_for_a_client_that_does_not_read() -> None:
    async def main() -> None:
        for app in (create_hub, hub_behind_a_middleware):
            async with serving(app, max_backlog=1 << 30, write_timeout=0.3, leaves=False) as live:
                slow = await stuck(live, "/ws/slow?topic=t")
                sent = 0
                while sink_of(live, "slow").flowing:
                    await publish(live, "t", sent, sent + 50)
                    sent += 50
                async with asyncio.timeout(3.0):
                    await live.manager.shutdown()
                assert live.manager.active_connections == []
                await slow.end()

    uvrun(main())


def test_an_endpoint_learns_that_its_client_was_closed_as_slow() -> None:
    """Also by plain ASGI, where the server would tell it only when the client has taken the close frame."""
    ends: list[int] = []

    def app(manager: WebSocketManager) -> Any:
        async def endpoint(websocket: WebSocket) -> None:
            connection: Connection = await manager.new_connection(websocket, "slow", "t")
            try:
                while True:
                    await connection.receive_json()
            except WebSocketDisconnect as exc:
                ends.append(exc.code)

        return Starlette(routes=[WebSocketRoute("/ws", endpoint)])

    def wrapped(manager: WebSocketManager) -> Any:
        return Starlette(routes=app(manager).routes, middleware=[Middleware(Wrapped)])

    async def main() -> None:
        for make in (app, wrapped):
            async with serving(make, max_backlog=50_000, write_timeout=FOREVER) as live:
                slow = await stuck(live, "/ws")
                sent = 0
                while live.manager.active_connections:
                    await publish(live, "t", sent, sent + 50)
                    sent += 50
                    assert sent < 30_000
                await until_async(lambda: not live.server.server_state.tasks, 3.0, "the end of the endpoint")
                await slow.end()
        assert ends == [1013, 1013]

    uvrun(main())
