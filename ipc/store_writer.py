"""Appending to the store: the next offset of the host, the link to the topic's last one, the topic's window.

Stands below ``store.py``, on the way of a message whose topic has history. The usual append is one read and two
writes of LMDB and unpacks nothing; everything else (first entry, age, another rule, the turn of a long window) takes
the long way through :class:`ipc.store_window.Window`.
"""

from __future__ import annotations

from ipc.store_changes import SWEEP_EVERY
from ipc.store_records import (
    CHUNK,
    EMPTY,
    IDEMPOTENCY_MS,
    IDEMPOTENT_ORDER,
    LOG,
    TOPIC,
    ZERO,
    Entry,
    EntryTooLarge,
    Position,
    Retention,
    channel_key,
    idempotency_key,
    lengths,
)
from ipc.store_upkeep import Upkeep
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

TRIMS_AT_ONCE = 8
"""At most so many entries are trimmed by one append (more than one only after a rule has changed or time has gone)."""

_from_bytes = int.from_bytes


class Writer(Upkeep):
    """Everything that can be done to the store inside a transaction."""

    def __init__(self) -> None:
        super().__init__()
        self.max_entry = 1 << 30
        """The largest entry, in bytes."""
        self._channels: dict[str, tuple[bytes, bytes, dict[int, bytes]]] = {}

    def append(self, entry: Entry) -> Position:
        """Store one entry under the next offset of the host and trim its topic."""
        topic = entry.topic.encode()
        prefix, channel, sizes_known = self._channels.get(entry.channel) or self._channel(entry.channel)
        key = prefix + topic
        if entry.idempotency_key:
            known = self._known(key, entry.idempotency_key)
            if known is not None:
                return known
        self.top = offset = self.top + 1
        packed = offset.to_bytes(8, "big")
        retention = entry.retention
        ttl_ms = retention.ttl_ms
        record = self._get(key)
        killed = ZERO
        # The usual case: the same rule as last time, the window not empty, in one piece, and nothing in it too old.
        if (
            record is not None
            and record[:PREFIX] == retention.prefix
            and len(record) > OFFSETS
            and (not ttl_ms or _from_bytes(record[FIRST_TIME], "big") + ttl_ms > self.now)
        ):
            previous = record[-8:]
            size = len(record)
            free = retention.size - ((size - OFFSETS) >> 3)
            if free > 0 and size < FULL_INLINE:
                record += packed
            elif not free:
                killed = record[OFFSETS : OFFSETS + 8]
                self._killed.append(killed)
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
            size = len(topic)
            sizes = sizes_known.get(size) or sizes_known.setdefault(size, lengths(channel, topic, b"", b""))
        value = b"".join((previous, self._time8, killed, sizes, channel, topic, info, tags, entry.data))
        if len(value) > self.max_entry:
            raise EntryTooLarge(
                f"a message of {len(value)} bytes does not fit: the store takes {self.max_entry} at most"
            )
        # The log comes last in the order of keys: MDB_APPEND.
        (self._log_put or self._open_log())(LOG + packed, value, True, True, True)
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
        self._killed.append(record[OFFSETS : OFFSETS + 8])
        return shorter, record[OFFSETS : OFFSETS + 8]

    def _append_other(self, key: bytes, record: bytes | None, entry: Entry, offset: int) -> bytes:
        """The new record of a topic in every case that is not a usual one."""
        if record is None:
            window = Window(offset)
        else:
            window = Window.decode(record)
            if not window.count:
                self._delete(EMPTY + record[TRIMMED:OFFSETS])
        # By the old rule first: a new one must not bring back anything.
        removed = self._trim_old(window, TRIMS_AT_ONCE)
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

    def _channel(self, channel: str) -> tuple[bytes, bytes, dict[int, bytes]]:
        if len(self._channels) >= 1024:
            self._channels.clear()
        found = self._channels[channel] = (TOPIC + channel_key(channel) + b"\0", channel.encode(), {})
        return found

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
