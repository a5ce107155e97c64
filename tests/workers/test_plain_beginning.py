"""The short way of a publication that begins like the client's last one: it does what the long way does."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from workers.plain import PlainSession
from workers.transport import DONE

TOPIC = "room/1"


class FakeManager:
    """Takes publications; everything else that a session asks of its manager is not asked here."""

    class transport:
        congested = False

        @staticmethod
        def on_clear(callback: object) -> None: ...

    class rules:
        @staticmethod
        def may_broadcast(from_server: bool) -> bool:
            return False

        may_direct = may_broadcast

    def __init__(self) -> None:
        self.publishable: dict[str, bool] = {}
        self.published: list[tuple[str, Any]] = []

    def clients_may_publish(self, topic: str) -> bool:
        return self.publishable.setdefault(topic, topic != "forbidden")

    def publish_checked(self, topic: str, data: bytes) -> Any:
        self.published.append((topic, json.loads(data)))
        return DONE


class FakeConnection:
    """Takes answers."""

    def __init__(self) -> None:
        self.answers: list[Any] = []
        self.errors = 0
        self.subscription_count = 0

    def answer_error(self, *what: Any) -> None:
        self.answers.append(("error", *what))

    def push(self, message: Any) -> None:
        self.answers.append(message)


def session() -> tuple[PlainSession, FakeManager, FakeConnection]:
    manager, connection = FakeManager(), FakeConnection()
    return PlainSession(manager, connection), manager, connection  # type: ignore[arg-type]


def both_ways(first: bytes, payload: bytes) -> None:
    """``payload`` after twice ``first``, and alone."""
    learned, manager, connection = session()
    for _ in range(2):
        learned.on_message(first, True)
    assert len(manager.published) == 2
    manager.published.clear()
    connection.answers.clear()
    learned.on_message(payload, True)
    fresh, other_manager, other_connection = session()
    fresh.on_message(payload, True)
    assert manager.published == other_manager.published
    assert connection.answers == other_connection.answers


def written(spaced: bool, members: list[tuple[str, str]]) -> bytes:
    colon, comma = (": ", ", ") if spaced else (":", ",")
    return ("{" + comma.join(f"{name}{colon}{value}" for name, value in members) + "}").encode()


NAMES = st.sampled_from(
    [
        '"a"',
        '"b"',
        '""',
        '"type"',
        '"topic"',
        '"conn_id"',
        '"ack"',
        '"\\u0074ype"',
        '"to\\u0070ic"',
        '"é"',
        "a",
        '"a',
    ]
)
VALUES = st.sampled_from(
    [
        "1",
        "-0.5e3",
        "null",
        '"x"',
        '"\\ud83d\\ude00"',
        '"send"',
        '"room/2"',
        "[1, {}]",
        '{"type": "send"}',
        "tru",
        "{",
        "",
        "1,",
    ]
    + ['"subscribe"', "[" * 2000 + "]" * 2000]
)


@given(
    st.booleans(),
    st.booleans(),
    st.lists(st.tuples(NAMES, VALUES), max_size=4),
    st.sampled_from(["", "x", " ", "}"]),
)
@example(False, False, [], "")
@example(True, True, [('"a"', "1"), ('"a"', "2")], "")
def test_it_does_what_the_long_way_does(
    first_spaced: bool, spaced: bool, members: list[tuple[str, str]], tail: str
) -> None:
    ours = [('"type"', '"send"'), ('"topic"', f'"{TOPIC}"')]
    both_ways(written(first_spaced, [*ours, ('"n"', "1")]), written(spaced, ours + members) + tail.encode())


@given(st.binary(max_size=60))
def test_any_end_of_a_message(end: bytes) -> None:
    beginning = b'{"type":"send","topic":"room/1","'
    both_ways(beginning + b'n":1}', (beginning + end).decode("utf-8", "replace").encode())


@pytest.mark.parametrize(
    "payload",
    [
        b'{"type":"send","topic":"room/1",}',
        b'{"type":"send","topic":"room/1","}',
        b'{"type":"send","topic":"room/1","a":1,"type":"send"}',
        b'{"type":"send","topic":"room/1","a":1,"topic":"room/2"}',
        b'{"type":"send","topic":"room/1","a":1,"ack":7}',
        b'{"type":"send","topic":"room/1","a":1,"conn_id":"c"}',
        b'{"type":"send","topic":"room/10","a":1}',
        b'{"type":"send","topic":"forbidden","a":1}',
    ],
)
def test_what_only_begins_alike(payload: bytes) -> None:
    both_ways(b'{"type":"send","topic":"room/1","a":1}', payload)


def test_topics_in_turns_and_with_escapes() -> None:
    learned, manager, _ = session()
    for number in range(40):
        topic = ('"a"', '"b"', '"b"', '"\\u0062"', '"b\\""')[number % 5]
        learned.on_message(b'{"type":"send","topic":%b,"n":%d}' % (topic.encode(), number), True)
    names = ("a", "b", "b", "b", 'b"')
    assert manager.published == [(names[number % 5], {"n": number}) for number in range(40)]


def passed_on(payload: bytes, times: int, monkeypatch: pytest.MonkeyPatch, last_long: bool) -> list[bytes]:
    """The texts that are published; without ``last_long`` the last message may not be taken apart."""
    learned, manager, _ = session()
    texts: list[bytes] = []

    def take(topic: str, data: bytes) -> object:
        texts.append(data)
        return DONE

    monkeypatch.setattr(manager, "publish_checked", take)
    for number in range(times):
        if number == times - 1 and not last_long:
            monkeypatch.setattr(PlainSession, "_read", None)
        learned.on_message(payload, True)
    return texts


def test_it_is_taken_and_passes_on_the_same_text(monkeypatch: pytest.MonkeyPatch) -> None:
    payload = b'{"type":"send","topic":"room/1","n":1,"o":{"a": [1, 2]}}'
    assert passed_on(payload, 3, monkeypatch, False) == [b'{"n":1,"o":{"a": [1, 2]}}'] * 3


def test_written_with_spaces_it_goes_the_long_way(monkeypatch: pytest.MonkeyPatch) -> None:
    payload = b'{"type": "send", "topic": "a", "n": 1}'
    assert passed_on(payload, 4, monkeypatch, True) == [b'{"n":1}'] * 4
