"""Every member of ``WebSocketManager`` (contract section 6), in one process: over memory and over the bus."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocket
from websockets.asyncio.client import ClientConnection

from ipc.rules import Rules, TopicRule
from ipc.topics import InvalidTopic
from tests.support import until_async
from tests.workers.server_fixture import Live, runtime_dir, serving, uvrun
from workers.manager import WebSocketManager
from workers.message import Message


def application(manager: WebSocketManager) -> Any:
    """What users write: every JSON value a client sends goes to the manager."""

    async def endpoint(websocket: WebSocket) -> None:
        connection = await manager.new_connection(
            websocket, websocket.path_params["conn_id"], websocket.query_params.get("topic")
        )
        async for value in connection.iter_json():
            await manager.receive(connection, value)
        await manager.remove_connection(connection)

    return Starlette(routes=[WebSocketRoute("/{conn_id}", endpoint)])


@asynccontextmanager
async def live_on(broker: str, **options: Any) -> AsyncIterator[Live]:
    """The application on ``memory`` or ``ipc``."""
    if broker == "memory":
        async with serving(application, **options) as live:
            yield live
    else:
        with runtime_dir() as path:
            async with serving(application, broker=f"ipc://{path}", **options) as live:
                yield live


BROKERS = pytest.mark.parametrize("broker", ["memory", "ipc"])


async def next_json(client: ClientConnection) -> Any:
    async with asyncio.timeout(5.0):
        return json.loads(await client.recv())


async def nothing_more(client: ClientConnection, live: Live) -> None:
    """What had been sent before would come before this."""
    await live.manager.broadcast({"probe": 1})
    assert await next_json(client) == {"probe": 1}


# --- sending ---


@BROKERS
@pytest.mark.parametrize("awaited", [True, False])
def test_all_forms_of_sending(broker: str, awaited: bool) -> None:
    async def main() -> None:
        async with live_on(broker) as live:
            m = live.manager
            a, b = await live.client("/a?topic=t/%2B"), await live.client("/b")

            async def done(accepted: Any) -> None:
                if awaited:
                    assert await accepted is None

            await done(m.send("t/x", {"n": 1}))
            await done(m.send(topic="t/x", data=[2]))
            await done(m.send(Message(type="send", topic="t/x", data={"n": 3})))
            await done(m.send_msg(Message(type="send", topic="t/x", data={"n": 4})))
            await done(m.send("t/x", None, local=True))
            await done(m.send("nobody", {"n": 0}))
            await m.publish("t/x", "six")
            wanted: Any
            for wanted in ({"n": 1}, [2], {"n": 3}, {"n": 4}, None, "six"):
                assert await next_json(a) == wanted
            await done(m.broadcast({"n": 1}))
            await done(m.broadcast(Message(type="broadcast", data=2)))
            await done(m.send_msg(Message(type="broadcast", data=3)))
            await done(m.broadcast(data=4, local=True))
            for client in (a, b):
                for wanted in ({"n": 1}, 2, 3, 4):
                    assert await next_json(client) == wanted
            await done(m.send_by_conn_id("b", 1))
            await done(m.send_by_conn_id(["b", "b", "nobody"], 2))
            await done(m.send_by_conn_id(Message(type="send_by_conn_id", conn_id="b", data=3)))
            await done(m.send_by_conn_id(Message(type="send_by_conn_id", conn_id=["b", "a"], data=4)))
            await done(m.send_msg(Message(typ="send_by_conn_id", conn_id="b", data=5)))
            await done(m.send_by_conn_id(conn_id="b", data=6, local=True))
            await done(m.send_by_conn_id([], 7))
            for wanted in (1, 2, 3, 4, 5, 6):
                assert await next_json(b) == wanted
            assert await next_json(a) == 4
            await nothing_more(a, live)
            await nothing_more(b, live)
            await a.close()
            await b.close()

    uvrun(main())


def test_what_cannot_be_sent_is_said_at_once() -> None:
    async def main() -> None:
        async with live_on("memory") as live:
            m = live.manager
            for topic in ("", "a/#", "+", "x" * 256, "a\0b", "/".join("a" * 40)):
                with pytest.raises(InvalidTopic):
                    m.send(topic, {})
                with pytest.raises(InvalidTopic):
                    await m.publish(topic, {})
            with pytest.raises(TypeError):
                m.send("a", object())
            with pytest.raises(TypeError, match="what to send"):
                m.send("a")
            with pytest.raises(TypeError, match="what to send"):
                m.send_by_conn_id("a")
            with pytest.raises(ValueError, match="surrogate|UTF-8|utf-8"):
                m.broadcast("\ud800")
            deep: list[Any] = []
            for _ in range(100_000):
                deep = [deep]
            with pytest.raises(ValueError, match="deep"):
                m.broadcast(deep)
            with pytest.raises(InvalidTopic):
                m.send_msg(Message(type="connect", data={}))

    uvrun(main())


def test_the_same_id_more_than_once_gets_it_everywhere() -> None:
    async def main() -> None:
        async with live_on("ipc") as live:
            clients = [await live.client("/same") for _ in range(3)]
            live.manager.send_by_conn_id("same", 1)
            for client in clients:
                assert await next_json(client) == 1
            await clients[0].close()
            await until_async(lambda: len(live.manager.active_connections) == 2, 3.0)
            live.manager.send_by_conn_id("same", 2)
            for client in clients[1:]:
                assert await next_json(client) == 2
                await client.close()

    uvrun(main())


def test_from_a_thread_of_the_application() -> None:
    """An endpoint without ``async`` runs in one."""

    async def main() -> None:
        for broker in ("memory", "ipc"):
            async with live_on(broker) as live:
                client = await live.client("/c?topic=t")

                def publish() -> None:
                    for n in range(100):
                        live.manager.send("t", n)
                    live.manager.broadcast("all")
                    live.manager.send_by_conn_id("c", "you")

                thread = threading.Thread(target=publish)
                thread.start()
                assert [await next_json(client) for _ in range(102)] == [*range(100), "all", "you"]
                thread.join()
                await client.close()

    uvrun(main())


# --- receiving ---


@BROKERS
def test_what_clients_say(broker: str) -> None:
    async def main() -> None:
        async with live_on(broker, max_subscriptions=3) as live:
            client = await live.client("/c")

            async def say(value: Any) -> Any:
                await client.send(json.dumps(value))
                return await next_json(client)

            subscribed = await say({"type": "subscribe", "topic": "a/+", "ack": {"id": 7}})
            assert subscribed == {"type": "ack", "ack": {"id": 7}}
            assert await say({"type": "send", "topic": "a/b", "conn_id": "ignored", "x": 1, "y": None}) == {
                "x": 1,
                "y": None,
            }
            assert await say({"type": "broadcast", "topic": "ignored", "x": 2}) == {"x": 2}
            assert await say({"type": "send_by_conn_id", "conn_id": ["c", "d"], "x": 3}) == {"x": 3}
            assert await say({"type": "send_by_conn_id", "conn_id": "c", "x": 4}) == {"x": 4}
            assert await say({"type": "connect", "ack": False}) == {"type": "ack", "ack": False}
            assert await say({"type": "unsubscribe", "topic": "never", "ack": 1}) == {"type": "ack", "ack": 1}
            for bad in (
                *(None, 5, "text", [], [{"type": "connect"}], {}, {"type": None}, {"type": 7}),
                *({"type": "nonsense"}, {"type": "__init__"}, {"type": "active_connections"}),
                *({"type": "set_conn_id", "conn_id": "x"}, {"type": "send"}, {"type": "send", "topic": 5}),
                *({"type": "send", "topic": "a/#"}, {"type": "send", "topic": ""}),
                *({"type": "subscribe"}, {"type": "subscribe", "topic": "a/#/b"}, {"type": "unsubscribe"}),
                *({"type": "subscribe", "topic": "x" * 70_0}, {"type": "subscribe", "topic": ["a"]}),
                *({"type": "send_by_conn_id"}, {"type": "send_by_conn_id", "conn_id": []}),
                *({"type": "send_by_conn_id", "conn_id": [5]}, {"type": "send_by_conn_id", "conn_id": {}}),
            ):
                answer = await say(bad)
                assert (answer["type"], answer["code"]) == ("error", 107), bad
                assert "\n" not in answer["error"] and "0x" not in answer["error"], answer
                assert await say({"type": "connect", "ack": 1}) == {"type": "ack", "ack": 1}
            answer = await say({"type": "send", "topic": "+", "ack": "mine"})
            assert (answer["code"], answer["ack"]) == (107, "mine")
            for topic in ("b", "c"):
                await say({"type": "subscribe", "topic": topic, "ack": 1})
            assert (await say({"type": "subscribe", "topic": "d"}))["code"] == 106
            assert (await say({"type": "subscribe", "topic": "c", "ack": 1}))["type"] == "ack"
            await nothing_more(client, live)
            await client.close()

    uvrun(main())


def test_a_message_object_is_received_too_and_left_as_it_was() -> None:
    async def main() -> None:
        async with live_on("memory") as live:
            client = await live.client("/c")
            await until_async(lambda: live.manager.active_connections, 3.0)
            (connection,) = live.manager
            subscribe = Message(type="subscribe", topic="t", data={})
            message = Message(type="send", topic="t", data={"n": 1})
            given = {"type": "send", "topic": "t", "n": 2}
            for thing in (subscribe, message, given):
                await live.manager.receive(connection, thing)
            assert (message.data, given) == ({"n": 1}, {"type": "send", "topic": "t", "n": 2})
            assert [await next_json(client) for _ in range(2)] == [{"n": 1}, {"n": 2}]
            del connection
            await client.close()

    uvrun(main())


def test_topic_rules_bind_clients_and_not_the_application() -> None:
    rules = Rules(
        topics={"closed/#": TopicRule(publish="nobody", subscribe="nobody")},
        client_broadcast="nobody",
        client_direct="nobody",
    )

    async def main() -> None:
        async with live_on("ipc", rules=rules) as live:
            client = await live.client("/c")
            for refused in (
                {"type": "send", "topic": "closed/a"},
                {"type": "subscribe", "topic": "closed/a"},
                {"type": "subscribe", "topic": "#"},
                {"type": "broadcast"},
                {"type": "send_by_conn_id", "conn_id": "c"},
            ):
                await client.send(json.dumps(refused))
                assert (await next_json(client))["code"] == 103, refused
            (connection,) = live.manager
            connection.topics.add("closed/#")
            del connection
            live.manager.send("closed/a", 1)
            live.manager.send_by_conn_id("c", 2)
            assert [await next_json(client) for _ in range(2)] == [1, 2]
            await client.close()

    uvrun(main())
