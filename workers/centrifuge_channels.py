"""All subscriptions of one Centrifuge connection: made, answered, recovered, ended.

The part of `workers/centrifuge.py` that deals with channels. A channel is a topic or a pattern, just as the client
wrote it. For each one there is at most one question to the shell at a time; what comes for it meanwhile waits,
so that a quick unsubscribe and subscribe can never overtake each other.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Final

from ipc.topics import InvalidTopic, check_pattern, is_pattern

from . import centrifuge_effects as effects
from . import centrifuge_messages as messages
from .centrifuge_effects import Refusal, Subscribed
from .centrifuge_messages import SubscribeRequest, UnsubscribeRequest
from .centrifuge_output import Identity, Output
from .centrifuge_subscription import Subscription
from .codes import ErrorCode

SERVER_UNSUBSCRIBE: Final = 2000
INSUFFICIENT: Final = 2500
EXPIRED: Final = 2501

_STATE_INVALIDATED_EPOCH = "_"  # a client that was told 2502 or 3014 asks for this one; it fits nothing


class Channels:
    """The subscriptions of one connection.

    Attributes:
        initial: what the connect reply will say of the server-side subscriptions it waits for; None: unanswered.
        initial_error: one of them was refused.
    """

    __slots__ = ("_config", "_identity", "_output", "_subscriptions", "initial", "initial_error")

    def __init__(self, config: effects.Config, identity: Identity, output: Output) -> None:
        self._config = config
        self._identity = identity
        self._output = output
        self._subscriptions: dict[str, Subscription] = {}
        self.initial: dict[str, dict[str, Any] | None] = {}
        self.initial_error: int | Refusal | None = None

    def __len__(self) -> int:
        return len(self._subscriptions)

    def get(self, channel: str) -> Subscription | None:
        """Return the subscription to exactly this channel, live or being made."""
        return self._subscriptions.get(channel)

    def live(self) -> list[str]:
        """Return the channels whose subscribe reply has left."""
        return [channel for channel, subscription in self._subscriptions.items() if subscription.live]

    def is_live(self, channel: str) -> bool:
        """Tell whether the client is subscribed and knows it."""
        subscription = self._subscriptions.get(channel)
        return subscription is not None and subscription.live

    def next_expiry(self) -> float:
        """Return when the first subscription ends for want of a fresh token."""
        return min((item.expires_at for item in self._subscriptions.values()), default=math.inf)

    def fits(self, number: int, channel: str) -> bool:
        """Check a topic or pattern that is not empty; a bad one is an error for the command."""
        try:
            check_pattern(channel)
        except InvalidTopic as exc:
            self._output.error(number, ErrorCode.BAD_REQUEST, f"bad request: {exc}")
            return False
        return True

    # What the client wants.

    def subscribe(self, number: int, request: SubscribeRequest) -> None:
        """Take a subscribe command. The channel is not empty."""
        channel = request.channel
        if not self.fits(number, channel):
            return
        subscription = self._subscriptions.get(channel)
        if subscription is not None:
            if subscription.ends_before_next():
                self._wait(subscription, number, request)
            else:
                self._output.error(number, ErrorCode.ALREADY_SUBSCRIBED)
        elif len(self._subscriptions) >= self._config.max_subscriptions:
            self._output.error(number, ErrorCode.LIMIT_EXCEEDED)
        elif request.type >= 1:
            self._output.error(number, ErrorCode.NOT_AVAILABLE)
        elif request.tf and request.tf != b"null":
            self._output.error(number, ErrorCode.BAD_REQUEST, "bad request: tags filters are not supported")
        else:
            self._begin(number, request, server_side=False)

    def unsubscribe(self, number: int, request: UnsubscribeRequest) -> None:
        """Take an unsubscribe command. The channel is not empty, and need not be known."""
        subscription = self._subscriptions.get(request.channel)
        if subscription is not None and not subscription.live:
            self._wait(subscription, number, request)
            return
        if subscription is not None:
            self._remove(subscription, 0)
        self._output.line(b'{"id":%d,"unsubscribe":{}}' % number)

    def _wait(
        self, subscription: Subscription, number: int, request: SubscribeRequest | UnsubscribeRequest
    ) -> None:
        subscription.waiting.append((number, request))
        self._output.in_flight += 1

    # What the server wants.

    def subscribe_client(
        self, channel: str, wanted: effects.ServerSubscription, left: messages.RecoverRequest
    ) -> None:
        """Begin a server-side subscription to a valid channel that is not subscribed.

        Args:
            channel: a topic or pattern.
            wanted: of what kind.
            left: the position the client brought back for it.
        """
        request = SubscribeRequest(
            channel=channel,
            recover=left.recover,
            epoch=left.epoch,
            offset=left.offset,
            positioned=wanted.positioned,
            recoverable=wanted.recoverable,
            join_leave=wanted.join_leave,
        )
        self._begin(0, request, server_side=True)

    def unsubscribe_client(self, channel: str, code: int) -> None:
        """End a subscription and tell the client; no effect if there is none."""
        subscription = self._subscriptions.get(channel)
        if subscription is None:
            return
        if not subscription.live:
            if code not in subscription.waiting:
                subscription.waiting.append(code)
            return
        reason = messages.UNSUBSCRIBE_REASONS.get(code, "unsubscribed by the server")
        self._output.line(messages.encode_unsubscribe(channel, code, reason))
        self._remove(subscription, code)

    def expire(self, now: float) -> bool:
        """End the expired subscriptions; False if a server-side one is among them, which ends the connection."""
        for subscription in [item for item in self._subscriptions.values() if item.expires_at <= now]:
            if subscription.server_side:
                return False
            self.unsubscribe_client(subscription.channel, EXPIRED)
        return True

    def drop_all(self, code: int) -> None:
        """The connection is over: end what is in force. What the shell is still making ends when it answers."""
        subscriptions, self._subscriptions = self._subscriptions, {}
        self.initial = {}
        for subscription in subscriptions.values():
            if subscription.established:
                self._output.emit(subscription.ended(code, self._identity.info(subscription.info)))

    def _begin(self, number: int, request: SubscribeRequest, server_side: bool) -> None:
        self._subscriptions[request.channel] = Subscription(
            number, request, server_side, self._config.max_buffered
        )
        self._output.ask(
            effects.Subscribe(
                channel=request.channel,
                token=request.token,
                data=bytes(request.data),
                recover=request.recover,
                since=messages.Position(request.offset, request.epoch),
                positioned=request.positioned,
                recoverable=request.recoverable or request.recover,
                join_leave=request.join_leave,
                server_side=server_side,
            )
        )

    def _remove(self, subscription: Subscription, code: int) -> None:
        del self._subscriptions[subscription.channel]
        self._output.emit(subscription.ended(code, self._identity.info(subscription.info)))

    # What the shell answers.

    def subscribed(self, channel: str, result: Subscribed, now: float) -> None:
        """It is in force."""
        subscription = self._subscriptions.get(channel)
        if subscription is None or subscription.established:
            return
        self._output.answered()
        subscription.established = True
        subscription.info = result.info
        if subscription.overflowed:
            self._fail(subscription, ErrorCode.INTERNAL)
            return
        body = self._result(subscription, result)
        flag = subscription.request.flag
        if body.get("recovered") is False and flag & messages.FLAG_REJECT_UNRECOVERED:
            self._fail(subscription, ErrorCode.UNRECOVERABLE_POSITION)
            return
        if result.ttl is not None:
            subscription.expires_at = now + result.ttl + self._config.expired_grace
            body |= messages.expires(result.ttl)
        if channel in self.initial:
            self.initial[channel] = body
        else:
            self._establish(subscription, body)

    def subscribe_failed(self, channel: str, error: int | Refusal) -> None:
        """It was refused."""
        subscription = self._subscriptions.get(channel)
        if subscription is not None and not subscription.established:
            self._output.answered()
            self._fail(subscription, error)

    def abandoned(self, channel: str, result: Subscribed, code: int) -> None:
        """It is in force, but the connection ended meanwhile: what the shell has set up has to go."""
        subscription = self._subscriptions.get(channel)
        if subscription is not None and subscription.established:
            return  # it is among those that `drop_all` will end
        server_side = subscription is not None and subscription.server_side
        self._subscriptions.pop(channel, None)
        info = self._identity.info(result.info)
        self._output.emit(effects.Unsubscribe(channel, code, info, server_side))

    def go_live(self, channels: Iterable[str]) -> None:
        """The connect reply has been said: what came for its server-side subscriptions follows."""
        for channel in channels:
            self._output.lines(self._subscriptions[channel].go_live())

    def _establish(self, subscription: Subscription, body: dict[str, Any]) -> None:
        """Tell the client that it is subscribed, then what came meanwhile; then do what it wanted next."""
        if subscription.server_side:
            self._output.line(messages.encode_subscribe(subscription.channel, body))
        else:
            reply = messages.encode_reply(subscription.number, "subscribe", body)
            self._output.reply(reply, recovery="publications" in body)
        self._output.lines(subscription.go_live())
        self._go_on(subscription)

    def _fail(self, subscription: Subscription, error: int | Refusal) -> None:
        """Let a subscription end that was never live."""
        channel = subscription.channel
        if subscription.established:
            self._remove(subscription, INSUFFICIENT)
        else:
            del self._subscriptions[channel]
        if channel in self.initial:
            self.initial_error = error
        elif not subscription.server_side:
            self._output.refuse(subscription.number, error)
        self._go_on(subscription)

    def _go_on(self, subscription: Subscription) -> None:
        """Do what came for the channel meanwhile. A subscribe among it makes the rest wait again."""
        waiting, subscription.waiting = subscription.waiting, []
        for item in waiting:
            if isinstance(item, int):
                self.unsubscribe_client(subscription.channel, item)
                continue
            self._output.answered()
            number, request = item
            if isinstance(request, SubscribeRequest):
                self.subscribe(number, request)
            else:
                self.unsubscribe(number, request)

    def refreshed(self, channel: str, ttl: float | None, now: float, info: bytes | None) -> None:
        """A fresh token keeps the subscription for `ttl` more seconds, or for ever."""
        subscription = self._subscriptions.get(channel)
        if subscription is not None:
            subscription.expires_at = math.inf if ttl is None else now + ttl + self._config.expired_grace
            if info is not None:
                subscription.info = info

    # Positions.

    def _result(self, subscription: Subscription, result: Subscribed) -> dict[str, Any]:
        """Decide what the client is told of its position, and remember it."""
        request = subscription.request
        recoverable = result.recoverable and (request.recoverable or request.recover)
        positioned = recoverable or (result.recoverable and request.positioned)
        body: dict[str, Any] = {}
        top = 0
        if recoverable:
            body["recoverable"] = True
        if positioned:
            top = result.offset
            body |= {"positioned": True, "epoch": result.epoch, "offset": top}
        if request.recover:
            body["was_recovering"] = True
        if request.recover and recoverable:
            missed = self._missed(subscription, result)
            body["recovered"] = missed is not None
            if missed is not None:
                # The client moves on from where it was, with each of the publications.
                body["offset"] = request.offset
                body["publications"] = messages.raw_list(missed)
                if result.publications:
                    top = max(top, result.publications[-1].offset)
        if result.data:
            body["data"] = messages.raw(result.data)
        subscription.start(top, ordered=positioned or not is_pattern(subscription.channel))
        return body

    def _missed(self, subscription: Subscription, result: Subscribed) -> list[bytes] | None:
        """Return all missed publications; None if the client has to be told that some are lost."""
        if not result.recovered or subscription.request.epoch == _STATE_INVALIDATED_EPOCH:
            return None
        missed = []
        room = self._config.max_recovery
        for item in result.publications:
            missed.append(item.encode(subscription.channel))
            room -= len(missed[-1])
            if room < 0:
                return None
        return missed
