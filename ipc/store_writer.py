"""What happens inside one write transaction of the store: append, trim, expire, evict, clear.

Stands below ``store.py``, which holds the append lock, begins and commits. The usual append is one read and two writes
of LMDB and unpacks nothing; everything else (first entry, age, long windows, another rule) takes the long way through
:class:`ipc.store_window.Window`.

The entry that a new one pushes out of its window is not deleted at once, which would touch another page of the log
with each append: the new entry names it (``killed``), and at every 64th offset the transaction that reaches it deletes
what the last 64 have named (`_sweep`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from ipc.store_records import (
    CHUNK,
    DUE,
    EMPTY,
    GARBAGE,
    IDEMPOTENCY_MS,
    IDEMPOTENT_ORDER,
    LOG,
    LOG_KILLED,
    LOG_TIME,
    STATE_KEY,
    TOPIC,
    ZERO,
    Entry,
    EntryTooLarge,
    Position,
    Retention,
    StoreState,
    channel_key,
    idempotency_key,
    is_tombstone,
    lengths,
    log_key,
    number,
    split_name,
    tombstone,
    topic_key,
    topic_name,
)
from ipc.store_window import (
    FIRST_TIME,
    FULL_INLINE,
    IN_HEAD,
    INLINE,
    OFFSETS,
    PIECE,
    PIECES,
    PREFIX,
    TRIMMED,
    Window,
    pack_offsets,
    unpack_offsets,
)

if TYPE_CHECKING:
    from lmdb import Transaction

SWEEP_EVERY = 64
TRIMS_AT_ONCE = 8
"""At most so many entries are trimmed by one append (more than one only after a rule has changed or time has gone)."""
METADATA_MS = 7 * 86_400_000
"""How long an empty topic is remembered; then its record goes and the floor rises."""

_from_bytes = int.from_bytes


class Writer:
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
        self.max_entry = 1 << 30
        """The largest entry, in bytes."""
        self._lengths: dict[tuple[str, int], bytes] = {}
        self._channels: dict[str, tuple[bytes, bytes]] = {}
        self._expected = -1
        self._last_time = 0
        self._state: StoreState | None = None

    # The transaction -------------------------------------------------------------------------------------------

    def begin(self, txn: Transaction[bytes], txn_id: int, now: int) -> None:
        """Enter a transaction with this number. ``now``: milliseconds since 1970."""
        self.txn = txn
        self._get = txn.get
        self._put = txn.put
        self._delete = txn.delete
        self._state = None
        # What the last transaction left is still true unless another process has written since.
        if self._expected != txn_id:
            self._look_up_top()
        self._expected = -1
        # A clock that was set back must not disorder the log; one that was far ahead must not rule for ever.
        if now < self._last_time <= now + 3_600_000:
            now = self._last_time
        self.now = now
        self._time8 = now.to_bytes(8, "big")
        self._top_before = self.top

    def finish(self) -> None:
        """Write what is written once per transaction; the caller commits next, then calls :meth:`committed`."""
        if self._state is not None:
            self._put(STATE_KEY, msgspec.msgpack.encode(self._state))

    def committed(self, txn_id: int) -> None:
        """The transaction is in force."""
        # A transaction that changed nothing leaves its number to the next one, so only an append proves anything.
        if self.top != self._top_before:
            self._last_time = self.now
            self._expected = txn_id + 1

    def _look_up_top(self) -> None:
        cursor = self.txn.cursor()
        if cursor.last() and cursor.key()[:1] == LOG:
            self.top = number(cursor.key())
            self._last_time = _from_bytes(cursor.value()[LOG_TIME], "big")
        else:
            self.top = self._last_time = 0

    @property
    def state(self) -> StoreState:
        """The store's state, to be changed in place; it is written at the end of the transaction."""
        if self._state is None:
            self._state = msgspec.msgpack.decode(self._get(STATE_KEY, b""), type=StoreState)
        return self._state

    # Append ----------------------------------------------------------------------------------------------------

    def append(self, entry: Entry) -> Position:
        """Store one entry under the next offset of the host and trim its topic."""
        topic = entry.topic.encode()
        prefix, channel = self._channels.get(entry.channel) or self._channel(entry.channel)
        key = prefix + topic
        if entry.idempotency_key:
            known = self._known(key, entry.idempotency_key)
            if known is not None:
                return known
        self.top = offset = self.top + 1
        packed = offset.to_bytes(8, "big")
        retention = entry.retention
        record = self._get(key)
        killed = ZERO
        # The usual case: the same rule as last time, the window not empty, in one piece, and nothing in it too old.
        if (
            record is not None
            and record[:PREFIX] == retention.prefix
            and len(record) > OFFSETS
            and (not retention.ttl_ms or _from_bytes(record[FIRST_TIME], "big") + retention.ttl_ms > self.now)
        ):
            previous = record[-8:]
            size = len(record)
            free = retention.size - ((size - OFFSETS) >> 3)
            if free > 0 and size < FULL_INLINE:
                record += packed
            elif not free:
                killed = record[OFFSETS : OFFSETS + 8]
                record = record[:TRIMMED] + record[OFFSETS:] + packed
            else:
                record = self._append_other(key, record, entry, offset)
        elif record is not None:
            previous = record[-8:]
            record, killed = self._append_long(record, retention, packed) or (
                self._append_other(key, record, entry, offset),
                ZERO,
            )
        else:
            previous = ZERO
            record = self._append_other(key, None, entry, offset)
        self._put(key, record)
        info, tags = entry.info, entry.tags
        if info or tags:
            sizes = lengths(channel, topic, info, tags)
        else:
            sizes = self._lengths.get((entry.channel, len(topic))) or self._sizes(
                entry.channel, channel, topic
            )
        value = b"".join((previous, self._time8, killed, sizes, channel, topic, info, tags, entry.data))
        if len(value) > self.max_entry:
            raise EntryTooLarge(
                f"a message of {len(value)} bytes does not fit: the store takes {self.max_entry} at most"
            )
        self._put(LOG + packed, value)
        self.added += len(value)
        if entry.idempotency_key:
            self._remember(key, entry.idempotency_key, packed, previous)
        if not offset % SWEEP_EVERY:
            self._sweep(offset)
        return Position(offset, _from_bytes(previous, "big"))

    def _append_long(self, record: bytes, retention: Retention, packed: bytes) -> tuple[bytes, bytes] | None:
        """The usual case of a window in pieces: the new record and what was pushed out, or None if it is not so."""
        if record[:PREFIX] != retention.long_prefix or (
            retention.ttl_ms and _from_bytes(record[FIRST_TIME], "big") + retention.ttl_ms <= self.now
        ):
            return None
        in_head = _from_bytes(record[IN_HEAD], "big")
        in_record = (len(record) - OFFSETS) >> 3
        free = retention.size - in_record - PIECE * _from_bytes(record[PIECES], "big")
        if in_record - in_head >= INLINE:
            return None
        if free > 0:
            return record + packed, ZERO
        if free or in_head < 2:
            return None
        fewer = (in_head - 1).to_bytes(4, "big")
        shorter = b"".join((record[: IN_HEAD.start], fewer, record[PIECES], record[OFFSETS:], packed))
        return shorter, record[OFFSETS : OFFSETS + 8]

    def _append_other(self, key: bytes, record: bytes | None, entry: Entry, offset: int) -> bytes:
        """The new record of a topic in every case that is not a usual one."""
        if record is None:
            window = Window(offset)
        else:
            window = Window.decode(record)
            if not window.count:
                self._delete(EMPTY + record[TRIMMED:OFFSETS])
        removed = self._trim_old(
            window, TRIMS_AT_ONCE
        )  # by the old rule: a new one must not bring back anything
        window.apply(entry.retention)
        removed += self._trim_old(window, TRIMS_AT_ONCE)
        while window.count >= window.size and removed < TRIMS_AT_ONCE:
            self._remove(window.pop(self._take_piece))
            removed += 1
        if not window.count:
            window.first_time = self.now
        window.ident = window.ident or offset
        piece = window.push(offset)
        if piece:
            self._put(
                CHUNK + window.ident.to_bytes(8, "big") + piece[0].to_bytes(8, "big"), pack_offsets(piece)
            )
        if window.ttl_ms and not window.due:
            self._schedule(key, window)
        return window.encode()

    def _channel(self, channel: str) -> tuple[bytes, bytes]:
        if len(self._channels) >= 1024:
            self._channels.clear()
            self._lengths.clear()
        found = self._channels[channel] = (TOPIC + channel_key(channel) + b"\0", channel.encode())
        return found

    def _sizes(self, name: str, channel: bytes, topic: bytes) -> bytes:
        found = self._lengths[name, len(topic)] = lengths(channel, topic, b"", b"")
        return found

    def _sweep(self, offset: int) -> None:
        """Delete what the last entries have pushed out of their windows, in order (neighbours share pages)."""
        self.swept = True
        cursor = self.txn.cursor()
        killed = []
        dead = []
        # One more than 64: the entry at the last sweep may have become a tombstone since.
        if cursor.set_range(log_key(offset - SWEEP_EVERY)):
            for key, value in cursor.iternext():
                if value[LOG_KILLED] != ZERO:
                    killed.append(value[LOG_KILLED])
                if value[24]:
                    dead.append(key)
        for victim in sorted(killed):
            self._delete(LOG + victim)
        for key in dead:
            self._delete(key)

    # Idempotency -----------------------------------------------------------------------------------------------

    def _known(self, key: bytes, client_key: str) -> Position | None:
        value = self._get(idempotency_key(key, client_key))
        if value is None:
            return None
        offset, previous, time = unpack_offsets(value)
        return Position(offset, previous, True) if time + IDEMPOTENCY_MS > self.now else None

    def _remember(self, key: bytes, client_key: str, offset: bytes, previous: bytes) -> None:
        digest = idempotency_key(key, client_key)
        self._put(digest, offset + previous + self._time8)
        self._put(IDEMPOTENT_ORDER + offset, self._time8 + digest)
        self.forget_keys(2)

    def forget_keys(self, limit: int, *, early: bool = False) -> int:
        """Forget idempotency keys that have expired (``early``: also younger ones), the oldest first."""
        for done in range(limit):
            found = self._first(IDEMPOTENT_ORDER)
            if found is None or (not early and _from_bytes(found[1][:8], "big") + IDEMPOTENCY_MS > self.now):
                return done
            key, value = found
            self._delete(key)
            remembered = self._get(value[8:])
            if remembered is not None and remembered[:8] == key[1:]:  # it was not used again since
                self._delete(value[8:])
        return limit

    # Removing --------------------------------------------------------------------------------------------------

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
        else:
            self._delete(key)
        if value[LOG_KILLED] != ZERO:
            self._delete(LOG + value[LOG_KILLED])

    def _trim_old(self, window: Window, limit: int) -> int:
        """Remove at most ``limit`` entries that are too old; returns how many. Keeps ``first_time`` true."""
        for done in range(limit):
            if not window.count or not window.ttl_ms or window.first_time + window.ttl_ms > self.now:
                return done
            value = self._get(log_key(window.front(self._take_piece)))
            if value is not None:
                window.first_time = _from_bytes(value[LOG_TIME], "big")
                if window.first_time + window.ttl_ms > self.now:
                    return done
            self._remove(window.pop(self._take_piece))
        return limit

    def _emptied(self, key: bytes, window: Window) -> None:
        self._put(EMPTY + window.trimmed.to_bytes(8, "big"), self._time8 + key)

    def _schedule(self, key: bytes, window: Window) -> None:
        window.due = window.first_time + window.ttl_ms
        self._put(DUE + window.due.to_bytes(8, "big") + window.ident.to_bytes(8, "big"), key)

    def expire(self, limit: int) -> int:
        """Trim idle topics by age, drop what was long empty; at most about ``limit`` removals. Returns how many."""
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
        done += self.forget_keys(max(0, limit - done))
        return done + self._collect_garbage(max(0, limit - done))

    def _expire_topic(self, due_key: bytes, key: bytes, limit: int) -> int:
        record = self._get(key)
        window = None if record is None else Window.decode(record)
        if window is None or window.due != number(due_key):
            self._delete(due_key)
            return 0
        had = window.count
        removed = self._trim_old(window, limit)
        if removed < limit or not window.count:
            self._delete(due_key)
            window.due = 0
            if window.count and window.ttl_ms:
                self._schedule(key, window)
            elif had and not window.count:
                self._emptied(key, window)
        self._put(key, window.encode())
        return removed

    def _drop_topic(self, empty_key: bytes, value: bytes) -> None:
        """Forget an empty topic: from now on only the floor knows that something was removed from it."""
        self._delete(empty_key)
        self._delete(value[8:])
        self.removed += 2 * len(value) + 64
        self.state.floor = max(self.state.floor, number(empty_key))

    def clear(self, channel: str, topic: str) -> int:
        """Remove all entries of a topic; returns how many there were."""
        key = topic_key(channel, topic)
        record = self._get(key)
        if record is None or len(record) <= OFFSETS:
            return 0
        window = Window.decode(record)
        count = window.count
        if window.pieces:
            self._put(GARBAGE + window.ident.to_bytes(8, "big"), b"")
        for offset in window.head + window.tail:
            self._remove(offset)
        window.trimmed = window.top
        window.head, window.tail, window.pieces, window.ident = [], [], 0, 0
        self._emptied(key, window)
        self._put(key, window.encode())
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
                self._delete(found[0])
            for offset in offsets:
                self._remove(offset)
            done += len(offsets) + 1
        return done

    # Making room -----------------------------------------------------------------------------------------------

    def evict(self, wanted: int, limit: int) -> int:
        """Remove the oldest, whatever it is, until about ``wanted`` bytes are free; at most ``limit`` things.

        Returns the bytes that were removed, 0 when nothing is left that may go.
        """
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
            self._delete(key)
            return True
        self._evict_entry(number(key), value)
        return True

    def _evict_entry(self, offset: int, value: bytes) -> None:
        key = topic_key(*split_name(topic_name(value)))
        record = self._get(key)
        window = None if record is None else Window.decode(record)
        if window is not None and window.count:
            if window.front(self._take_piece) == offset:
                window.pop(self._take_piece)
                self.state.evicted += 1
                if not window.count:
                    self._emptied(key, window)
            self._put(
                key, window.encode()
            )  # even when nothing was popped: looking at the front may move a piece
        self._remove(offset)
