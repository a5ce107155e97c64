"""One write transaction of the store, seen from inside: what every change is made of.

Stands below ``store_upkeep.py`` and ``store_writer.py``; ``store_core.py`` holds the append lock, begins and ends. It
knows the host's last offset and the clock, removes entries from the log, and sweeps.

The entry that a new one pushes out of its window is not deleted at once, which would touch another page of the log
with each append: the new entry names it (``killed``), and at every 64th offset the transaction that reaches it deletes
what the last 64 have named. A process that was alone since then still knows; otherwise the entries are read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec

from ipc.store_records import (
    CHUNK,
    LOG,
    LOG_KILLED,
    LOG_TIME,
    STATE_KEY,
    ZERO,
    StoreState,
    is_tombstone,
    log_key,
    number,
    tombstone,
)
from ipc.store_window import unpack_offsets

if TYPE_CHECKING:
    from lmdb import Transaction

SWEEP_EVERY = 64


class Changes:
    """The changes of one transaction. One object per process, used for one transaction after the other."""

    def __init__(self) -> None:
        self.top = 0
        """The host's last offset, this transaction's appends included."""
        self.now = 0
        """The time of this transaction in milliseconds; never before that of the last entry."""
        self.added = 0
        """Bytes appended since the caller last set it to 0."""
        self.swept = False
        """A multiple of `SWEEP_EVERY` was reached: a good time to look at the space in use."""
        self.removed = 0
        """Bytes removed since the caller last set it to 0."""
        self._expected = -1
        self._last_time = 0
        # What the entries after `_known_since` have pushed out, and tombstones: to be deleted at the next sweep.
        self._known_since = 0
        self._killed: list[bytes] = []
        self._dead: list[bytes] = []
        self._state: StoreState | None = None
        self._log_put: Callable[..., bool] | None = None

    # The transaction -------------------------------------------------------------------------------------------

    def begin(self, txn: Transaction[bytes], txn_id: int, now: int) -> None:
        """Enter a transaction with this number. ``now``: milliseconds since 1970."""
        self.txn = txn
        self._get = txn.get
        self._put = txn.put
        self._delete = txn.delete
        self._state = None
        self._log_put = None
        # What the last transaction left is still true unless another process has written since.
        if self._expected != txn_id:
            self._look_up_top()
            self._known_since = self.top
            self._killed.clear()
            self._dead.clear()
        self._expected = -1
        # A clock that was set back must not disorder the log; one that was far ahead must not rule for ever.
        if now < self._last_time <= now + 3_600_000:
            now = self._last_time
        self.now = now
        self._time8 = now.to_bytes(8, "big")
        self._top_before = self.top

    def commit(self, txn_id: int) -> None:
        """Commit the transaction."""
        if self._state is not None:
            self._put(STATE_KEY, msgspec.msgpack.encode(self._state))
        self.txn.commit()
        # A transaction that changed nothing leaves its number to the next one, so only an append proves anything.
        if self.top != self._top_before:
            self._last_time = self.now
            self._expected = txn_id + 1

    def _open_log(self) -> Callable[..., bool]:
        self._log_put = put = self.txn.cursor().put
        return put

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
            self._state = msgspec.msgpack.decode(self._get(STATE_KEY, b""), type=StoreState)
        return self._state

    # The log ----------------------------------------------------------------------------------------------------

    def _first(self, prefix: bytes) -> tuple[bytes, bytes] | None:
        cursor = self.txn.cursor()
        if cursor.set_range(prefix) and cursor.key().startswith(prefix):
            return cursor.item()
        return None

    def _take_piece(self, ident: int) -> list[int]:
        found = self._first(CHUNK + ident.to_bytes(8, "big"))
        if found is None:
            return []
        self._delete(found[0])
        return list(unpack_offsets(found[1]))

    def _remove(self, offset: int) -> None:
        """Delete an entry from the log, and the one that it was to take along at the next sweep."""
        key = log_key(offset)
        value = self._get(key)
        if value is None:
            return
        self.removed += len(value) + 32
        if offset == self.top:
            self._put(key, tombstone(value))
            self._dead.append(key)
        else:
            self._delete(key)
        if value[LOG_KILLED] != ZERO:
            self._delete(LOG + value[LOG_KILLED])

    def _sweep(self, offset: int) -> None:
        """Delete what the last entries have pushed out of their windows, in order (neighbours share pages)."""
        self.swept = True
        if self._known_since >= offset - SWEEP_EVERY:
            self._read_killed(offset)
        for victim in sorted(self._killed):
            self._delete(LOG + victim)
        for key in self._dead:
            self._delete(key)
        self._known_since = offset - 1  # what may become of this entry will be known too
        self._killed.clear()
        self._dead.clear()

    def _read_killed(self, offset: int) -> None:
        """Find out what is to be swept where other processes have written too."""
        self._killed.clear()
        self._dead.clear()
        cursor = self.txn.cursor()
        # One more than 64: the entry at the last sweep may have become a tombstone since.
        if cursor.set_range(log_key(offset - SWEEP_EVERY)):
            for key, value in cursor.iternext():
                if value[LOG_KILLED] != ZERO:
                    self._killed.append(value[LOG_KILLED])
                if is_tombstone(value):
                    self._dead.append(key)
