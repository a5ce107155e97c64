"""Presence over the workers of a host: exact, without ghosts, a leave for each join; also when workers are killed."""

from __future__ import annotations

import asyncio
import functools
import json
import os
import signal
from collections import Counter
from typing import Any

import pytest
from websockets.asyncio.client import ClientConnection
from websockets.exceptions import ConnectionClosed

from tests.hub import Hub
from tests.support import until_async

RULES = """
[topics."room/#"]
presence = true
"""
PATH = "/connection/websocket"


class Member:
    """A client of the Centrifuge protocol, by hand."""

    def __init__(self, socket: ClientConnection) -> None:
        self.socket = socket
        self.client = ""
        self.joined: Counter[str] = Counter()
        self.left: Counter[str] = Counter()
        self.closed: tuple[int, str] | None = None
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self._number = 0
        self._task = asyncio.create_task(self._read())

    @classmethod
    async def connect(cls, hub: Hub, channel: str = "room/1", join_leave: bool = False) -> Member:
        member = cls(await hub.connect(PATH))
        member.client = (await member.ask("connect", {}))["client"]
        await member.ask("subscribe", {"channel": channel, "join_leave": join_leave})
        return member

    async def _read(self) -> None:
        try:
            async for frame in self.socket:
                for line in str(frame).split("\n"):
                    await self._take(json.loads(line))
        except ConnectionClosed:
            pass
        self.closed = (self.socket.close_code or 0, self.socket.close_reason or "")
        for answer in self._answers.values():
            answer.cancel()

    async def _take(self, message: dict[str, Any]) -> None:
        if not message:
            await self.socket.send("{}")
        elif "id" in message:
            self._answers.pop(message["id"]).set_result(message)
        elif "join" in message["push"]:
            self.joined[message["push"]["join"]["info"]["client"]] += 1
        elif "leave" in message["push"]:
            self.left[message["push"]["leave"]["info"]["client"]] += 1

    async def ask(self, method: str, arguments: dict[str, Any]) -> Any:
        self._number += 1
        answer = self._answers[self._number] = asyncio.get_running_loop().create_future()
        await self.socket.send(json.dumps({"id": self._number, method: arguments}))
        async with asyncio.timeout(10):
            return (await answer)[method]

    async def present(self, channel: str = "room/1") -> set[str]:
        return set((await self.ask("presence", {"channel": channel}))["presence"])


def settled(hub: Hub, members: list[Member]) -> bool:
    """Each of them is on a living worker, or knows that it is not."""
    return all(member.closed or hub.worker_of(member.socket) is not None for member in members)


def told(member: Member, gone: set[str]) -> bool:
    """It has seen exactly these leave."""
    return set(member.left) == gone


@pytest.mark.timeout(120)
def test_a_thousand_joins_and_leaves_with_killed_workers() -> None:
    with Hub(workers=4, config=RULES) as hub:

        async def main() -> None:
            observer = await Member.connect(hub, join_leave=True)
            safe = hub.worker_of(observer.socket)
            members: list[Member] = []
            everybody = {observer.client}
            limit = asyncio.Semaphore(25)

            async def one() -> Member:
                async with limit:
                    return await Member.connect(hub)

            for number in range(10):
                fresh = await asyncio.gather(*[one() for _ in range(100)])
                everybody |= {member.client for member in fresh}
                members += fresh
                going = [member for place, member in enumerate(members) if place % 3]
                for place, member in enumerate(going):
                    if place % 2:
                        await member.ask("unsubscribe", {"channel": "room/1"})
                    else:
                        member.socket.transport.abort()
                members = members[::3]
                if number in (2, 5, 8):
                    pids = [pid for pid in hub.worker_pids() if pid != safe]
                    os.kill(pids[0], signal.SIGKILL)
                    await until_async(lambda: len(hub.worker_pids()) == 4, 20)
                    await until_async(functools.partial(settled, hub, members))
                members = [member for member in members if member.closed is None]
                wanted = {observer.client, *(member.client for member in members)}

                async def exact() -> bool:
                    return await observer.present() == wanted  # noqa: B023 -- awaited below

                await until_async(exact, 5.0, "the exact list without a ghost")
            for member in members:
                member.socket.transport.abort()
            stats: dict[str, int] = {}

            async def alone() -> bool:
                stats.update(await observer.ask("presence_stats", {"channel": "room/1"}))
                return stats["num_clients"] == 1

            await until_async(alone, 5)
            await until_async(lambda: len(observer.left) == len(everybody) - 1, 5)
            assert set(observer.joined) == everybody
            assert set(observer.joined.values()) == {1}
            assert set(observer.left) == everybody - {observer.client}
            assert set(observer.left.values()) == {1}

        hub.run(main(), 110)


def test_the_leaves_of_a_killed_worker_are_told_within_two_seconds() -> None:
    with Hub(workers=3, config=RULES) as hub:

        async def main() -> None:
            members = [await Member.connect(hub, join_leave=True) for _ in range(24)]
            where = {member: hub.worker_of(member.socket) for member in members}
            victim = where[members[0]]
            gone = {member.client for member in members if where[member] == victim}
            left = [member for member in members if where[member] != victim]
            assert left and victim is not None
            loop = asyncio.get_running_loop()
            began = loop.time()
            os.kill(victim, signal.SIGKILL)
            for member in left:
                await until_async(functools.partial(told, member, gone), 3)
            assert loop.time() - began < 2
            assert all(set(member.left.values()) == {1} for member in left)

        hub.run(main())
