"""``subscribe`` and ``unsubscribe`` messages as functions, for applications that handle messages themselves.

The names and the checks of fastapi-distributed-websocket, with MQTT 5's grammar instead of "contains a slash".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ipc.topics import InvalidTopic, check_pattern
from workers.connection import Connection
from workers.errors import InvalidSubscription, InvalidSubscriptionMessage
from workers.message import Message


def subscribe(connection: Connection, message: Message | Mapping[str, Any]) -> None:
    """Subscribe ``connection`` to the topic or pattern of a ``subscribe`` message.

    Raises:
        InvalidSubscriptionMessage: not a ``subscribe`` message, or without a topic.
        InvalidSubscription: the topic is no pattern (MQTT 5 section 4.7).
    """
    connection.topics.add(_pattern(connection, message, "subscribe"))


def unsubscribe(connection: Connection, message: Message | Mapping[str, Any]) -> None:
    """Undo a subscription; one that does not exist is no error.

    Raises:
        InvalidSubscriptionMessage: not an ``unsubscribe`` message, or without a topic.
        InvalidSubscription: the topic is no pattern.
    """
    connection.topics.discard(_pattern(connection, message, "unsubscribe"))


def handle_subscription_message(connection: Connection, message: Message | Mapping[str, Any]) -> None:
    """:func:`subscribe` or :func:`unsubscribe`, as the message's type says.

    Raises:
        InvalidSubscriptionMessage: neither, or without a topic.
        InvalidSubscription: the topic is no pattern.
    """
    kind, _ = _parts(connection, message)
    if kind == "subscribe":
        subscribe(connection, message)
    else:
        unsubscribe(connection, message)


def _parts(connection: Connection, message: Message | Mapping[str, Any]) -> tuple[Any, Any]:
    if isinstance(message, Message):
        return message.type, message.topic
    if isinstance(message, Mapping):
        return message.get("type"), message.get("topic")
    raise InvalidSubscriptionMessage(
        f"a subscription message is an object, not {type(message).__name__}", connection=connection
    )


def _pattern(connection: Connection, message: Message | Mapping[str, Any], kind: str) -> str:
    found, topic = _parts(connection, message)
    if found != kind:
        raise InvalidSubscriptionMessage(
            f"expected a message of type {kind!r}, got {found!r}", connection=connection
        )
    if not isinstance(topic, str) or not topic:
        raise InvalidSubscriptionMessage(f"a {kind} message needs a topic", connection=connection)
    try:
        check_pattern(topic)
    except InvalidTopic as exc:
        raise InvalidSubscription(str(exc), connection=connection) from None
    return topic
