"""Interest: no subscription is ever missed, and what nobody needs is cleared."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from ipc import interest as module
from ipc.board import INTEREST_BITS
from ipc.interest import InterestKind, OwnInterest, PlaceCache, bucket, place, topic_places
from ipc.topics import is_pattern, matches, prefix_run

levels = st.sampled_from(["a", "b", "", "$x", "+", "#"])
patterns = st.lists(levels, min_size=1, max_size=4).map("/".join)
topics = st.lists(st.sampled_from(["a", "b", "", "$x"]), min_size=1, max_size=4).map("/".join)


def wanted(memory: bytearray, offset: int, places: Iterable[tuple[int, int]]) -> bool:
    """As a sender looks."""
    return any(memory[offset + byte] & mask for byte, mask in places)


def subscribe(own: OwnInterest, channel: str, pattern: str) -> None:
    kind, text = (
        (InterestKind.PREFIX, prefix_run(pattern)) if is_pattern(pattern) else (InterestKind.EXACT, pattern)
    )
    own.add(kind, channel, text)


@given(st.text(), st.text(), st.sampled_from(InterestKind))
def test_a_bucket_is_in_the_map_and_always_the_same(channel: str, text: str, kind: InterestKind) -> None:
    number = bucket(kind, channel, text)
    assert 0 <= number < INTEREST_BITS
    assert bucket(int(kind), channel, text) == number
    assert place(kind, channel, text) == (number >> 3, 1 << number % 8)


def test_buckets_are_pinned() -> None:
    """Two versions of this program on one host must agree; whoever changes this raises the board's layout version."""
    assert bucket(InterestKind.EXACT, "hub", "a/b") == 1020642
    assert bucket(InterestKind.PREFIX, "hub", "") == 953434


def test_what_lies_side_by_side_is_kept_apart() -> None:
    assert bucket(0, "a", "bc") != bucket(0, "ab", "c")
    assert bucket(0, "hub", "a") != bucket(1, "hub", "a")
    assert bucket(0, "hub", "\ud800") != bucket(0, "hub", "\udfff")


def test_buckets_are_spread_evenly() -> None:
    found = Counter(bucket(0, "hub", f"room/{number}") for number in range(20_000))
    assert max(found.values()) <= 4
    assert len(found) > 19_500


@given(st.lists(patterns, max_size=5), topics)
def test_whoever_has_a_matching_subscription_is_found(subscribed: list[str], topic: str) -> None:
    own = OwnInterest(memory := bytearray(2 * INTEREST_BITS // 8), 1000, lambda: None)
    subscribed = [pattern for pattern in subscribed if matches_something(pattern)]
    for pattern in subscribed:
        subscribe(own, "hub", pattern)
    if matches(topic, subscribed):
        assert wanted(memory, 1000, topic_places("hub", topic))
    if not subscribed:
        assert not wanted(memory, 1000, topic_places("hub", topic))


def matches_something(pattern: str) -> bool:
    return "#" not in pattern or (pattern.endswith("#") and pattern.count("#") == 1)


def test_the_examples_of_the_design() -> None:
    places = topic_places("hub", "a/b/c")
    for kind, text in [(0, "a/b/c"), (1, ""), (1, "a/"), (1, "a/b/"), (1, "a/b/c/")]:
        assert place(kind, "hub", text) in places
    assert len(places) == 5
    assert place(1, "hub", "") not in topic_places("hub", "$sys/a"), "# does not match what begins with $"


def test_another_channel_is_not_concerned() -> None:
    own = OwnInterest(memory := bytearray(INTEREST_BITS // 8), 0, lambda: None)
    subscribe(own, "one", "#")
    assert wanted(memory, 0, topic_places("one", "a"))
    assert not wanted(memory, 0, topic_places("two", "a"))


def test_others_look_again_at_each_bit_that_changes_and_only_then() -> None:
    changes: list[int] = []
    own = OwnInterest(bytearray(INTEREST_BITS // 8), 0, lambda: changes.append(1))
    own.add(0, "hub", "a")
    own.add(0, "hub", "a")
    assert len(changes) == 1
    own.discard(0, "hub", "a")
    assert len(changes) == 1
    own.discard(0, "hub", "a")
    assert len(changes) == 2
    assert len(own) == 0


def test_the_bit_is_set_before_anybody_is_told() -> None:
    memory = bytearray(INTEREST_BITS // 8)
    seen = []
    own = OwnInterest(memory, 0, lambda: seen.append(any(memory)))
    own.add(0, "hub", "a")
    own.clear()
    assert seen == [True, False]


def test_what_was_never_wanted_cannot_be_discarded() -> None:
    own = OwnInterest(bytearray(INTEREST_BITS // 8), 0, lambda: None)
    with pytest.raises(ValueError, match="never added"):
        own.discard(0, "hub", "a")


@pytest.mark.parametrize("limit", [1, 7, 1000])
def test_the_caches_are_bounded_and_right(limit: int) -> None:
    cache = PlaceCache(limit)
    numbers = random.Random(1)
    for _ in range(500):
        topic = f"room/{numbers.randrange(50)}"
        assert cache.topic("hub", topic) == topic_places("hub", topic)
        assert cache.other(InterestKind.CONN, "hub", topic) == place(InterestKind.CONN, "hub", topic)
        assert len(cache._topics) <= limit
        assert len(cache._others) <= limit


class Churn(RuleBasedStateMachine):
    """Against a plain count of what is wanted."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = bytearray(INTEREST_BITS // 8)
        self.own = OwnInterest(self.memory, 0, lambda: None)
        self.model: Counter[tuple[int, str]] = Counter()

    @rule(kind=st.sampled_from(InterestKind), text=st.sampled_from("abcdefgh"))
    def add(self, kind: InterestKind, text: str) -> None:
        self.own.add(kind, "hub", text)
        self.model[kind, text] += 1

    @rule(kind=st.sampled_from(InterestKind), text=st.sampled_from("abcdefgh"))
    def discard(self, kind: InterestKind, text: str) -> None:
        if self.model[kind, text]:
            self.own.discard(kind, "hub", text)
            self.model[kind, text] -= 1

    @rule()
    def clear(self) -> None:
        self.own.clear()
        self.model.clear()

    @invariant()
    def bits_are_what_is_wanted(self) -> None:
        expected = {module.place(kind, "hub", text) for (kind, text), count in self.model.items() if count}
        found = {(byte, mask) for byte, mask in expected if self.memory[byte] & mask}
        assert found == expected
        assert int.from_bytes(self.memory, "big").bit_count() == len(expected) == len(self.own)


TestChurn = Churn.TestCase
