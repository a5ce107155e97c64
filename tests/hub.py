"""A real hub for tests: the supervisor in a session of its own, on a free port, with a runtime directory of its own."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Coroutine, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import websockets
from websockets.asyncio.client import ClientConnection

from tests.support import free_port, scratch_directory, until

ROOT = Path(__file__).parent.parent


class Hub:
    """``with Hub(workers=4) as hub``: started and ready inside, and nothing left of it afterwards."""

    def __init__(
        self,
        workers: int = 2,
        *,
        options: Sequence[str] = (),
        app: str | None = None,
        config: str | None = None,
        env: dict[str, str] | None = None,
        cwd: Path | None = None,
        wait_ready: bool = True,
        runtime_dir: str | None = None,
        port: int | None = None,
    ) -> None:
        self.port = port or free_port()
        self._base = Path(scratch_directory())
        self.runtime_dir = runtime_dir or str(self._base / "run")
        self.log_path = self._base / "log"
        arguments = ["--port", str(self.port), "--workers", str(workers), "--runtime-dir", self.runtime_dir]
        if app is not None:
            arguments += ["--app", app]
        if config is not None:
            (self._base / "hub.toml").write_text(config)
            arguments += ["--config", str(self._base / "hub.toml")]
        self.arguments = [*arguments, *options]
        clean = {key: value for key, value in os.environ.items() if not key.startswith("FLOCKWIRE_")}
        self.env = {**clean, "PYTHONPATH": str(ROOT), **(env or {})}
        self.cwd = cwd or ROOT
        self.workers = workers
        self._wait_ready = wait_ready
        self.process: subprocess.Popen[bytes] | None = None
        self._clients: list[ClientConnection] = []

    def run(self, main: Coroutine[Any, Any, Any], timeout: float = 50.0) -> None:
        """Run a coroutine with a deadline, and end whatever clients it left open."""

        async def bounded() -> None:
            try:
                async with asyncio.timeout(timeout):
                    await main
            finally:
                for client in self._clients:
                    client.transport.abort()
                await asyncio.gather(*[client.wait_closed() for client in self._clients])
                self._clients.clear()

        asyncio.run(bounded())

    def start(self) -> None:
        log = self.log_path.open("ab")
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "supervisor", *self.arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self.env,
                cwd=self.cwd,
                start_new_session=True,
            )
        finally:
            log.close()
        if self._wait_ready:
            self.wait_ready()

    def __enter__(self) -> Hub:
        try:
            self.start()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            sys.stderr.write(f"--- log of the hub\n{self.log()}\n---\n")
        self._end()

    def _end(self) -> None:
        process = self.process
        if process is not None:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                try:
                    process.wait(15)
                except subprocess.TimeoutExpired:
                    pass
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            process.wait(10)
        shutil.rmtree(self._base, ignore_errors=True)

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    @property
    def url(self) -> str:
        return f"ws://127.0.0.1:{self.port}"

    def log(self) -> str:
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    def command(self, *arguments: str, timeout: float = 40.0) -> subprocess.CompletedProcess[str]:
        """One of the other commands of the command line, on this hub."""
        name, *rest = arguments
        return subprocess.run(
            [sys.executable, "-m", "supervisor", name, "--runtime-dir", self.runtime_dir, *rest],
            capture_output=True,
            text=True,
            env=self.env,
            cwd=self.cwd,
            timeout=timeout,
        )

    def status(self) -> dict[str, Any]:
        """What the running hub says of itself."""
        from supervisor.control import ask

        answer = ask(self.runtime_dir, {"command": "status"}, timeout=10.0)
        assert answer is not None, "no hub is running"
        return answer

    def ready_workers(self) -> list[dict[str, Any]]:
        try:
            status = self.status()
        except Exception:
            return []
        return [worker for worker in status["workers"] if worker["state"] == "ready"]

    def wait_ready(self, workers: int | None = None, timeout: float = 30.0) -> list[dict[str, Any]]:
        wanted = self.workers if workers is None else workers

        def look() -> list[dict[str, Any]]:
            if self.process is not None and self.process.poll() is not None:
                raise AssertionError(f"the hub ended with {self.process.returncode}:\n{self.log()}")
            ready = self.ready_workers()
            return ready if len(ready) == wanted else []

        return until(look, timeout, f"{wanted} ready workers; the log says:\n{self.log()}")

    def worker_pids(self) -> list[int]:
        return [int(worker["pid"]) for worker in self.ready_workers()]

    def signal(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def wait(self, timeout: float = 40.0) -> int:
        assert self.process is not None
        return self.process.wait(timeout)

    async def connect(self, path: str = "/ws", **options: Any) -> ClientConnection:
        """A client by the real ``websockets`` library."""
        options.setdefault("max_size", None)
        options.setdefault("ping_interval", None)
        options.setdefault("open_timeout", 20)
        options.setdefault("proxy", None)
        options.setdefault("compression", None)
        client = await websockets.connect(self.url + path, **options)
        self._clients.append(client)
        return client

    def worker_of(self, client: ClientConnection) -> int | None:
        """The pid of the worker that holds this client's connection: whose descriptor is the other end's socket."""
        return self.worker_of_socket(client.transport.get_extra_info("sockname")[1])

    def worker_of_socket(self, port: int) -> int | None:
        """The pid of the worker that has the other end of the connection from this local port."""
        inode = None
        for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[1].endswith(f":{self.port:04X}") and fields[2].endswith(f":{port:04X}"):
                inode = fields[9]
        for pid in self.worker_pids():
            try:
                descriptors = os.listdir(f"/proc/{pid}/fd")
            except OSError:
                continue  # it ended in the meantime
            for fd in descriptors:
                try:
                    if os.readlink(f"/proc/{pid}/fd/{fd}") == f"socket:[{inode}]":
                        return pid
                except OSError:
                    continue  # closed in the meantime
        return None

    async def connect_to(self, pid: int, path: str, *, others: bool = False) -> ClientConnection:
        """A client on one worker, or on any other one."""
        for _ in range(200):
            client = await self.connect(path)
            if (self.worker_of(client) == pid) != others:
                return client
            await client.close()
        raise AssertionError(f"no connection landed on {pid}")

    async def connect_many(self, paths: Sequence[str]) -> list[ClientConnection]:
        """Many at once, a few dozen at a time."""
        limit = asyncio.Semaphore(50)

        async def one(path: str) -> ClientConnection:
            async with limit:
                return await self.connect(path)

        return list(await asyncio.gather(*[one(path) for path in paths]))


async def read_json(client: ClientConnection, timeout: float = 10.0) -> Any:
    """The next message, decoded."""
    async with asyncio.timeout(timeout):
        return json.loads(await client.recv())


async def say(client: ClientConnection, **message: Any) -> None:
    """Send one message of the plain protocol."""
    await client.send(json.dumps(message))


async def acked(client: ClientConnection, ack: Any = 1, **message: Any) -> Any:
    """Send with an ack and wait for it; what else arrives before it, or an error instead, is an error of the test."""
    await say(client, ack=ack, **message)
    answer = await read_json(client)
    assert (answer.get("type"), answer.get("ack")) == ("ack", ack), answer
    return answer


async def silent(client: ClientConnection, seconds: float = 0.3) -> bool:
    """Nothing more arrives: a probe after a round trip, so the wait only catches what is already under way."""
    try:
        async with asyncio.timeout(seconds):
            await client.recv()
    except TimeoutError:
        return True
    return False
