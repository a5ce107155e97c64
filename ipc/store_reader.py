"""Reading the store: what a client has missed, a page of history, what a worker must catch up with.

Stands below ``store.py``, beside the way of a message: live messages come over the bus, from here comes what somebody
missed. Everything is read in short transactions and copied out of them.

A recovery may have to look at many entries, so it is a generator that stops after every few hundred: the caller
goes on when its event loop has had a turn. Each piece is one transaction and as if a recovery began anew where the
last one ended, so nothing has to stand still in between.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import msgspec

from ipc.store_records import (
    EMPTY,
    LOG,
    LOG_TIME,
    STATE_KEY,
    TOPIC,
    Recovery,
    StoredEntry,
    StoreState,
    channel_key,
    is_tombstone,
    join_name,
    log_key,
    number,
    stored_entry,
    topic_key,
    topic_name,
)
from ipc.store_topic import completed, offsets_after, read_pending
from ipc.topics import is_pattern, matches, prefix_run

if TYPE_CHECKING:
    from lmdb import Transaction

STEP = 500
"""So many entries or topics are looked at in one transaction: about one millisecond."""

Begin = Callable[[], AbstractContextManager["Transaction[bytes]"]]
Steps = Generator[None, None, Recovery]


def read_state(txn: Transaction[bytes]) -> StoreState:
    """The store's state."""
    return msgspec.msgpack.decode(txn.get(STATE_KEY, b""), type=StoreState)


def read_top(txn: Transaction[bytes]) -> int:
    """The host's last offset; 0 when nothing was ever stored."""
    cursor = txn.cursor()
    return number(cursor.key()) if cursor.last() and cursor.key()[:1] == LOG else 0


# Recovery -------------------------------------------------------------------------------------------------------


class Scan:
    """One recovery under way: what was asked, and what was found so far."""

    def __init__(
        self, begin: Begin, channel: str, patterns: tuple[str, ...], now: int, limit_bytes: int, epoch: str
    ) -> None:
        self._begin = begin
        self._channel = channel
        self._channel_name = channel.encode()
        self._prefix = TOPIC + channel_key(channel) + b"\0"
        self._patterns = patterns
        self._now = now
        self._left = limit_bytes
        self._epoch = epoch
        self._entries: list[StoredEntry] = []
        self._top = 0
        self._wanted: dict[
            bytes, bytes | None
        ] = {}  # log entries' topics -> key of their record if they match
        self._last: dict[bytes, int] = {}  # key of a topic's record -> the last offset taken

    def steps(self, offset: int) -> Steps:
        """Recover what came after ``offset``."""
        with self._begin() as txn:
            self._top = read_top(txn)
            if not read_state(txn).floor <= offset <= self._top:
                return self._answer(False)
        topics: list[tuple[bytes, str]] | None
        if any(map(is_pattern, self._patterns)):
            distance = self._top - offset
            # Looking at a topic costs about as much as looking at two entries of the log.
            topics = None if distance <= STEP // 2 else (yield from self._topics(distance // 2))
        else:
            topics = [(topic_key(self._channel, topic), topic) for topic in dict.fromkeys(self._patterns)]
        if topics is None:
            complete = yield from self._scan_log(offset)
        else:
            complete = yield from self._scan_topics(topics, offset)
            self._entries.sort(key=lambda entry: entry.offset)
        with self._begin() as txn:
            # Memory of topics that were dropped meanwhile.
            complete = complete and read_state(txn).floor <= offset
        return self._answer(complete)

    def _answer(self, recovered: bool) -> Recovery:
        return Recovery(recovered, self._entries if recovered else (), self._top, self._epoch)

    def _take(self, offset: int, value: bytes) -> bool:
        """Add an entry to the answer; False when the answer would become too large."""
        self._entries.append(stored_entry(offset, value))
        self._left -= len(value)
        return self._left >= 0

    # Topic by topic: for exact topics, and for patterns that match few topics in a log that has gone far.

    def _topics(self, limit: int) -> Generator[None, None, list[tuple[bytes, str]] | None]:
        """The topics that match, or None when more than ``limit`` records would have to be looked at."""
        found: dict[bytes, str] = {}
        channel = self._prefix
        looked = 0
        for pattern in self._patterns:
            if not is_pattern(pattern):
                found[channel + pattern.encode()] = pattern
                continue
            run = prefix_run(pattern)
            if pattern == run + "#" and len(run) > 1:
                found[channel + run[:-1].encode()] = run[:-1]  # a/# matches a, which does not begin with a/
            prefix = key = channel + run.encode()
            while key:
                key = self._match_topics(pattern, prefix, key, len(channel), found)
                looked += STEP
                if looked > max(limit, STEP):
                    return None
                yield
        return list(found.items())

    def _match_topics(
        self, pattern: str, prefix: bytes, start: bytes, skip: int, found: dict[bytes, str]
    ) -> bytes:
        """Look at some records from ``start`` on; returns where to go on, or an empty key at the end."""
        with self._begin() as txn:
            cursor = txn.cursor()
            if not cursor.set_range(start):
                return b""
            for looked, key in enumerate(cursor.iternext(values=False)):
                if not key.startswith(prefix):
                    return b""
                if looked == STEP:
                    return key
                topic = key[skip:].decode()
                if matches(topic, pattern):
                    found[key] = topic
        return b""

    def _scan_topics(self, topics: list[tuple[bytes, str]], offset: int) -> Generator[None, None, bool]:
        place = 0
        after = offset
        while place < len(topics):
            todo = STEP
            with self._begin() as txn:
                pending = read_pending(txn)
                while place < len(topics) and todo > 0:
                    key, topic = topics[place]
                    waiting = pending.get(join_name(self._channel, topic), b"")
                    looked, more = self._scan_topic(txn, key, waiting, after, todo)
                    if looked < 0:
                        return False
                    todo -= looked + 1
                    after = more or offset
                    place += not more
            if todo <= 0:
                yield
        return True

    def _scan_topic(
        self, txn: Transaction[bytes], key: bytes, waiting: bytes, after: int, limit: int
    ) -> tuple[int, int]:
        """Take the entries of one topic; returns how many (-1: something is missing) and where to go on, or 0."""
        record = txn.get(key)
        if record is None or int.from_bytes((waiting or record)[-8:], "big") <= after:
            return 0, 0  # nothing new: what was trimmed is older still
        window = completed(txn, record, waiting)
        if window.trimmed > after:
            return -1, 0
        checked = not window.ttl_ms
        taken = 0
        for offset in offsets_after(txn, window, after):
            if offset > self._top:
                break
            value = txn.get(log_key(offset))
            if value is None or is_tombstone(value):
                return -1, 0
            if not checked and int.from_bytes(value[LOG_TIME], "big") + window.ttl_ms <= self._now:
                return -1, 0
            checked = True  # the others are younger
            if not self._take(offset, value):
                return -1, 0
            taken += 1
            if taken >= limit:
                return taken, offset
        return taken, 0

    # Along the log: for patterns, when the position is not far behind.

    def _scan_log(self, offset: int) -> Generator[None, None, bool]:
        """Take what matches from the log, then look for topics that match and have nothing left in it.

        An entry that was removed since ``offset`` shows in one of three ways: its topic's ``trimmed``, a later entry
        of the topic whose previous one was not met, or the record of a topic that is empty. So nothing is missed
        although each piece sees the store at another moment; the end is one where log and empty topics both are done.
        """
        after = checked = offset
        while True:
            with self._begin() as txn:
                self._top = read_top(txn)
                seen: dict[bytes, int] = {}
                more = self._scan_piece(txn, offset, after, seen)
                if more < 0 or not self._complete(txn, seen, after):
                    return False
                after = more or self._top
                if not more:
                    checked, done = self._check_empty(txn, checked)
                    if checked < 0 or done:
                        return done
            yield

    def _scan_piece(self, txn: Transaction[bytes], start: int, after: int, seen: dict[bytes, int]) -> int:
        """Look at some of the log after ``after``; returns where to go on, 0 at the end, -1 if something is missing.

        ``seen`` gets the topics that match and occur, each with the time of its first entry.
        """
        cursor = txn.cursor()
        if not cursor.set_range(log_key(after + 1)):
            return 0
        for looked, (key, value) in enumerate(cursor.iternext()):
            if looked == STEP:
                return number(key) - 1
            if is_tombstone(value):
                continue
            name = topic_name(value)
            record_key = self._record_key(name)
            if record_key is None:
                continue
            seen.setdefault(name, int.from_bytes(value[LOG_TIME], "big"))
            previous = int.from_bytes(value[:8], "big")
            if previous > start and previous != self._last.get(record_key):
                return -1
            self._last[record_key] = number(key)
            if not self._take(number(key), value):
                return -1
        return 0

    def _record_key(self, token: bytes) -> bytes | None:
        """The key of the record of a log entry's topic, None when it does not match."""
        try:
            return self._wanted[token]
        except KeyError:
            end = 3 + int.from_bytes(token[1:3], "big")
            wanted = token[3:end] == self._channel_name and matches(token[end:].decode(), self._patterns)
            key = self._wanted[token] = self._prefix + token[end:] if wanted else None
            return key

    def _complete(self, txn: Transaction[bytes], seen: dict[bytes, int], after: int) -> bool:
        """Nothing that came after ``after`` was removed from the topics, nor is too old (their first one's time)."""
        pending = read_pending(txn) if seen else {}
        for name, time in seen.items():
            record = txn.get(self._record_key(name) or b"")
            if record is None:
                return False
            window = completed(txn, record, pending.get(name, b""))
            if window.trimmed > after or (window.ttl_ms and time + window.ttl_ms <= self._now):
                return False
        return True

    def _check_empty(self, txn: Transaction[bytes], checked: int) -> tuple[int, bool]:
        """Look at some topics that are empty; returns how far (-1: one has lost an entry) and whether that is all."""
        cursor = txn.cursor()
        if not cursor.set_range(EMPTY + (checked + 1).to_bytes(8, "big")):
            return checked, True
        for looked, (key, value) in enumerate(cursor.iternext()):
            if key[:1] != EMPTY:
                break
            if looked == STEP:
                return checked, False
            checked = number(key)
            key = value[8:]
            if (
                key.startswith(self._prefix)
                and self._last.get(key) != checked
                and matches(key[len(self._prefix) :].decode(), self._patterns)
            ):
                return -1, False
        return checked, True
