"""Managers on brokers that have only ``BrokerInterface``: the user's own, and Redis with the original's wire format."""

from __future__ import annotations

import asyncio
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import redis

from ipc.peer import BusFull
from tests.redis_server import redis_server
from tests.support import until_async
from tests.workers.server_fixture import serving, uvrun
from tests.workers.test_manager import application, next_json
from workers.broker_interface import BrokerUnavailable
from workers.hub import create_hub
from workers.manager import WebSocketManager
from workers.message import Message
from workers.redis_broker import RedisBroker
from workers.transport import MAX_OUTBOX


class Shelf:
    """A broker as a user would write it, without deriving from anything; it gives back what it is given."""

    made: list[Shelf] = []

    def __init__(self, *, as_dict: bool = True) -> None:
        self.log: list[Any] = []
        self.published: list[tuple[str, Any]] = []
        self.waiting: asyncio.Queue[Any] = asyncio.Queue()
        self.as_dict = as_dict
        self.asked = 0
        self.gate = asyncio.Event()
        self.gate.set()
        Shelf.made.append(self)

    async def connect(self) -> None:
        self.log.append("connect")

    async def disconnect(self) -> None:
        self.log.append("disconnect")

    async def subscribe(self, channel: str) -> None:
        self.log.append(("subscribe", channel))

    async def unsubscribe(self, channel: str) -> None:
        self.log.append(("unsubscribe", channel))

    async def publish(self, channel: str, message: Any) -> None:
        await self.gate.wait()
        if message.get("explode"):
            raise ConnectionError("the broker is down")
        self.published.append((channel, dict(message)))
        self.waiting.put_nowait(message if self.as_dict else Message.from_client_message(data=message))

    async def get_message(self, **kwargs: Any) -> Any:
        self.asked += 1
        found = await self.waiting.get()
        if isinstance(found, Exception):
            raise found
        return found


def own_broker(manager: WebSocketManager) -> Shelf:
    """Its broker."""
    assert isinstance(manager.broker, Shelf)
    return manager.broker


@pytest.mark.parametrize("as_dict", [True, False])
def test_a_broker_of_the_users_carries_everything(as_dict: bool) -> None:
    async def main() -> None:
        manager = WebSocketManager("mine", broker_class=Shelf, as_dict=as_dict)
        shelf = own_broker(manager)
        async with manager, serving(lambda _: application(manager)) as live:
            assert shelf.log == ["connect", ("subscribe", "mine")]
            client = await live.client("/c?topic=t")
            data = {"n": 1}
            await manager.send("t", data)
            assert shelf.published == [("mine", {"type": "send", "topic": "t", "conn_id": None, "n": 1})]
            assert data == {"n": 1}
            await manager.broadcast({"n": 2})
            await manager.send_by_conn_id("c", {"n": 3})
            await manager.send_by_conn_id(["c", "d"], {"n": 4})
            await manager.publish("t", {"n": 5})
            assert [message for _, message in shelf.published[1:]] == [
                {"type": "broadcast", "topic": None, "conn_id": None, "n": 2},
                {"type": "send_by_conn_id", "topic": None, "conn_id": "c", "n": 3},
                {"type": "send_by_conn_id", "topic": None, "conn_id": ["c", "d"], "n": 4},
                {"type": "send", "topic": "t", "conn_id": None, "n": 5},
            ]
            await manager.send("t", {"n": 6}, local=True)
            assert len(shelf.published) == 5
            got = sorted([(await next_json(client))["n"] for _ in range(6)])
            assert got == [1, 2, 3, 4, 5, 6]
            await client.send('{"type":"send","topic":"t","n":7,"ack":1}')
            assert sorted([json.dumps(await next_json(client)) for _ in range(2)]) == [
                '{"n": 7}',
                '{"type": "ack", "ack": 1}',
            ]
            await client.close()
            await until_async(lambda: not manager.active_connections, 3.0)
        assert shelf.log[2:] == [("unsubscribe", "mine"), "disconnect"]

    uvrun(main())


def test_the_listener_survives_whatever_the_broker_does(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        manager = WebSocketManager("mine", broker_class=Shelf)
        shelf = own_broker(manager)
        async with manager, serving(lambda _: application(manager)) as live:
            client = await live.client("/c?topic=t")
            good = {"type": "send", "topic": "t", "conn_id": None, "n": 1}
            for nuisance in (
                *(None, {}, [], "text", 7, {"type": "send"}, {"type": "send", "topic": 5, "n": 0}),
                *({"type": "connect", "topic": None}, {"type": None}, {"type": "send", "topic": "a/#"}),
                *(
                    {"type": "send_by_conn_id", "conn_id": 7},
                    {"type": "send_by_conn_id"},
                    {"type": "shutdown"},
                ),
                *(
                    object(),
                    b"bytes",
                    {"type": "active_connections", "topic": "t/x"},
                    Message(type="x", data=1),
                ),
            ):
                shelf.waiting.put_nowait(nuisance)
                shelf.waiting.put_nowait(good)
                # Content that is no message costs no waiting: foreign processes could stop us with it.
                async with asyncio.timeout(0.5):
                    assert await next_json(client) == {"n": 1}, nuisance
            for failure in (ConnectionError("gone"), ValueError("strange"), TimeoutError()):
                shelf.waiting.put_nowait(failure)
                shelf.waiting.put_nowait(good)
                assert await next_json(client) == {"n": 1}
            await client.close()
            await until_async(lambda: not manager.active_connections, 3.0)

    with caplog.at_level(logging.WARNING, "workers"):
        uvrun(main())
    assert "get_message failed on channel 'mine': ConnectionError('gone')" in caplog.text


def test_a_broker_that_polls_burns_no_core_and_one_that_never_waits_starves_nobody() -> None:
    class Polling(Shelf):
        async def get_message(self, **kwargs: Any) -> Any:
            self.asked += 1
            return None

    class Eager(Shelf):
        async def get_message(self, **kwargs: Any) -> Any:
            self.asked += 1
            return {"type": "send", "topic": "t", "n": self.asked}

    async def main() -> None:
        for kind in (Polling, Eager):
            manager = WebSocketManager("mine", broker_class=kind)
            async with manager:
                loop = asyncio.get_running_loop()
                end = loop.time() + 0.3
                await until_async(lambda: loop.time() > end, 3.0)  # noqa: B023
                if kind is Polling:
                    assert own_broker(manager).asked < 100

    uvrun(main())


def test_a_message_the_broker_refuses_is_logged_and_the_next_ones_go(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def main() -> None:
        async with WebSocketManager("mine", broker_class=Shelf) as manager:
            manager.send("t", {"explode": 1})
            async with asyncio.timeout(5.0):
                with pytest.raises(ConnectionError, match="the broker is down"):
                    await manager.publish("t", {"explode": 1})
                await manager.send("t", {"n": 2})
            assert [message["n"] for _, message in own_broker(manager).published] == [2]

    uvrun(main())
    assert "did not take a message on channel 'mine'" in caplog.text and "the broker is down" in caplog.text


def test_an_ack_means_that_the_broker_has_taken_it() -> None:
    async def main() -> None:
        manager = WebSocketManager("mine", broker_class=Shelf)
        shelf = own_broker(manager)
        async with manager:
            for make in (application, create_hub):
                async with serving(lambda _: make(manager)) as live:  # noqa: B023
                    client = await live.client("/c" if make is application else "/ws/c")
                    shelf.gate.clear()
                    await client.send('{"type":"send","topic":"t","n":1,"ack":1}')
                    await client.send('{"type":"send","topic":"t","explode":1,"ack":2}')
                    await client.send('{"type":"connect","ack":3}')
                    assert (await next_json(client))["ack"] == 3
                    shelf.gate.set()
                    assert await next_json(client) == {"type": "ack", "ack": 1}
                    refused = await next_json(client)
                    assert (refused["type"], refused["code"], refused["ack"]) == ("error", 100, 2)
                    await client.close()
                    await until_async(lambda: not manager.active_connections, 3.0)

    uvrun(main())


def test_what_this_wire_format_cannot_carry_is_refused_at_once() -> None:
    async def main() -> None:
        async with WebSocketManager("mine", broker_class=Shelf) as manager:
            for data in ([1], "text", None, 7):
                with pytest.raises(ValueError, match="only objects"):
                    manager.send("t", data)
            for key in ("type", "topic", "conn_id"):
                with pytest.raises(ValueError, match=f"keys {key}"):
                    manager.broadcast({key: 1, "other": 2})

    uvrun(main())


def test_a_broker_that_stands_still_pushes_back() -> None:
    async def main() -> None:
        manager = WebSocketManager("mine", broker_class=Shelf)
        shelf = own_broker(manager)
        async with manager:
            shelf.gate.clear()
            waiting = asyncio.ensure_future(manager.send("t", {"n": 0}))
            for n in range(1, 2 * MAX_OUTBOX):
                manager.send("t", {"n": n})
            assert manager.transport.congested
            with pytest.raises(BusFull, match="await"):
                manager.send("t", {"n": -1})
            called: list[int] = []
            manager.transport.on_clear(lambda: called.append(1))
            await asyncio.sleep(0)
            assert not waiting.done() and not called
            shelf.gate.set()
            await waiting
            await manager.send("t", {"n": 2 * MAX_OUTBOX})
            assert called == [1] and not manager.transport.congested
            assert [message["n"] for _, message in shelf.published] == list(range(2 * MAX_OUTBOX + 1))

    uvrun(main())


def test_shutdown_publishes_what_waits_but_not_for_ever() -> None:
    async def main() -> None:
        manager = WebSocketManager("mine", broker_class=Shelf)
        shelf = own_broker(manager)
        await manager.startup()
        for n in range(10):
            manager.send("t", {"n": n})
        await manager.shutdown()
        assert len(shelf.published) == 10
        await manager.startup()
        shelf.gate.clear()
        waiting = asyncio.ensure_future(manager.send("t", {"n": "never"}))
        async with asyncio.timeout(3.0):
            await manager.shutdown()
            with pytest.raises(BrokerUnavailable, match="shut down before"):
                await waiting
        shelf.gate.set()
        await manager.startup()
        await manager.send("t", {"n": "new"})
        assert [message["n"] for _, message in shelf.published[10:]] == ["new"]
        await manager.shutdown()
        assert shelf.log.count("connect") == shelf.log.count("disconnect") == 3

    uvrun(main())


def test_a_broker_that_cannot_subscribe_is_disconnected_again() -> None:
    class Refusing(Shelf):
        async def subscribe(self, channel: str) -> None:
            raise PermissionError(channel)

    async def main() -> None:
        manager = WebSocketManager("mine", broker_class=Refusing)
        with pytest.raises(PermissionError):
            await manager.startup()
        assert own_broker(manager).log == ["connect", "disconnect"]
        assert not manager.started
        with pytest.raises(RuntimeError, match="startup"):
            manager.send("t", {})

    uvrun(main())


# --- Redis ---


def test_two_managers_over_redis_and_the_originals_wire_format(tmp_path: Path) -> None:
    async def main(url: str, plain: Any) -> None:
        async with (
            serving(application, broker=url, channel="chat") as live,
            serving(application, broker=url, channel="chat") as other,
            serving(application, broker=url, channel="else") as stranger,
        ):
            a, b = await live.client("/a?topic=t/%23"), await other.client("/b?topic=t/x")
            c = await stranger.client("/c?topic=t/x")
            await live.manager.send("t/x", {"n": 1})
            await other.manager.broadcast({"n": 2})
            await live.manager.send_by_conn_id(["a", "b"], {"n": 3})
            await b.send('{"type":"send","topic":"t/x","n":4}')
            for client in (a, b):
                # One connection publishes for each manager, so only each one's order is kept.
                assert sorted([(await next_json(client))["n"] for _ in range(4)]) == [1, 2, 3, 4]
            # An old process on the same channel, its noise, and what is none of us.
            for payload in (
                "no json",
                "[]",
                '{"type": "connect", "topic": null, "conn_id": null}',
                '{"type": "send", "topic": null}',
                '{"type": "send", "topic": "t/x", "conn_id": null, "from": "old"}',
            ):
                plain.publish("chat", payload)
            for client in (a, b):
                assert await next_json(client) == {"from": "old"}
            listener = plain.pubsub()
            listener.subscribe("chat")
            listener.get_message(timeout=5)
            await live.manager.publish("t/y", {"n": 5})
            seen = json.loads(listener.get_message(timeout=5)["data"])
            assert seen == {"type": "send", "topic": "t/y", "conn_id": None, "n": 5}
            listener.close()
            assert await next_json(a) == {"n": 5}
            await stranger.manager.broadcast({"n": 6})
            assert await next_json(c) == {"n": 6}
            for client in (a, b, c):
                await client.close()

    with redis_server(tmp_path) as server, redis.Redis(port=server.port) as plain:
        uvrun(main(server.url, plain))


def test_a_redis_that_comes_back_finds_the_manager_again(tmp_path: Path) -> None:
    async def main(server: Any) -> None:
        async with serving(application, broker=server.url, channel="chat") as live:
            client = await live.client("/c?topic=t")
            server.stop()
            await until_async(lambda: not live.manager.broker.listening, 5.0)  # type: ignore[attr-defined, arg-type, return-value]
            server.start()
            await until_async(lambda: live.manager.broker.listening, 10.0)  # type: ignore[attr-defined]
            await live.manager.send("t", {"n": 1})
            assert await next_json(client) == {"n": 1}
            await client.close()

    with redis_server(tmp_path) as server:
        uvrun(main(server), complaints=True)


def test_a_redis_that_is_not_there_is_said_at_startup() -> None:
    async def main() -> None:
        manager = WebSocketManager(
            "c", broker_class=RedisBroker, redis_url="redis://127.0.0.1:1", publish_timeout=0.3
        )
        with pytest.raises(ConnectionError, match="127.0.0.1:1"):
            await manager.startup()
        await manager.shutdown()

    uvrun(main())
