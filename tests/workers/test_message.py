"""Messages: made from what clients send, made into what brokers carry, and refused in words."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given as property_of
from hypothesis import strategies as st

from workers.message import CLIENT_TYPES, InvalidMessage, Message, validate_client_message

JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)
DATA = st.dictionaries(
    st.text().filter(lambda key: key not in ("type", "topic", "conn_id")), JSON, max_size=5
)


def test_both_names_of_the_type_are_accepted_and_readable() -> None:
    for message in (Message(type="send", topic="a", data={}), Message(typ="send", topic="a", data={})):
        assert message.type == message.typ == "send"
    message.typ = "broadcast"
    assert message.type == "broadcast"


def test_a_message_has_one_type() -> None:
    assert Message(type="send", typ="send", data={}).type == "send"
    with pytest.raises(TypeError, match="two names"):
        Message(type="send", typ="broadcast", data={})
    with pytest.raises(TypeError, match="needs a type"):
        Message(data={})
    with pytest.raises(TypeError):
        Message("send", {})  # type: ignore[call-arg]


def test_what_is_not_given_is_none() -> None:
    message = Message(type="broadcast", data={"x": 1})
    assert (message.topic, message.conn_id) == (None, None)


def test_from_client_message_takes_the_data_apart_and_leaves_its_argument_alone() -> None:
    given = {"type": "send", "topic": "chat/1", "conn_id": "c", "msg": "hi", "deep": {"x": [1]}}
    before = copy.deepcopy(given)
    message = Message.from_client_message(data=given)
    assert message == Message(
        type="send", topic="chat/1", conn_id="c", data={"msg": "hi", "deep": {"x": [1]}}
    )
    assert given == before
    message.data["new"] = 1
    assert given == before


def test_serialize_gives_a_new_flat_dict_and_leaves_the_message_alone() -> None:
    data = {"msg": "hi", "type": "the data's own"}
    message = Message(type="send", topic="chat/1", data=data)
    flat = message.__serialize__()
    assert flat == {"msg": "hi", "type": "send", "topic": "chat/1", "conn_id": None}
    assert message.data is data
    assert data == {"msg": "hi", "type": "the data's own"}
    flat["msg"] = "changed"
    assert data["msg"] == "hi"


def test_data_that_is_no_dict_cannot_be_made_flat() -> None:
    with pytest.raises(TypeError, match="must be a dict"):
        Message(type="send", topic="a", data=[1, 2]).__serialize__()


@property_of(data=DATA, topic=st.none() | st.text(), conn_id=st.none() | st.text() | st.lists(st.text()))
def test_a_serialized_message_is_the_same_message_again(
    data: dict[str, Any], topic: str | None, conn_id: str | list[str] | None
) -> None:
    message = Message(type="broadcast", topic=topic, conn_id=conn_id, data=data)
    assert Message.from_client_message(data=message.__serialize__()) == message


def test_messages_are_equal_by_value_and_not_hashable() -> None:
    assert Message(type="send", topic="a", data={"x": 1}) == Message(typ="send", topic="a", data={"x": 1})
    assert Message(type="send", topic="a", data={"x": 1}) != Message(type="send", topic="a", data={"x": 2})
    assert Message(type="send", topic="a", data={}) != {"type": "send", "topic": "a"}
    with pytest.raises(TypeError):
        hash(Message(type="send", data={}))


def test_the_repr_tells_what_it_is_and_stays_short() -> None:
    assert repr(Message(type="send", topic="a", data={"x": 1})) == (
        "Message(type='send', topic='a', conn_id=None, data={'x': 1})"
    )
    assert len(repr(Message(type="send", topic="a", data={"x": "y" * 10_000}))) < 200


# What clients may send


@pytest.mark.parametrize(
    "given",
    [
        {"type": "subscribe", "topic": "a/#"},
        {"type": "unsubscribe", "topic": "news"},
        {"type": "send", "topic": "a", "msg": 1},
        {"type": "broadcast", "msg": 1},
        {"type": "broadcast", "topic": None, "conn_id": None},
        {"type": "send_by_conn_id", "conn_id": "c"},
        {"type": "send_by_conn_id", "conn_id": ["c", "d"]},
        {"type": "connect"},
    ],
)
def test_valid_messages_are_taken(given: dict[str, Any]) -> None:
    before = copy.deepcopy(given)
    message = validate_client_message(given)
    assert message.type == given["type"]
    assert given == before


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([], "this is an array"),
        ("send", "this is a string"),
        (5, "this is a number"),
        (True, "this is a boolean"),
        (None, "this is null"),
        ({}, "needs a type, a string; this has none"),
        ({"type": None}, "has None"),
        ({"type": 5}, "has 5"),
        ({"type": ["send"]}, "has ['send']"),
        ({"type": "shout"}, "unknown type 'shout'; there are connect, subscribe"),
        ({"type": "set_conn_id", "conn_id": "c"}, "unknown type 'set_conn_id'"),
        ({"type": "active_connections"}, "unknown type"),
        ({"type": "subscribe"}, "of type subscribe needs a topic"),
        ({"type": "unsubscribe", "topic": None}, "of type unsubscribe needs a topic"),
        ({"type": "send", "topic": ""}, "of type send needs a topic"),
        ({"type": "send", "topic": 5}, "topic must be a string, this is 5"),
        ({"type": "broadcast", "topic": ["a"]}, "topic must be a string"),
        ({"type": "send_by_conn_id"}, "needs a conn_id"),
        ({"type": "send_by_conn_id", "conn_id": ""}, "needs a conn_id"),
        ({"type": "send_by_conn_id", "conn_id": []}, "needs a conn_id"),
        ({"type": "send_by_conn_id", "conn_id": 5}, "conn_id must be"),
        ({"type": "send_by_conn_id", "conn_id": {"c": 1}}, "conn_id must be"),
        ({"type": "send_by_conn_id", "conn_id": ["c", 5]}, "conn_id must be"),
    ],
)
def test_invalid_messages_are_refused_in_words(given: object, words: str) -> None:
    with pytest.raises(InvalidMessage) as caught:
        validate_client_message(given)
    assert words in str(caught.value)


def test_words_about_hostile_messages_stay_short() -> None:
    deep: Any = []
    for _ in range(500):
        deep = [deep]
    for given in ({"type": "x" * 100_000}, {"type": "send", "topic": deep}, {"type": deep}):
        with pytest.raises(InvalidMessage) as caught:
            validate_client_message(given)
        assert len(str(caught.value)) < 200


@property_of(
    JSON
    | st.fixed_dictionaries(
        {"type": st.sampled_from(CLIENT_TYPES)}, optional={"topic": JSON, "conn_id": JSON}
    )
)
def test_any_json_is_either_a_message_or_an_invalid_one(given: object) -> None:
    try:
        message = validate_client_message(given)
    except InvalidMessage:
        return
    assert message.type in CLIENT_TYPES
    assert message.topic is None or isinstance(message.topic, str)
