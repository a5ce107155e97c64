"""The subscription index: a naive model beside it, its kept answers, what must not cost much (S11 to S13)."""

from __future__ import annotations

import gc
import random
import sys
import time
import weakref
from collections.abc import Iterable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from ipc.topics import InvalidTopic, matches
from workers.subscriptions import SubscriptionIndex, _Node


def assert_empty(index: SubscriptionIndex[int]) -> None:
    """Nothing is left of subscriptions that ended: no topic, no pattern, no node of the trie."""
    assert len(index) == 0
    assert not index._exact
    assert not index._patterns
    assert nodes(index._root) == 1
    assert all(not answer.subscribers and not answer.patterns for answer in index._answers.values())


def nodes(root: _Node[int]) -> int:
    count, waiting = 0, [root]
    while waiting:
        node = waiting.pop()
        count += 1
        waiting += node.children.values()
        if node.any_level is not None:
            waiting.append(node.any_level)
    return count


def assert_kept_answers_are_consistent(index: SubscriptionIndex[int]) -> None:
    """Each pattern knows exactly the kept answers it is part of."""
    for pattern in index._patterns.values():
        assert pattern.answered == {t for t, answer in index._answers.items() if pattern in answer.patterns}
    alive = set(index._patterns.values())
    for answer in index._answers.values():
        assert alive.issuperset(answer.patterns)


# --- the interface ---


def test_add_discard_and_count() -> None:
    index: SubscriptionIndex[int] = SubscriptionIndex()
    for pattern in ("a/b", "a/+", "#"):
        assert index.count(pattern) == 0
        assert index.add(pattern, 1)
        assert not index.add(pattern, 1)
        assert index.add(pattern, 2)
        assert index.count(pattern) == 2
    assert len(index) == 6
    for pattern in ("a/b", "a/+", "#"):
        assert index.discard(pattern, 1)
        assert not index.discard(pattern, 1)
        assert index.count(pattern) == 1
        assert index.discard(pattern, 2)
        assert index.count(pattern) == 0
    assert_empty(index)


@pytest.mark.parametrize("pattern", ["a", "a/b/c", "+", "#", "a/+/c", "a/#", "", "a+", "#/a"])
def test_discarding_what_never_was_does_nothing(pattern: str) -> None:
    index: SubscriptionIndex[int] = SubscriptionIndex()
    assert not index.discard(pattern, 1)
    assert index.count(pattern) == 0
    index.add("a/b", 1)
    index.add("a/+/+", 1)
    assert not index.discard(pattern, 1)
    assert len(index) == 2


@pytest.mark.parametrize("pattern", ["", "a+", "a/#/b", "#/#", "a/+b"])
def test_an_invalid_pattern_is_refused_and_leaves_nothing(pattern: str) -> None:
    index: SubscriptionIndex[int] = SubscriptionIndex()
    with pytest.raises(InvalidTopic):
        index.add(pattern, 1)
    assert_empty(index)


@pytest.mark.parametrize("topic", ["", "a/+", "#", "+", "a+b"])
def test_nobody_gets_a_message_to_an_invalid_topic(topic: str) -> None:
    index: SubscriptionIndex[int] = SubscriptionIndex()
    for pattern in ("#", "+", "a/+", "+/+"):
        index.add(pattern, 1)
    assert index.match(topic) == ()
    assert not index._answers


def test_each_subscriber_once_in_order() -> None:
    index: SubscriptionIndex[int] = SubscriptionIndex()
    for subscriber in (5, 3, 9, 1):
        index.add("a/b", subscriber)
    for pattern in ("#", "a/#", "a/+", "+/b", "+/+", "a/b/#", "+/b/#"):
        index.add(pattern, 3)
        index.add(pattern, 7)
    assert index.match("a/b") == (5, 3, 9, 1, 7)


@pytest.mark.parametrize("pattern", ["#", "+/x", "+/#", "$a/x", "$a/#", "$a/+", "$a/x/#"])
def test_leading_wildcards_do_not_match_dollar_topics(pattern: str) -> None:
    index: SubscriptionIndex[int] = SubscriptionIndex()
    index.add(pattern, 1)
    assert index.match("$a/x") == ((1,) if pattern.startswith("$") else ())


# --- kept answers ---


def test_the_same_tuple_until_the_topics_subscribers_change() -> None:
    index: SubscriptionIndex[int] = SubscriptionIndex()
    index.add("a/b", 1)
    index.add("+/b", 2)
    index.add("b/#", 3)
    first, other = index.match("a/b"), index.match("b/b")
    assert (first, other) == ((1, 2), (3, 2))
    index.add("a/c", 4)
    index.add("c/+", 4)
    index.discard("c/+", 4)
    index.add("b/#", 5)
    assert index.match("a/b") is first
    assert index.match("b/b") == (3, 5, 2)
    index.add("a/#", 6)
    assert index.match("a/b") == (1, 6, 2)
    index.discard("a/#", 6)
    index.discard("a/b", 1)
    assert index.match("a/b") == (2,)
    assert index.match("b/b") == (3, 5, 2)


def test_the_same_tuple_for_nobody_too() -> None:
    index: SubscriptionIndex[int] = SubscriptionIndex()
    assert index.match("a") == ()
    index.add("a", 1)
    assert index.match("a") == (1,)
    index.discard("a", 1)
    index.add("#", 2)
    assert index.match("a") == (2,)


def test_kept_answers_are_bounded() -> None:
    index: SubscriptionIndex[int] = SubscriptionIndex(kept_answers=10)
    index.add("a/#", 1)
    index.add("a/+", 2)
    index.add("a/5", 3)
    for number in range(35):
        assert set(index.match(f"a/{number}")) == ({1, 2, 3} if number == 5 else {1, 2})
        assert len(index._answers) <= 10
        assert_kept_answers_are_consistent(index)
    assert index.match("x" * 65536) == ()
    assert max(map(len, index._answers)) <= 255


class Client:
    """Something that can be weakly referenced."""


def test_patterns_forget_answers_that_are_dropped() -> None:
    index: SubscriptionIndex[int] = SubscriptionIndex()
    index.add("a/+", 1)
    index.add("#", 2)
    for change in ("a/b", "a/+", "+/b"):
        index.match("a/b")
        index.add(change, 3)
        assert_kept_answers_are_consistent(index)
        index.match("a/b")
        index.discard(change, 3)
        assert_kept_answers_are_consistent(index)


@pytest.mark.parametrize("pattern", ["a/b", "a/+", "#"])
def test_kept_answers_keep_no_subscriber_alive(pattern: str) -> None:
    index: SubscriptionIndex[Client] = SubscriptionIndex()
    client = Client()
    gone = weakref.ref(client)
    index.add(pattern, client)
    assert index.match("a/b") == (client,)
    index.add("x/+", Client())  # makes the answer one to be checked again
    index.discard(pattern, client)
    del client
    gc.collect()
    assert gone() is None


# --- against a naive model (S13) ---


class Model:
    """Ten lines that are plainly right: a set of pairs, and `matches`."""

    def __init__(self) -> None:
        self.pairs: set[tuple[str, int]] = set()

    def add(self, pattern: str, subscriber: int) -> bool:
        is_new = (pattern, subscriber) not in self.pairs
        self.pairs.add((pattern, subscriber))
        return is_new

    def discard(self, pattern: str, subscriber: int) -> bool:
        was_there = (pattern, subscriber) in self.pairs
        self.pairs.discard((pattern, subscriber))
        return was_there

    def match(self, topic: str) -> set[int]:
        return {subscriber for pattern, subscriber in self.pairs if matches(topic, pattern)}

    def count(self, pattern: str) -> int:
        return sum(pattern == mine for mine, _ in self.pairs)


def joined(levels: Iterable[str]) -> str:
    return "/".join(levels)


TOPICS = st.lists(st.sampled_from(["a", "b", "", "$a"]), min_size=1, max_size=3).map(joined).filter(bool)
PATTERNS = (
    st.lists(st.sampled_from(["a", "+", "b", "", "$a"]), max_size=2)
    .flatmap(lambda levels: st.sampled_from(["a", "#", "+"]).map(lambda last: [*levels, last]))
    .map(joined)
)
SUBSCRIBERS = st.integers(0, 4)


class IndexMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.index: SubscriptionIndex[int] = SubscriptionIndex(kept_answers=5)
        self.model = Model()
        self.answers: dict[str, tuple[tuple[str, ...], tuple[int, ...]]] = {}

    @rule(pattern=PATTERNS, subscriber=SUBSCRIBERS)
    def add(self, pattern: str, subscriber: int) -> None:
        assert self.index.add(pattern, subscriber) == self.model.add(pattern, subscriber)

    @rule(pattern=PATTERNS, subscriber=SUBSCRIBERS)
    def discard(self, pattern: str, subscriber: int) -> None:
        assert self.index.discard(pattern, subscriber) == self.model.discard(pattern, subscriber)

    @rule(choice=st.randoms(use_true_random=False))
    def discard_one_that_exists(self, choice: random.Random) -> None:
        if self.model.pairs:
            self.discard(*choice.choice(sorted(self.model.pairs)))

    @rule(topic=TOPICS)
    def match(self, topic: str) -> None:
        answer = self.index.match(topic)
        assert sorted(answer) == sorted(self.model.match(topic))
        assert self.index.match(topic) is answer

    @rule(pattern=PATTERNS)
    def count(self, pattern: str) -> None:
        assert self.index.count(pattern) == self.model.count(pattern)

    @invariant()
    def sizes_and_answers_fit(self) -> None:
        assert len(self.index) == len(self.model.pairs)
        assert_kept_answers_are_consistent(self.index)

    def teardown(self) -> None:
        for pattern, subscriber in self.model.pairs:
            assert self.index.discard(pattern, subscriber)
        assert_empty(self.index)


TestIndexMachine = IndexMachine.TestCase
TestIndexMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def operate(operations: int, seed: int) -> None:
    """Random operations on index and model side by side, and the empty tree at the end."""
    chance = random.Random(seed)
    topics = [joined(chance.choices(["", "a", "b", "c", "$a"], k=chance.randint(1, 4))) for _ in range(40)]
    patterns = [
        joined([*chance.choices(["", "a", "b", "c", "$a", "+", "+"], k=chance.randint(0, 3)), last])
        for last in ["#", "#", "+", "a", "b"]
        for _ in range(10)
    ]
    topics = [topic for topic in topics if topic]
    index: SubscriptionIndex[int] = SubscriptionIndex(kept_answers=30)
    model = Model()
    for step in range(operations):
        if step % 20 == 0:
            assert_kept_answers_are_consistent(index)
        verb = chance.random()
        pattern, subscriber = chance.choice(patterns), chance.randrange(8)
        if verb < 0.6:
            topic = chance.choice(topics)
            answer = index.match(topic)
            assert len(answer) == len(set(answer))
            assert set(answer) == model.match(topic), (topic, model.pairs)
        elif verb < 0.75 and len(model.pairs) < 40:
            assert index.add(pattern, subscriber) == model.add(pattern, subscriber)
        else:
            assert index.discard(pattern, subscriber) == model.discard(pattern, subscriber)
    for pattern, subscriber in list(model.pairs):
        assert index.discard(pattern, subscriber)
    assert_empty(index)


def test_twenty_thousand_operations_agree_with_the_model() -> None:
    operate(20_000, seed=20_260_101)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_ten_million_operations_agree_with_the_model() -> None:
    for seed in range(100):
        operate(100_000, seed)


# --- what must not cost much ---


def test_the_work_does_not_grow_with_unrelated_subscriptions() -> None:
    """Counts the lines that a match runs through instead of the time: that is exact."""
    index: SubscriptionIndex[int] = SubscriptionIndex()
    index.add("game/+/score", 1)
    index.add("game/7/#", 2)
    few = visited(index, "game/7/score")
    for number in range(5_000):
        index.add(f"room/{number}/#", 3)
        index.add(f"user/+/{number}", 3)
        index.add(f"game/{number + 10}/+", 3)
    assert visited(index, "game/7/score") == few
    assert index.match("game/7/score") == (2, 1)


def visited(index: SubscriptionIndex[int], topic: str) -> int:
    """Count the lines of Python that an answer takes which is not kept."""
    index._answers.clear()
    lines = 0

    def trace(frame: object, event: str, argument: object) -> object:
        nonlocal lines
        lines += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)  # type: ignore[arg-type]
    try:
        index.match(topic)
    finally:
        sys.settrace(before)
    return lines


def test_a_thousand_plus_levels_cost_linear_time() -> None:
    index: SubscriptionIndex[int] = SubscriptionIndex()
    for depth in range(1, 1001):
        index.add("/".join(["+"] * depth), depth)
    topic = "/".join(["a"] * 1000)
    started = time.process_time()
    for _ in range(100):
        assert index.match(topic) == (1000,)
    assert time.process_time() - started < 5  # about 0.05 s here
    for depth in range(1, 1001):
        index.discard("/".join(["+"] * depth), depth)
    assert_empty(index)


def test_a_hot_topic_is_answered_from_memory_while_strangers_come_and_go() -> None:
    index: SubscriptionIndex[int] = SubscriptionIndex()
    for subscriber in range(1000):
        index.add("hot", subscriber)
    index.add("#", -1)
    answer = index.match("hot")
    assert len(answer) == 1001
    for number in range(1000):
        index.add(f"user/{number}/#", number)
        index.add(f"user/{number}", number)
        index.add(f"+/{number}", number)
        assert index.match("hot") is answer
        index.discard(f"user/{number}/#", number)
        index.discard(f"+/{number}", number)
        assert index.match("hot") is answer
