"""The words of the Centrifuge JSON protocol: commands as they come in, replies and pushes as they go out.

First and last stop of a Centrifuge client's message; `workers/centrifuge.py` knows what the words mean. Everything
is pure. JSON that belongs to the application (`data`, `info`) is embedded as it is, never decoded, so it has to be
valid JSON in UTF-8. What leaves here is one JSON object on one line, without the line's end.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Final

import msgspec

from .codes import ErrorCode

MAX_OFFSET: Final = 2**53
"""The largest offset a client may name: JavaScript's numbers are exact up to here."""

PING: Final = b"{}"
"""What the server sends on schedule, and what the client answers with."""

FLAG_REJECT_UNRECOVERED: Final = 2
"""Bit of a subscribe command's `flag`: answer error 112 instead of `recovered: false`."""

UNSUBSCRIBE_REASONS: Final[dict[int, str]] = {
    2000: "server unsubscribe",
    2500: "insufficient state",
    2501: "subscription expired",
    2502: "state invalidated",
}
"""Codes of an unsubscribe push; from 2500 on the client subscribes again at once."""

LINE_FEED: Final = 0x0A  # numbers, for they are found several times faster than the bytes
CARRIAGE_RETURN: Final = 0x0D

Offset = Annotated[int, msgspec.Meta(ge=0, le=MAX_OFFSET)]
Unsigned32 = Annotated[int, msgspec.Meta(ge=0, le=2**32 - 1)]
Signed32 = Annotated[int, msgspec.Meta(ge=-(2**31), le=2**31 - 1)]
Signed64 = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]


class BadFrame(ValueError):
    """A frame holds no command, or something that is none: the connection ends with 3501."""


class Position(msgspec.Struct, frozen=True, gc=False):
    """A place in the host's log. An empty epoch means whichever is current."""

    offset: Offset = 0
    epoch: str = ""


class RecoverRequest(msgspec.Struct, frozen=True, gc=False):
    """Where a client left a server-side subscription that it comes back to."""

    recover: bool = False
    offset: Offset = 0
    epoch: str = ""


class ConnectRequest(msgspec.Struct, frozen=True):
    """`connect`: who the client is, and its positions in server-side subscriptions."""

    token: str = ""
    data: msgspec.Raw = msgspec.Raw()
    name: str = ""
    version: str = ""
    headers: dict[str, str] = {}
    subs: dict[str, RecoverRequest] = {}
    flag: Signed64 = 0


class SubscribeRequest(msgspec.Struct, frozen=True, gc=False):
    """`subscribe`: to a topic or a pattern, perhaps from a position."""

    channel: str = ""
    token: str = ""
    data: msgspec.Raw = msgspec.Raw()
    recover: bool = False
    epoch: str = ""
    offset: Offset = 0
    positioned: bool = False
    recoverable: bool = False
    join_leave: bool = False
    delta: str = ""
    tf: msgspec.Raw = msgspec.Raw()
    flag: Signed64 = 0
    type: Signed32 = 0


class UnsubscribeRequest(msgspec.Struct, frozen=True, gc=False):
    """`unsubscribe`; needs no subscription."""

    channel: str = ""


class PublishRequest(msgspec.Struct, frozen=True, gc=False):
    """`publish`: any JSON value to a topic."""

    channel: str = ""
    data: msgspec.Raw = msgspec.Raw()


class PresenceRequest(msgspec.Struct, frozen=True, gc=False):
    """`presence`: who is subscribed."""

    channel: str = ""


class PresenceStatsRequest(msgspec.Struct, frozen=True, gc=False):
    """`presence_stats`: how many are subscribed."""

    channel: str = ""


class HistoryRequest(msgspec.Struct, frozen=True, gc=False):
    """`history`: limit 0 asks for the top position only, a negative one for all."""

    channel: str = ""
    limit: Signed32 = 0
    since: Position | None = None
    reverse: bool = False


class RpcRequest(msgspec.Struct, frozen=True, gc=False):
    """`rpc`: a question to the application."""

    method: str = ""
    data: msgspec.Raw = msgspec.Raw()


class SendRequest(msgspec.Struct, frozen=True, gc=False):
    """`send`: a message to the application; has no id and gets no reply."""

    data: msgspec.Raw = msgspec.Raw()


class RefreshRequest(msgspec.Struct, frozen=True, gc=False):
    """`refresh`: a new connection token before the old one expires."""

    token: str = ""


class SubRefreshRequest(msgspec.Struct, frozen=True, gc=False):
    """`sub_refresh`: the same for one subscription."""

    channel: str = ""
    token: str = ""


class PingRequest(msgspec.Struct, frozen=True, gc=False):
    """`ping`: a command that no current client sends; its pings are the server's."""


ChannelRequest = (
    SubscribeRequest
    | UnsubscribeRequest
    | PresenceRequest
    | PresenceStatsRequest
    | HistoryRequest
    | SubRefreshRequest
)
"""What concerns one topic or pattern."""

Request = (
    ConnectRequest | PublishRequest | RpcRequest | SendRequest | RefreshRequest | PingRequest | ChannelRequest
)

Command = tuple[int, Request | None]
"""The id (0: none) and what is asked; None is a pong."""


class _Line(msgspec.Struct, frozen=True):
    """One line of a frame: exactly one of the fields after the id is set, or it is a pong."""

    id: Unsigned32 = 0
    publish: PublishRequest | None = None
    rpc: RpcRequest | None = None
    send: SendRequest | None = None
    subscribe: SubscribeRequest | None = None
    unsubscribe: UnsubscribeRequest | None = None
    connect: ConnectRequest | None = None
    presence: PresenceRequest | None = None
    presence_stats: PresenceStatsRequest | None = None
    history: HistoryRequest | None = None
    refresh: RefreshRequest | None = None
    sub_refresh: SubRefreshRequest | None = None
    ping: PingRequest | None = None


_METHODS: Final = len(msgspec.structs.fields(_Line)) - 1
_decode_line = msgspec.json.Decoder(_Line).decode
_fields = msgspec.structs.astuple
_encode = msgspec.json.Encoder().encode


def decode_commands(frame: bytes) -> list[Command]:
    """Read the commands of a frame, all of them or none.

    Unknown fields are ignored, so that newer clients are understood.

    Raises:
        BadFrame: it is empty, no valid UTF-8 or JSON, or a line of it is no command.
    """
    try:
        if not frame.isascii():
            # The decoder passes the application's data on unseen, and a client that gets bad UTF-8 hangs up.
            frame.decode()
        if LINE_FEED in frame:
            commands = [_command(line) for line in frame.split(b"\n") if line and not line.isspace()]
        else:
            commands = [_command(frame)]
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
        raise BadFrame(str(exc)) from None
    if not commands:
        raise BadFrame("no command")
    return commands


def _command(line: bytes) -> Command:
    decoded = _decode_line(line)
    fields = _fields(decoded)  # the id, and the methods of which all but one are None
    unset = fields.count(None)
    number: int = fields[0]
    if unset == _METHODS:
        if number == 0 and line.translate(None, b" \t\r\n") == PING:
            return 0, None
        raise BadFrame("no known method")
    if unset != _METHODS - 1:
        raise BadFrame("more than one method")
    request = next(filter(None, fields[1:]))
    if number == 0 and type(request) is not SendRequest:
        raise BadFrame("no id")
    return number, request


def one_line(text: bytes) -> bytes:
    """Return valid JSON without line ends: here (and in Server-Sent Events) they part messages."""
    # In JSON a bare line end can only be white space between tokens: strings have it escaped.
    if LINE_FEED in text or CARRIAGE_RETURN in text:
        return text.replace(b"\n", b" ").replace(b"\r", b" ")
    return text


def encode_client_info(user: str, client: str, conn_info: bytes = b"", chan_info: bytes = b"") -> bytes:
    """Return a ClientInfo: who published, joined, left or is present."""
    info = b'{"client":' + _encode(client) + b',"user":' + _encode(user)
    if conn_info:
        info += b',"conn_info":' + one_line(conn_info)
    if chan_info:
        info += b',"chan_info":' + one_line(chan_info)
    return info + b"}"


def encode_pub(data: bytes, offset: int = 0, info: bytes = b"", topic: str = "") -> bytes:
    """Return a Publication, as it stands in a push and in a list of `publications`.

    Args:
        data: the application's JSON.
        offset: its place in the log; 0 on a topic without history.
        info: the ClientInfo of the client that published it, if one did.
        topic: the concrete topic, where it differs from the subscribed channel.
    """
    return b"".join(_pub(data, offset, info, topic))


def _pub(data: bytes, offset: int, info: bytes, topic: str) -> list[bytes]:
    pub = [b'{"data":', one_line(data)]
    if offset:
        pub.append(b',"offset":%d' % offset)
    if info:
        pub += (b',"info":', info)
    if topic:
        pub += (b',"tags":{"topic":', _encode(topic), b"}")
    pub.append(b"}")
    return pub


def encode_publication(
    channel: str, data: bytes, offset: int = 0, info: bytes = b"", topic: str = ""
) -> bytes:
    """Return the push of a publication: the same bytes for every client that subscribed to this channel.

    Args:
        channel: the string the clients subscribed with, a topic or a pattern.
        data: the application's JSON.
        offset: its place in the log; 0 on a topic without history.
        info: the ClientInfo of the client that published it, if one did.
        topic: the topic it was published to; told to the clients (`tags.topic`) where it is not the channel.
    """
    pub = _pub(data, offset, info, "" if topic == channel else topic)
    return b"".join((b'{"push":{"channel":', _encode(channel), b',"pub":', *pub, b"}}"))


def encode_join(channel: str, info: bytes) -> bytes:
    """Return the push that tells who subscribed; for those who asked for `join_leave`."""
    return b'{"push":{"channel":' + _encode(channel) + b',"join":{"info":' + info + b"}}}"


def encode_leave(channel: str, info: bytes) -> bytes:
    """Return the push that tells who is gone; for those who asked for `join_leave`."""
    return b'{"push":{"channel":' + _encode(channel) + b',"leave":{"info":' + info + b"}}}"


def encode_message(data: bytes) -> bytes:
    """Return the push of a message from the application to this one client."""
    return b'{"push":{"message":{"data":' + one_line(data) + b"}}}"


def encode_unsubscribe(channel: str, code: int, reason: str) -> bytes:
    """Return the push that ends a subscription; from code 2500 on the client subscribes again."""
    return _encode({"push": {"channel": channel, "unsubscribe": {"code": code, "reason": reason}}})


def encode_subscribe(channel: str, result: Mapping[str, object]) -> bytes:
    """Return the push that begins a server-side subscription."""
    return _encode({"push": {"channel": channel, "subscribe": result}})


def encode_disconnect(code: int, reason: str) -> bytes:
    """Return the push that stands for a close frame on transports that have none. Never for WebSocket."""
    return _encode({"push": {"disconnect": {"code": code, "reason": reason}}})


def encode_reply(number: int, method: str, result: Mapping[str, object]) -> bytes:
    """Return a successful answer to command `number`; values may be `msgspec.Raw`."""
    return _encode({"id": number, method: result})


def encode_error(number: int, code: int, message: str = "", temporary: bool | None = None) -> bytes:
    """Return an error as the answer to command `number`, with the code's own words if no others are given."""
    known = ErrorCode(code) if code in _ERROR_CODES else None
    if temporary is None:
        temporary = known.temporary if known else False
    # The Python client reads the message without asking whether there is one.
    error: dict[str, object] = {"code": code, "message": message or (known.message if known else "error")}
    if temporary:
        error["temporary"] = True
    return _encode({"id": number, "error": error})


def raw_list(items: Iterable[bytes]) -> list[msgspec.Raw]:
    """Return JSON texts as values for `encode_reply`."""
    return [msgspec.Raw(item) for item in items]


def raw(text: bytes) -> msgspec.Raw:
    """Return the application's JSON as a value for `encode_reply`."""
    return msgspec.Raw(one_line(text))


def expires(ttl: float) -> dict[str, object]:
    """Return the fields of a reply that make a client refresh its token in time."""
    return {"expires": True, "ttl": max(1, int(ttl))}


_ERROR_CODES: Final = frozenset(ErrorCode)
