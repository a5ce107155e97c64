"""The plain protocol (``/ws``): one JSON object a message, the format of fastapi-distributed-websocket.

Where a client's message becomes a subscription or a publication. :class:`PlainSession` takes raw text of the
built-in hub's clients, whose values are passed on as they were written; :func:`handle_message` also takes decoded
objects from :meth:`workers.WebSocketManager.receive`.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Final

import msgspec

from ipc.peer import BusFull, EnvelopeTooBig
from ipc.store_records import StoreError
from ipc.topics import InvalidTopic, check_pattern
from workers import codes, jsontext
from workers.codes import ErrorCode
from workers.limited_protocol import HOLD_BUS
from workers.stored import Result, Storing, refusal
from workers.transport import DONE, Accepted, Taking, Unpublishable

if TYPE_CHECKING:
    from workers.connection import Connection
    from workers.manager import WebSocketManager

logger = logging.getLogger("workers")

_UNSET: Final = object()
_SEND: Final = msgspec.Raw(b'"send"')
_OURS: Final = frozenset({"type", "topic", "conn_id"})
_NEVER: Final = b"\0"  # begins no JSON
_END: Final = ord("}")
_BEGINNING: Final = b'{"type":"send","topic":'


class _Ours(msgspec.Struct, gc=False):
    """The members of a message that are not the application's."""

    type: Any = msgspec.UNSET
    topic: Any = msgspec.UNSET
    conn_id: Any = msgspec.UNSET
    ack: Any = msgspec.UNSET


_decode_text = msgspec.json.Decoder(str).decode
_decode_ours = msgspec.json.Decoder(_Ours).decode


class Refused(Exception):
    """A client's message cannot be served; becomes an error message with this code."""

    def __init__(self, code: ErrorCode, words: str) -> None:
        super().__init__(words)
        self.code = code


class PlainSession:
    """What one client of the built-in hub says."""

    __slots__ = ("_beginning", "_connection", "_length", "_manager", "_topic")

    def __init__(self, manager: WebSocketManager, connection: Connection) -> None:
        self._connection = connection
        self._manager = manager
        self._topic = ""
        """Where the last publication went."""
        self._beginning = _NEVER
        """What a publication to there begins with, up to the first member of the application's."""
        self._length = len(_NEVER)

    def on_message(self, payload: bytes, is_text: bool) -> None:
        """One WebSocket message, in order. Never raises."""
        connection = self._connection
        if not is_text:
            connection.close_soon(*codes.UNSUPPORTED_DATA)
            return
        manager = self._manager
        try:
            if payload[: self._length] == self._beginning and (data := self._rest(payload)):
                connection.errors = 0
                accepted = manager.publish_checked(self._topic, data)
                if accepted is DONE:
                    return
                room = self._tell(accepted)
            else:
                room = self._read(payload)
        except BusFull as exc:
            connection.answer_error(str(exc), ErrorCode.INTERNAL)
            room = False
        except EnvelopeTooBig as exc:
            connection.answer_error(str(exc), ErrorCode.BAD_REQUEST)
            return
        except Unpublishable as exc:
            connection.answer_error(f"the data cannot be passed on: {exc}", ErrorCode.BAD_REQUEST)
            return
        except Exception:
            # Whatever it was: neither this connection nor the process shall end by it.
            logger.exception("a client's message could not be served")
            connection.answer_error(ErrorCode.INTERNAL.message, ErrorCode.INTERNAL)
            return
        if not room:
            connection.hold_reading(HOLD_BUS, manager.transport.on_clear)

    def _rest(self, payload: bytes) -> bytes:
        """What a publication that begins like the last one passes on; empty if there is more to it than that.

        It is only looked at: it has to be JSON, with no member of ours. To take it apart would cost as much as all the
        rest of a message's way.
        """
        data = b'{"' + payload[self._length :]
        if data[-1] != _END:
            return b""
        try:
            ours = _decode_ours(data)
        except jsontext.UNREADABLE:
            return b""  # what is wrong is found, and told, elsewhere
        return data if ours.type is ours.topic is ours.conn_id is ours.ack is msgspec.UNSET else b""

    def _learn(self, payload: bytes, written: bytes, topic: str) -> None:
        """At the second publication to a topic: remember how the client begins it."""
        if topic != self._topic:
            self._topic, self._beginning = topic, _NEVER
        else:
            # Only where it is written without spaces: then what is passed on is what the long way would pass on (but
            # for spaces and repeated keys in what follows, which stay as the client wrote them).
            beginning = _BEGINNING + written + b',"'
            if payload.startswith(beginning):
                self._beginning = beginning
        self._length = len(self._beginning)

    def _read(self, payload: bytes) -> bool:
        """Any message; returns False when the client should not be read until the bus has room again."""
        connection = self._connection
        try:
            message = jsontext.decode_members(payload)
        except jsontext.UNREADABLE as exc:
            connection.answer_error(str(jsontext.not_json(exc)), ErrorCode.BAD_REQUEST)
            return True
        # A publication without an ack takes the straight way.
        if message.get("type") == _SEND and "ack" not in message:
            return self._send(payload, message)
        return handle_message(self._manager, connection, message)

    def _send(self, payload: bytes, message: dict[str, msgspec.Raw]) -> bool:
        manager = self._manager
        try:
            written = message["topic"]
            topic = _decode_text(written)
            if not manager.clients_may_publish(topic):
                return handle_message(manager, self._connection, message)
            data = jsontext.encode_members({name: message[name] for name in message if name not in _OURS})
        except (KeyError, ValueError, msgspec.DecodeError):
            # What is wrong is found there, and told.
            return handle_message(manager, self._connection, message)
        self._learn(payload, bytes(written), topic)
        self._connection.errors = 0
        return self._tell(manager.publish_checked(topic, data))

    def _tell(self, accepted: Accepted) -> bool:
        """See that the client is told what it has to know; False when it should not be read for a while."""
        if accepted is DONE:
            return True
        if isinstance(accepted, Storing):
            connection = self._connection
            accepted.when_done(lambda result: _tell_stored(connection, _UNSET, result))
            return not self._manager.transport.congested
        return isinstance(accepted, Taking) and not self._manager.transport.congested


def handle_message(manager: WebSocketManager, connection: Connection, data: dict[str, Any]) -> bool:
    """Act on a client's object, whose values are decoded or ``msgspec.Raw``; answer what is wrong with it.

    ``data`` is taken apart. Returns False when the client should not be read until the bus has room again.
    """
    ack: Any = _UNSET
    try:
        ack = data.pop("ack", _UNSET)
        kind = _text(data.pop("type", None), "type")
        accepted = _act(manager, connection, kind, data)
    except Refused as exc:
        if ack is _UNSET:
            connection.answer_error(str(exc), exc.code)
        else:
            connection.answer_error(str(exc), exc.code, ack)
        return True
    connection.errors = 0
    if isinstance(accepted, Storing):
        accepted.when_done(lambda result: _tell_stored(connection, ack, result))
        return not manager.transport.congested
    if isinstance(accepted, Taking):
        if ack is not _UNSET:
            accepted.when_done(lambda failure: _tell_taken(connection, ack, failure))
        return not manager.transport.congested
    room = accepted is None or accepted is DONE
    if ack is not _UNSET:
        if room:
            connection.push({"type": "ack", "ack": ack})
        else:
            manager.transport.on_clear(lambda: connection.push({"type": "ack", "ack": ack}))
    return room


def _tell_taken(connection: Connection, ack: Any, failure: Exception | None) -> None:
    """A broker that is driven by a task has taken a message, or has refused it."""
    if failure is None:
        connection.push({"type": "ack", "ack": ack})
    else:
        words = "the message was not passed on: the broker did not take it"
        connection.push({"type": "error", "error": words, "code": int(ErrorCode.INTERNAL), "ack": ack})


def _tell_stored(connection: Connection, ack: Any, result: Result) -> None:
    """A message with history was stored, or was not: that is no error of the client's, so it is not counted."""
    if isinstance(result, StoreError):
        code, words = refusal(result)
        answer: dict[str, Any] = {"type": "error", "error": words, "code": int(code)}
    elif ack is _UNSET:
        return
    else:
        answer = {"type": "ack"}
    if ack is not _UNSET:
        answer["ack"] = ack
    connection.push(answer)


def _act(
    manager: WebSocketManager, connection: Connection, kind: str, data: dict[str, Any]
) -> Accepted | None:
    topic, conn_id = data.pop("topic", None), data.pop("conn_id", None)
    rules = manager.rules
    try:
        if kind == "send":
            name = _text(topic, "topic")
            if not manager.clients_may_publish(name):
                raise Refused(ErrorCode.PERMISSION_DENIED, f"publishing to {name!r} is not permitted")
            return manager.publish_checked(name, jsontext.encode(data))
        if kind == "subscribe":
            _subscribe(manager, connection, _text(topic, "topic"))
            return None
        if kind == "unsubscribe":
            pattern = _text(topic, "topic")
            check_pattern(pattern)
            if connection.subscription_count:
                connection.topics.discard(pattern)
            return None
        if kind == "broadcast":
            if not rules.may_broadcast(False):
                raise Refused(ErrorCode.PERMISSION_DENIED, "broadcasting is not permitted")
            return manager.broadcast_text(jsontext.encode(data))
        if kind == "send_by_conn_id":
            ids = _conn_ids(conn_id)
            if not rules.may_direct(False):
                raise Refused(ErrorCode.PERMISSION_DENIED, "direct messages are not permitted")
            return manager.direct_text(ids, jsontext.encode(data))
        if kind == "connect":
            return None
    except InvalidTopic as exc:
        raise Refused(ErrorCode.BAD_REQUEST, str(exc)) from None
    except BusFull as exc:
        raise Refused(ErrorCode.INTERNAL, str(exc)) from None
    except (TypeError, ValueError) as exc:
        raise Refused(ErrorCode.BAD_REQUEST, f"the data cannot be passed on: {exc}") from None
    raise Refused(
        ErrorCode.BAD_REQUEST,
        f"unknown type {kind[:80]!r}; use subscribe, unsubscribe, send, broadcast, send_by_conn_id or connect",
    )


def _subscribe(manager: WebSocketManager, connection: Connection, pattern: str) -> None:
    """In force on the whole host when it returns: the board has the interest, the index has the connection."""
    check_pattern(pattern)
    if not manager.rules.may_subscribe(pattern, False):
        raise Refused(ErrorCode.PERMISSION_DENIED, f"subscribing to {pattern!r} is not permitted")
    limit = manager.settings.max_subscriptions
    if connection.subscription_count >= limit and pattern not in connection.topics:
        raise Refused(ErrorCode.LIMIT_EXCEEDED, f"a connection may have at most {limit} subscriptions")
    connection.topics.add(pattern)


def subscribe_at_connect(manager: WebSocketManager, connection: Connection, patterns: list[str]) -> None:
    """The ``?topic=`` parameters of a handshake; what is wrong with one is told to the client once it is accepted."""
    for pattern in patterns:
        if connection.closing:
            return  # so much was wrong already
        try:
            _subscribe(manager, connection, pattern)
        except InvalidTopic as exc:
            connection.answer_error(str(exc), ErrorCode.BAD_REQUEST)
        except Refused as exc:
            connection.answer_error(str(exc), exc.code)


def _value(value: Any) -> Any:
    """A member's value, decoded if it is still as it was written."""
    return jsontext.decode(value) if isinstance(value, msgspec.Raw) else value


def _text(value: Any, name: str) -> str:
    if type(value) is msgspec.Raw:
        try:
            return _decode_text(value)
        except (msgspec.DecodeError, UnicodeError):
            pass  # the long way finds the words
    try:
        decoded = _value(value)
    except jsontext.NotJson as exc:
        raise Refused(ErrorCode.BAD_REQUEST, f"{name}: {exc}") from None
    if not isinstance(decoded, str):
        what = "is missing" if decoded is None else f"must be a string, not {type(decoded).__name__}"
        raise Refused(ErrorCode.BAD_REQUEST, f"{name} {what}")
    return decoded


def _conn_ids(value: Any) -> tuple[str, ...]:
    try:
        decoded = _value(value)
    except jsontext.NotJson as exc:
        raise Refused(ErrorCode.BAD_REQUEST, f"conn_id: {exc}") from None
    ids = [decoded] if isinstance(decoded, str) else decoded
    if not isinstance(ids, list) or not ids or not all(isinstance(item, str) and item for item in ids):
        raise Refused(ErrorCode.BAD_REQUEST, "conn_id must be a string or a list of strings")
    return tuple(ids)
