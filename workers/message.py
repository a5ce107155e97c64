"""One message of the plain protocol: what kind it is, whom it is for, and its data.

On the way in, `validate_client_message` makes it from the JSON object a client sent; on the way out to a
broker, `Message.__serialize__` makes the same flat object again. Pure: knows no connection and no I/O.

In that object the keys `type`, `topic` and `conn_id` say what to do, and all others are the data.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Any

SUBSCRIPTION_TYPES = frozenset({"subscribe", "unsubscribe"})
CLIENT_TYPES = ("connect", "subscribe", "unsubscribe", "send", "broadcast", "send_by_conn_id")
"""What a client may say."""

_NEED_TOPIC = SUBSCRIPTION_TYPES | {"send"}
_MISSING = object()


class InvalidMessage(ValueError):
    """What a client sent is no message of the plain protocol; the text says why, in words for the client."""


class Message:
    """A message, from a client or to be sent.

    Attributes:
        type: `send`, `broadcast`, `send_by_conn_id`, `subscribe`, `unsubscribe` or `connect`.
            `typ` is the same.
        topic: Whom it is for, or what is subscribed to.
        conn_id: The connection or connections it is for.
        data: What receivers get: a dict, or for a message made by the program any JSON value.
    """

    __slots__ = ("conn_id", "data", "topic", "type")

    def __init__(
        self,
        *,
        type: str | None = None,
        data: Any,
        topic: str | None = None,
        conn_id: str | list[str] | None = None,
        typ: str | None = None,
    ) -> None:
        """Make a message; the original's name `typ` is accepted for `type`.

        Raises:
            TypeError: there is no type, or `type` and `typ` differ.
        """
        if type is not None and typ is not None and type != typ:
            raise TypeError(f"type={type!r} and typ={typ!r} are two names for one thing, but they differ")
        kind = typ if type is None else type
        if kind is None:
            raise TypeError("a Message needs a type, for example Message(type='send', topic='a/b', data={})")
        self.type = kind
        self.topic = topic
        self.conn_id = conn_id
        self.data = data

    @property
    def typ(self) -> str:
        """The type, by the name it had in fastapi-distributed-websocket."""
        return self.type

    @typ.setter
    def typ(self, value: str) -> None:
        self.type = value

    @classmethod
    def from_client_message(cls, *, data: Mapping[str, Any]) -> Message:
        """Make a message from the object a client sent, which is not changed.

        Whether the type exists and has what it needs is not looked at; `validate_client_message` does that.

        Raises:
            InvalidMessage: it is not an object, or its type is not a string.
        """
        if not isinstance(data, Mapping):
            raise InvalidMessage(f"a message is a JSON object with a type, this is {_json_name(data)}")
        rest = dict(data)
        kind = rest.pop("type", _MISSING)
        if not isinstance(kind, str):
            found = "has none" if kind is _MISSING else f"has {reprlib.repr(kind)}"
            raise InvalidMessage(f"a message needs a type, a string; this {found}")
        return cls(type=kind, topic=rest.pop("topic", None), conn_id=rest.pop("conn_id", None), data=rest)

    def __serialize__(self) -> dict[str, Any]:
        """The message as one new flat dict, as it travels through a broker; the message is not changed.

        Raises:
            TypeError: the data is not a dict, and so cannot lie beside `type`, `topic` and `conn_id`.
        """
        if not isinstance(self.data, Mapping):
            raise TypeError(
                f"the data of a message for this broker must be a dict, this is {reprlib.repr(self.data)}: "
                "its keys travel beside type, topic and conn_id"
            )
        return {**self.data, "type": self.type, "topic": self.topic, "conn_id": self.conn_id}

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Message):
            return NotImplemented
        mine = (self.type, self.topic, self.conn_id, self.data)
        return mine == (other.type, other.topic, other.conn_id, other.data)

    # Equal messages may change and cease to be equal, and their data is a dict.
    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return (
            f"Message(type={self.type!r}, topic={self.topic!r}, conn_id={self.conn_id!r}, "
            f"data={reprlib.repr(self.data)})"
        )


def validate_client_message(data: object) -> Message:
    """Make a message from what a client sent, or say what is wrong with it.

    The grammar of the topic is not looked at: that depends on whether it is published or subscribed to.

    Args:
        data: The decoded JSON, any value; it is not changed.

    Raises:
        InvalidMessage: it is not an object, its type is unknown, or what the type needs is missing.
    """
    message = Message.from_client_message(data=data)  # type: ignore[arg-type]
    if message.type not in CLIENT_TYPES:
        raise InvalidMessage(
            f"unknown type {reprlib.repr(message.type)}; there are {', '.join(CLIENT_TYPES)}"
        )
    if message.topic is not None and not isinstance(message.topic, str):
        raise InvalidMessage(f"topic must be a string, this is {reprlib.repr(message.topic)}")
    if message.type in _NEED_TOPIC and not message.topic:
        raise InvalidMessage(f"a message of type {message.type} needs a topic")
    _check_conn_id(message)
    return message


def _check_conn_id(message: Message) -> None:
    conn_id = message.conn_id
    strings = all(isinstance(one, str) for one in conn_id) if isinstance(conn_id, list) else True
    if not strings or not isinstance(conn_id, str | list | None):
        raise InvalidMessage(f"conn_id must be a string or a list of strings, not {reprlib.repr(conn_id)}")
    if message.type == "send_by_conn_id" and not conn_id:
        raise InvalidMessage("a message of type send_by_conn_id needs a conn_id, or a list of them")


def _json_name(value: object) -> str:
    """The kind of a decoded JSON value, as the writer of the client knows it."""
    names = {list: "an array", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return "null" if value is None else names.get(type(value), f"a {type(value).__name__}")
