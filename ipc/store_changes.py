"""One write transaction of the store, seen from inside: what every change is made of.

Stands below ``store_fold.py``; ``store_core.py`` holds the append lock, begins and ends. It knows the host's last
offset and the clock, and removes entries from the log.

What leaves a window is not deleted at once. A worker that the bus has not told of an entry reads it from the log, and
with a window of one entry it would be gone with the next message: so what was pushed out stays for `GRACE_MS`, for
workers that catch up and nobody else (recovery and history go by the windows), unless it takes more than an eighth of
the store. A *mark* lists what a transaction has pushed out; deleting dozens at once is cheaper, too.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import msgspec

from ipc.store_records import (
    CHUNK,
    GRACE,
    LOG,
    LOG_TIME,
    STATE_KEY,
    StoreState,
    log_key,
    number,
    tombstone,
)

if TYPE_CHECKING:
    from lmdb import Transaction

GRACE_MS = 5_000
"""How long an entry stays readable for workers that catch up after it has left its topic's window, in milliseconds."""
GRACE_SHARE = 8
"""What stays that long takes at most this part of the store."""

_MARK = struct.Struct(">QQ")  # time, bytes of the log when it was written, counted from anywhere


class Changes:
    """The changes of one transaction. One object per process, used for one transaction after the other."""

    txn: Transaction[bytes]

    def __init__(self) -> None:
        self.top = 0
        """The host's last offset, this transaction's appends included."""
        self.now = 0
        """The time of this transaction in milliseconds; never before that of the last entry."""
        self.added = 0
        """Bytes appended since the caller last set it to 0."""
        self.removed = 0
        """Bytes removed since the caller last set it to 0."""
        self.max_grace = 1 << 30
        """The most bytes of what has left its window and is still there."""
        self._victims: list[bytes] = []
        """Offsets to be deleted from the log when their grace is over."""
        self._passed = 0
        """Bytes that went into the log since the last mark."""
        self._last_time = 0
        self._time8 = b""
        self._state: StoreState | None = None

    def _look_up_top(self) -> None:
        cursor = self.txn.cursor()
        if cursor.last() and cursor.key()[:1] == LOG:
            self.top = number(cursor.key())
            self._last_time = int.from_bytes(cursor.value()[LOG_TIME], "big")
        else:
            self.top = self._last_time = 0

    @property
    def state(self) -> StoreState:
        """The store's state, to be changed in place; it is written at the end of the transaction."""
        if self._state is None:
            self._state = msgspec.msgpack.decode(self.txn.get(STATE_KEY, b""), type=StoreState)
        return self._state

    def _write_state(self) -> None:
        if self._state is not None:
            self.txn.put(STATE_KEY, msgspec.msgpack.encode(self._state))

    # The log ----------------------------------------------------------------------------------------------------

    def _first(self, prefix: bytes) -> tuple[bytes, bytes] | None:
        cursor = self.txn.cursor()
        if cursor.set_range(prefix) and cursor.key().startswith(prefix):
            return cursor.item()
        return None

    def _take_piece(self, ident: int) -> bytes:
        found = self._first(CHUNK + ident.to_bytes(8, "big"))
        if found is None:
            return b""
        self.txn.delete(found[0])
        return found[1]

    def _remove(self, offset: int) -> None:
        """Delete an entry from the log now."""
        key = log_key(offset)
        value = self.txn.get(key)
        if value is None:
            return
        self.removed += len(value) + 32
        if offset == self.top:
            self.txn.put(key, tombstone(value))
            self._victims.append(key[1:])
        else:
            self.txn.delete(key)

    def _let_go(self, offsets: bytes) -> None:
        """Delete entries from the log when their grace is over."""
        self._victims += [offsets[place : place + 8] for place in range(0, len(offsets), 8)]

    # Grace ------------------------------------------------------------------------------------------------------

    def _last_mark(self) -> tuple[bytes, bytes] | None:
        cursor = self.txn.cursor()
        after = bytes((GRACE[0] + 1,))
        found = cursor.prev() if cursor.set_range(after) else cursor.last()
        return cursor.item() if found and cursor.key()[:1] == GRACE else None

    def _write_mark(self) -> None:
        """Note what this transaction has pushed out."""
        last = self._last_mark()
        passed = self._passed + (_MARK.unpack_from(last[1])[1] if last is not None else 0)
        self._passed = 0
        key = GRACE + self.top.to_bytes(8, "big")
        offsets = b"".join(sorted(self._victims))
        self._victims.clear()
        if last is not None and last[0] == key:
            offsets = last[1][_MARK.size :] + offsets
        self.txn.put(key, _MARK.pack(self.now, passed) + offsets)

    def release(self, limit: int) -> int:
        """Delete what has had its grace, at most so many marks; returns how many entries that were."""
        done = 0
        last = self._last_mark()
        passed = _MARK.unpack_from(last[1])[1] if last is not None else 0
        for _ in range(limit):
            found = self._first(GRACE)
            if found is None:
                break
            key, value = found
            time, before = _MARK.unpack_from(value)
            if abs(self.now - time) < GRACE_MS and passed - before <= self.max_grace:
                break
            if number(key) == self.top:
                return done + self._release_last(key, value)
            for place in range(_MARK.size, len(value), 8):
                self.txn.delete(LOG + value[place : place + 8])
            self.txn.delete(key)
            done += (len(value) - _MARK.size) // 8
        return done

    def _release_last(self, key: bytes, value: bytes) -> int:
        """Delete what the newest mark lists. The log's last entry, if among them, holds the sequence's place."""
        last = key[1:]
        done = 0
        for place in range(_MARK.size, len(value), 8):
            victim = value[place : place + 8]
            if victim != last:
                done += self.txn.delete(LOG + victim)
            else:
                self.txn.put(LOG + last, tombstone(self.txn.get(LOG + last, b"")))
        if value[-8:] == last:
            self.txn.put(key, value[: _MARK.size] + last)
        else:
            self.txn.delete(key)
        return done
