"""The library under servers that are not ours: plain ``uvicorn --workers`` and gunicorn, whose processes meet by the
runtime directory."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import websockets
from websockets.asyncio.client import ClientConnection

from ipc.runtime import RuntimeDir
from tests.support import free_port, run, until, until_async

ROOT = Path(__file__).parent.parent.parent

FASTAPI = """
import os
from contextlib import asynccontextmanager
from fastapi import FastAPI, WebSocket
from workers import WebSocketManager

manager = WebSocketManager("chat", "ipc://RUNTIME_DIR")

@asynccontextmanager
async def lifespan(app):
    async with manager:
        yield

app = FastAPI(lifespan=lifespan)

@app.websocket("/ws/{conn_id}")
async def endpoint(websocket: WebSocket, conn_id: str, topic: str | None = None):
    connection = await manager.new_connection(websocket, conn_id, topic)
    await connection.send_json({"pid": os.getpid()})
    async for message in connection.iter_json():
        await manager.receive(connection, message)
    manager.remove_connection(connection)

@app.post("/publish/{topic}")
def publish(topic: str, n: int):  # no "async": it runs in a thread
    manager.send(topic, {"n": n})
    return {"pid": os.getpid()}
"""

STARLETTE = """
import os
from contextlib import asynccontextmanager
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route, WebSocketRoute
from workers import WebSocketManager

manager = WebSocketManager("chat", "ipc://RUNTIME_DIR")

@asynccontextmanager
async def lifespan(app):
    await manager.startup()
    yield
    await manager.shutdown()

async def endpoint(websocket):
    connection = await manager.new_connection(
        websocket, websocket.path_params["conn_id"], websocket.query_params.get("topic")
    )
    await connection.send_json({"pid": os.getpid()})
    async for message in connection:
        await manager.receive(connection, message)
    manager.remove_connection(connection)

async def publish(request):
    await manager.publish(request.path_params["topic"], {"n": int(request.query_params["n"])})
    return JSONResponse({"pid": os.getpid()})

app = Starlette(
    routes=[WebSocketRoute("/ws/{conn_id}", endpoint), Route("/publish/{topic}", publish, methods=["POST"])],
    lifespan=lifespan,
)
"""

MOUNTED = """
from fastapi import FastAPI
from workers import WebSocketManager, create_hub

app = FastAPI()  # whose lifespan starts nothing
app.mount("/realtime", create_hub(WebSocketManager("hub", "ipc://RUNTIME_DIR")))
"""

HUB = """
from workers import WebSocketManager, create_hub

app = create_hub(WebSocketManager("hub", "ipc://RUNTIME_DIR"))
"""

HISTORY = """
[topics."kept/#"]
history_size = 1000
history_ttl = 60
"""

UVICORN = ("uvicorn", "app:app", "--workers", "2", "--host", "127.0.0.1", "--log-level", "warning", "--port")
UVICORN_ONE = ("uvicorn", "app:app", "--host", "127.0.0.1", "--log-level", "warning", "--port")
GUNICORN = (
    "gunicorn",
    "app:app",
    "-w",
    "2",
    "-k",
    "uvicorn_worker.UvicornWorker",
    "--log-level",
    "warning",
    "-b",
)


class Server:
    """A foreign server in a session of its own."""

    def __init__(self, base: Path, command: tuple[str, ...], env: dict[str, str]) -> None:
        self.port = free_port()
        address = f"127.0.0.1:{self.port}" if command[0] == "gunicorn" else str(self.port)
        self.log_path = base / f"log-{self.port}"
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *command, address],
                cwd=base,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env=env,
            )

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def stop(self) -> None:
        """An ordered stop; afterwards nothing of it runs."""
        if self.process.poll() is None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(15)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(10)

    async def client(self, path: str, **options: Any) -> ClientConnection:
        """A client, as soon as the server listens."""
        options = {"ping_interval": None, "max_size": None, "proxy": None, "compression": None} | options

        async def connected() -> ClientConnection | None:
            assert self.process.poll() is None, self.log()
            try:
                return await websockets.connect(f"ws://127.0.0.1:{self.port}{path}", **options)
            except (OSError, websockets.InvalidHandshake):
                return None

        client = await until_async(connected, 25.0, f"a connection; the log says {self.log()}")
        assert client is not None
        return client

    async def pid_and_client(self, path: str, **options: Any) -> tuple[int, ClientConnection]:
        """And which process it is connected to."""
        client = await self.client(path, **options)
        return (await next_json(client))["pid"], client

    async def one_on_each(self, path: str, count: int = 2) -> dict[int, ClientConnection]:
        """A client on each of so many processes."""
        found: dict[int, ClientConnection] = {}

        async def all_found() -> bool:
            pid, client = await self.pid_and_client(path)
            if pid in found:
                await client.close()
            else:
                found[pid] = client
            return len(found) == count

        await until_async(all_found, 25.0, f"{count} processes that serve; there are {list(found)}")
        return found


class Place:
    """A directory with the application, and a runtime directory."""

    def __init__(self, app: str) -> None:
        shm = "/dev/shm" if os.path.isdir("/dev/shm") else None
        self.base = Path(tempfile.mkdtemp(prefix="fw-test-", dir=shm))
        self.runtime_dir = str(self.base / "run")
        (self.base / "app.py").write_text(app.replace("RUNTIME_DIR", self.runtime_dir))
        self.servers: list[Server] = []

    def start(self, command: tuple[str, ...], **env: str) -> Server:
        clean = {key: value for key, value in os.environ.items() if not key.startswith("FLOCKWIRE_")}
        server = Server(self.base, command, {**clean, "PYTHONPATH": str(ROOT), **env})
        self.servers.append(server)
        return server

    def inboxes(self) -> list[str]:
        return [name for name in os.listdir(self.runtime_dir) if name.startswith("i") and "." in name]

    def peers(self) -> dict[int, int]:
        """Slots in use and whose they are."""
        if not os.path.exists(self.runtime_dir):
            return {}
        with RuntimeDir.open(self.runtime_dir, create=False) as runtime:
            board = runtime.open_board()
            return {slot: board.record(slot).pid for slot in board.used_slots()}


@contextlib.contextmanager
def place(app: str, *, tidy: bool = True) -> Iterator[Place]:
    """A place of which nothing is left: no process, and after an ordered stop no inbox and no slot."""
    made = Place(app)
    try:
        yield made
        for server in made.servers:
            server.stop()
        if tidy:
            assert made.inboxes() == []
            assert made.peers() == {}
        for server in made.servers:
            assert "Traceback" not in server.log(), server.log()
    finally:
        for server in made.servers:
            server.stop()
        shutil.rmtree(made.base, ignore_errors=True)


async def next_json(client: ClientConnection) -> Any:
    async with asyncio.timeout(10.0):
        return json.loads(await client.recv())


async def acked(client: ClientConnection, **message: Any) -> None:
    await client.send(json.dumps({**message, "ack": 1}))
    assert await next_json(client) == {"type": "ack", "ack": 1}


async def cross(clients: list[ClientConnection]) -> None:
    """Everything reaches everybody from everywhere, once: topics, broadcasts, and the id they all have."""
    for number, client in enumerate(clients):
        for kind in ({"type": "send", "topic": "room/1"}, {"type": "broadcast"}, {"type": "send_by_conn_id"}):
            await client.send(json.dumps({"conn_id": "same", **kind, "from": number}))
            for receiver in clients:
                assert await next_json(receiver) == {"from": number}
        await acked(client, type="subscribe", topic=f"only/{number}")
        await clients[number - 1].send(json.dumps({"type": "send", "topic": f"only/{number}", "n": number}))
        assert await next_json(client) == {"n": number}


@pytest.mark.parametrize(
    ("app", "command"),
    [(FASTAPI, UVICORN), (STARLETTE, GUNICORN), (FASTAPI, (*GUNICORN[:-1], "--preload", "-b"))],
    ids=["fastapi-uvicorn", "starlette-gunicorn", "fastapi-gunicorn-preload"],
)
def test_messages_cross_between_the_processes_of_a_server(app: str, command: tuple[str, ...]) -> None:
    async def main(there: Place) -> None:
        server = there.start(command)
        clients = list((await server.one_on_each("/ws/same?topic=room/%2B")).values())
        assert len(there.peers()) == 2
        await cross(clients)
        await acked(clients[0], type="subscribe", topic="plain")
        async with httpx.AsyncClient(trust_env=False) as http:
            for n in range(10):
                await http.post(f"http://127.0.0.1:{server.port}/publish/plain", params={"n": n})
                assert await next_json(clients[0]) == {"n": n}
        server.process.terminate()
        for client in clients:
            with contextlib.suppress(websockets.ConnectionClosed):
                await client.recv()
            assert client.close_code == 1012

    with place(app) as there:
        run(main(there))


def test_two_servers_that_start_at_once_in_a_directory_that_is_not_there_yet() -> None:
    async def main(there: Place) -> None:
        servers = [there.start(UVICORN_ONE) for _ in range(3)]
        found = await asyncio.gather(
            *[server.pid_and_client("/ws/same?topic=room/%2B") for server in servers]
        )
        assert len({pid for pid, _ in found}) == 3
        assert sorted(there.peers().values()) == sorted(pid for pid, _ in found)
        await cross([client for _, client in found])
        for _, client in found:
            await client.close()

    with place(STARLETTE) as there:
        run(main(there))


def test_a_killed_process_is_reaped_by_the_other_and_its_successor_works() -> None:
    async def main(there: Place) -> None:
        server = there.start(UVICORN)
        first = await server.one_on_each("/ws/same?topic=room/%2B")
        killed, kept = sorted(first)
        os.kill(killed, signal.SIGKILL)
        await until_async(
            lambda: killed not in there.peers().values(), 2.0, "the reaping of the dead one's slot"
        )
        assert len(there.inboxes()) == len(there.peers())
        await first[kept].send('{"type":"broadcast","n":1}')
        assert await next_json(first[kept]) == {"n": 1}

        async def successor() -> ClientConnection | None:
            pid, client = await server.pid_and_client("/ws/same?topic=room/%2B")
            if pid not in (killed, kept):
                return client
            await client.close()
            return None

        new = await until_async(successor, 25.0, "the successor")
        assert new is not None
        await cross([first[kept], new])
        for client in (first[kept], new):
            await client.close()

    with place(FASTAPI) as there:
        run(main(there))


def test_a_hub_that_is_mounted_where_no_lifespan_starts_it() -> None:
    async def main(there: Place) -> None:
        server = there.start(UVICORN)
        await (await server.client("/realtime/ws/first")).close()

        async def all_ready() -> bool:
            # A connection each, or it would always be the same process that answers.
            async with httpx.AsyncClient(trust_env=False) as http:
                answer = await http.get(f"http://127.0.0.1:{server.port}/realtime/readyz")
            return answer.status_code == 200 and answer.json()["peers"] == 2

        await until_async(all_ready, 20.0, "both processes on the bus")
        clients = [await server.client(f"/realtime/ws/c{n}?topic=t") for n in range(12)]
        for n, client in enumerate(clients):
            await client.send(json.dumps({"type": "send_by_conn_id", "conn_id": f"c{(n - 1) % 12}", "n": n}))
        for n, client in enumerate(clients):
            assert await next_json(client) == {"n": (n + 1) % 12}
        await clients[0].send('{"type":"send","topic":"t","last":1}')
        for client in clients:
            assert await next_json(client) == {"last": 1}
            await client.close()

    with place(MOUNTED, tidy=False) as there:
        run(main(there))
        # uvicorn ends by the signal it got, and no lifespan was there to leave the bus: the next one tidies.
        there.servers[0].stop()
        assert there.inboxes()
        run(alone(there.start(UVICORN_ONE), there))


async def replaced(there: Place, victim: int) -> None:
    """Kill a process and wait for its successor."""
    os.kill(victim, signal.SIGKILL)

    def two_others() -> bool:
        pids = set(there.peers().values())
        return len(pids) == 2 and victim not in pids

    await until_async(two_others, 20.0, "a successor")


@pytest.mark.parametrize("command", [UVICORN, GUNICORN], ids=["uvicorn", "gunicorn"])
def test_history_where_the_processes_are_not_ours(command: tuple[str, ...]) -> None:
    """What was missed while a process was killed comes from the store, whichever process is asked for it."""

    async def main(there: Place) -> None:
        (there.base / "hub.toml").write_text(HISTORY)
        server = there.start(command, FLOCKWIRE_CONFIG=str(there.base / "hub.toml"))
        await (await server.client("/ws/first")).close()
        await until_async(lambda: len(there.peers()) == 2, 20.0, "both processes on the bus")
        reader = await server.client("/ws/reader?topic=kept/%23&envelope=1")
        writer = await server.client("/ws/writer")
        await acked(writer, type="send", topic="kept/a", n=0)
        before = await next_json(reader)
        assert before["data"] == {"n": 0}
        # One after the other: a store that nobody holds begins anew.
        for victim in list(there.peers().values()):
            await replaced(there, victim)
        writer = await server.client("/ws/writer")
        for n in range(1, 20):
            await acked(writer, type="send", topic=f"kept/{n % 3}", n=n)
        since = f"{before['epoch']}:{before['offset']}"
        reader = await server.client(f"/ws/reader?topic=kept/%23&envelope=1&since={since}")
        assert [(await next_json(reader))["data"]["n"] for _ in range(19)] == list(range(1, 20))
        for client in (reader, writer):
            await client.close()

    with place(HUB, tidy=False) as there:
        run(main(there))


async def alone(server: Server, there: Place) -> None:
    """A server that finds what dead ones have left."""
    client = await server.client("/realtime/ws/x")
    assert len(there.inboxes()) == len(there.peers()) == 1
    await client.close()


def rss(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def test_a_client_that_does_not_read_is_bounded_and_closed() -> None:
    async def main(there: Place) -> None:
        server = there.start(UVICORN_ONE, FLOCKWIRE_MAX_BACKLOG="256KiB", FLOCKWIRE_WRITE_TIMEOUT="60")
        pid, good = await server.pid_and_client("/ws/good?topic=t")
        _, slow = await server.pid_and_client("/ws/slow?topic=t", max_queue=1)
        slow.transport.pause_reading()
        body = "x" * 10_000
        for n in range(100):  # what the allocator needs anyway
            await good.send(json.dumps({"type": "send", "topic": "t", "n": n, "body": body}))
            assert (await next_json(good))["n"] == n
        before, n = rss(pid), 100
        while "closed as slow" not in server.log():
            for _ in range(50):
                n += 1
                await good.send(json.dumps({"type": "send", "topic": "t", "n": n, "body": body}))
                assert (await next_json(good))["n"] == n
            assert n < 3000, "it is never closed"
        assert rss(pid) - before < 2 << 20
        assert "1013" in server.log()
        slow.transport.abort()
        await good.close()

    with place(FASTAPI) as there:
        run(main(there))
        for server in there.servers:
            server.stop()


def test_a_manager_without_a_url_says_what_the_choices_are() -> None:
    there = Place(FASTAPI.replace(', "ipc://RUNTIME_DIR"', ""))
    server = there.start(UVICORN_ONE)
    try:
        until(lambda: server.process.poll() is not None, 25.0, "the end of a server that cannot start")
        assert "ValueError: Unknown broker url: None" in server.log() and "ipc:///" in server.log()
    finally:
        server.stop()
        shutil.rmtree(there.base, ignore_errors=True)
