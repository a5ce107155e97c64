"""Stopping, reloading and scaling under load (R5, R6, R8's life cycle seen by clients)."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from pathlib import Path

import pytest
import websockets
from websockets.asyncio.client import ClientConnection

from tests.hub import Hub, acked, read_json, say
from tests.support import until_async

VERSIONED = """
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route
from workers import create_hub

async def version(request):
    return PlainTextResponse("VERSION")

hub = create_hub()
app = Starlette(routes=[Route("/version", version), Mount("/", hub)], lifespan=hub.router.lifespan_context)
"""


async def closed_with(client: ClientConnection) -> tuple[int, float]:
    """The close code a client sees, and when."""
    try:
        while True:
            await client.recv()
    except websockets.ConnectionClosed as exc:
        return (exc.rcvd.code if exc.rcvd else 1006), time.monotonic()


def test_r5_a_stop_closes_everybody_with_1001_spread_over_a_while() -> None:
    async def main(hub: Hub) -> None:
        clients = await hub.connect_many(["/ws/x"] * 400)
        hub.signal(signal.SIGTERM)
        ends = await asyncio.wait_for(asyncio.gather(*[closed_with(client) for client in clients]), 20)
        assert {code for code, _ in ends} == {1001}
        times = sorted(when for _, when in ends)
        most = max(sum(1 for t in times if begin <= t < begin + 0.1) for begin in times)
        assert most < 200, f"{most} closes within 100 ms"
        assert times[-1] - times[0] < 10
        assert hub.wait() == 0

    with Hub(workers=4, options=("--drain-timeout", "10")) as hub:
        hub.run(main(hub))
        assert not Path(hub.runtime_dir).exists()


def test_r6_a_reload_under_a_connect_storm_refuses_nobody_and_serves_new_code(tmp_path: Path) -> None:
    module = tmp_path / "versioned.py"
    module.write_text(VERSIONED.replace("VERSION", "one"))

    async def version(hub: Hub) -> str:
        reader, writer = await asyncio.open_connection("127.0.0.1", hub.port)
        writer.write(b"GET /version HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        answer = (await reader.read()).decode()
        writer.close()
        await writer.wait_closed()
        assert answer.startswith("HTTP/1.1 200"), answer
        return answer.rsplit("\r\n", 1)[-1]

    async def main(hub: Hub) -> None:
        old = set(hub.worker_pids())
        held = await hub.connect_many(["/ws/held"] * 40)
        done = asyncio.Event()
        served = 0
        fewest = len(old)

        async def storm() -> None:
            nonlocal served
            while not done.is_set():
                client = await hub.connect("/ws/storm")
                # A worker that is about to be replaced may close with 1012, never without a word.
                try:
                    await acked(client, type="connect")
                except websockets.ConnectionClosed as exc:
                    assert exc.rcvd is not None and exc.rcvd.code == 1012
                await client.close()
                served += 1

        async def watch() -> None:
            nonlocal fewest
            while not done.is_set():
                fewest = min(fewest, len(hub.worker_pids()))
                await asyncio.sleep(0.05)  # sampling, not waiting

        async with asyncio.TaskGroup() as group:
            for _ in range(8):
                group.create_task(storm())
            group.create_task(watch())
            await until_async(lambda: served > 50, 10, "the storm")
            module.write_text(VERSIONED.replace("VERSION", "two"))
            hub.signal(signal.SIGHUP)
            ends = [asyncio.create_task(closed_with(client)) for client in held]
            await until_async(
                lambda: not old & set(hub.worker_pids()) and len(hub.worker_pids()) == 3, 40, "new workers"
            )
            done.set()
        assert {code for code, _ in await asyncio.gather(*ends)} == {1012}
        assert fewest >= 2
        assert {await version(hub) for _ in range(20)} == {"two"}

    with Hub(workers=3, app="versioned:app", cwd=tmp_path, options=("--drain-timeout", "5")) as hub:
        hub.run(main(hub))


def test_a_reload_whose_successor_fails_keeps_the_old_ones(tmp_path: Path) -> None:
    module = tmp_path / "breaking.py"
    module.write_text(VERSIONED.replace("VERSION", "one"))

    async def main(hub: Hub) -> None:
        old = set(hub.worker_pids())
        async with await hub.connect("/ws/x") as client:
            module.write_text("raise RuntimeError('typo in the new version')\n")
            hub.signal(signal.SIGHUP)
            await until_async(lambda: "typo in the new version" in hub.log(), 20, "the error in the log")
            await acked(client, type="connect")
            assert set(hub.worker_pids()) == old

    with Hub(workers=2, app="breaking:app", cwd=tmp_path) as hub:
        hub.run(main(hub))


def test_scale_up_and_down_by_command_and_signal() -> None:
    async def main(hub: Hub) -> None:
        clients = await hub.connect_many(["/ws/x?topic=s"] * 20)
        up = await asyncio.to_thread(hub.command, "scale", "4")
        assert up.returncode == 0, up.stderr
        assert len(hub.worker_pids()) == 4
        more = await hub.connect_many(["/ws/y?topic=s"] * 40)
        await say(clients[0], type="send", topic="s", n=1)
        for client in clients + more:
            assert await read_json(client) == {"n": 1}
        hub.signal(signal.SIGTTOU)
        await until_async(lambda: len(hub.worker_pids()) == 3, 20, "one worker less")
        down = await asyncio.to_thread(hub.command, "scale", "1")
        assert down.returncode == 0, down.stderr
        assert len(hub.worker_pids()) == 1
        again = await hub.connect_many(["/ws/z?topic=s"] * 20)
        await say(again[0], type="send", topic="s", n=2)
        for client in again:
            assert await read_json(client) == {"n": 2}
        hub.signal(signal.SIGTTIN)
        await until_async(lambda: len(hub.worker_pids()) == 2, 20, "one worker more")

    with Hub(workers=2, options=("--drain-timeout", "5")) as hub:
        hub.run(main(hub))


def test_tail_and_publish_commands() -> None:
    import subprocess
    import sys

    with Hub(workers=2) as hub:
        tail = subprocess.Popen(
            [sys.executable, "-m", "supervisor", "tail", "--runtime-dir", hub.runtime_dir, "news/#"],
            stdout=subprocess.PIPE,
            env=hub.env,
            cwd=hub.cwd,
        )
        try:

            async def main() -> None:
                await until_async(
                    lambda: any(peer["kind"] == "tail" for peer in hub.status()["peers"]),
                    15,
                    "tail on the bus",
                )
                async with await hub.connect("/ws/x?topic=news/%2B") as client:
                    done = await asyncio.to_thread(hub.command, "publish", "news/1", '{"a": [1, null]}')
                    assert done.returncode == 0, done.stderr
                    assert await read_json(client) == {"a": [1, None]}

            hub.run(main())
            assert tail.stdout is not None
            line = json.loads(tail.stdout.readline())
            assert line["topic"] == "news/1" and line["data"] == {"a": [1, None]}
        finally:
            tail.send_signal(signal.SIGINT)
            assert tail.wait(10) in (0, 130)
            assert tail.stdout is not None
            tail.stdout.close()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGQUIT, 131), (signal.SIGTERM, 0), (signal.SIGINT, 0)])
def test_exit_codes(number: int, code: int) -> None:
    with Hub(workers=1) as hub:
        hub.signal(number)
        assert hub.wait() == code
