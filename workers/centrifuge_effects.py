"""What a Centrifuge session wants done, and what it is told when it was: its whole contact with the world.

Between the state machine of one connection (`workers/centrifuge.py`) and the shell, which has sockets, bus, store
and the application's hooks. Effects go out as lists, to be performed in order; each that wants an answer says by
which method of the session it is given. Plain values: nothing here does anything.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import msgspec

from .centrifuge_messages import Position, encode_pub, expires, raw
from .codes import Close


class Config(msgspec.Struct, frozen=True, kw_only=True):
    """What all connections of a worker have in common. Times in seconds, sizes in bytes."""

    version: str = "flockwire"
    """What the connect reply says of the server."""
    ping_interval: float = 25.0
    """How often the server pings; 0 turns pings off."""
    ping_timeout: float = 10.0
    """How long a client may take for its pong."""
    stale_timeout: float = 10.0
    """How long a client may stay without a successful `connect`."""
    expired_grace: float = 25.0
    """How long an expired connection or subscription may still be refreshed."""
    max_subscriptions: int = 128
    """Subscriptions per connection, server-side ones too."""
    max_in_flight: int = 4096
    """Commands that wait for their answer; beyond, error 111. See also `Session.busy`."""
    max_buffered: int = 1024 * 1024
    """Live publications kept for a subscription that is being made; beyond, it fails with error 100."""
    max_recovery: int = 32 * 1024 * 1024
    """Publications in one recovery reply; beyond, it says `recovered: false`."""
    max_history: int = 300
    """Publications in one `history` reply."""
    rpc: bool = False
    """The application answers `rpc`; otherwise error 104."""
    messages: bool = False
    """The application takes `send`; otherwise it is ignored."""
    tokens: bool = False
    """Tokens are checked: `refresh` and `sub_refresh` are performed; otherwise error 108."""


class Refusal(msgspec.Struct, frozen=True):
    """An error for a client. Without a message the code's own words are told, and its own `temporary`."""

    code: int
    message: str = ""
    temporary: bool | None = None


# Effects.


class Send(msgspec.Struct, frozen=True, gc=False):
    """Write `data` as one text message."""

    data: bytes
    recovery: bool = False
    """It holds recovered publications, which do not count against `--max-backlog`."""


class Connect(msgspec.Struct, frozen=True):
    """Decide who this is. Answer: `connected` or `connect_failed`."""

    token: str
    data: bytes
    name: str
    version: str
    headers: Mapping[str, str]


class Subscribe(msgspec.Struct, frozen=True):
    """Decide, join the index (from then on use `admits`), then read position or history.

    Answer: `subscribed` or `subscribe_failed`, once. Never more than one per channel at a time.
    """

    channel: str
    token: str = ""
    data: bytes = b""
    recover: bool = False
    """The client was here: give it what came after `since`."""
    since: Position = Position()
    positioned: bool = False
    recoverable: bool = False
    join_leave: bool = False
    server_side: bool = False


class Unsubscribe(msgspec.Struct, frozen=True):
    """Leave the index and presence. Comes exactly once for each call of `subscribed`."""

    channel: str
    code: int
    """0: the client asked; below 3000: the code of the unsubscribe push; else the connection is over."""
    info: bytes
    """The ClientInfo for the leave event."""
    server_side: bool = False


class Publish(msgspec.Struct, frozen=True, gc=False):
    """Publish to a topic. Answer: `published` or `failed`."""

    id: int
    channel: str
    data: bytes
    info: bytes
    """The publisher's ClientInfo, which goes with the publication."""


class Presence(msgspec.Struct, frozen=True, gc=False):
    """List who is subscribed to exactly this channel. Answer: `presence` or `failed`."""

    id: int
    channel: str


class PresenceStats(msgspec.Struct, frozen=True, gc=False):
    """Count who is subscribed to exactly this channel. Answer: `presence_stats` or `failed`."""

    id: int
    channel: str


class History(msgspec.Struct, frozen=True):
    """Read from the log. Answer: `history` or `failed` (112 if `since` names another epoch)."""

    id: int
    channel: str
    limit: int
    """0: only the top position; else at most so many."""
    since: Position | None
    """Exclusive; an empty epoch fits any."""
    reverse: bool
    """Newest first, and older than `since`."""


class Rpc(msgspec.Struct, frozen=True, gc=False):
    """Ask the application. Answer: `rpc_result` or `failed`."""

    id: int
    method: str
    data: bytes


class Message(msgspec.Struct, frozen=True, gc=False):
    """Give a message to the application. No answer."""

    data: bytes


class Refresh(msgspec.Struct, frozen=True, gc=False):
    """Check a new connection token. Answer: `refreshed` or `failed`."""

    id: int
    token: str


class SubRefresh(msgspec.Struct, frozen=True, gc=False):
    """Check a new subscription token. Answer: `sub_refreshed` or `failed`."""

    id: int
    channel: str
    token: str


Effect = (
    Send
    | Close
    | Connect
    | Subscribe
    | Unsubscribe
    | Publish
    | Presence
    | PresenceStats
    | History
    | Rpc
    | Message
    | Refresh
    | SubRefresh
)
"""`Close` is that of `workers/codes.py`: send the close frame after what was sent before, then call `end`."""


# Answers.


class ServerSubscription(msgspec.Struct, frozen=True, kw_only=True):
    """A subscription the application makes for its client."""

    positioned: bool = True
    recoverable: bool = True
    join_leave: bool = False


class Accepted(msgspec.Struct, frozen=True, kw_only=True):
    """A connection may come in. `info` and `data` are JSON texts; empty means none."""

    user: str = ""
    info: bytes = b""
    """Told to others as `conn_info`."""
    data: bytes = b""
    """Told to this client in the connect reply."""
    ttl: float | None = None
    """Seconds until the client has to refresh its token; None: never."""
    subscriptions: Mapping[str, ServerSubscription] = {}
    session: str = ""
    node: str = ""
    """The last two only for the transports that are no WebSocket."""

    def reply(self, config: Config, client_id: str, subs: Mapping[str, object]) -> dict[str, object]:
        """Return the connect reply, with what is said of each server-side subscription."""
        body: dict[str, object] = {"client": client_id, "version": config.version}
        if self.data:
            body["data"] = raw(self.data)
        if subs:
            body["subs"] = subs
        if self.ttl is not None:
            body |= expires(self.ttl)
        if config.ping_interval > 0:
            body["ping"] = math.ceil(config.ping_interval)
            body["pong"] = True
        if self.session:
            body |= {"session": self.session, "node": self.node}
        return body


class Publication(msgspec.Struct, frozen=True, gc=False):
    """An entry of the log, for recovery and history."""

    data: bytes
    offset: int
    topic: str = ""
    info: bytes = b""

    def encode(self, channel: str) -> bytes:
        """Return it as JSON for a client of `channel`, which is told the topic where it is another."""
        return encode_pub(self.data, self.offset, self.info, "" if self.topic == channel else self.topic)


class Subscribed(msgspec.Struct, frozen=True, kw_only=True):
    """A subscription is in force on the whole host, and what the log said about it at one moment after that."""

    recoverable: bool = False
    """Every topic of the channel has history. If not, the fields down to `publications` mean nothing."""
    epoch: str = ""
    offset: int = 0
    """The top: when recovering, `publications` has everything up to here."""
    recovered: bool = False
    publications: Sequence[Publication] = ()
    """All after `since`, in order of their offsets; only if `recovered`."""
    info: bytes = b""
    """Told to others as `chan_info`."""
    data: bytes = b""
    """Told to this client in the reply."""
    ttl: float | None = None
    """Seconds until the client has to refresh the subscription's token; None: never."""
