"""Several hubs that share a Redis, and clients that take down what they get: for the tests of federation."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import Coroutine, Iterator, Sequence
from typing import Any

from websockets.asyncio.client import ClientConnection
from websockets.exceptions import ConnectionClosed

from tests.hub import Hub, acked, say
from tests.support import until, until_async


@contextlib.contextmanager
def hosts(
    urls: Sequence[str], *options: str, workers: int = 2, config: str | None = None
) -> Iterator[list[Hub]]:
    """A hub for each address of Redis, linked."""
    with contextlib.ExitStack() as stack:
        hubs = [
            Hub(workers, options=("--redis-url", url, *options), config=config, wait_ready=False)
            for url in urls
        ]
        for hub in hubs:
            stack.enter_context(hub)
        for hub in hubs:
            hub.wait_ready()
        for hub in hubs:
            until(lambda hub=hub: link(hub) == "ready", 20, "the bridge is ready")  # type: ignore[misc]
        yield hubs


def play(hubs: Sequence[Hub], main: Coroutine[Any, Any, None], timeout: float = 50.0) -> None:
    """Run a coroutine with clients of several hubs, all of which are closed at its end."""
    for hub in hubs:
        hub._clients = hubs[0]._clients
    hubs[0].run(main, timeout)


def link(hub: Hub) -> str:
    """How a hub stands with Redis."""
    return str(hub.status()["bridge"]["link"])


async def linked(hubs: Sequence[Hub], timeout: float = 20.0, state: str = "ready") -> None:
    """Wait until all do so, without disturbing the clients of this loop."""
    for hub in hubs:
        async with asyncio.timeout(timeout):
            while await asyncio.to_thread(link, hub) != state:
                await asyncio.sleep(0.02)


def total(hub: Hub, name: str) -> int:
    """One of the federation's counters, of the whole host."""
    return int(hub.status()["totals"][f"federation_{name}"])


class Reader:
    """A subscriber that takes everything down, with the time since it was sent."""

    def __init__(self, client: ClientConnection) -> None:
        self.got: list[dict[str, Any]] = []
        self.delays: list[float] = []
        self.task = asyncio.create_task(self._read(client))

    async def _read(self, client: ClientConnection) -> None:
        with contextlib.suppress(ConnectionClosed):
            async for text in client:
                message = json.loads(text)
                self.got.append(message)
                if "at" in message:
                    self.delays.append(time.monotonic() - message["at"])

    async def has(self, count: int, timeout: float = 30.0) -> list[dict[str, Any]]:
        """What it got, once it is that much."""
        await until_async(lambda: len(self.got) >= count, timeout, f"{count} messages")
        return self.got

    def numbers(self, publisher: int) -> list[int]:
        """The numbers of one publisher's messages, as they came."""
        return [message["n"] for message in self.got if message["p"] == publisher]


async def reader(hub: Hub, topic: str) -> Reader:
    """A subscriber of one pattern."""
    return Reader(await hub.connect(f"/ws/reader?topic={topic.replace('#', '%23')}"))


class Publisher:
    """Publishes numbered messages at a steady rate until told to stop."""

    def __init__(self, client: ClientConnection, number: int, rate: float = 200.0) -> None:
        self.sent = 0
        self._client = client
        self._number = number
        self._rate = rate
        self._stop = asyncio.Event()
        self._task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        started = time.monotonic()
        while not self._stop.is_set():
            due = int((time.monotonic() - started) * self._rate)
            while self.sent < due:
                text = {"topic": f"a/{self.sent % 5}", "p": self._number, "n": self.sent}
                await say(self._client, type="send", at=time.monotonic(), **text)
                self.sent += 1
            await asyncio.sleep(0.005)

    async def stop(self) -> int:
        """How many were sent; the hub has taken all of them."""
        self._stop.set()
        await self._task
        await acked(self._client, type="connect", ack="end")
        return self.sent


async def publisher(hub: Hub, number: int, rate: float = 200.0) -> Publisher:
    """A steady publisher on a hub."""
    return Publisher(await hub.connect("/ws/publisher"), number, rate)


class Proxy:
    """A TCP proxy on a port of its own that can stop forwarding while connections stay open."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._open = threading.Event()
        self._open.set()
        self._sockets: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
                far = socket.create_connection(("127.0.0.1", self._target))
            except OSError:
                return
            self._sockets += [near, far]
            for source, target in ((near, far), (far, near)):
                thread = threading.Thread(target=self._forward, args=(source, target), daemon=True)
                self._threads.append(thread)
                thread.start()

    def _forward(self, source: socket.socket, target: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                self._open.wait()
                target.sendall(data)
        except OSError:
            pass
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def hold(self) -> None:
        """Forward nothing, and close nothing."""
        self._open.clear()

    def resume(self) -> None:
        """Forward again, what was held first."""
        self._open.set()

    def close(self) -> None:
        """End of everything."""
        self._open.set()
        for end in [self._listener, *self._sockets]:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
        for thread in self._threads:
            thread.join(5)

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
