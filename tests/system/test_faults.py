"""What happens to everybody else when something dies or stands still (R1 to R4, R10, R15)."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import websockets
from websockets.asyncio.client import ClientConnection

from tests.hub import Hub, acked, read_json, say
from tests.support import until, until_async

APP = """
import os, time
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route
from workers import create_hub

async def pid(request):
    return PlainTextResponse(str(os.getpid()))

async def block(request):
    time.sleep(30)

hub = create_hub()
routes = [Route("/pid", pid), Route("/block", block), Mount("/", hub)]
app = Starlette(routes=routes, lifespan=hub.router.lifespan_context)
"""


def process_ids(hub: Hub) -> set[int]:
    """Everything of the hub's session that is no zombie."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[3]) == hub.pid and fields[0] != "Z":
                found.add(int(entry.name))
    return found


class Flow:
    """A publisher that sends as fast as it is told and a subscriber that checks; both on workers of one's choice."""

    def __init__(
        self, publisher: ClientConnection, subscriber: ClientConnection, topic: str, rate: float
    ) -> None:
        self.publisher, self.subscriber = publisher, subscriber
        self.topic, self.rate = topic, rate
        self.sent = 0
        self.got = 0
        self.delays: list[float] = []
        self.stopped = asyncio.Event()

    async def publish(self) -> None:
        begin = time.monotonic()
        while not self.stopped.is_set():
            due = int((time.monotonic() - begin) * self.rate)
            while self.sent < due:
                await say(self.publisher, type="send", topic=self.topic, n=self.sent, at=time.monotonic())
                self.sent += 1
            await asyncio.sleep(0.002)  # pacing, not waiting for anything

    async def check(self) -> None:
        async for text in self.subscriber:
            message = json.loads(text)
            assert message["n"] == self.got, (message["n"], self.got)
            self.got += 1
            self.delays.append(time.monotonic() - message["at"])

    async def finish(self) -> None:
        self.stopped.set()
        await until_async(
            lambda: self.got == self.sent, 10, f"all of {self.topic}: {self.got} of {self.sent}"
        )


def test_r1_a_killed_worker_costs_nobody_else_anything() -> None:
    async def main(hub: Hub) -> None:
        victim, *rest = hub.worker_pids()
        doomed = await hub.connect_to(victim, "/ws/doomed")
        flow = Flow(
            await hub.connect_to(victim, "/ws/p", others=True),
            await hub.connect_to(victim, "/ws/s?topic=r1", others=True),
            "r1",
            1000,
        )
        async with asyncio.TaskGroup() as group:
            group.create_task(flow.publish())
            checking = group.create_task(flow.check())
            await until_async(lambda: flow.got > 500)
            os.kill(victim, signal.SIGKILL)
            killed = time.monotonic()
            # Connections that come while a quarter of the sockets has nobody behind it.
            queued = await hub.connect_many([f"/ws/q{n}" for n in range(100)])
            with pytest.raises(websockets.ConnectionClosed):
                await doomed.recv()
            await until_async(
                lambda: len(hub.worker_pids()) == 4 and victim not in hub.worker_pids(), 5, "the successor"
            )
            assert time.monotonic() - killed < 5
            slots = [worker["slot"] for worker in hub.status()["workers"]]
            assert len(set(slots)) == 4
            for n, client in enumerate(queued):
                await acked(client, ack=n, type="connect")
            await flow.finish()
            checking.cancel()
        assert set(rest) <= set(hub.worker_pids())

    with Hub(workers=4) as hub:
        hub.run(main(hub))


@pytest.mark.parametrize("how", ["stop", "block"])
def test_r2_r3_r10_a_worker_that_stands_still_is_replaced_and_costs_the_others_nothing(
    how: str, tmp_path: Path
) -> None:
    (tmp_path / "blocking.py").write_text(APP)

    async def main(hub: Hub) -> None:
        victim = hub.worker_pids()[0]
        flow = Flow(
            await hub.connect_to(victim, "/ws/p", others=True),
            await hub.connect_to(victim, "/ws/s?topic=r2", others=True),
            "r2",
            500,
        )
        await hub.connect_to(victim, "/ws/w?topic=r2")
        async with asyncio.TaskGroup() as group:
            group.create_task(flow.publish())
            checking = group.create_task(flow.check())
            await until_async(lambda: flow.got > 200)
            if how == "stop":
                os.kill(victim, signal.SIGSTOP)
            else:
                writer = await block(hub, victim)
                writer.close()
            stopped = time.monotonic()
            await until_async(
                lambda: victim not in hub.worker_pids() and len(hub.worker_pids()) == 4, 15, "the successor"
            )
            assert time.monotonic() - stopped < 12
            await flow.finish()
            checking.cancel()

    with Hub(
        workers=4,
        options=(
            "--worker-timeout",
            "3",
        ),
        app="blocking:app",
        cwd=tmp_path,
    ) as hub:
        hub.run(main(hub))
        assert "heartbeat" in hub.log()


async def block(hub: Hub, victim: int) -> asyncio.StreamWriter:
    """Ask pid by pid until the request that blocks for half a minute is the victim's; close what is returned."""
    for _ in range(200):
        reader, writer = await asyncio.open_connection("127.0.0.1", hub.port)
        writer.write(b"GET /pid HTTP/1.1\r\nHost: x\r\n\r\n")
        answer = await reader.readuntil(b"\r\n\r\n")
        length = int(answer.lower().split(b"content-length:")[1].split(b"\r\n")[0])
        if int(await reader.readexactly(length)) == victim:
            writer.write(b"GET /block HTTP/1.1\r\nHost: x\r\n\r\n")
            await writer.drain()
            return writer
        writer.close()
        await writer.wait_closed()
    raise AssertionError("no request landed on the victim")


def test_connects_while_a_worker_is_stopped_are_served_by_the_others() -> None:
    async def main(hub: Hub) -> None:
        victim = hub.worker_pids()[0]
        os.kill(victim, signal.SIGSTOP)
        try:
            # From the moment the supervisor has steered away, every connect is answered at once.
            await until_async(
                lambda: any(w["pid"] == victim and w["state"] == "stale" for w in hub.status()["workers"]),
                6,
                "steering",
            )
            begin = time.monotonic()
            clients = await hub.connect_many(["/ws/x"] * 200)
            assert time.monotonic() - begin < 3
            await asyncio.gather(*[client.close() for client in clients])
        finally:
            os.kill(victim, signal.SIGCONT)

    with Hub(
        workers=4,
        options=(
            "--worker-timeout",
            "60",
        ),
    ) as hub:
        hub.run(main(hub))


def test_r4_r15_a_killed_supervisor_leaves_nothing() -> None:
    with Hub(
        workers=3,
        options=(
            "--drain-timeout",
            "3",
        ),
    ) as hub:
        for _ in range(3):
            hub.run(_with_clients_killed(hub))
            until(lambda: not process_ids(hub), 15, "the end of all processes")
            leftovers = os.listdir(hub.runtime_dir) if os.path.isdir(hub.runtime_dir) else []
            hub.start()
            inboxes = [name for name in os.listdir(hub.runtime_dir) if name.startswith("i")]
            assert len(inboxes) == 3, (leftovers, inboxes)
        hub.signal(signal.SIGTERM)
        assert hub.wait() == 0
        assert not os.path.exists(hub.runtime_dir)


async def _with_clients_killed(hub: Hub) -> None:
    clients = await hub.connect_many(["/ws/x"] * 20)
    assert hub.process is not None
    hub.process.kill()
    hub.process.wait()
    for client in clients:
        with pytest.raises(websockets.ConnectionClosed) as end:
            await read_json(client, 10)
        assert end.value.rcvd is not None and end.value.rcvd.code == 1001


def test_r10_every_envelope_that_a_stopped_worker_misses_is_counted() -> None:
    """Four publishers at full speed, one of four workers stopped: the others miss nothing."""

    async def main(hub: Hub) -> None:
        victim = hub.worker_pids()[0]
        publishers = [await hub.connect_to(victim, "/ws/p", others=True) for _ in range(4)]
        subscriber = await hub.connect_to(victim, "/ws/s?topic=r10/%23", others=True)
        lost = await hub.connect_to(victim, "/ws/l?topic=r10/%23")
        os.kill(victim, signal.SIGSTOP)
        body = "x" * 1000
        each = 4000
        following = dict.fromkeys(range(4), 0)
        moved = asyncio.Event()

        async def publish(number: int, client: ClientConnection) -> None:
            for n in range(each):
                while n - following[number] > 200:  # this Python subscriber is the slowest part of it all
                    moved.clear()
                    await moved.wait()
                message: dict[str, Any] = {
                    "type": "send",
                    "topic": f"r10/{number}",
                    "p": number,
                    "n": n,
                    "x": body,
                }
                if n % 50 == 49:
                    await acked(client, ack=n, **message)
                else:
                    await say(client, **message)

        async def check() -> None:
            for _ in range(4 * each):
                message = json.loads(await subscriber.recv())
                assert message["n"] == following[message["p"]]
                following[message["p"]] += 1
                moved.set()

        async with asyncio.TaskGroup() as group:
            group.create_task(check())
            for number, client in enumerate(publishers):
                group.create_task(publish(number, client))
        await until_async(
            lambda: victim not in hub.worker_pids() and len(hub.worker_pids()) == 4, 20, "the successor"
        )
        await lost.close()

        def dropped() -> int:
            return int(hub.status()["totals"]["bus_dropped"])

        received_before = 0
        await until_async(lambda: dropped() >= 4 * each - received_before, 5, f"all counted: {dropped()}")
        assert dropped() == 4 * each

    with Hub(
        workers=4,
        options=(
            "--worker-timeout",
            "8",
            "--bus-backlog",
            "1MiB",
        ),
    ) as hub:
        hub.run(main(hub), 58)
