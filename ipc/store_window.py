"""A topic's record in the store: its rule, and the offsets of what is still kept of it (its window).

Stands between ``store_records.py`` (bytes) and ``store_writer.py`` (LMDB); pure but for the pieces of a long window,
which the caller loads and stores. The record as bytes::

    0   size (4), ttl in ms (8), 0 or 1 when the window is in pieces (4)      = Retention.prefix
    16  ident (8): under which the pieces are filed; 0 while there is nothing to file
    24  time of the oldest entry, or of an older one that is gone (8)
    32  deadline under which the topic waits to be looked at for age, or 0 (8)
    40  number of offsets in the head (4), number of pieces (4)
    48  trimmed: the highest offset that was removed (8)
    56  the oldest offsets: the head; then the newest: the tail (8 each)

``trimmed`` stands in front of the oldest offset on purpose: dropping the eight bytes at 48 removes the oldest entry
and leaves the right ``trimmed``, so the usual append is two slices of bytes and nothing is unpacked. The last eight
bytes are always the topic's last offset, whether it is still kept or not.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

from ipc.store_records import Retention

PIECE = 64
"""Offsets in one piece of a long window."""
INLINE = 128
"""So many of the newest offsets fit in the record before some move to a piece."""

PREFIX = 16
TRIMMED = 48
OFFSETS = 56
FIRST_TIME = slice(24, 32)
IN_HEAD = slice(40, 44)
PIECES = slice(44, 48)
FULL_INLINE = OFFSETS + INLINE * 8

_HEADER = struct.Struct(">IQIQQQIIQ")


class Window:
    """A topic's record, unpacked: for everything but the usual append."""

    __slots__ = ("due", "first_time", "head", "ident", "pieces", "size", "tail", "trimmed", "ttl_ms")

    def __init__(self, ident: int) -> None:
        self.size = 1
        self.ttl_ms = 0
        self.ident = ident
        self.first_time = 0
        self.due = 0
        self.trimmed = 0
        self.head: list[int] = []
        self.pieces = 0
        self.tail: list[int] = []

    @classmethod
    def decode(cls, record: bytes) -> Window:
        """Unpack a topic's record."""
        window = cls.__new__(cls)
        (
            window.size,
            window.ttl_ms,
            _,
            window.ident,
            window.first_time,
            window.due,
            in_head,
            window.pieces,
            window.trimmed,
        ) = _HEADER.unpack_from(record)
        offsets = list(unpack_offsets(record, OFFSETS))
        window.head = offsets[:in_head]
        window.tail = offsets[in_head:]
        return window

    def encode(self) -> bytes:
        """The record as bytes."""
        header = _HEADER.pack(
            self.size,
            self.ttl_ms,
            1 if self.head or self.pieces else 0,
            self.ident,
            self.first_time,
            self.due,
            len(self.head),
            self.pieces,
            self.trimmed,
        )
        return header + pack_offsets(self.head) + pack_offsets(self.tail)

    def apply(self, retention: Retention) -> None:
        """Take over the rule that holds now."""
        self.size = retention.size
        self.ttl_ms = retention.ttl_ms

    @property
    def count(self) -> int:
        """How many entries the window holds."""
        return len(self.head) + self.pieces * PIECE + len(self.tail)

    @property
    def top(self) -> int:
        """The topic's last offset, kept or not; 0 when it never had one."""
        return self.tail[-1] if self.tail else self.trimmed

    def front(self, take_piece: Callable[[int], list[int]]) -> int:
        """The oldest offset. ``take_piece(ident)`` removes and returns the oldest stored piece when it is needed."""
        if not self.head and self.pieces:
            self.head = take_piece(self.ident)
            self.pieces -= 1
        return self.head[0] if self.head else self.tail[0]

    def pop(self, take_piece: Callable[[int], list[int]]) -> int:
        """Remove the oldest offset from the window and return it; it is the new ``trimmed``."""
        self.trimmed = self.front(take_piece)
        del (self.head or self.tail)[0]
        return self.trimmed

    def push(self, offset: int) -> list[int]:
        """Add the newest offset; returns a piece to be stored (under ``ident``) or an empty list."""
        self.tail.append(offset)
        if len(self.tail) <= INLINE:
            return []
        old, self.tail = self.tail[:PIECE], self.tail[PIECE:]
        if not self.head and not self.pieces:
            self.head = old
            return []
        self.pieces += 1
        return old


def pack_offsets(offsets: list[int]) -> bytes:
    """Offsets as bytes, eight each."""
    return struct.pack(f">{len(offsets)}Q", *offsets)


def unpack_offsets(data: bytes, start: int = 0) -> tuple[int, ...]:
    """The offsets that fill ``data`` from ``start`` on."""
    return struct.unpack_from(f">{(len(data) - start) // 8}Q", data, start)
