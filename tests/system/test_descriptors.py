"""The limit of descriptors is reached (R21): who comes waits, who is there does not notice, and the hub lives."""

from __future__ import annotations

import asyncio
import json
import resource
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ipc import Publisher
from tests.hub import Hub, acked, read_json, say
from tests.support import until_async

LIMIT = 160
CROWD = 240
WORDS = "new connections wait"
REQUEST = b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n"


@contextmanager
def lowered(limit: int) -> Iterator[None]:
    """Processes that are started inside may have so many descriptors."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100


def knock(hub: Hub) -> socket.socket:
    """A connection that says nothing yet."""
    knocking = socket.create_connection(("127.0.0.1", hub.port), 5)
    knocking.setblocking(False)
    return knocking


def was_hung_up(sock: socket.socket) -> bool:
    try:
        return sock.recv(1, socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False
    except ConnectionError:
        return True


async def answer(sock: socket.socket) -> bytes:
    async with asyncio.timeout(5):
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(sock, REQUEST)
        return await loop.sock_recv(sock, 64)


@pytest.fixture
def hub() -> Iterator[Hub]:
    made = Hub(workers=1)
    with lowered(LIMIT):
        made.start()
    try:
        yield made
    finally:
        made._end()


def test_at_the_limit_who_comes_waits_and_who_is_there_goes_on(hub: Hub) -> None:
    crowd: list[socket.socket] = []

    async def scenario() -> None:
        [pid] = hub.worker_pids()
        client = await hub.connect("/ws/here")
        await acked(client, type="subscribe", topic="t")
        crowd.extend(knock(hub) for _ in range(CROWD))
        await until_async(lambda: WORDS in hub.log(), 10.0, "the log line")

        # The hub's own descriptors are not taken by clients: another process still joins the bus.
        with Publisher(hub.runtime_dir) as publisher:
            publisher.publish("t", {"from": "outside"})
        assert await read_json(client) == {"from": "outside"}

        before = cpu_seconds(pid)
        for number in range(20):
            await say(client, type="send", topic="t", n=number)
            assert json.loads(await client.recv())["n"] == number
            await asyncio.sleep(0.05)  # pacing: the processor time of a second is looked at
        assert cpu_seconds(pid) - before < 0.2
        assert not any(map(was_hung_up, crowd))

        # The last in the queue is served as soon as there is room.
        *others, last = crowd
        for sock in others:
            sock.close()
        assert (await answer(last)).startswith(b"HTTP/1.1 200")
        assert hub.worker_pids() == [pid]
        assert hub.log().count(WORDS) == 1

    try:
        hub.run(scenario())
    finally:
        for sock in crowd:
            sock.close()


def test_a_worker_drains_while_it_is_full(hub: Hub) -> None:
    crowd = [knock(hub) for _ in range(CROWD)]
    try:

        async def scenario() -> None:
            await until_async(lambda: WORDS in hub.log(), 10.0, "the log line")
            hub.process.terminate()  # type: ignore[union-attr]

        hub.run(scenario())
        assert hub.wait(20) == 0
    finally:
        for sock in crowd:
            sock.close()
