"""Who subscribed to what: the index that turns a message's topic into the subscribers that get it.

A worker asks it once for each message that a client of its own published or that the bus brought; the answer
goes to the fan-out. Exact topics are in a dict, patterns in a trie of their levels, so that the cost of an
answer does not grow with the number of subscribers elsewhere. Answers are kept, since most messages go to the
topics of the messages before.

How kept answers stay right, whatever the churn of subscriptions:

- A change of an exact topic drops the answer for this topic.
- Each pattern knows the kept answers it is part of; a change of its subscribers drops these.
- A pattern that is new could be part of any answer. Rather than looking for those, it raises the version of
  the trie: an answer of an older version is checked by walking down the trie again when it is next asked for,
  and mostly it still holds. So no subscription is slow because many answers are kept, and publishing is not
  slowed by strangers' subscriptions beyond that walk.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Generic, TypeVar

import msgspec

from ipc.topics import MAX_TOPIC_BYTES, check_wildcards

S = TypeVar("S", bound=Hashable)

DEFAULT_KEPT_ANSWERS = 4096
"""For how many topics an index keeps the answer of `match`."""


class SubscriptionIndex(Generic[S]):
    """Subscribers by topic and pattern (MQTT 5, section 4.7), in one process.

    It does no input or output and is not thread-safe. Limits of length and depth are the caller's affair.
    """

    def __init__(self, kept_answers: int = DEFAULT_KEPT_ANSWERS) -> None:
        self._exact: dict[str, dict[S, None]] = {}  # dicts as sets that keep the order
        self._patterns: dict[str, _Pattern[S]] = {}
        self._root: _Node[S] = _Node()
        self._pairs = 0
        self._answers: dict[str, _Answer[S]] = {}
        self._kept_answers = kept_answers
        self._version = 0

    def __len__(self) -> int:
        """Return the number of pairs of pattern and subscriber."""
        return self._pairs

    def add(self, pattern: str, subscriber: S) -> bool:
        """Subscribe to a topic or pattern; return False if that was so already.

        Raises:
            InvalidTopic: the pattern is empty or has a misplaced wildcard.
        """
        if _has_wildcard(pattern):
            found = self._patterns.get(pattern) or self._add_pattern(pattern)
            subscribers = found.subscribers
        else:
            found = None
            subscribers = self._exact.get(pattern) or self._add_exact(pattern)
        if subscriber in subscribers:
            return False
        subscribers[subscriber] = None
        self._pairs += 1
        self._drop_answers(pattern, found)
        return True

    def discard(self, pattern: str, subscriber: S) -> bool:
        """Unsubscribe from exactly this topic or pattern; return False if there was no such subscription."""
        found = self._patterns.get(pattern)
        subscribers = self._exact.get(pattern) if found is None else found.subscribers
        if subscribers is None or subscriber not in subscribers:
            return False
        del subscribers[subscriber]
        self._pairs -= 1
        self._drop_answers(pattern, found)
        if not subscribers:
            if found is None:
                del self._exact[pattern]
            else:
                self._remove_pattern(pattern)
        return True

    def count(self, pattern: str) -> int:
        """Return how many subscribers exactly this topic or pattern has."""
        found = self._patterns.get(pattern)
        return len(self._exact.get(pattern, ()) if found is None else found.subscribers)

    def match(self, topic: str) -> tuple[S, ...]:
        """Return who gets a message to this topic: each subscriber once, however many patterns match.

        Subscribers of the exact topic come first, then those of one pattern after the other, each in the
        order in which they subscribed. The same tuple object is returned until a subscription that concerns
        the topic changes, as long as the answer is kept. Nobody gets a message to an invalid topic (empty, or
        with a wildcard).
        """
        answer = self._answers.get(topic)
        if answer is not None and answer.version == self._version:
            return answer.subscribers
        return self._answer(topic, answer)

    def _add_exact(self, topic: str) -> dict[S, None]:
        check_wildcards(topic)
        return self._exact.setdefault(topic, {})

    def _add_pattern(self, pattern: str) -> _Pattern[S]:
        check_wildcards(pattern)
        new = self._patterns[pattern] = _Pattern()
        levels, is_open = _split(pattern)
        node = self._root
        for level in levels:
            node = node.make_child(level)
        if is_open:
            node.open_pattern = new
        else:
            node.pattern = new
        self._version += 1
        return new

    def _remove_pattern(self, pattern: str) -> None:
        """Take a pattern out of the trie, with the nodes that only it needed."""
        del self._patterns[pattern]
        levels, is_open = _split(pattern)
        path = [self._root]
        for level in levels:
            path.append(path[-1].child(level))
        if is_open:
            path[-1].open_pattern = None
        else:
            path[-1].pattern = None
        for level in reversed(levels):
            if path.pop().is_needed():
                return
            path[-1].remove_child(level)

    def _drop_answers(self, pattern: str, found: _Pattern[S] | None) -> None:
        """Forget the answers that a changed topic or pattern (then `found`) is part of."""
        for topic in (pattern,) if found is None else tuple(found.answered):
            answer = self._answers.pop(topic, None)
            if answer is not None:
                for part in answer.patterns:
                    part.answered.discard(topic)

    def _answer(self, topic: str, kept: _Answer[S] | None) -> tuple[S, ...]:
        """Find the answer for a topic, or see that an older one still holds."""
        if not topic or "+" in topic or "#" in topic:
            return ()
        patterns = self._matching_patterns(topic)
        if kept is not None:
            if kept.patterns == patterns:
                kept.version = self._version
                return kept.subscribers
            self._drop_answers(topic, None)
        subscribers = self._exact.get(topic, {})
        if patterns:
            subscribers = subscribers.copy()
            for pattern in patterns:
                subscribers.update(pattern.subscribers)
        answer = _Answer(tuple(subscribers), patterns, self._version)
        if len(topic) <= MAX_TOPIC_BYTES:  # unchecked topics shall not fill the memory
            self._keep(topic, answer)
        return answer.subscribers

    def _keep(self, topic: str, answer: _Answer[S]) -> None:
        if len(self._answers) >= self._kept_answers:
            # Rare and cheap enough: what is hot comes back with the next message.
            for old in self._answers.values():
                for pattern in old.patterns:
                    pattern.answered.clear()
            self._answers.clear()
        self._answers[topic] = answer
        for pattern in answer.patterns:
            pattern.answered.add(topic)

    def _matching_patterns(self, topic: str) -> list[_Pattern[S]]:
        """Walk down the trie, level by level, along all branches that match the topic."""
        found: list[_Pattern[S]] = []
        if not self._patterns:
            return found
        nodes = [self._root]
        levels = topic.split("/")
        if topic[0] == "$":  # which wildcards on the first level do not match
            child = self._root.children.get(levels[0])
            if child is None:
                return found
            nodes = [child]
            del levels[0]
        for level in levels:
            following: list[_Node[S]] = []
            for node in nodes:
                if node.open_pattern is not None:
                    found.append(node.open_pattern)
                if node.any_level is not None:
                    following.append(node.any_level)
                child = node.children.get(level)
                if child is not None:
                    following.append(child)
            if not following:
                return found
            nodes = following
        for node in nodes:
            if node.pattern is not None:
                found.append(node.pattern)
            if node.open_pattern is not None:
                found.append(node.open_pattern)
        return found


class _Pattern(Generic[S]):
    """The subscribers of one pattern, and the topics whose kept answers they are part of."""

    __slots__ = ("answered", "subscribers")

    def __init__(self) -> None:
        self.subscribers: dict[S, None] = {}
        self.answered: set[str] = set()


class _Answer(msgspec.Struct, Generic[S], gc=False):
    """What `match` answered for a topic, from which patterns, at which version of the trie."""

    subscribers: tuple[S, ...]
    patterns: list[_Pattern[S]]
    version: int


class _Node(Generic[S]):
    """A place in the trie of patterns: what ends here, and where it goes on."""

    __slots__ = ("any_level", "children", "open_pattern", "pattern")

    def __init__(self) -> None:
        self.pattern: _Pattern[S] | None = None  # ends with the level that leads here
        self.open_pattern: _Pattern[S] | None = None  # ends with # after that level
        self.any_level: _Node[S] | None = None  # where + leads
        self.children: dict[str, _Node[S]] = {}

    def is_needed(self) -> bool:
        """Tell whether a pattern ends here or further down."""
        return bool(self.pattern or self.open_pattern or self.any_level or self.children)

    def make_child(self, level: str) -> _Node[S]:
        """Return where a level of a pattern leads, made if it is missing."""
        if level == "+":
            self.any_level = self.any_level or _Node()
            return self.any_level
        return self.children.setdefault(level, _Node())

    def child(self, level: str) -> _Node[S]:
        """Return where a level leads, of a pattern that is in the trie."""
        if level != "+":
            return self.children[level]
        if self.any_level is None:
            raise KeyError(level)
        return self.any_level

    def remove_child(self, level: str) -> None:
        """Cut off where a level leads."""
        if level == "+":
            self.any_level = None
        else:
            del self.children[level]


def _split(pattern: str) -> tuple[list[str], bool]:
    """Return the levels of a valid pattern without a last `#`, and whether there was one."""
    levels = pattern.split("/")
    is_open = levels[-1] == "#"
    return (levels[:-1] if is_open else levels), is_open


def _has_wildcard(text: str) -> bool:
    return "+" in text or "#" in text
