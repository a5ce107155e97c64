"""Reading one topic: its record, what the log has after it, and the offsets of its history.

Stands below ``store_reader.py`` and ``store.py``. The record of a topic lags behind the log by up to a few dozen
entries (``store_fold.py``): whoever reads it adds those, and goes by the size of the window as if they were in it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from itertools import islice, takewhile
from typing import TYPE_CHECKING

from ipc.store_records import (
    CHUNK,
    FOLD_KEY,
    LOG_TIME,
    ZERO,
    StoredEntry,
    is_tombstone,
    join_name,
    log_key,
    stored_entry,
    topic_key,
    topic_name,
)
from ipc.store_window import Window, unpack_offsets

if TYPE_CHECKING:
    from lmdb import Transaction

Pending = dict[bytes, bytes]
"""Offsets, eight bytes each, by :func:`topic_name`."""


def read_pending(txn: Transaction[bytes]) -> Pending:
    """What is in the log and not yet in the topics' records: offsets as bytes, by :func:`topic_name`."""
    found: dict[bytes, bytes] = {}
    cursor = txn.cursor()
    if cursor.set_range(log_key(int.from_bytes(txn.get(FOLD_KEY, ZERO)[:8], "big") + 1)):
        for key, value in cursor.iternext():
            name = topic_name(value)
            found[name] = found.get(name, b"") + key[1:]
    return found


def completed(txn: Transaction[bytes], record: bytes, pending: bytes) -> Window:
    """A topic's window with what is not yet in its record. It may be read, not changed: what it has too much is in it
    still, behind ``trimmed``."""
    window = Window.decode(record)
    window.tail += pending
    excess = window.count - window.size
    if excess > 0:
        window.trimmed = next(islice(offsets_after(txn, window, 0), excess - 1, None), window.trimmed)
    return window


def read_window(txn: Transaction[bytes], channel: str, topic: str) -> Window | None:
    """The window of a topic."""
    record = txn.get(topic_key(channel, topic))
    if record is None:
        return None
    return completed(txn, record, read_pending(txn).get(join_name(channel, topic), b""))


def read_entry(txn: Transaction[bytes], offset: int) -> StoredEntry | None:
    """The entry at an offset, if the store still has it."""
    value = txn.get(log_key(offset))
    return None if value is None or is_tombstone(value) else stored_entry(offset, value)


def offsets_after(txn: Transaction[bytes], window: Window, offset: int) -> Iterator[int]:
    """The offsets in a window that are greater than ``offset``, the oldest first."""
    offset = max(offset, window.trimmed)
    if window.head:
        head = unpack_offsets(window.head)
        yield from head[bisect_right(head, offset) :]
    tail = unpack_offsets(window.tail)
    if window.pieces and (not tail or offset < tail[0]):
        prefix = CHUNK + window.ident.to_bytes(8, "big")
        cursor = txn.cursor()
        # The piece before the first that begins after the offset may hold it.
        found = cursor.set_range(prefix + (offset + 1).to_bytes(8, "big"))
        if (cursor.prev() if found else cursor.last()) and not cursor.key().startswith(prefix):
            cursor.next()
        for key, piece in cursor.iternext():
            if not key.startswith(prefix):
                break
            offsets = unpack_offsets(piece)
            yield from offsets[bisect_right(offsets, offset) :]
    yield from tail[bisect_right(tail, offset) :]


def offsets_before(txn: Transaction[bytes], window: Window, offset: int) -> Iterator[int]:
    """The offsets in a window that are less than ``offset``, the newest first."""
    return takewhile(lambda each: each > window.trimmed, _all_before(txn, window, offset))


def _all_before(txn: Transaction[bytes], window: Window, offset: int) -> Iterator[int]:
    yield from (each for each in reversed(unpack_offsets(window.tail)) if each < offset)
    if window.pieces:
        prefix = CHUNK + window.ident.to_bytes(8, "big")
        cursor = txn.cursor()
        found = cursor.set_range(prefix + offset.to_bytes(8, "big"))
        if cursor.prev() if found else cursor.last():
            for key, piece in cursor.iterprev():
                if not key.startswith(prefix):
                    break
                yield from (each for each in reversed(unpack_offsets(piece)) if each < offset)
    yield from (each for each in reversed(unpack_offsets(window.head)) if each < offset)


def first_fresh(txn: Transaction[bytes], window: Window, now: int) -> int:
    """The oldest offset of a window that is not too old; what comes before counts as trimmed."""
    if not window.ttl_ms or window.first_time + window.ttl_ms > now:
        return window.trimmed + 1
    for offset in offsets_after(txn, window, window.trimmed):
        value = txn.get(log_key(offset))
        if value is not None and int.from_bytes(value[LOG_TIME], "big") + window.ttl_ms > now:
            return offset
    return window.top + 1


def history_offsets(
    txn: Transaction[bytes], window: Window, now: int, since: int | None, reverse: bool
) -> Iterator[int]:
    """The offsets of a topic's history after (``reverse``: before, newest first) ``since``, without the too old."""
    fresh = first_fresh(txn, window, now)
    if not reverse:
        yield from offsets_after(txn, window, max(since or 0, fresh - 1))
        return
    for offset in offsets_before(txn, window, window.top + 1 if since is None else since):
        if offset < fresh:
            return
        yield offset
