"""Where a client that names its topic belongs: the pure part; ``tests/system/test_gathering.py`` has the rest."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.gathering import FEW, TAKES_NOBODY, has_room, home, topic_of

workers = st.lists(st.integers(0, 63), min_size=1, unique=True)


@pytest.mark.parametrize(
    ("theirs", "ours", "room"),
    [
        (0, 0, False),  # a small hub: there is little to save
        (0, FEW - 1, False),
        (0, FEW, True),
        (FEW, FEW, True),
        (125, 100, True),
        (126, 100, False),
        (TAKES_NOBODY, 1000, False),
    ],
)
def test_only_who_is_not_much_fuller_gets_anothers_clients(theirs: int, ours: int, room: bool) -> None:
    assert has_room(theirs, ours) is room


@given(st.text(min_size=1), workers)
def test_everybody_knows_the_same_home_whatever_the_order(topic: str, listeners: list[int]) -> None:
    topic = topic.encode("utf-8", "replace").decode()
    found = home(topic, listeners)
    assert found in listeners
    assert home(topic, sorted(listeners)) == found


@given(st.text("abc/12", min_size=1), workers, st.integers(0, 63))
def test_one_worker_less_moves_only_what_had_its_home_there(
    topic: str, listeners: list[int], gone: int
) -> None:
    left = [listener for listener in listeners if listener != gone]
    if left and home(topic, listeners) != gone:
        assert home(topic, left) == home(topic, listeners)


def test_homes_are_spread_evenly() -> None:
    counts = [0] * 8
    for number in range(8000):
        counts[home(f"room/{number}", range(8))] += 1
    assert min(counts) > 800


@pytest.mark.parametrize(
    ("url", "topic"),
    [
        (b"/ws", None),
        (b"/ws?", None),
        (b"/ws?topic=", None),
        (b"/ws?x=1&topic=room%2F7&topic=b", "room/7"),
        (b"/ws/topic=no", None),
        (b"/ws?subtopic=a", None),
        (b"/ws?topic=a/%23&topic=b", "b"),  # a pattern has no home
        (b"/ws?topic=%00&topic=b", "b"),
        (b"/ws?topic=" + b"x" * 300, None),
        (b"/ws?topic=%C3%A4", "ä"),
        (b"/ws?topic=\xff\xfe", "ÿþ"),  # not UTF-8: somebody else finds fault with it
        (b"/ws?topic=%", "%"),
        (b"/ws?topic=a;b", "a;b"),
    ],
)
def test_the_topic_of_a_request(url: bytes, topic: str | None) -> None:
    assert topic_of(url) == topic


@given(st.binary())
def test_any_url_has_one_or_none(url: bytes) -> None:
    topic_of(url)
    topic_of(b"/ws?topic=" + url)
