"""Interest: which peers a message must go to, and which messages this process wants.

Stands between a publisher and the bus. Everybody has a map of 2^20 bits on the board; a bit stands for all
(kind, channel, text) that hash to it. A set bit means "send it to me"; a collision costs a useless delivery, never a
lost one. Pure arithmetic: the map is any object whose bytes can be indexed.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from hashlib import blake2b
from typing import Protocol

from ipc.board import INTEREST_BITS
from ipc.topics import is_pattern, prefix_run, prefix_runs

_CACHED = 16384


class InterestKind(IntEnum):
    """What a text in the interest map is."""

    EXACT = 0
    """A topic without wildcards."""
    PREFIX = 1
    """What stands before a pattern's first wildcard, see :func:`ipc.topics.prefix_run`."""
    CONN = 2
    """A conn_id that is connected here."""
    CHANNEL = 3
    """The empty text: this process has a connection on the channel, so broadcasts concern it."""


def interest_in(pattern: str) -> tuple[InterestKind, str]:
    """What a subscription to a topic or pattern looks like in the map."""
    if is_pattern(pattern):
        return InterestKind.PREFIX, prefix_run(pattern)
    return InterestKind.EXACT, pattern


class Bits(Protocol):
    """Memory in which bits are looked up and set: the mapped board, or a bytearray in tests."""

    def __getitem__(self, index: int, /) -> int: ...
    def __setitem__(self, index: int, value: int, /) -> None: ...


Place = tuple[int, int]
"""Where a bit is in a map: (byte, mask)."""


def bucket(kind: int, channel: str, text: str) -> int:
    """The bit that stands for (kind, channel, text): 0 to 2^20 - 1, the same in every process.

    Texts that UTF-8 cannot express (lone surrogates) hash too; nothing is refused here.
    """
    name = channel.encode("utf-8", "surrogatepass")
    # The length in front keeps ("a", "bc") and ("ab", "c") apart.
    said = b"%d %d %b%b" % (kind, len(name), name, text.encode("utf-8", "surrogatepass"))
    return int.from_bytes(blake2b(said, digest_size=8).digest(), "big") % INTEREST_BITS


def place(kind: int, channel: str, text: str) -> Place:
    """The same as (byte, mask)."""
    number = bucket(kind, channel, text)
    return number >> 3, 1 << (number & 7)


def topic_places(channel: str, topic: str) -> tuple[Place, ...]:
    """Every bit whose owner may have a subscription that matches ``topic``: itself, and each of its prefixes."""
    prefixes = (place(InterestKind.PREFIX, channel, run) for run in prefix_runs(topic))
    return (place(InterestKind.EXACT, channel, topic), *dict.fromkeys(prefixes))


class PlaceCache:
    """Remembers places: hashing costs more than all the rest of finding a destination. Bounded."""

    def __init__(self, limit: int = _CACHED) -> None:
        self._limit = limit
        self._topics: dict[tuple[str, str], tuple[Place, ...]] = {}
        self._others: dict[tuple[int, str, str], Place] = {}

    def topic(self, channel: str, topic: str) -> tuple[Place, ...]:
        """As :func:`topic_places`."""
        key = (channel, topic)
        places = self._topics.get(key)
        if places is None:
            if len(self._topics) >= self._limit:
                self._topics.clear()
            places = self._topics[key] = topic_places(channel, topic)
        return places

    def other(self, kind: int, channel: str, text: str) -> Place:
        """As :func:`place`."""
        key = (kind, channel, text)
        found = self._others.get(key)
        if found is None:
            if len(self._others) >= self._limit:
                self._others.clear()
            found = self._others[key] = place(kind, channel, text)
        return found


class OwnInterest:
    """What this process wants, counted per bit, so that a bit is cleared with the last that needs it.

    Args:
        bits: where the map is.
        offset: where in ``bits`` it begins.
        changed: called after each bit that was set or cleared; it makes others look again.
    """

    def __init__(self, bits: Bits, offset: int, changed: Callable[[], None]) -> None:
        self._bits = bits
        self._offset = offset
        self._changed = changed
        self._counts: dict[int, int] = {}

    def add(self, kind: int, channel: str, text: str) -> None:
        """Want it (once more). When this returns, whoever publishes from now on sends it here."""
        number = bucket(kind, channel, text)
        count = self._counts.get(number, 0)
        self._counts[number] = count + 1
        if count == 0:
            self._bits[self._offset + (number >> 3)] |= 1 << (number & 7)
            self._changed()

    def discard(self, kind: int, channel: str, text: str) -> None:
        """Want it once less.

        Raises:
            ValueError: it was not wanted at all; somebody else's bit would have been cleared.
        """
        number = bucket(kind, channel, text)
        count = self._counts.get(number, 0)
        if count == 0:
            raise ValueError(f"interest {kind}, {channel!r}, {text!r} is discarded but was never added")
        if count > 1:
            self._counts[number] = count - 1
            return
        del self._counts[number]
        self._bits[self._offset + (number >> 3)] &= 0xFF ^ (1 << (number & 7))
        self._changed()

    def clear(self) -> None:
        """Want nothing any more."""
        for number in self._counts:
            self._bits[self._offset + (number >> 3)] &= 0xFF ^ (1 << (number & 7))
        self._counts.clear()
        self._changed()

    def __len__(self) -> int:
        """Bits that are set."""
        return len(self._counts)
