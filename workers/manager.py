"""The manager: who is connected here, who wants what, and the way of every message.

In the middle of a message's way. In: :meth:`WebSocketManager.receive` (an application) or ``workers/plain.py`` (the
built-in hub) publish what a client sent. Across: the transport gives an envelope to every process that wants it.
Out: :meth:`WebSocketManager._deliver` finds the sinks and hands the payload to the fan-out.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from operator import attrgetter
from threading import get_ident
from typing import Any, Final, TypeVar

from starlette.websockets import WebSocket

from ipc.envelope import BROADCAST, DIRECT, TOPIC, Envelope
from ipc.interest import interest_in
from ipc.peer import InterestKind
from ipc.rules import DEFAULT_SLOW_POLICY, Rules
from ipc.topics import InvalidTopic, check_topic
from workers import jsontext
from workers.broker_interface import BrokerInterface, is_valid_broker
from workers.brokers import InMemoryBroker, IpcBroker, create_broker
from workers.codes import SERVICE_RESTART, ErrorCode
from workers.connection import Connection, check_conn_id
from workers.context import current_settings
from workers.errors import WebSocketException
from workers.fanout import HEADS, Fanout, SlowPolicy, current_fanout, text_frame
from workers.keeping import Keeping
from workers.message import Message
from workers.plain import handle_message
from workers.scattered import deliver_elsewhere
from workers.settings import Settings
from workers.sinks import AnySink
from workers.subscriptions import SubscriptionIndex
from workers.transport import DONE, LET_THE_LOOP_TURN, Accepted, DirectTransport, Transport, transport_for

logger = logging.getLogger("workers")

#: Topics of which a manager remembers whether clients may publish there.
MAX_KNOWN_TOPICS: Final = 4096

_UNSET: Final = object()
Self = TypeVar("Self", bound="WebSocketManager")


class WebSocketManager(Keeping):
    """Connections of this process and the channel they share with the managers of other processes.

    Args:
        broker_channel: managers on different channels do not see each other's messages.
        broker_url: where messages go: None (the supervisor's runtime directory), ``memory://``, ``ipc://``,
            ``ipc:///path``, ``redis://…``, ``rediss://…``.
        broker_class: a broker of your own instead, made with ``**kwargs``.

    An async context manager (:meth:`startup`, :meth:`shutdown`), and iterable over its connections. Delivery is at
    most once; per publisher in order; nothing is lost between accept and a client's socket except to a client that
    is closed as slow or by a process that dies.

    Raises:
        ValueError: no usable ``broker_url``, or ``broker_class`` lacks a method.
    """

    def __init__(
        self,
        broker_channel: str,
        broker_url: str | None = None,
        broker_class: type[Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self.broker_channel = broker_channel
        self.broker: BrokerInterface
        if broker_class is not None:
            if not is_valid_broker(broker_class):
                raise ValueError(
                    f"{broker_class.__name__} is no broker: it needs connect, disconnect, subscribe, unsubscribe, "
                    "publish and get_message (see workers.BrokerInterface)"
                )
            self.broker = broker_class(**kwargs)
        else:
            self.broker = create_broker(broker_url)
        self._transport: Transport = transport_for(self.broker, broker_channel)
        self._index: SubscriptionIndex[AnySink] = SubscriptionIndex()
        self._connections: dict[Connection, None] = {}
        self._by_id: dict[str, list[Connection]] = {}
        self._everyone: tuple[AnySink, ...] | None = None
        self._settings: Settings | None = None
        self._rules: Rules | None = None
        self.publishable: dict[str, bool] = {}
        """What :meth:`clients_may_publish` has answered, and would again."""
        self._policy: Callable[[str], SlowPolicy] | None = None
        self._post: Callable[[Envelope], Accepted] = self._publish
        # The fan-out of the loop that all connections live on; see scattered.py for when they do not.
        self._fanout: Fanout | None = None
        self._scattered = False
        self._started = False
        self._wants_broadcasts = False
        self._lock: asyncio.Lock | None = None

    # --- life -----------------------------------------------------------------------------------------

    async def startup(self) -> None:
        """Connect to the broker. After this, messages cross. A second call does nothing.

        Raises:
            RuntimeDirError: the runtime directory cannot be used.
        """
        self._lock = self._lock or asyncio.Lock()
        async with self._lock:
            if not self._started:
                await self._transport.start(self._deliver)
                if isinstance(self.broker, IpcBroker) and self.broker.peer is not None:
                    self._rules = self.broker.peer.rules
                self.publishable.clear()
                if any(rule.slow_consumer is not None for rule in self.rules.topics.values()):
                    self._policy = self.rules.slow_consumer
                if isinstance(self._transport, DirectTransport):
                    self._post = self._transport.post
                self._start_keeping()
                if self._log is not None:
                    self._post = self._post_or_store
                self._started = True
                self._wants_broadcasts = False
                for connection in self._connections:
                    self._want(connection)

    async def shutdown(self) -> None:
        """Close all clients with 1012, leave the broker; :meth:`startup` works again afterwards."""
        closing = []
        for connection in list(self._connections):
            fanout = connection.target[0].fanout
            if fanout is current_fanout():
                closing.append(connection.close(*SERVICE_RESTART))
            elif not fanout.loop.is_closed():
                fanout.loop.call_soon_threadsafe(connection.close_soon, *SERVICE_RESTART)
        for outcome in await asyncio.gather(*closing, return_exceptions=True):
            if isinstance(outcome, Exception):
                logger.debug("closing a connection at shutdown: %r", outcome)
        for connection in list(self._connections):
            self.connection_gone(connection)
        if self._started:
            self._started = False
            self._post = self._publish
            self._stop_keeping()
            await self._transport.stop()
        self._lock = None

    async def __aenter__(self: Self) -> Self:
        await self.startup()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.shutdown()

    @property
    def started(self) -> bool:
        """Whether messages cross."""
        return self._started

    @property
    def settings(self) -> Settings:
        """The limits in force: the supervisor's, else the defaults and ``FLOCKWIRE_…`` variables."""
        if self._settings is None:
            self._settings = current_settings()
        return self._settings

    @property
    def rules(self) -> Rules:
        """Topic rules in force: the running hub's where there is one."""
        if self._rules is None:
            self._rules = self.settings.rules
        return self._rules

    @property
    def transport(self) -> Transport:
        """How messages leave; for the back-pressure of whoever publishes."""
        return self._transport

    # --- connections ------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Connection]:
        return iter(list(self._connections))

    @property
    def active_connections(self) -> list[Connection]:
        """The connections of this process, oldest first."""
        return list(self._connections)

    async def new_connection(
        self, websocket: WebSocket, conn_id: str, topic: str | None = None
    ) -> Connection:
        """Accept a client. When the handshake is answered its id, its topic and its part in broadcasts are in force
        on the whole host.

        An invalid ``topic`` is answered with an error message; the client stays connected without it.
        """
        connection = self.register(websocket, conn_id)
        if topic:
            try:
                connection.topics.add(topic)
            except InvalidTopic as exc:
                connection.answer_error(str(exc), ErrorCode.BAD_REQUEST)
        await self.accept(connection)
        return connection

    def register(self, websocket: WebSocket, conn_id: str, first: bytes | None = None) -> Connection:
        """A connection that is in force before it is accepted; what is sent to it waits for :meth:`accept`.

        ``first`` is JSON text that the client gets before anything else.
        """
        check_conn_id(conn_id)
        fanout = current_fanout()
        self._scattered = bool(self._connections) and (self._scattered or self._fanout is not fanout)
        self._fanout = fanout
        connection = Connection(websocket, conn_id)
        connection.prepare(self, self.settings.max_backlog, self.settings.write_timeout)
        if first is not None:
            connection.target[0].push(first)
        self._connections[connection] = None
        self._everyone = None
        self._by_id.setdefault(conn_id, []).append(connection)
        self._want(connection)
        return connection

    async def accept(self, connection: Connection) -> None:
        """Answer the handshake of a registered connection."""
        try:
            await connection.accept()
        except BaseException:
            self.connection_gone(connection)
            raise

    async def close_connection(self, connection: Connection, code: int = 1000) -> None:
        """Close and forget a connection; one that is gone already is no error."""
        self.connection_gone(connection)
        await connection.close(code)

    def remove_connection(self, connection: Connection) -> Accepted:
        """Forget a connection without closing it; one that is unknown is no error."""
        self.connection_gone(connection)
        return DONE

    def set_conn_id(self, connection: Connection, conn_id: str) -> Accepted:
        """Give a connection another address and tell the client: ``{"type":"set_conn_id","conn_id":…}``."""
        connection.id = conn_id
        connection.push({"type": "set_conn_id", "conn_id": conn_id})
        return DONE

    def _want(self, connection: Connection) -> None:
        if not self._wants_broadcasts:
            self._wants_broadcasts = True
            self._transport.interest_add(InterestKind.CHANNEL, "")
        self._transport.interest_add(InterestKind.CONN, connection.id)
        if connection.subscription_count:
            for pattern in connection.topics:
                self._transport.interest_add(*interest_in(pattern))

    def connection_subscribed(self, connection: Connection, pattern: str) -> None:
        """A pattern was added to ``connection.topics``."""
        if connection.feed is not None:
            self.listen(pattern, connection.feed)
            return
        self._transport.interest_add(*interest_in(pattern))
        if self._log is not None:
            self._catch_up()
        sink = connection.target[0]
        self._index.add(pattern, sink)
        sink.fanout.subscriptions += 1

    def connection_unsubscribed(self, connection: Connection, pattern: str) -> None:
        """A pattern was removed from ``connection.topics``."""
        if connection.feed is not None:
            self.unlisten(pattern, connection.feed)
        elif self._index.discard(pattern, connection.target[0]):
            current_fanout().subscriptions -= 1
            self._transport.interest_discard(*interest_in(pattern))

    def connection_renamed(self, connection: Connection, old: str, new: str) -> None:
        """``connection.id`` was set."""
        self._transport.interest_add(InterestKind.CONN, new)
        self._by_id.setdefault(new, []).append(connection)
        self._forget_id(connection, old)

    def connection_gone(self, connection: Connection) -> None:
        """Forget a connection and all it wanted; once is enough."""
        if connection not in self._connections:
            return
        del self._connections[connection]
        self._everyone = None
        if connection.subscription_count:
            connection.topics.clear()
        self._forget_id(connection, connection.id)
        if not self._connections and self._wants_broadcasts:
            self._wants_broadcasts = False
            self._transport.interest_discard(InterestKind.CHANNEL, "")
        connection.owner = None

    def _forget_id(self, connection: Connection, conn_id: str) -> None:
        named = self._by_id.get(conn_id, [])
        if connection in named:
            named.remove(connection)
            self._transport.interest_discard(InterestKind.CONN, conn_id)
        if not named:
            self._by_id.pop(conn_id, None)

    # --- messages: in -------------------------------------------------------------------------------------

    async def receive(self, connection: Connection, message: dict[str, Any] | Message) -> None:
        """Act on what a client sent: a subscription, else a publication, under the topic rules.

        What is wrong with it becomes an error message to the client. Waits while the bus is full.
        """
        try:
            if isinstance(message, Message):
                message = message.__serialize__()
            if not isinstance(message, dict):
                raise WebSocketException(
                    f"expected a JSON object, got {type(message).__name__}", connection=connection
                )
            handle_message(self, connection, dict(message))
        except WebSocketException as exc:
            connection.answer_error(exc.message, exc.code)
        await self._transport.accepted()

    # --- messages: across -----------------------------------------------------------------------------------

    def send(self, topic: str | Message, data: Any = _UNSET, *, local: bool = False) -> Accepted:
        """Publish to the subscribers of a topic on every worker, once to each connection.

        Args:
            topic: where to, without wildcards; or a :class:`Message` that says it all.
            data: any JSON value.
            local: keep to this process.

        Returns:
            Something that may be awaited (the bus has accepted it) or ignored.

        Raises:
            InvalidTopic: not a topic to publish to.
            TypeError, ValueError: ``data`` has no JSON form.
            BusFull: publishes that nobody awaited have overshot the bound.
        """
        if isinstance(topic, Message):
            message = topic
            topic, data = message.topic or "", message.data
        return self.publish_text(topic, jsontext.encode(_given(data)), local)

    def broadcast(self, data: Any | Message, *, local: bool = False) -> Accepted:
        """As :meth:`send`, to every connection of this channel on every worker."""
        return self.broadcast_text(jsontext.encode(data.data if isinstance(data, Message) else data), local)

    def send_by_conn_id(
        self, conn_id: str | list[str] | Message, data: Any = _UNSET, *, local: bool = False
    ) -> Accepted:
        """As :meth:`send`, to all connections that have this id, or one of these."""
        if isinstance(conn_id, Message):
            message = conn_id
            conn_id, data = message.conn_id or [], message.data
        ids = (conn_id,) if isinstance(conn_id, str) else tuple(conn_id)
        return self.direct_text(ids, jsontext.encode(_given(data)), local)

    def send_msg(self, message: Message) -> Accepted:
        """Send a :class:`Message` as its type says: ``send``, ``broadcast`` or ``send_by_conn_id``."""
        if message.type == "broadcast":
            return self.broadcast(message)
        if message.type == "send_by_conn_id":
            return self.send_by_conn_id(message)
        return self.send(message)

    def publish_text(self, topic: str, payload: bytes, local: bool = False, info: bytes = b"") -> Accepted:
        """:meth:`send` for JSON text in UTF-8 that is ready; ``info`` is JSON that tells who publishes."""
        check_topic(topic)
        envelope = Envelope(TOPIC, self.broker_channel, topic, payload, (), 0, info)
        retention = None if local else self._retention(topic)
        return self._publish(envelope, local) if retention is None else self._store(envelope, retention)

    def publish_checked(self, topic: str, payload: bytes) -> Accepted:
        """The same for a topic that :meth:`clients_may_publish` has seen."""
        return self._post(Envelope(TOPIC, self.broker_channel, topic, payload))

    def _post_or_store(self, envelope: Envelope) -> Accepted:
        """Where any topic has history, what clients publish goes this way."""
        retention = self._retentions[envelope.topic]
        if retention is not None:
            return self._store(envelope, retention)
        return self._transport.publish(envelope, False)

    def clients_may_publish(self, topic: str) -> bool:
        """Whether the topic rules let clients publish there.

        Raises:
            InvalidTopic: not a topic to publish to.
        """
        allowed = self.publishable.get(topic)
        if allowed is None:
            check_topic(topic)
            if len(self.publishable) >= MAX_KNOWN_TOPICS:
                self.publishable.clear()
            allowed = self.publishable[topic] = self.rules.may_publish(topic, False)
        return allowed

    def broadcast_text(self, payload: bytes, local: bool = False) -> Accepted:
        """:meth:`broadcast` for JSON text that is ready."""
        return self._publish(Envelope(BROADCAST, self.broker_channel, "", payload), local)

    def direct_text(self, conn_ids: tuple[str, ...], payload: bytes, local: bool = False) -> Accepted:
        """:meth:`send_by_conn_id` for JSON text that is ready."""
        return self._publish(Envelope(DIRECT, self.broker_channel, "", payload, conn_ids), local)

    def _publish(self, envelope: Envelope, local: bool = False) -> Accepted:
        if not self._started:
            if local or isinstance(self.broker, InMemoryBroker):
                self._deliver([envelope])
                return DONE
            raise RuntimeError("this manager is not started; call await manager.startup() first")
        accepted = self._transport.publish(envelope, local)
        if accepted is DONE and self._fanout is not None and self._fanout.crowded:
            return LET_THE_LOOP_TURN
        return accepted

    # --- messages: out ------------------------------------------------------------------------------------

    def _deliver(self, envelopes: Sequence[Envelope]) -> None:
        """Envelopes of this channel, from here or from the bus, in order."""
        if self._listening:
            if len(envelopes) > 1 and any(each.kind != envelopes[0].kind for each in envelopes):
                # A client may get topics here and broadcasts below.
                for _, run in groupby(envelopes, attrgetter("kind")):
                    self._deliver(tuple(run))
                return
            self._deliver_to_receivers(envelopes)
        fanout = self._fanout
        if fanout is None:
            return  # nobody has ever connected here
        if self._scattered or fanout.thread != get_ident():
            deliver_elsewhere(envelopes, self._targets, self.rules.slow_consumer)
            return
        find_policy = self._policy
        if len(envelopes) == 1 and (envelope := envelopes[0]).kind == TOPIC:
            # What is published here comes alone.
            topic = envelope.topic
            targets = self._index.match(topic)
            if targets:
                data = envelope.data
                frame = HEADS[len(data)] + data if len(data) < 1024 else text_frame(data)
                policy = DEFAULT_SLOW_POLICY if find_policy is None else find_policy(topic)
                fanout.send_frames(targets, [frame], policy, topic)
            return
        frames: list[bytes] = []
        topic, targets, policy = "", (), DEFAULT_SLOW_POLICY  # no topic is empty
        for envelope in envelopes:
            kind = envelope.kind
            if kind != TOPIC or envelope.topic != topic:  # messages to one topic come in runs
                if frames:
                    fanout.send_frames(targets, frames, policy, topic)
                    frames = []
                topic, targets = "", ()
                if kind == TOPIC:
                    topic = envelope.topic
                    targets = self._index.match(topic)
                    if find_policy is not None:
                        policy = find_policy(topic)
                elif kind == BROADCAST:
                    fanout.send(self._all_sinks(), envelope.data)
                elif kind == DIRECT:
                    fanout.send(self._sinks_of(envelope.conn_ids), envelope.data)
            if targets:
                data = envelope.data
                size = len(data)
                frames.append(HEADS[size] + data if size < 1024 else text_frame(data))
        if frames:
            fanout.send_frames(targets, frames, policy, topic)

    def _targets(self, envelope: Envelope) -> tuple[AnySink, ...]:
        if envelope.kind == TOPIC:
            return self._index.match(envelope.topic)
        return self._all_sinks() if envelope.kind == BROADCAST else self._sinks_of(envelope.conn_ids)

    def _all_sinks(self) -> tuple[AnySink, ...]:
        if self._everyone is None:
            self._everyone = tuple([connection.target[0] for connection in list(self._connections)])
        return self._everyone

    def _sinks_of(self, conn_ids: tuple[str, ...]) -> tuple[AnySink, ...]:
        if len(conn_ids) == 1:
            named = self._by_id.get(conn_ids[0], ())
            return named[0].target if len(named) == 1 else tuple(connection.target[0] for connection in named)
        all_named = (named for conn_id in conn_ids for named in self._by_id.get(conn_id, ()))
        return tuple({connection.target[0]: None for connection in all_named})


def _given(data: Any) -> Any:
    if data is _UNSET:
        raise TypeError("say what to send: data, or a Message")
    return data
