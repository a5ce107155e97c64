"""The Centrifuge protocol for one connection, as a state machine: no socket, no clock, no event loop.

A Centrifuge client's frames pass here between the WebSocket and everything else. The shell (whoever has the
socket) makes one `Session` per connection, calls it, and performs the effects that each call returns, in order.
`workers/centrifuge_effects.py` has the effects, each with the method that answers it,
`workers/centrifuge_messages.py` the bytes, `workers/centrifuge_channels.py` all that concerns subscriptions.

| the shell calls | when |
|---|---|
| `receive(frame, now)` | a text message arrived |
| `timer(now)` | `next_deadline` has come; look at it after every call, it may have moved forward |
| `connected`, `subscribed`, `published`, `presence`, ... | an effect was carried out; in any order |
| `connect_failed`, `subscribe_failed`, `failed` | it was refused: an error code or a `Refusal` |
| `admits(channel, offset, push)` | a publication, join or leave is on its way out to this client |
| `subscribe`, `unsubscribe`, `send`, `disconnect` | the application or the worker wants it |
| `insufficient(channel)` | the client's position is void: another epoch, or a gap that cannot be healed |
| `reading_paused(now)`, `reading_resumed(now)` | back-pressure; while `busy`, read no further |
| `end()` | the connection is gone, or `Close` was performed |

Binary messages, and those that are too large: `disconnect(*codes.BAD_REQUEST)`.

**Pushes.** `encode_publication(channel, ...)` is the same bytes for all clients of a channel: the fan-out makes it
once, then asks each session `admits`. That is False while the subscribe reply has not left (the push is kept and
leaves with the reply) and for an offset that the client's position covers (a duplicate). The shell brings the
publications of a channel in the order of their offsets, each once; those of a recoverable pattern in the order of
the log over all its topics. `subscription(channel)` is the object behind it: its `admits` saves the lookup, and
once it is `live`, an offset above its `position` needs no question at all.

**Subscribing.** The shell joins the index before it reads the log, and answers with a snapshot of it: the top, and
for a recovery all that matches between the client's position and the top. What comes live meanwhile goes to
`admits`. For a channel nothing more is asked until the answer is there. For each `subscribed` there is exactly one
`Unsubscribe`, at once if the connection has ended meanwhile.
"""

from __future__ import annotations

import math
from enum import Enum

import msgspec

from ipc.topics import check_pattern

from . import centrifuge_effects as effects
from . import centrifuge_messages as messages
from . import codes
from .centrifuge_channels import INSUFFICIENT, SERVER_UNSUBSCRIBE, Channels
from .centrifuge_commands import Commands
from .centrifuge_deadlines import Deadline, Heartbeat
from .centrifuge_effects import Effect, Refusal, Send
from .centrifuge_messages import encode_publication
from .centrifuge_output import Identity, Output
from .centrifuge_subscription import Subscription

__all__ = ["BUSY", "Session", "State", "encode_publication"]

BUSY = 256
"""While so many commands wait for their answers, the shell should not read more of them."""


class State(Enum):
    """Where a connection stands."""

    OPEN = "waiting for connect"
    CONNECTING = "connect is being decided"
    CONNECTED = "connected"
    FAILED = "connect was answered with an error"
    CLOSED = "closed"


_CONNECTED = State.CONNECTED  # looked up for each message
_CLOSED = State.CLOSED


class Session:
    """The protocol's side of one connection.

    Attributes:
        state: see `State`.
        next_deadline: when `timer` has to be called; infinity for never. Calling it early does no harm.
    """

    __slots__ = (
        "_accepted",
        "_channels",
        "_close_code",
        "_commands",
        "_config",
        "_connect",
        "_connect_id",
        "_expiry",
        "_heartbeat",
        "_held",
        "_identity",
        "_jitter",
        "_output",
        "_stale",
        "next_deadline",
        "state",
    )

    def __init__(self, config: effects.Config, *, client_id: str, now: float, jitter: float = 0.5) -> None:
        """Begin with a connection that was just opened.

        Args:
            config: what all connections have in common.
            client_id: unique on the host.
            now: seconds on a clock that never goes back; the same one for every call.
            jitter: at random from [0, 1): spreads the first pings of clients that came together.
        """
        self.state = State.OPEN
        self._config = config
        self._jitter = jitter
        self._identity = Identity(client_id)
        self._output = Output()
        self._channels = Channels(config, self._identity, self._output)
        self._commands = Commands(config, self._channels, self._identity, self._output)
        self._connect_id = 0
        self._connect = _NO_CONNECT
        self._accepted: effects.Accepted | None = None
        self._held: list[messages.Command] = []
        self._close_code = codes.CONNECTION_CLOSED.code
        self._heartbeat = Heartbeat(config.ping_interval, config.ping_timeout)
        self._expiry = Deadline()
        self._stale = Deadline(now + config.stale_timeout)
        self.next_deadline = self._stale.at

    @property
    def client_id(self) -> str:
        """Names this connection to everybody."""
        return self._identity.client_id

    @property
    def user(self) -> str:
        """Who it is, as the application said; empty if nobody knows."""
        return self._identity.user

    @property
    def closed(self) -> bool:
        """Nothing is sent any more."""
        return self.state is State.CLOSED

    @property
    def in_flight(self) -> int:
        """Commands that wait for their answer."""
        return self._output.in_flight

    @property
    def busy(self) -> bool:
        """So much is under way that the shell should stop reading until it is answered."""
        return self._output.in_flight >= BUSY or len(self._held) >= BUSY

    # What comes from the client.

    def receive(self, frame: bytes, now: float) -> list[Effect]:
        """Take one text message of the client, with one or more commands."""
        state = self.state
        if state is _CONNECTED:
            if frame == messages.PING:
                self._heartbeat.pong()
                return []
        elif state is State.CLOSED or state is State.FAILED:
            return []
        try:
            commands = messages.decode_commands(frame)
        except messages.BadFrame:
            return self._end_with(codes.BAD_REQUEST)
        for number, request in commands:
            if self.state is _CONNECTED:
                self._perform(number, request)
            elif self.closed:
                break
            else:
                self._before_connected(number, request)
        return self._output.take()

    def _before_connected(self, number: int, request: messages.Request | None) -> None:
        if self.state is State.CONNECTING:
            # Clients send what they want next without waiting; the connect reply comes first all the same.
            if request is not None:
                self._held.append((number, request))
            if len(self._held) > self._config.max_in_flight:
                self._close(codes.TOO_MANY_REQUESTS)
        elif isinstance(request, messages.ConnectRequest):
            self.state = State.CONNECTING
            self._connect_id, self._connect = number, request
            data = bytes(request.data)
            self._output.emit(
                effects.Connect(request.token, data, request.name, request.version, request.headers)
            )
        else:
            self._close(codes.BAD_REQUEST)

    def _perform(self, number: int, request: messages.Request | None) -> None:
        if request is None:
            self._heartbeat.pong()
        elif not self._commands.perform(number, request):
            self._close(codes.BAD_REQUEST)

    # Answers to Connect.

    def connected(self, accepted: effects.Accepted, now: float) -> list[Effect]:
        """Let the client in. The reply leaves when its server-side subscriptions have been answered too.

        Raises:
            InvalidTopic: a server-side subscription is to no topic or pattern; nothing has happened then.
        """
        if self.state is not State.CONNECTING or self._accepted is not None:
            return []
        for channel in accepted.subscriptions:
            check_pattern(channel)
        if len(accepted.subscriptions) > self._config.max_subscriptions:
            return self._end_with(codes.CHANNEL_LIMIT)
        self._accepted = accepted
        self._identity.set(accepted.user, accepted.info)
        self._channels.initial = dict.fromkeys(accepted.subscriptions)
        for channel, wanted in accepted.subscriptions.items():
            left = self._connect.subs.get(channel, _NO_POSITION)
            self._channels.subscribe_client(channel, wanted, left)
        self._finish_connect(now)
        return self._output.take()

    def connect_failed(self, error: int | Refusal) -> list[Effect]:
        """Keep the client out: it may only leave now. See `disconnect` for a close."""
        if self.state is State.CONNECTING:
            self._fail_connect(error)
        return self._output.take()

    def _fail_connect(self, error: int | Refusal) -> None:
        self.state = State.FAILED
        self._held.clear()
        self._output.refuse(self._connect_id, error)
        self._channels.drop_all(codes.CONNECTION_CLOSED.code)

    def _finish_connect(self, now: float) -> None:
        """Send the connect reply if nothing is missing, and go on with what the client sent behind it."""
        if self._channels.initial_error is not None:
            self._fail_connect(self._channels.initial_error)
            return
        subs = {channel: body for channel, body in self._channels.initial.items() if body is not None}
        if self._accepted is None or len(subs) < len(self._channels.initial):
            return
        body = self._accepted.reply(self._config, self.client_id, subs)
        if self._accepted.ttl is not None:
            self._expiry.set(now + self._accepted.ttl + self._config.expired_grace)
        self._channels.initial = {}
        self._accepted, self._connect = None, _NO_CONNECT
        self.state = State.CONNECTED
        self._stale.clear()
        self._heartbeat.start(now, self._jitter)
        reply = messages.encode_reply(self._connect_id, "connect", body)
        self._output.reply(reply, recovery=any("publications" in sub for sub in subs.values()))
        self._channels.go_live(subs)
        held, self._held = self._held, []
        for number, request in held:
            if not self.closed:
                self._perform(number, request)
        self._reschedule()

    # Answers to Subscribe.

    def subscribed(self, channel: str, result: effects.Subscribed, now: float) -> list[Effect]:
        """It is in force."""
        if self.closed or self._channels.get(channel) is None:
            self._channels.abandoned(channel, result, self._close_code)
            return self._output.take()
        self._channels.subscribed(channel, result, now)
        if self.state is State.CONNECTING:
            self._finish_connect(now)
        if result.ttl is not None:
            self._reschedule()
        return self._output.take()

    def subscribe_failed(self, channel: str, error: int | Refusal, now: float) -> list[Effect]:
        """It was refused; the shell has undone what it had set up."""
        if not self.closed:
            self._channels.subscribe_failed(channel, error)
            if self.state is State.CONNECTING:
                self._finish_connect(now)
        return self._output.take()

    # Answers to effects with an id.

    def published(self, id: int) -> list[Effect]:
        """Answer `Publish`: accepted, and stored if the topic has history."""
        if self.state is not _CONNECTED:
            return []
        self._output.answered()
        return [Send(b'{"id":%d,"publish":{}}' % id)]

    def presence(self, id: int, clients: dict[str, bytes]) -> list[Effect]:
        """Answer `Presence` with the ClientInfo of each client."""
        infos = {client: msgspec.Raw(info) for client, info in clients.items()}
        return self._answer(id, "presence", {"presence": infos})

    def presence_stats(self, id: int, clients: int, users: int) -> list[Effect]:
        """Answer `PresenceStats` with the number of connections and of distinct users."""
        return self._answer(id, "presence_stats", {"num_clients": clients, "num_users": users})

    def history(
        self, id: int, channel: str, publications: list[effects.Publication], offset: int, epoch: str
    ) -> list[Effect]:
        """Answer `History`.

        Args:
            id: of the effect.
            channel: of the effect.
            publications: in the order asked for.
            offset: the top of the log.
            epoch: of the log.
        """
        items = messages.raw_list(item.encode(channel) for item in publications)
        return self._answer(id, "history", {"publications": items, "offset": offset, "epoch": epoch})

    def rpc_result(self, id: int, data: bytes = b"") -> list[Effect]:
        """Answer `Rpc` with a JSON text; empty means none."""
        return self._answer(id, "rpc", {"data": messages.raw(data)} if data else {})

    def refreshed(self, id: int, ttl: float | None, now: float, info: bytes | None = None) -> list[Effect]:
        """Answer `Refresh`: good for `ttl` more seconds (None: for ever); `info` replaces the `conn_info`."""
        body: dict[str, object] = {"client": self.client_id, "version": self._config.version}
        self._expiry.clear()
        if ttl is not None:
            self._expiry.set(now + ttl + self._config.expired_grace)
            body |= messages.expires(ttl)
        if info is not None:
            self._identity.set(self.user, info)
        self._reschedule()
        return self._answer(id, "refresh", body)

    def sub_refreshed(
        self, id: int, channel: str, ttl: float | None, now: float, info: bytes | None = None
    ) -> list[Effect]:
        """Answer `SubRefresh`: good for `ttl` more seconds (None: for ever); `info` replaces the `chan_info`."""
        self._channels.refreshed(channel, ttl, now, info)
        self._reschedule()
        return self._answer(id, "sub_refresh", {} if ttl is None else messages.expires(ttl))

    def failed(self, id: int, error: int | Refusal) -> list[Effect]:
        """Answer any effect with an `id` with an error."""
        if not self.closed:
            self._output.answered()
            self._output.refuse(id, error)
        return self._output.take()

    def _answer(self, number: int, method: str, body: dict[str, object]) -> list[Effect]:
        if self.closed:
            return []
        self._output.answered()
        return [Send(messages.encode_reply(number, method, body))]

    # What others want of this connection.

    def admits(self, channel: str, offset: int, push: bytes) -> bool:
        """Tell whether a push for this channel is to be written now. See `Subscription.admits`."""
        subscription = self._channels.get(channel)
        return subscription is not None and self.state is not _CLOSED and subscription.admits(offset, push)

    def subscription(self, channel: str) -> Subscription | None:
        """Return the subscription to exactly this channel, from `Subscribe` to `Unsubscribe`."""
        return self._channels.get(channel)

    def subscriptions(self) -> list[str]:
        """Return the channels the client knows it is subscribed to."""
        return self._channels.live()

    def wants_join_leave(self, channel: str) -> bool:
        """Tell whether joins and leaves of this channel are pushed to this client."""
        subscription = self._channels.get(channel)
        return subscription is not None and subscription.request.join_leave

    def client_info(self, channel: str = "") -> bytes:
        """Return this client's ClientInfo, with what a subscription to `channel` adds to it."""
        subscription = self._channels.get(channel)
        return self._identity.info(subscription.info if subscription is not None else b"")

    def subscribe(self, channel: str, wanted: effects.ServerSubscription) -> list[Effect]:
        """Subscribe the client from the server's side; no effect if it is subscribed, or not connected.

        Raises:
            InvalidTopic: the channel is no topic or pattern.
            ValueError: the connection has as many subscriptions as are allowed.
        """
        check_pattern(channel)
        if self.state is State.CONNECTED and self._channels.get(channel) is None:
            limit = self._config.max_subscriptions
            if len(self._channels) >= limit:
                raise ValueError(f"client {self.client_id} has {limit} subscriptions, more are not allowed")
            self._channels.subscribe_client(channel, wanted, _NO_POSITION)
        return self._output.take()

    def unsubscribe(self, channel: str, code: int = SERVER_UNSUBSCRIBE) -> list[Effect]:
        """End a subscription from the server's side; no effect if there is none.

        Args:
            channel: as it was subscribed.
            code: 2000 to 2499: for good; 2500 to 2999: the client subscribes again at once.

        Raises:
            ValueError: the code is none of these.
        """
        if not 2000 <= code <= 2999:
            raise ValueError(f"unsubscribe code {code}: 2000 to 2999 are allowed")
        if self.state is State.CONNECTED:
            self._channels.unsubscribe_client(channel, code)
        return self._output.take()

    def insufficient(self, channel: str) -> list[Effect]:
        """Make the client come back with its position: to its own subscription at once, else to the hub."""
        subscription = self._channels.get(channel)
        if subscription is not None and subscription.server_side:
            return self._end_with(codes.INSUFFICIENT_STATE)
        return self.unsubscribe(channel, INSUFFICIENT)

    def send(self, data: bytes) -> list[Effect]:
        """Push a message (a JSON text) to this client alone; no effect if it is not connected."""
        if self.state is State.CONNECTED:
            self._output.line(messages.encode_message(data))
        return self._output.take()

    def disconnect(self, code: int, reason: str = "") -> list[Effect]:
        """Close the connection.

        Raises:
            ValueError: the code is not from 3000 to 4999, or the reason is too long for a close frame.
        """
        if not 3000 <= code <= 4999:
            raise ValueError(f"disconnect code {code}: 3000 to 4999 are allowed")
        if len(reason.encode()) > codes.MAX_REASON_BYTES:
            raise ValueError(
                f"a reason of {len(reason.encode())} bytes: at most {codes.MAX_REASON_BYTES} are allowed"
            )
        return self._end_with(codes.Close(code, reason))

    def end(self) -> list[Effect]:
        """The connection is gone: return what is left to undo. May be called again."""
        self._fall_silent()
        self._channels.drop_all(self._close_code)
        return self._output.take()

    # Time.

    def timer(self, now: float) -> list[Effect]:
        """Do what is due."""
        if self.closed:
            return []
        if self._stale.passed(now):
            return self._end_with(codes.STALE)
        if self._heartbeat.pong_missed(now):
            return self._end_with(codes.NO_PONG)
        if self._expiry.passed(now):
            return self._end_with(codes.CONNECTION_EXPIRED)
        if not self._channels.expire(now):
            return self._end_with(codes.SUBSCRIPTION_EXPIRED)
        if self._heartbeat.ping_due(now):
            self._output.line(messages.PING)
        self._reschedule()
        return self._output.take()

    def reading_paused(self, now: float) -> None:
        """The shell has stopped reading: the pong deadline stands still."""
        self._heartbeat.pause(now)

    def reading_resumed(self, now: float) -> None:
        """The shell reads again. Look at `next_deadline`."""
        self._heartbeat.resume(now)
        self._reschedule()

    def _reschedule(self) -> None:
        if not self.closed:
            self.next_deadline = min(
                self._stale.at, self._heartbeat.next_deadline, self._expiry.at, self._channels.next_expiry()
            )

    # The end.

    def _end_with(self, close: codes.Close) -> list[Effect]:
        self._close(close)
        return self._output.take()

    def _close(self, close: codes.Close) -> None:
        if not self.closed:
            self._close_code = close.code
            self._fall_silent()
            self._output.emit(close)

    def _fall_silent(self) -> None:
        self.state = State.CLOSED
        self.next_deadline = math.inf
        self._held.clear()


_NO_CONNECT = messages.ConnectRequest()
_NO_POSITION = messages.RecoverRequest()
