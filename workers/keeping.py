"""The part of a manager that deals with history, presence, and receivers that are no plain clients.

In the way of a message between ``workers/manager.py`` and the host's log: what is published to a topic with history is
stored first, and comes back through the log, in its order. Receivers encode messages in their own way: clients of the
Centrifuge protocol, Server-Sent Events, clients that want envelopes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from threading import get_ident
from typing import TYPE_CHECKING, Any

from ipc.envelope import JOIN, LEAVE, TOPIC, Envelope
from ipc.interest import interest_in
from ipc.peer import Peer
from ipc.positions import Position
from ipc.rules import Rules
from ipc.store_records import Retention, StoreError
from ipc.topics import check_topic
from workers import jsontext
from workers.broker_interface import BrokerInterface
from workers.brokers import IpcBroker
from workers.fanout import Fanout, current_fanout
from workers.feeds import Receiver
from workers.stored import HistoryPage, NoHistory, Storing, read_history
from workers.subscriptions import SubscriptionIndex
from workers.transport import Accepted, Transport

if TYPE_CHECKING:
    from ipc.history import HostLog


class Keeping:
    """What :class:`~workers.manager.WebSocketManager` is built on."""

    broker: BrokerInterface
    broker_channel: str
    _transport: Transport
    _fanout: Fanout | None

    def __init__(self) -> None:
        self._receivers: SubscriptionIndex[Receiver] = SubscriptionIndex()
        self._listening = False
        """There are receivers: asked for each message, so it has to be cheap."""
        self._log: HostLog | None = None
        self._retentions: Mapping[str, Retention | None] = {}
        self._log_loop: asyncio.AbstractEventLoop | None = None
        self._log_thread = 0
        self.on_presence: Callable[[Envelope], None] | None = None
        """Told of joins and leaves on the whole host."""

    @property
    def rules(self) -> Rules:
        """Topic rules in force."""
        raise NotImplementedError

    def publish_text(self, topic: str, payload: bytes, local: bool = False, info: bytes = b"") -> Accepted:
        """Publish JSON text in UTF-8 that is ready."""
        raise NotImplementedError

    @property
    def peer(self) -> Peer | None:
        """Our place on the host's bus; None with another broker, or before ``startup()``."""
        return self.broker.peer if isinstance(self.broker, IpcBroker) else None

    @property
    def log(self) -> HostLog | None:
        """The history of the host; None where no topic has any."""
        return self._log

    def _start_keeping(self) -> None:
        peer = self.peer
        if peer is not None:
            self._log = peer.log
            self._retentions = peer.rules.retentions
            self._log_loop = asyncio.get_running_loop()
            self._log_thread = get_ident()
            if peer.presence is not None:
                peer.presence.attach(self.broker_channel, self._tell_presence)

    def _stop_keeping(self) -> None:
        peer = self.peer
        if peer is not None and peer.presence is not None:
            peer.presence.detach(self.broker_channel)
        self._log = None

    # --- publishing ---------------------------------------------------------------------------------------

    async def publish(self, topic: str, data: Any, idempotency_key: str | None = None) -> Position | None:
        """As ``send``, and return when the bus has accepted it: where it was stored.

        Args:
            topic: where to, without wildcards.
            data: any JSON value.
            idempotency_key: on a topic with history, a second message with the same key within five minutes is not
                published again; the position is that of the first one.

        Returns:
            Its position on a topic with history, None on any other.

        Raises:
            InvalidTopic: not a topic to publish to.
            StoreError: it could not be stored, and was delivered to nobody.
        """
        check_topic(topic)
        retention = self._retention(topic)
        payload = jsontext.encode(data)
        if retention is None:
            await self.publish_text(topic, payload)
            return None
        envelope = Envelope(TOPIC, self.broker_channel, topic, payload)
        position = await self._store(envelope, retention, idempotency_key or "")
        await self._transport.accepted()
        return position

    def _retention(self, topic: str) -> Retention | None:
        return None if self._log is None else self.rules.retention(topic)

    def _store(self, envelope: Envelope, retention: Retention, idempotency_key: str = "") -> Storing:
        """Store a message, and then deliver it everywhere."""
        storing = Storing(envelope.topic)
        if self._log_thread == get_ident() and self._log is not None:
            try:
                self._log.publish(envelope, retention, storing.finish, idempotency_key)
            except StoreError as error:
                storing.finish(error)
        elif self._log_loop is not None:
            # A thread of the application's, in which an endpoint without "async" runs.
            self._log_loop.call_soon_threadsafe(
                self._store_here, envelope, retention, idempotency_key, storing
            )
        return storing

    def _store_here(
        self, envelope: Envelope, retention: Retention, idempotency_key: str, storing: Storing
    ) -> None:
        try:
            if self._log is None:
                raise StoreError("the manager was shut down")
            self._log.publish(envelope, retention, storing.finish, idempotency_key)
        except StoreError as error:
            storing.finish(error)

    # --- questions ----------------------------------------------------------------------------------------

    async def history(
        self, topic: str, limit: int = 100, since: Position | None = None, reverse: bool = False
    ) -> HistoryPage:
        """What is kept of a topic.

        Args:
            topic: an exact topic, whose rule gives it history.
            limit: at most so many messages, 300 at most; -1 for as many as there may be, 0 for the position alone.
            since: only what came after this position (or before it, if ``reverse``).
            reverse: newest first.

        Raises:
            NoHistory: the topic has none.
            UnrecoverablePosition: ``since`` is of a log that is gone.
            InvalidTopic, ValueError: the topic, or what is asked for, makes no sense.
        """
        check_topic(topic)
        if self._log is None or self._retention(topic) is None:
            raise NoHistory(f"{topic!r} has no history: set history_size in a topic rule that applies to it")
        return read_history(self._log, self.broker_channel, topic, limit, since, reverse)

    async def presence(self, topic: str) -> dict[str, Any]:
        """Who is subscribed to exactly this topic or pattern by the Centrifuge protocol, on the whole host.

        Returns:
            By client id: ``{"client": …, "user": …}``, and ``conn_info`` and ``chan_info`` where there is any.

        Raises:
            ValueError: it has no presence.
            StoreError: it cannot be read.
        """
        peer = self.peer
        if peer is None or peer.presence is None or not self.rules.has_presence(topic):
            raise ValueError(f"{topic!r} has no presence: set presence in a topic rule that applies to it")
        present = peer.presence.present(self.broker_channel, topic)
        return {who.client: jsontext.decode(who.info) for who in present}

    # --- receivers ----------------------------------------------------------------------------------------

    def listen(self, pattern: str, receiver: Receiver) -> None:
        """Give ``receiver`` what is published to a topic or pattern; from now on it misses nothing."""
        self._transport.interest_add(*interest_in(pattern))
        if self._log is not None:
            self._catch_up()
        if self._receivers.add(pattern, receiver):
            if self._fanout is None:
                self._fanout = current_fanout()
            current_fanout().subscriptions += 1
            self._listening = True
        else:
            self._transport.interest_discard(*interest_in(pattern))

    def count_slow(self) -> None:
        """A receiver was closed because its client reads too slowly."""
        current_fanout().slow_closed += 1

    def _catch_up(self) -> None:
        """Deliver what was stored so far before somebody new subscribes, who shall get what comes from now on."""
        if self._log is not None and self._log_thread == get_ident():
            self._log.catch_up()

    def unlisten(self, pattern: str, receiver: Receiver) -> None:
        """The end of :meth:`listen`."""
        if self._receivers.discard(pattern, receiver):
            current_fanout().subscriptions -= 1
            self._listening = len(self._receivers) > 0
            self._transport.interest_discard(*interest_in(pattern))

    def _deliver_to_receivers(self, envelopes: Sequence[Envelope]) -> None:
        fanout = self._fanout
        if fanout is not None and fanout.thread != get_ident():
            if not fanout.loop.is_closed():
                fanout.loop.call_soon_threadsafe(self._deliver_to_receivers, envelopes)
            return
        for envelope in envelopes:
            if envelope.kind == TOPIC:
                for receiver in self._receivers.match(envelope.topic):
                    receiver.deliver(envelope)
            elif envelope.kind in (JOIN, LEAVE):
                self._tell_presence(envelope)

    def _tell_presence(self, envelope: Envelope) -> None:
        if self.on_presence is not None:
            self.on_presence(envelope)
