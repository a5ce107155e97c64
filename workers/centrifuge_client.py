"""The shell around one client of the Centrifuge protocol: its socket, its timer, and what its session wants done.

On the way of a message in both directions. In: frames go to the session (``workers/centrifuge.py``), whose effects are
performed here: publish, subscribe, read history, ask the application. Out: replies leave here, publications through
``workers/centrifuge_groups.py``.
"""

from __future__ import annotations

import asyncio
import logging
import random
import secrets
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, Final

from starlette.websockets import WebSocket

from ipc.peer import BusFull
from ipc.positions import Position
from ipc.store_records import StoreError
from ipc.topics import InvalidTopic
from workers import centrifuge_effects as effects
from workers import codes, jsontext
from workers.centrifuge import Session
from workers.centrifuge_effects import Effect, Refusal
from workers.centrifuge_hooks import (
    BUDGET,
    CentrifugeError,
    ClientSession,
    ConnectReply,
    ConnectRequest,
    Disconnect,
    PublishReply,
    SubscribeReply,
)
from workers.centrifuge_questions import answer_history, answer_presence, answer_presence_stats
from workers.codes import ErrorCode
from workers.connection import Connection
from workers.fanout import current_fanout
from workers.limited_protocol import HOLD_ANSWERS, HOLD_BUS
from workers.protocol import our_protocol
from workers.sinks import AnySink
from workers.stored import Result, Storing, refusal

if TYPE_CHECKING:
    from workers.centrifuge_hub import CentrifugeHub

logger = logging.getLogger("workers")

Failed = Callable[[int | Refusal], list[Effect]]
_NOTHING: Final = ConnectReply()


class CentrifugeClient:
    """One connection. Its methods are called on the event loop's thread."""

    def __init__(self, hub: CentrifugeHub, websocket: WebSocket, config: effects.Config) -> None:
        self.hub = hub
        self.websocket = websocket
        self._loop = asyncio.get_running_loop()
        self.session = Session(
            config,
            client_id=secrets.token_urlsafe(15),
            now=self._loop.time(),
            jitter=random.random(),
        )
        self.public = ClientSession(self)
        self.protocol = our_protocol(websocket)
        self.connection = Connection(websocket, self.session.client_id)
        settings = hub.manager.settings
        self.connection.prepare(self, settings.max_backlog, settings.write_timeout)
        self.sink: AnySink = self.connection.target[0]
        self.sink.slow_close = codes.SLOW
        self._target = self.connection.target
        self._timer: asyncio.TimerHandle | None = None
        self._present: set[str] = set()
        self._told = False
        self._gone = False
        self._calm: asyncio.Event | None = None
        self._closing = (codes.CONNECTION_CLOSED.code, codes.CONNECTION_CLOSED.reason)

    # In --------------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """The handshake is answered: from now on it has its time to say who it is, and no more."""
        self._schedule()

    def on_message(self, payload: bytes, is_text: bool) -> None:
        """One WebSocket message, in order. Never raises."""
        try:
            if is_text:
                self.do(self.session.receive(payload, self._loop.time()))
            else:
                self.do(self.session.disconnect(*codes.BAD_REQUEST))
        except Exception:
            # Whatever it was: neither the process nor the other clients shall suffer by it.
            logger.exception("a client's frame could not be served")
            self.disconnect(*codes.SERVER_ERROR)
        self._schedule()
        if self.session.busy:
            self._hold(HOLD_ANSWERS, lambda callback: None)
        if self.hub.manager.transport.congested:
            self._hold(HOLD_BUS, self.hub.manager.transport.on_clear)

    def _hold(self, reason: int, on_clear: Callable[[Callable[[], None]], None]) -> None:
        """Read no further; under a foreign server its endpoint waits instead, see :meth:`calm`."""
        protocol = self.protocol
        if protocol is not None and not protocol.holds(reason):
            protocol.hold(reason)
            self.session.reading_paused(self._loop.time())
            on_clear(lambda: self._release(reason))

    def _release(self, reason: int) -> None:
        protocol = self.protocol
        if protocol is not None and protocol.holds(reason):
            protocol.release(reason)
            self.session.reading_resumed(self._loop.time())
            self._schedule()

    async def calm(self) -> None:
        """Wait until so much was answered that more may be read."""
        while self.session.busy and not self._gone:
            self._calm = asyncio.Event()
            await self._calm.wait()

    def _schedule(self) -> None:
        """See that the session's timer runs in time."""
        due = self.session.next_deadline
        if self._timer is not None:
            if self._timer.when() <= due:
                return
            self._timer.cancel()
            self._timer = None
        if due != float("inf") and not self._gone:
            self._timer = self._loop.call_at(due, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self.do(self.session.timer(self._loop.time()))
        self._schedule()

    # What the session wants ------------------------------------------------------------------------------------

    def do(self, wanted: list[Effect]) -> None:
        """Perform effects in order."""
        for effect in wanted:
            _PERFORM[type(effect)](self, effect)

    def _answer(self, wanted: list[Effect]) -> None:
        """As :meth:`do`, for answers that come later than the frame that asked."""
        self.do(wanted)
        self._schedule()
        if not self.session.busy:
            self._release(HOLD_ANSWERS)
            if self._calm is not None:
                self._calm.set()

    def _on_send(self, effect: effects.Send) -> None:
        if effect.recovery:
            # What a client has missed may be far more than what may wait for it.
            current_fanout().flush()
            self.sink.push_extra(effect.data)
        else:
            current_fanout().send(self._target, effect.data)

    def _on_close(self, close: codes.Close) -> None:
        self._closing = (close.code, close.reason)
        current_fanout().flush()
        self.connection.close_soon(*close)
        self.finish()

    def _on_connect(self, effect: effects.Connect) -> None:
        if self.hub.asks.connect:
            request = ConnectRequest(
                effect.token, _decoded(effect.data), effect.name, effect.version, effect.headers
            )
            self._ask(self._decide_connect(request), self.session.connect_failed)
        elif not self.hub.manager.settings.allow_anonymous:
            self.do(self.session.connect_failed(ErrorCode.UNAUTHORIZED))
        else:
            self._connect(_NOTHING)

    async def _decide_connect(self, request: ConnectRequest) -> None:
        self._connect(await self.hub.hooks.on_connect(self.public, request) or _NOTHING)

    def _connect(self, reply: ConnectReply) -> None:
        accepted = effects.Accepted(
            user=reply.user,
            info=_encoded(reply.info),
            data=_encoded(reply.data),
            subscriptions={channel: effects.ServerSubscription() for channel in reply.subscriptions},
        )
        self._told = True
        self._answer(self.session.connected(accepted, self._loop.time()))

    @property
    def _known(self) -> bool:
        """Whether the application has said who it is."""
        return bool(self.session.user)

    # Subscriptions ---------------------------------------------------------------------------------------------

    def _on_subscribe(self, effect: effects.Subscribe) -> None:
        channel = effect.channel
        if not effect.server_side:
            if not self.hub.manager.rules.may_subscribe(channel, self._known):
                self._refuse_subscription(channel, ErrorCode.PERMISSION_DENIED)
                return
            if self.hub.asks.subscribe:
                self._ask(
                    self._decide_subscribe(effect), lambda error: self._subscription_failed(channel, error)
                )
                return
        self._subscribe(effect, SubscribeReply())

    def _subscription_failed(self, channel: str, error: int | Refusal) -> list[Effect]:
        return self.session.subscribe_failed(channel, error, self._loop.time())

    def _refuse_subscription(self, channel: str, error: int) -> None:
        self._answer(self._subscription_failed(channel, error))

    async def _decide_subscribe(self, effect: effects.Subscribe) -> None:
        reply = await self.hub.hooks.on_subscribe(self.public, effect.channel, _decoded(effect.data))
        self._subscribe(effect, reply or SubscribeReply())

    def _subscribe(self, effect: effects.Subscribe, reply: SubscribeReply) -> None:
        """Join first, then read the log: what comes meanwhile is kept by the session."""
        subscription = self.session.subscription(effect.channel)
        if subscription is None or self.session.closed:
            return
        manager = self.hub.manager
        result = effects.Subscribed(info=_encoded(reply.info), data=_encoded(reply.data))
        self.hub.groups.join(effect.channel, self, subscription)
        wants = effect.recoverable or effect.positioned or effect.recover
        if manager.log is None or not wants or not manager.rules.recoverable(effect.channel):
            self._subscribed(effect.channel, result)
        elif effect.recover:
            self.hub.run(self._recover(effect, result))
        else:
            try:
                top = manager.log.top()
            except StoreError as error:
                self._undo(effect.channel, error)
            else:
                self._subscribed(effect.channel, _at(result, top))

    async def _recover(self, effect: effects.Subscribe, result: effects.Subscribed) -> None:
        manager, channel = self.hub.manager, effect.channel
        assert manager.log is not None
        since = Position(effect.since.offset, effect.since.epoch)
        try:
            found = await manager.log.recover(manager.broker_channel, channel, since)
        except StoreError as error:
            self._undo(channel, error)
            return
        publications = [
            effects.Publication(entry.data, entry.offset, entry.topic, entry.info) for entry in found.entries
        ]
        at = _at(result, Position(found.top, found.epoch), found.recovered, publications)
        self._subscribed(channel, at)

    def _undo(self, channel: str, error: StoreError) -> None:
        logger.warning("a subscription to %r failed: %s", channel, error)
        self.hub.groups.leave(channel, self)
        self._refuse_subscription(channel, ErrorCode.INTERNAL)

    def _subscribed(self, channel: str, result: effects.Subscribed) -> None:
        self._answer(self.session.subscribed(channel, result, self._loop.time()))
        subscription = self.session.subscription(channel)
        if subscription is not None and subscription.established and not self.session.closed:
            self._join(channel)

    def _join(self, channel: str) -> None:
        presence = self.hub.presence
        if presence is None or channel in self._present or not self.hub.manager.rules.has_presence(channel):
            return
        session = self.session
        try:
            presence.join(
                self.hub.manager.broker_channel,
                channel,
                session.client_id,
                session.user,
                session.client_info(channel),
            )
        except StoreError as error:
            logger.warning("presence on %r was not stored: %s", channel, error)
        else:
            self._present.add(channel)

    def _on_unsubscribe(self, effect: effects.Unsubscribe) -> None:
        self.hub.groups.leave(effect.channel, self)
        if effect.channel in self._present and self.hub.presence is not None:
            self._present.discard(effect.channel)
            self.hub.presence.leave(self.hub.manager.broker_channel, effect.channel, self.session.client_id)

    # Publications ----------------------------------------------------------------------------------------------

    def _on_publish(self, effect: effects.Publish) -> None:
        if not self.hub.manager.rules.may_publish(effect.channel, self._known):
            self.do(self.session.failed(effect.id, ErrorCode.PERMISSION_DENIED))
        elif self.hub.asks.publish:
            self._ask(self._decide_publish(effect), lambda error: self.session.failed(effect.id, error))
        else:
            self._publish(effect.id, effect.channel, effect.data, effect.info)

    async def _decide_publish(self, effect: effects.Publish) -> None:
        reply = await self.hub.hooks.on_publish(self.public, effect.channel, _decoded(effect.data))
        data = jsontext.encode(reply.data) if isinstance(reply, PublishReply) else effect.data
        self._publish(effect.id, effect.channel, data, effect.info)

    def _publish(self, number: int, channel: str, data: bytes, info: bytes) -> None:
        try:
            accepted = self.hub.manager.publish_text(channel, data, info=info)
        except InvalidTopic as error:
            self._answer(self.session.failed(number, Refusal(ErrorCode.BAD_REQUEST, str(error))))
        except (BusFull, ValueError) as error:
            self._answer(self.session.failed(number, Refusal(ErrorCode.INTERNAL, str(error), True)))
        else:
            if isinstance(accepted, Storing):
                accepted.when_done(lambda result: self._stored(number, result))
            else:
                self._answer(self.session.published(number))

    def _stored(self, number: int, result: Result) -> None:
        if isinstance(result, StoreError):
            self._answer(self.session.failed(number, Refusal(*refusal(result))))
        else:
            self._answer(self.session.published(number))

    # Questions -------------------------------------------------------------------------------------------------

    def _on_presence(self, effect: effects.Presence) -> None:
        self.do(answer_presence(self.hub, self.session, effect))

    def _on_presence_stats(self, effect: effects.PresenceStats) -> None:
        self.do(answer_presence_stats(self.hub, self.session, effect))

    def _on_history(self, effect: effects.History) -> None:
        self.do(answer_history(self.hub, self.session, effect))

    def _on_rpc(self, effect: effects.Rpc) -> None:
        self._ask(self._call(effect), lambda error: self.session.failed(effect.id, error))

    async def _call(self, effect: effects.Rpc) -> None:
        result = await self.hub.hooks.on_rpc(self.public, effect.method, _decoded(effect.data))
        self._answer(self.session.rpc_result(effect.id, jsontext.encode(result)))

    def _on_app_message(self, effect: effects.Message) -> None:
        self._ask(self.hub.hooks.on_message(self.public, _decoded(effect.data)), lambda error: [])

    def _on_refresh(self, effect: effects.Refresh | effects.SubRefresh) -> None:
        self.do(self.session.failed(effect.id, ErrorCode.NOT_AVAILABLE))

    def _ask(self, question: Coroutine[Any, Any, None], failed: Failed) -> None:
        """Let the application decide, within the budget."""
        self.hub.run(self._asked(question, failed))

    async def _asked(self, question: Coroutine[Any, Any, None], failed: Failed) -> None:
        error: int | Refusal
        try:
            async with asyncio.timeout(BUDGET):
                await question
            return
        except CentrifugeError as refused:
            error = Refusal(refused.code, refused.message, refused.temporary)
        except Disconnect as wish:
            self.disconnect(wish.code, wish.reason)
            return
        except TimeoutError:
            logger.warning("a hook took longer than %g s; the client gets error 100", BUDGET)
            error = ErrorCode.INTERNAL
        except Exception:
            logger.exception("a hook failed; the client gets error 100")
            error = ErrorCode.INTERNAL
        self._answer(failed(error))

    # What the application wants --------------------------------------------------------------------------------

    def send(self, data: Any) -> None:
        """See :meth:`ClientSession.send`."""
        self._answer(self.session.send(jsontext.encode(data)))

    def subscribe(self, channel: str, recoverable: bool, join_leave: bool) -> None:
        """See :meth:`ClientSession.subscribe`."""
        wanted = effects.ServerSubscription(
            positioned=recoverable, recoverable=recoverable, join_leave=join_leave
        )
        self._answer(self.session.subscribe(channel, wanted))

    def unsubscribe(self, channel: str, code: int) -> None:
        """See :meth:`ClientSession.unsubscribe`."""
        self._answer(self.session.unsubscribe(channel, code))

    def disconnect(self, code: int, reason: str) -> None:
        """See :meth:`ClientSession.disconnect`."""
        self._answer(self.session.disconnect(code, reason))

    # The end, and what a connection asks of its owner ----------------------------------------------------------

    def connection_gone(self, connection: Connection) -> None:
        """The client is gone, or our close frame is on its way."""
        self.finish()

    def connection_subscribed(self, connection: Connection, pattern: str) -> None:
        """Plain subscriptions: there are none."""

    def connection_unsubscribed(self, connection: Connection, pattern: str) -> None:
        """Plain subscriptions: there are none."""

    def connection_renamed(self, connection: Connection, old: str, new: str) -> None:
        """Its id does not change."""

    def finish(self) -> None:
        """Undo everything; once is enough."""
        if self._gone:
            return
        self._gone = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._calm is not None:
            self._calm.set()
        self.hub.clients.discard(self)
        self.do(self.session.end())
        if self._told and self.hub.asks.disconnect:
            self._ask(self.hub.hooks.on_disconnect(self.public, *self._ending()), lambda error: [])

    def _ending(self) -> tuple[int, str]:
        return self.connection.gone or self._closing


_PERFORM: Final[dict[type[Any], Callable[[CentrifugeClient, Any], None]]] = {
    effects.Send: CentrifugeClient._on_send,
    codes.Close: CentrifugeClient._on_close,
    effects.Connect: CentrifugeClient._on_connect,
    effects.Subscribe: CentrifugeClient._on_subscribe,
    effects.Unsubscribe: CentrifugeClient._on_unsubscribe,
    effects.Publish: CentrifugeClient._on_publish,
    effects.Presence: CentrifugeClient._on_presence,
    effects.PresenceStats: CentrifugeClient._on_presence_stats,
    effects.History: CentrifugeClient._on_history,
    effects.Rpc: CentrifugeClient._on_rpc,
    effects.Message: CentrifugeClient._on_app_message,
    effects.Refresh: CentrifugeClient._on_refresh,
    effects.SubRefresh: CentrifugeClient._on_refresh,
}


def _at(
    result: effects.Subscribed,
    top: Position,
    recovered: bool = False,
    publications: list[effects.Publication] | None = None,
) -> effects.Subscribed:
    return effects.Subscribed(
        recoverable=True,
        epoch=top.epoch,
        offset=top.offset,
        recovered=recovered,
        publications=publications or (),
        info=result.info,
        data=result.data,
    )


def _encoded(value: Any) -> bytes:
    return b"" if value is None else jsontext.encode(value)


def _decoded(text: bytes) -> Any:
    return jsontext.decode(text) if text else None
