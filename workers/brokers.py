"""Brokers: what carries a manager's messages to other managers, in this process, on this host, or through Redis.

Two families. A *direct* broker (``memory://``, ``ipc://``) takes ready envelopes and hands those of others to a
callback, without a queue or a task in between: :class:`DirectBroker`. Any other is driven through
:class:`~workers.broker_interface.BrokerInterface` (see ``workers/transport.py``). Direct brokers have that interface
too, for applications that use a broker by itself.
"""

from __future__ import annotations

import asyncio
import functools
import os
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from threading import get_ident
from typing import Any, Final
from urllib.parse import urlsplit

from ipc.bus import Bus
from ipc.envelope import BROADCAST, DIRECT, TOPIC, Envelope
from ipc.peer import InterestKind, Peer, PeerKind
from ipc.runtime import default_runtime_dir
from workers import jsontext
from workers.broker_interface import BrokerInterface
from workers.context import current_settings
from workers.gauges import Gauges
from workers.message import Message

Deliver = Callable[[Sequence[Envelope]], None]

#: Messages that may wait for ``get_message`` of a direct broker; the oldest goes first.
MAX_WAITING: Final = 1000


class _Member:
    """One manager (or broker used by itself) on a channel of this process, with the loop it lives on."""

    __slots__ = ("anywhere", "deliver", "loop")

    def __init__(self, loop: asyncio.AbstractEventLoop, deliver: Deliver, anywhere: bool) -> None:
        self.loop = loop
        self.deliver = deliver
        self.anywhere = anywhere

    def hand(self, envelopes: Sequence[Envelope], here: asyncio.AbstractEventLoop | None) -> None:
        if self.anywhere or self.loop is here:
            self.deliver(envelopes)
        elif not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self.deliver, envelopes)


class DirectBroker(BrokerInterface):
    """A broker that moves envelopes without queues: what memory and the bus have in common."""

    def __init__(self) -> None:
        self._queue: deque[Message] = deque()
        self._arrived: asyncio.Event | None = None
        self._subscribed: set[str] = set()

    # To be provided by each kind.

    def channels(self) -> dict[str, list[_Member]]:
        """The members of each channel in this process."""
        raise RuntimeError("this broker is not connected; call connect() or manager.startup() first")

    def to_others(self, envelope: Envelope) -> bool:
        """Give an envelope to the other processes; True when whoever publishes should pause now."""
        return False

    @property
    def congested(self) -> bool:
        """True while whoever publishes should pause."""
        return False

    def on_clear(self, callback: Callable[[], None]) -> None:
        """Call back once when no longer congested."""
        callback()

    async def accepted(self) -> None:
        """Wait until not congested."""

    def interest_add(self, kind: InterestKind, channel: str, text: str) -> None:
        """This process wants envelopes of this kind from now on."""

    def interest_discard(self, kind: InterestKind, channel: str, text: str) -> None:
        """It no longer does, for one of those who did."""

    # What managers use.

    def join(self, channel: str, deliver: Deliver, *, anywhere: bool = False) -> Sequence[object]:
        """Hand envelopes of ``channel``, from this process and others, to ``deliver`` in order.

        On this loop; ``anywhere`` means on the loop, or the thread, of whoever publishes.
        Returns all that are on the channel in this process, now and later.
        """
        members = self.channels().setdefault(channel, [])
        members[:] = [member for member in members if not member.loop.is_closed()]
        members.append(_Member(asyncio.get_running_loop(), deliver, anywhere))
        return members

    def leave(self, channel: str, deliver: Deliver) -> None:
        """The end of :meth:`join`; may be called twice."""
        members = self.channels().get(channel, [])
        members[:] = [member for member in members if member.deliver != deliver]
        if not members:
            self.channels().pop(channel, None)

    def publish_envelope(self, envelope: Envelope, *, local: bool = False) -> None:
        """Give an envelope to everybody on its channel, or to this process alone.

        Raises:
            BusFull: publishes that nobody awaited have overshot the bound.
        """
        if not local:
            self.to_others(envelope)
        self.hand_here(envelope.channel, [envelope])

    def hand_here(self, channel: str, envelopes: Sequence[Envelope]) -> None:
        """Give envelopes to the members in this process."""
        _hand(self.channels(), channel, envelopes)

    # BrokerInterface.

    async def subscribe(self, channel: str) -> None:
        if channel not in self._subscribed:
            self._subscribed.add(channel)
            self.join(channel, self._enqueue)
            self.interest_add(InterestKind.PREFIX, channel, "")
            self.interest_add(InterestKind.CHANNEL, channel, "")

    async def unsubscribe(self, channel: str) -> None:
        if channel in self._subscribed:
            self._subscribed.discard(channel)
            self.interest_discard(InterestKind.PREFIX, channel, "")
            self.interest_discard(InterestKind.CHANNEL, channel, "")
            self.leave(channel, self._enqueue)

    async def publish(self, channel: str, message: Any) -> None:
        self.publish_envelope(to_envelope(channel, message))
        await self.accepted()

    async def get_message(self, **kwargs: Any) -> Message | None:
        """The next message of a subscribed channel; waits for it, at most ``timeout`` seconds if that is given."""
        if self._arrived is None:
            self._arrived = asyncio.Event()
        try:
            async with asyncio.timeout(kwargs.get("timeout")):
                while not self._queue:
                    self._arrived.clear()
                    await self._arrived.wait()
        except TimeoutError:
            return None
        return self._queue.popleft()

    def has_subscribers(self, channel: str) -> bool:
        """Whether anybody of this process is on ``channel``."""
        return bool(self.channels().get(channel))

    def _enqueue(self, envelopes: Sequence[Envelope]) -> None:
        for envelope in envelopes:
            if envelope.kind not in (TOPIC, BROADCAST, DIRECT):
                continue  # joins and leaves are no messages
            if len(self._queue) >= MAX_WAITING:
                self._queue.popleft()
            self._queue.append(to_message(envelope))
        if self._arrived is not None:
            self._arrived.set()

    async def __aenter__(self) -> DirectBroker:
        await self.connect()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.disconnect()


def _hand(channels: dict[str, list[_Member]], channel: str, envelopes: Sequence[Envelope]) -> None:
    members = channels.get(channel)
    if members and len(members) == 1 and members[0].anywhere:
        members[0].deliver(envelopes)
    elif members:
        here = running_loop()
        for member in tuple(members):
            member.hand(envelopes, here)


def running_loop() -> asyncio.AbstractEventLoop | None:
    """The loop that runs in this thread, if any."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


_memory: dict[str, list[_Member]] = {}


class InMemoryBroker(DirectBroker):
    """``memory://``: managers of one process that name the same channel see each other's messages."""

    def channels(self) -> dict[str, list[_Member]]:
        return _memory

    async def connect(self) -> None:
        """Nothing to do."""

    async def disconnect(self) -> None:
        for channel in list(self._subscribed):
            await self.unsubscribe(channel)


_on_peer: weakref.WeakKeyDictionary[Peer, dict[str, list[_Member]]] = weakref.WeakKeyDictionary()


class IpcBroker(DirectBroker):
    """``ipc://``: the processes of one host that name the same runtime directory.

    Args:
        path: the runtime directory, made when missing; None for the default one.
    """

    def __init__(self, path: str | None = None) -> None:
        super().__init__()
        self.path = path or default_runtime_dir(None)
        self.peer: Peer | None = None
        self._gauges: Gauges | None = None
        self._bus: Bus | None = None
        self._thread = 0

    def channels(self) -> dict[str, list[_Member]]:
        if self.peer is None:
            return super().channels()
        return _on_peer.setdefault(self.peer, {})

    async def connect(self) -> None:
        """Join the bus.

        Raises:
            RuntimeDirError: the directory cannot be used; the text says why.
        """
        if self.peer is None:
            settings = current_settings()
            self.peer = await Peer.open(
                self.path, kind=PeerKind.APPLICATION, rules=settings.rules, bus_backlog=settings.bus_backlog
            )
            self._gauges = Gauges(self.peer)
            self._bus = self.peer.bus
            self._thread = get_ident()

    async def disconnect(self) -> None:
        for channel in list(self._subscribed):
            await self.unsubscribe(channel)
        if self._gauges is not None:
            self._gauges.stop()
        peer, self.peer, self._bus = self.peer, None, None
        if peer is not None:
            await peer.close()

    def join(self, channel: str, deliver: Deliver, *, anywhere: bool = False) -> Sequence[object]:
        first = channel not in self.channels()
        members = super().join(channel, deliver, anywhere=anywhere)
        if first and self.peer is not None:
            # Not bound to this broker: others of the process may stay on the channel when it has gone.
            self.peer.attach(channel, functools.partial(_hand, self.channels(), channel))
        return members

    def leave(self, channel: str, deliver: Deliver) -> None:
        super().leave(channel, deliver)
        if channel not in self.channels() and self.peer is not None:
            self.peer.detach(channel)

    def to_others(self, envelope: Envelope) -> bool:
        bus = self._bus
        if bus is None:
            self.channels()  # says that this broker is not connected
            return False
        if get_ident() != self._thread:
            # A thread of the application's, in which an endpoint without "async" runs.
            bus.loop.call_soon_threadsafe(bus.publish, envelope)
            return False
        bus.publish(envelope)
        return bus.congested

    @property
    def congested(self) -> bool:
        return self.peer is not None and self.peer.congested

    def on_clear(self, callback: Callable[[], None]) -> None:
        if self.peer is None:
            callback()
        else:
            self.peer.on_clear(callback)

    async def accepted(self) -> None:
        if self.peer is not None:
            await self.peer.accepted()

    def interest_add(self, kind: InterestKind, channel: str, text: str) -> None:
        if self.peer is not None:
            self.peer.interest_add(kind, channel, text)

    def interest_discard(self, kind: InterestKind, channel: str, text: str) -> None:
        if self.peer is not None:
            self.peer.interest_discard(kind, channel, text)


def to_envelope(channel: str, message: Any) -> Envelope:
    """The envelope of a :class:`Message`, or of the flat object ``{"type","topic","conn_id",**data}``.

    Raises:
        ValueError, TypeError: no such message, or data without a JSON form.
    """
    if isinstance(message, dict):
        message = Message.from_client_message(data=message)
    data = jsontext.encode(message.data)
    if message.type == "broadcast":
        return Envelope(BROADCAST, channel, "", data)
    if message.type == "send_by_conn_id":
        ids = message.conn_id
        return Envelope(DIRECT, channel, "", data, (ids,) if isinstance(ids, str) else tuple(ids or ()))
    if not message.topic:
        raise ValueError(f"a message of type {message.type!r} needs a topic")
    return Envelope(TOPIC, channel, message.topic, data)


def to_message(envelope: Envelope) -> Message:
    """The other way round."""
    data = jsontext.decode(envelope.data)
    if envelope.kind == BROADCAST:
        return Message(type="broadcast", data=data)
    if envelope.kind == DIRECT:
        ids = list(envelope.conn_ids)
        return Message(type="send_by_conn_id", data=data, conn_id=ids[0] if len(ids) == 1 else ids)
    return Message(type="send", data=data, topic=envelope.topic)


def create_broker(url: str | None, **kwargs: Any) -> BrokerInterface:
    """The broker that ``url`` names; None means the supervisor's runtime directory (``FLOCKWIRE_RUNTIME_DIR``).

    Args:
        url: ``memory://``, ``ipc://``, ``ipc:///path/of/runtime-dir``, ``redis://…``, ``rediss://…``, ``unix://…``.
        **kwargs: for the Redis client.

    Raises:
        ValueError: none of these; the text names the choices.
    """
    if url is None:
        path = os.environ.get("FLOCKWIRE_RUNTIME_DIR")
        if not path:
            raise ValueError(
                "Unknown broker url: None. Without the supervisor (no FLOCKWIRE_RUNTIME_DIR is set) say where messages "
                f"go: {_CHOICES}"
            )
        return IpcBroker(path)
    parts = urlsplit(url)
    if parts.scheme == "memory":
        return InMemoryBroker()
    if parts.scheme == "ipc":
        if parts.netloc:
            raise ValueError(
                f"Unknown broker url: {url!r}. A runtime directory is written ipc:///with/three/slashes"
            )
        return IpcBroker(parts.path or None)
    if parts.scheme in ("redis", "rediss", "unix"):
        from workers.redis_broker import RedisBroker

        return RedisBroker(url, **kwargs)
    raise ValueError(f"Unknown broker url: {url!r}. Choose {_CHOICES}")


_CHOICES: Final = (
    "memory:// (this process alone), ipc:// or ipc:///path/of/runtime-dir (the processes of this host), "
    "redis:// or rediss:// (through Redis)"
)
