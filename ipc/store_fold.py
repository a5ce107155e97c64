"""Appends that are in the log but not yet in their topics' records, and how they get there.

Stands between ``store_changes.py`` and ``store_upkeep.py``. A topic's record changes with each of its entries, and
writing it each time would double what an append costs. So an append writes the log alone; the records are written
(*folded*) for all entries since the last time, when these are `FOLD_EVERY`, by whoever comes then. ``b`` in the store
says up to which offset that was done. Whoever reads a record adds what the log has after that (``store_reader.py``).

For the link to the topic's previous entry a process remembers the topics it has met, and goes through what others
have appended in the meantime. What changes a record in another way folds first and raises the *generation*, upon which
all processes forget what they knew.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ipc.store_changes import Changes
from ipc.store_records import (
    CHUNK,
    DUE,
    FOLD_KEY,
    LOG_TIME,
    ZERO,
    Retention,
    lengths,
    log_key,
    split_name,
    topic_key,
    topic_name,
)
from ipc.store_window import Window

if TYPE_CHECKING:
    from lmdb import Transaction

FOLD_EVERY = 64
"""So many entries wait at most to be entered in their topics' records."""
TRIMS_AT_ONCE = 8
"""At most so many entries are trimmed for one append (more than one only after a rule has changed or time has gone)."""
_MARKS_PER_FOLD = 4
_TOPICS_KNOWN = 10_000

_from_bytes = int.from_bytes


class Head:
    """What a process knows of a topic: ``retention`` is None until the rule in its record was looked at."""

    __slots__ = ("key", "name", "previous", "retention")

    def __init__(self, channel: str, topic: str, previous: bytes) -> None:
        self.key = topic_key(channel, topic)
        first, second = channel.encode(), topic.encode()
        self.name = lengths(first, second, b"", b"") + first + second
        """What stands in a log entry between time and data, where there is neither info nor tags."""
        self.previous = previous
        self.retention: Retention | None = None


class Folding(Changes):
    """Entering what was appended in the records of the topics."""

    def __init__(self) -> None:
        super().__init__()
        self.folded = False
        """A fold was done since the caller last set it to False: a good time to look at the space in use."""
        self.pending: list[tuple[bytes, bytes]] = []
        """Key of the record and offset of what is not folded yet."""
        self._heads: dict[tuple[str, str], Head] = {}
        self._sure = 0
        """The host's last offset when `_heads` and `pending` were right."""
        self._failed = False
        self._expected = -1
        self._fold = (ZERO, 0)
        self._fold_written = self._fold
        self._top_before = 0
        self._log_put: Callable[..., bool] | None = None

    def begin(self, txn: Transaction[bytes], txn_id: int, now: int) -> None:
        """Enter a transaction with this number. ``now``: milliseconds since 1970."""
        self.txn = txn
        self._state = None
        self._log_put = None
        # What the last transaction left is still true unless another process has written since.
        if self._expected != txn_id or len(self._heads) > _TOPICS_KNOWN:
            self._catch_up()
        self._expected = -1
        self._failed = True  # until it is committed
        # A clock that was set back must not disorder the log; one that was far ahead must not rule for ever.
        if now < self._last_time <= now + 3_600_000:
            now = self._last_time
        self.now = now
        self._time8 = now.to_bytes(8, "big")
        self._top_before = self.top

    def commit(self, txn_id: int) -> None:
        """Commit the transaction."""
        if self._victims:
            self._write_mark()
        if self._fold is not self._fold_written:
            folded, generation = self._fold_written = self._fold
            self.txn.put(FOLD_KEY, folded + generation.to_bytes(8, "big"))
        if self._state is not None:
            self._write_state()
        self.txn.commit()
        self._failed = False
        self._sure = self.top
        # A transaction that changed nothing leaves its number to the next one, so only an append proves anything.
        if self.top != self._top_before:
            self._last_time = self.now
            self._expected = txn_id + 1

    def _catch_up(self) -> None:
        """Others may have written, or the last transaction of this process was undone."""
        self._look_up_top()
        self._victims.clear()
        written = self.txn.get(FOLD_KEY, bytes(16))
        folded, generation = written[:8], _from_bytes(written[8:], "big")
        start = _from_bytes(folded, "big")
        if (
            self._failed
            or generation != self._fold_written[1]
            or not start <= self._sure <= self.top
            or len(self._heads) > _TOPICS_KNOWN
        ):
            self._heads.clear()
            self.pending.clear()
        else:
            self.pending = [each for each in self.pending if each[1] > folded]
            start = self._sure
        self._fold = self._fold_written = (folded, generation)
        if start < self.top:
            self._read_appended(start)

    def _read_appended(self, start: int) -> None:
        cursor = self.txn.cursor()
        if cursor.set_range(log_key(start + 1)):
            for key, value in cursor.iternext():
                name = split_name(topic_name(value))
                head = self._heads.get(name)
                if head is None:
                    head = self._heads[name] = Head(*name, ZERO)
                head.previous = offset = key[1:]
                self.pending.append((head.key, offset))
                self._passed += len(value)

    def _new_generation(self) -> None:
        """A record was changed otherwise than by folding: what processes remember of topics may be wrong now."""
        self._heads.clear()
        self._fold = (self._fold[0], self._fold[1] + 1)

    def fold(self, limit: int = 0) -> None:
        """Enter what was appended in its topics' records; only the oldest ``limit`` if that is not 0."""
        if not self.pending:
            return
        part = self.pending[:limit] if limit else self.pending
        topics: dict[bytes, list[bytes]] = {}
        for key, offset in part:
            topics.setdefault(key, []).append(offset)
        for key, offsets in topics.items():
            self._fold_topic(key, b"".join(offsets))
        self._fold = (part[-1][1], self._fold[1])
        self.pending = self.pending[len(part) :]
        self.folded = True
        self.release(_MARKS_PER_FOLD)

    def _fold_topic(self, key: bytes, offsets: bytes) -> None:
        window = Window.decode(self.txn.get(key, b""))
        limit = TRIMS_AT_ONCE * (len(offsets) >> 3)
        if window.ttl_ms:
            self._trim_old(window, limit)
        pieces, gone = window.turn(offsets, limit, self._take_piece)
        if gone:
            self._let_go(gone)
        for piece in pieces:
            self.txn.put(CHUNK + window.ident.to_bytes(8, "big") + piece[:8], piece)
        self.txn.put(key, window.encode())

    def _trim_old(self, window: Window, limit: int) -> int:
        """Remove at most ``limit`` entries that are too old; returns how many. Keeps ``first_time`` true."""
        for done in range(limit):
            if not window.count or not window.ttl_ms or window.first_time + window.ttl_ms > self.now:
                return done
            value = self.txn.get(log_key(window.front(self._take_piece)))
            if value is not None:
                window.first_time = _from_bytes(value[LOG_TIME], "big")
                if window.first_time + window.ttl_ms > self.now:
                    return done
            self._let_go(window.pop(1, self._take_piece))
        return limit

    def _trim_a_few(self, window: Window) -> None:
        self._trim_old(window, TRIMS_AT_ONCE)

    def _schedule(self, key: bytes, window: Window) -> None:
        window.due = window.first_time + window.ttl_ms
        self.txn.put(DUE + window.due.to_bytes(8, "big") + window.ident.to_bytes(8, "big"), key)
