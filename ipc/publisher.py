"""A publisher: how any other program of the host (a cron job, a Celery task, a web application) publishes to a hub.

Stands where messages enter the bus from outside. It has a slot of its own and sends straight to the inboxes of the
interested processes; it receives nothing. A publish ends when each of them has processed the message, which they say on
the board: there is no answer to wait for on a socket, so the board is looked at until it says so, or time is up.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Iterable

import msgspec

from ipc import envelope as wire
from ipc.envelope import BROADCAST, DIRECT, TOPIC, Envelope
from ipc.positions import Position
from ipc.runtime import default_runtime_dir
from ipc.sender import Delivery, HubNotFound, Sender, drive, drive_async, opening
from ipc.topics import InvalidTopic, check_topic

__all__ = ["AsyncPublisher", "BusTimeout", "HubNotFound", "InvalidTopic", "Publisher"]

_SHORTEST_PAUSE = 20e-6
_LONGEST_PAUSE = 1e-3
_TICK = 0.25
_ASYNC_POLL = 1e-3
_LONGEST_ASYNC_POLL = 20e-3


class BusTimeout(TimeoutError):
    """Not every interested process has processed the message in time; it may still do so."""


class Publisher:
    """Publishes to the hub of a runtime directory, as a blocking or as an asynchronous context manager::

        with Publisher("/dev/shm/flockwire-1000/8000") as publisher:
            publisher.publish("room/1", {"x": 1})

        async with Publisher("/dev/shm/flockwire-1000/8000") as publisher:
            await publisher.publish("room/1", {"x": 1})

    The blocking form may be shared by threads: calls come one after the other. Used after a fork, it opens anew in the
    child. When the hub was restarted, the next publish finds the new one.

    Args:
        runtime_dir: where the hub runs; None: ``FLOCKWIRE_RUNTIME_DIR``, else where a bare ``ipc://`` leads.
        channel: the manager's ``broker_channel``; ``hub`` is the built-in hub's.
        timeout: seconds that each call may take when it is not given one.
    """

    def __init__(
        self, runtime_dir: str | os.PathLike[str] | None = None, channel: str = "hub", timeout: float = 5.0
    ):
        if runtime_dir is None:
            runtime_dir = os.environ.get("FLOCKWIRE_RUNTIME_DIR") or default_runtime_dir()
        self.runtime_dir = os.fspath(runtime_dir)
        self.channel = channel
        self.timeout = timeout
        self._sender: Sender | None = None
        self._mutex = threading.Lock()
        self._async: AsyncPublisher | None = None

    def publish(
        self, topic: str, data: object, *, timeout: float | None = None, idempotency_key: str = ""
    ) -> Position | None:
        """Publish ``data`` (anything msgspec makes JSON of) to the subscribers of a topic.

        Returns when every process with an interested subscriber has processed it: its position on a topic with
        history, where it is stored first, None on any other. With history, a second message with the same
        ``idempotency_key`` within five minutes is not published again.

        Raises:
            InvalidTopic: the topic is none that can be published to.
            BusTimeout: not all of them have, within ``timeout`` seconds.
            HubNotFound: no hub runs there.
            TypeError: the data cannot be JSON.
            ValueError: it has more than 16 MiB.
            StoreError: it could not be stored, and was delivered to nobody.
        """
        return self._run(_to_topic(self.channel, topic, data), timeout, idempotency_key)

    def broadcast(self, data: object, *, timeout: float | None = None) -> None:
        """Publish to every connection of the channel; as :meth:`publish` otherwise."""
        self._run(_to_all(self.channel, data), timeout)

    def send(self, conn_id: str | Iterable[str], data: object, *, timeout: float | None = None) -> None:
        """Send to the connections with this conn_id, or these; as :meth:`publish` otherwise."""
        self._run(_to_connections(self.channel, conn_id, data), timeout)

    def _run(self, envelope: Envelope, timeout: float | None, idempotency_key: str = "") -> Position | None:
        if self._async is not None:
            # Opened by `async with`, but called through this object: the caller awaits what it gets.
            return self._async._run(envelope, timeout, idempotency_key)  # type: ignore[return-value]
        with self._mutex:
            return self._publish(envelope, self.timeout if timeout is None else timeout, idempotency_key)

    def _publish(self, envelope: Envelope, timeout: float, idempotency_key: str) -> Position | None:
        deadline = time.monotonic() + timeout
        sender = self._opened(deadline)
        position = drive(sender.stored(envelope, idempotency_key, deadline))
        if position is not None and not envelope.offset:
            return position  # it was published before
        while sender.is_full():
            self._wait_a_moment(sender, deadline, _LONGEST_PAUSE, timeout)
        delivery = Delivery()
        sender.submit([(envelope, wire.encode(envelope), delivery)])
        pause = _SHORTEST_PAUSE
        while delivery.remaining:
            self._wait_a_moment(sender, deadline, pause, timeout)
            pause = min(pause * 1.5, _LONGEST_PAUSE)
        return position

    def _wait_a_moment(self, sender: Sender, deadline: float, pause: float, timeout: float) -> None:
        if time.monotonic() > deadline:
            raise BusTimeout(_late(timeout, sender) + _loop_hint())
        time.sleep(pause)
        sender.poll(time.monotonic())

    def _opened(self, deadline: float) -> Sender:
        sender = self._sender
        if sender is not None and sender.pid != os.getpid():
            # Sockets of the parent: not ours to use, nor to close.
            sender = self._sender = None
        if sender is not None and not sender.hub_is_there():
            self._sender = None
            sender.close()
            sender = None
        if sender is None:
            sender = self._sender = drive(opening(self.runtime_dir, deadline))
        return sender

    def open(self) -> None:
        """Find the hub now rather than at the first publish.

        Raises:
            HubNotFound: no hub runs there.
        """
        with self._mutex:
            self._opened(time.monotonic() + self.timeout)

    def close(self) -> None:
        """Give the slot back; may be called twice, and the publisher be used again after."""
        with self._mutex:
            sender, self._sender = self._sender, None
            if sender is not None and sender.pid == os.getpid():
                sender.close()

    def __enter__(self) -> Publisher:
        self.open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __aenter__(self) -> AsyncPublisher:
        if self._async is not None:
            raise RuntimeError("this publisher is open already")
        opened = AsyncPublisher(self.runtime_dir, self.channel, self.timeout)
        await opened.open()
        self._async = opened
        return opened

    async def __aexit__(self, *_: object) -> None:
        opened, self._async = self._async, None
        if opened is not None:
            await opened.close()


class AsyncPublisher:
    """What ``async with Publisher(…)`` gives: the same calls, to be awaited. Many may be under way at once.

    Belongs to the event loop it was opened on.
    """

    def __init__(self, runtime_dir: str, channel: str, timeout: float) -> None:
        self.runtime_dir = runtime_dir
        self.channel = channel
        self.timeout = timeout
        self._sender: Sender | None = None
        self._opening = asyncio.Lock()
        self._turn: list[tuple[Envelope, bytes, Delivery]] = []
        self._poller: asyncio.TimerHandle | None = None
        self._pause = _ASYNC_POLL
        self._closed = False

    async def publish(
        self, topic: str, data: object, *, timeout: float | None = None, idempotency_key: str = ""
    ) -> Position | None:
        """See :meth:`Publisher.publish`."""
        return await self._run(_to_topic(self.channel, topic, data), timeout, idempotency_key)

    async def broadcast(self, data: object, *, timeout: float | None = None) -> None:
        """See :meth:`Publisher.broadcast`."""
        await self._run(_to_all(self.channel, data), timeout)

    async def send(self, conn_id: str | Iterable[str], data: object, *, timeout: float | None = None) -> None:
        """See :meth:`Publisher.send`."""
        await self._run(_to_connections(self.channel, conn_id, data), timeout)

    async def _run(
        self, envelope: Envelope, timeout: float | None, idempotency_key: str = ""
    ) -> Position | None:
        timeout = self.timeout if timeout is None else timeout
        wire.encode(envelope)  # what cannot travel is refused before anything is stored
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout
        try:
            async with asyncio.timeout_at(deadline):
                sender = await self._opened(timeout)
                steps = sender.stored(envelope, idempotency_key, time.monotonic() + timeout)
                position = await drive_async(steps)
                if position is not None and not envelope.offset:
                    return position  # it was published before
                encoded = wire.encode(envelope)
                # Room comes by credits on the board, not by an event.
                while sender.is_full():  # noqa: ASYNC110
                    await asyncio.sleep(_ASYNC_POLL)
                future: asyncio.Future[None] = loop.create_future()
                delivery = Delivery(lambda: None if future.done() else future.set_result(None))
                if not self._turn:
                    loop.call_soon(self._flush)
                self._turn.append((envelope, encoded, delivery))
                await future
                return position
        except TimeoutError:
            raise BusTimeout(_late(timeout, self._sender)) from None

    def _flush(self) -> None:
        turn, self._turn = self._turn, []
        sender = self._sender
        if sender is None:
            return
        sender.submit(turn)
        self._pause = _ASYNC_POLL
        self._poll_soon(_ASYNC_POLL)

    def _poll_soon(self, pause: float) -> None:
        if self._poller is not None:
            self._poller.cancel()
        self._poller = asyncio.get_running_loop().call_later(pause, self._poll)

    def _poll(self) -> None:
        self._poller = None
        sender = self._sender
        if sender is None:
            return
        # More and more rarely while nothing moves: somebody may stand still for long.
        self._pause = min(self._pause * 1.25, _LONGEST_ASYNC_POLL)
        self._poll_soon(self._pause if sender.waiting else _TICK)
        if sender.poll(time.monotonic()):
            self._pause = _ASYNC_POLL
            self._poll_soon(_ASYNC_POLL)

    async def _opened(self, timeout: float) -> Sender:
        if self._closed:
            raise RuntimeError("this publisher is closed")
        sender = self._sender
        if sender is not None and sender.hub_is_there():
            return sender
        async with self._opening:
            if self._sender is not None and self._sender is not sender:
                return self._sender
            self._drop_sender()
            steps = opening(self.runtime_dir, time.monotonic() + timeout)
            sender = self._sender = await drive_async(steps)
            self._poll_soon(_TICK)
            return sender

    def _drop_sender(self) -> None:
        sender, self._sender = self._sender, None
        if self._poller is not None:
            self._poller.cancel()
            self._poller = None
        if sender is not None:
            sender.close()

    async def open(self) -> None:
        """Find the hub; raises :class:`HubNotFound` when there is none."""
        await self._opened(self.timeout)

    async def close(self) -> None:
        """Give the slot back."""
        self._closed = True
        self._drop_sender()


def _to_topic(channel: str, topic: str, data: object) -> Envelope:
    check_topic(topic)
    return Envelope(TOPIC, channel, topic, msgspec.json.encode(data))


def _to_all(channel: str, data: object) -> Envelope:
    return Envelope(BROADCAST, channel, "", msgspec.json.encode(data))


def _to_connections(channel: str, conn_id: str | Iterable[str], data: object) -> Envelope:
    conn_ids = (conn_id,) if isinstance(conn_id, str) else tuple(conn_id)
    return Envelope(DIRECT, channel, "", msgspec.json.encode(data), conn_ids)


def _late(timeout: float, sender: Sender | None) -> str:
    late = sender.late if sender is not None else []
    who = f" (slots {', '.join(map(str, late))})" if late else ""
    return f"not processed by every interested process{who} within {timeout:g} s; it may still arrive"


def _loop_hint() -> str:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return ""
    return "; this call blocked an event loop: if that loop serves the hub, use `async with`"
