"""Appending to the store: the next offset of the host, and the link to the topic's last one.

Stands below ``store.py``, on the way of a message whose topic has history. The usual append is one write of LMDB, at
the end of the log; the topic's record follows later (``store_fold.py``).
"""

from __future__ import annotations

from lmdb import MapFullError

from ipc.store_fold import Head
from ipc.store_records import (
    EMPTY,
    IDEMPOTENCY_MS,
    IDEMPOTENT_ORDER,
    LOG,
    ZERO,
    Entry,
    EntryTooLarge,
    Position,
    Retention,
    idempotency_key,
    lengths,
)
from ipc.store_upkeep import Upkeep
from ipc.store_window import OFFSETS, RULE_END, TRIMMED, Window, unpack_offsets

_from_bytes = int.from_bytes


class Cramped(MapFullError):
    """What is left in the store's file is kept for deleting."""


class Writer(Upkeep):
    """Everything that can be done to the store inside a transaction."""

    def __init__(self) -> None:
        super().__init__()
        self.max_entry = 1 << 30
        """The largest entry, in bytes."""
        self.cramped = False
        """Nothing may be appended, see :class:`Cramped`."""

    def append(self, entry: Entry) -> Position:
        """Store one entry under the next offset of the host."""
        if self.cramped:
            raise Cramped("what is left in the file is kept for deleting")
        head = self._heads.get((entry.channel, entry.topic))
        if entry.idempotency_key:
            key = head.key if head is not None else Head(entry.channel, entry.topic, ZERO).key
            known = self._known(key, entry.idempotency_key)
            if known is not None:
                return known
        if head is None or head.retention is not entry.retention:
            head = self._admit(entry, head)
        self.top = offset = self.top + 1
        packed = offset.to_bytes(8, "big")
        previous = head.previous
        if entry.info or entry.tags:
            value = self._with_more(entry, previous)
        else:
            value = b"".join((previous, self._time8, head.name, entry.data))
        size = len(value)
        if size > self.max_entry:
            raise EntryTooLarge(
                f"a message of {size} bytes does not fit: the store takes {self.max_entry} at most"
            )
        # The log comes last in the order of keys: MDB_APPEND.
        put = self._log_put
        if put is None:
            self._log_put = put = self.txn.cursor().put
        put(LOG + packed, value, True, True, True)
        head.previous = packed
        self.pending.append((head.key, packed))
        self.added += size
        self._passed += size
        if entry.idempotency_key:
            self._remember(head.key, entry.idempotency_key, packed, previous)
        return Position(offset, _from_bytes(previous, "big"))

    def _with_more(self, entry: Entry, previous: bytes) -> bytes:
        channel, topic = entry.channel.encode(), entry.topic.encode()
        sizes = lengths(channel, topic, entry.info, entry.tags)
        return b"".join((previous, self._time8, sizes, channel, topic, entry.info, entry.tags, entry.data))

    def _admit(self, entry: Entry, head: Head | None) -> Head:
        """Make the topic's record ready for an entry: it is there, with the rule that holds now, and not "empty"."""
        name = (entry.channel, entry.topic)
        retention = entry.retention
        new = head is None  # then none of its entries is pending: its record says all
        head = head or Head(*name, ZERO)
        record = self.txn.get(head.key)
        if new and record is not None:
            head.previous = record[-8:]
        if record is None or record[:RULE_END] != retention.rule or (new and len(record) == OFFSETS):
            self._prepare(head.key, record, retention)
        head.retention = retention
        self._heads[name] = head
        return head

    def _prepare(self, key: bytes, record: bytes | None, retention: Retention) -> None:
        changed = record is not None and record[:RULE_END] != retention.rule
        if changed:
            self.fold()
            record = self.txn.get(key)
            self._new_generation()
        window = Window(0) if record is None else Window.decode(record)
        if changed:
            # By the old rule: a new one must not bring back anything.
            self._trim_a_few(window)
        window.apply(retention)
        if changed:
            self._trim_a_few(window)
        if record is not None and len(record) == OFFSETS:
            self.txn.delete(EMPTY + record[TRIMMED:OFFSETS])
        if not window.count:
            window.first_time = self.now
        window.ident = window.ident or self.top + 1
        if window.ttl_ms and not 0 < window.due <= window.first_time + window.ttl_ms:
            self._schedule(key, window)
        self.txn.put(key, window.encode())

    # Idempotency -----------------------------------------------------------------------------------------------

    def _known(self, key: bytes, client_key: str) -> Position | None:
        value = self.txn.get(idempotency_key(key, client_key))
        if value is None:
            return None
        offset, previous, time = unpack_offsets(value)
        return Position(offset, previous, True) if time + IDEMPOTENCY_MS > self.now else None

    def _remember(self, key: bytes, client_key: str, offset: bytes, previous: bytes) -> None:
        digest = idempotency_key(key, client_key)
        self.txn.put(digest, offset + previous + self._time8)
        self.txn.put(IDEMPOTENT_ORDER + offset, self._time8 + digest)
        self.forget_keys(2)
