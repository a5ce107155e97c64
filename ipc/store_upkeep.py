"""What leaves the store: the too old, the cleared, the forgotten, and the oldest when it is full.

Stands between ``store_fold.py`` and ``store_writer.py``, off the way of a message. Everything is done in small
pieces, because whoever does it is a worker with clients.
"""

from __future__ import annotations

from ipc.store_fold import Folding
from ipc.store_records import (
    DUE,
    EMPTY,
    GARBAGE,
    IDEMPOTENCY_MS,
    IDEMPOTENT_ORDER,
    LOG,
    is_tombstone,
    number,
    split_name,
    topic_key,
    topic_name,
)
from ipc.store_window import OFFSETS, Window, unpack_offsets

METADATA_MS = 7 * 86_400_000
"""How long an empty topic is remembered; then its record goes and the floor rises."""

_from_bytes = int.from_bytes


class Upkeep(Folding):
    """Trimming by age, clearing, forgetting, evicting."""

    # By age ----------------------------------------------------------------------------------------------------

    def _emptied(self, key: bytes, window: Window) -> None:
        self._new_generation()
        self.txn.put(EMPTY + window.trimmed.to_bytes(8, "big"), self._time8 + key)

    def expire(self, limit: int) -> int:
        """Trim idle topics by age, drop what was long empty; at most about ``limit`` removals. Returns how many.

        Folds, too: what is idle is in order.
        """
        self.fold()
        done = 0
        while done < limit:
            found = self._first(DUE)
            if found is None or number(found[0]) > self.now:
                break
            done += self._expire_topic(*found, limit - done) + 1
        while done < limit:
            found = self._first(EMPTY)
            if found is None or _from_bytes(found[1][:8], "big") + METADATA_MS > self.now:
                break
            self._drop_topic(*found)
            done += 1
        done += self.release(max(0, limit - done) // 8 + 1)
        done += self.forget_keys(max(0, limit - done))
        return done + self._collect_garbage(max(0, limit - done))

    def _expire_topic(self, due_key: bytes, key: bytes, limit: int) -> int:
        record = self.txn.get(key)
        window = None if record is None else Window.decode(record)
        if window is None or window.due != number(due_key):
            self.txn.delete(due_key)
            return 0
        had = window.count
        removed = self._trim_old(window, limit)
        if removed < limit or not window.count:
            self.txn.delete(due_key)
            window.due = 0
            if window.count and window.ttl_ms:
                self._schedule(key, window)
            elif had and not window.count:
                self._emptied(key, window)
        self.txn.put(key, window.encode())
        return removed

    def _drop_topic(self, empty_key: bytes, value: bytes) -> None:
        """Forget an empty topic: from now on only the floor knows that something was removed from it."""
        self.txn.delete(empty_key)
        self.txn.delete(value[8:])
        self._new_generation()
        self.removed += 2 * len(value) + 64
        self.state.floor = max(self.state.floor, number(empty_key))

    def forget_keys(self, limit: int, *, early: bool = False) -> int:
        """Forget idempotency keys that have expired (``early``: also younger ones), the oldest first."""
        for done in range(limit):
            found = self._first(IDEMPOTENT_ORDER)
            if found is None or (not early and _from_bytes(found[1][:8], "big") + IDEMPOTENCY_MS > self.now):
                return done
            key, value = found
            self.txn.delete(key)
            remembered = self.txn.get(value[8:])
            if remembered is not None and remembered[:8] == key[1:]:  # it was not used again since
                self.txn.delete(value[8:])
        return limit

    # On demand -------------------------------------------------------------------------------------------------

    def clear(self, channel: str, topic: str) -> int:
        """Remove all entries of a topic; returns how many there were."""
        self.fold()
        key = topic_key(channel, topic)
        record = self.txn.get(key)
        if record is None or len(record) <= OFFSETS:
            return 0
        window = Window.decode(record)
        count = window.count
        if window.pieces:
            self.txn.put(GARBAGE + window.ident.to_bytes(8, "big"), b"")
        for offset in unpack_offsets(window.head + window.tail):
            self._remove(offset)
        window.trimmed = window.top
        window.head, window.tail, window.pieces, window.ident = b"", b"", 0, 0
        self._emptied(key, window)
        self.txn.put(key, window.encode())
        return count

    def _collect_garbage(self, limit: int) -> int:
        """Delete pieces of long windows that were cleared, with their entries."""
        done = 0
        while done < limit:
            found = self._first(GARBAGE)
            if found is None:
                break
            offsets = self._take_piece(number(found[0]))
            if not offsets:
                self.txn.delete(found[0])
            for offset in unpack_offsets(offsets):
                self._remove(offset)
            done += len(offsets) // 8 + 1
        return done

    # Making room -----------------------------------------------------------------------------------------------

    def evict(self, wanted: int, limit: int) -> int:
        """Remove the oldest, whatever it is, until about ``wanted`` bytes are free; at most ``limit`` things.

        Returns the bytes that were removed, 0 when nothing is left that may go.
        """
        self.fold()
        self.removed = 0
        for _ in range(limit):
            oldest = min(
                (found for prefix in (LOG, EMPTY, IDEMPOTENT_ORDER) if (found := self._first(prefix))),
                key=lambda found: found[0][1:9],
                default=None,
            )
            if oldest is None or not self._evict(*oldest) or self.removed >= wanted:
                break
        return self.removed

    def _evict(self, key: bytes, value: bytes) -> bool:
        kind = key[:1]
        if kind == EMPTY:
            self._drop_topic(key, value)
            return True
        if kind == IDEMPOTENT_ORDER:
            self.removed += 128
            return self.forget_keys(1, early=True) > 0
        if is_tombstone(value):
            if number(key) == self.top:
                return False
            self.txn.delete(key)
            return True
        self._evict_entry(number(key), value)
        return True

    def _evict_entry(self, offset: int, value: bytes) -> None:
        key = topic_key(*split_name(topic_name(value)))
        record = self.txn.get(key)
        window = None if record is None else Window.decode(record)
        if window is not None and window.count:
            if window.front(self._take_piece) == offset:
                window.pop(1, self._take_piece)
                self.state.evicted += 1
                if not window.count:
                    self._emptied(key, window)
            self.txn.put(
                key, window.encode()
            )  # even when nothing was popped: looking at the front may move a piece
        self._remove(offset)
