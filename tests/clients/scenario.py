"""What the official Python client sees. Run by the Python that has `centrifuge`: scenario.py URL; ends with 0 if all
was as it should be."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from typing import Any

import centrifuge
from centrifuge import Client, ClientEventHandler, SubscriptionEventHandler

URL = sys.argv[1]


async def until(condition: Callable[[], object], what: str) -> None:
    for _ in range(800):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"did not come true: {what}")


class Events(ClientEventHandler):  # type: ignore[misc, unused-ignore]
    def __init__(self) -> None:
        self.disconnected: list[int] = []
        self.connecting: list[int] = []

    async def on_disconnected(self, ctx: Any) -> None:
        self.disconnected.append(ctx.code)

    async def on_connecting(self, ctx: Any) -> None:
        self.connecting.append(ctx.code)


class Log(SubscriptionEventHandler):  # type: ignore[misc, unused-ignore]
    def __init__(self) -> None:
        self.publications: list[Any] = []
        self.subscribed: list[Any] = []
        self.unsubscribed: list[int] = []
        self.joins: list[str] = []
        self.leaves: list[str] = []

    async def on_publication(self, ctx: Any) -> None:
        self.publications.append(ctx.pub)

    async def on_subscribed(self, ctx: Any) -> None:
        self.subscribed.append(ctx)

    async def on_unsubscribed(self, ctx: Any) -> None:
        self.unsubscribed.append(ctx.code)

    async def on_join(self, ctx: Any) -> None:
        self.joins.append(ctx.info.user)

    async def on_leave(self, ctx: Any) -> None:
        self.leaves.append(ctx.info.user)


def client(**options: Any) -> tuple[Client, Events]:
    events = Events()
    return Client(URL, events=events, min_reconnect_delay=0.05, max_reconnect_delay=0.3, **options), events


async def refused(work: Any, code: int) -> None:
    try:
        await work
    except centrifuge.ReplyError as error:
        assert error.code == code, error
    else:
        raise AssertionError(f"error {code} was expected")


async def main() -> None:
    a, a_events = client(name="alice")
    b, _ = client(name="bob")
    log, wild = Log(), Log()
    chat = a.new_subscription("chat", events=log, recoverable=True, positioned=True, join_leave=True)
    pattern = b.new_subscription("h/#", events=wild, recoverable=True, positioned=True)
    for each in (chat, pattern):
        await each.subscribe()
    for one in (a, b):
        await one.connect()
    for each in (chat, pattern):
        await each.ready(8)
    assert log.subscribed[0].recoverable and log.subscribed[0].positioned
    await chat.publish({"a": 1})
    await until(lambda: len(log.publications) == 1, "own publication")
    assert log.publications[0].offset > 0 and log.publications[0].info.user == "alice"
    await a.publish("h/1/2", "x")
    await until(lambda: len(wild.publications) == 1, "through the wildcard")
    assert wild.publications[0].tags["topic"] == "h/1/2"

    second = b.new_subscription("chat")
    await second.subscribe()
    await until(lambda: "bob" in log.joins, "join")
    assert len((await chat.presence()).clients) == 2
    stats = await chat.presence_stats()
    assert (stats.num_clients, stats.num_users) == (2, 2)
    await second.unsubscribe()
    await until(lambda: "bob" in log.leaves, "leave")

    page = await chat.history(limit=5)
    assert page.publications and page.epoch
    assert (await chat.history(limit=1, reverse=True)).publications[0].data == {"a": 1}
    assert (await a.rpc("echo", {"x": None})).data == {"x": None}
    await refused(a.rpc("none", None), 104)
    await refused(a.publish("a/+", 1), 107)

    await a.rpc("unsub", {"channel": "chat", "code": 2500})
    await until(lambda: len(log.subscribed) == 2 and log.subscribed[1].recovered, "2500 recovers")
    await a.rpc("unsub", {"channel": "chat", "code": 2000})
    await until(lambda: log.unsubscribed == [2000], "2000 is for good")

    for _ in range(4):
        count, before = len(wild.subscribed), len(wild.publications)
        away = asyncio.ensure_future(b.rpc("drop", {}))
        await a.publish("h/1", 1)
        await a.publish("h/2", 2)
        await until(lambda count=count: len(wild.subscribed) > count, "back")  # type: ignore[misc]
        assert wild.subscribed[-1].recovered
        await until(lambda before=before: len(wild.publications) == before + 2, "both")  # type: ignore[misc]
        away.cancel()
    offsets = [publication.offset for publication in wild.publications]
    assert offsets == sorted(set(offsets))

    bad, bad_events = client(token="bad")
    await bad.connect()
    await until(lambda: bad_events.disconnected == [3500], "3500 is terminal")
    assert a_events.disconnected == []
    for one in (a, b):
        await one.disconnect()


asyncio.run(asyncio.wait_for(main(), 40))
