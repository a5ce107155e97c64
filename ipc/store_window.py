"""A topic's record in the store: its rule, and the offsets of what is still kept of it (its window).

Stands between ``store_records.py`` (bytes) and ``store_fold.py`` (LMDB); pure but for the pieces of a long window,
which the caller loads and stores. The record as bytes::

    0   size (4), ttl in ms (8)                                                = Retention.rule
    12  ident (8): under which the pieces are filed; 0 while there is nothing to file
    20  time of the oldest entry, or of an older one that is gone (8)
    28  deadline under which the topic waits to be looked at for age, or 0 (8)
    36  number of offsets in the head (4), number of pieces (4)
    44  trimmed: the highest offset that was removed (8)
    52  the oldest offsets: the head; then the newest: the tail (8 each)

The last eight bytes are always the topic's last offset, whether it is still kept or not. Offsets stay as they are
written, eight bytes each, so that dozens are moved with a slice.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

from ipc.store_records import Retention

PIECE = 64
"""Offsets in one piece of a long window."""
INLINE = 128
"""So many of the newest offsets fit in the record before some move to a piece."""

RULE_END = 12
TRIMMED = 44
OFFSETS = 52

_HEADER = struct.Struct(">IQQQQIIQ")
_PIECE_BYTES = PIECE * 8
_from_bytes = int.from_bytes


class Window:
    """A topic's record, unpacked. ``head`` and ``tail`` are offsets as bytes."""

    __slots__ = ("due", "first_time", "head", "ident", "pieces", "size", "tail", "trimmed", "ttl_ms")

    def __init__(self, ident: int) -> None:
        self.size = 1
        self.ttl_ms = 0
        self.ident = ident
        self.first_time = 0
        self.due = 0
        self.trimmed = 0
        self.head = b""
        self.pieces = 0
        self.tail = b""

    @classmethod
    def decode(cls, record: bytes) -> Window:
        """Unpack a topic's record."""
        window = cls.__new__(cls)
        (
            window.size,
            window.ttl_ms,
            window.ident,
            window.first_time,
            window.due,
            in_head,
            window.pieces,
            window.trimmed,
        ) = _HEADER.unpack_from(record)
        middle = OFFSETS + in_head * 8
        window.head = record[OFFSETS:middle]
        window.tail = record[middle:]
        return window

    def encode(self) -> bytes:
        """The record as bytes."""
        header = _HEADER.pack(
            self.size,
            self.ttl_ms,
            self.ident,
            self.first_time,
            self.due,
            len(self.head) >> 3,
            self.pieces,
            self.trimmed,
        )
        return header + self.head + self.tail

    def apply(self, retention: Retention) -> None:
        """Take over the rule that holds now."""
        self.size = retention.size
        self.ttl_ms = retention.ttl_ms

    @property
    def count(self) -> int:
        """How many entries the window holds."""
        return ((len(self.head) + len(self.tail)) >> 3) + self.pieces * PIECE

    @property
    def top(self) -> int:
        """The topic's last offset, kept or not; 0 when it never had one."""
        return _from_bytes(self.tail[-8:], "big") if self.tail else self.trimmed

    def front(self, take_piece: Callable[[int], bytes]) -> int:
        """The oldest offset. ``take_piece(ident)`` removes and returns the oldest stored piece when it is needed."""
        if not self.head and self.pieces:
            self.head = take_piece(self.ident)
            self.pieces -= 1
        return _from_bytes((self.head or self.tail)[:8], "big")

    def pop(self, count: int, take_piece: Callable[[int], bytes]) -> bytes:
        """Remove the oldest offsets, at most as many as there are, and return them; the last is ``trimmed`` now."""
        gone = b""
        left = count * 8
        while left > 0 and self.count:
            self.front(take_piece)
            if self.head:
                part, self.head = self.head[:left], self.head[left:]
            else:
                part, self.tail = self.tail[:left], self.tail[left:]
            gone += part
            left -= len(part)
        if gone:
            self.trimmed = _from_bytes(gone[-8:], "big")
        return gone

    def push(self, offsets: bytes) -> list[bytes]:
        """Add the newest offsets; returns pieces to be stored under ``ident``, mostly none."""
        self.tail += offsets
        pieces = []
        while len(self.tail) > INLINE * 8:
            old, self.tail = self.tail[:_PIECE_BYTES], self.tail[_PIECE_BYTES:]
            if not self.head and not self.pieces:
                self.head = old
            else:
                self.pieces += 1
                pieces.append(old)
        return pieces

    def turn(
        self, offsets: bytes, limit: int, take_piece: Callable[[int], bytes]
    ) -> tuple[list[bytes], bytes]:
        """Add the newest offsets and remove as many of the oldest as the size asks for, at most ``limit``.

        Returns:
            Pieces to be stored, and the offsets that were removed.
        """
        excess = min(limit, self.count + (len(offsets) >> 3) - self.size)
        if excess <= 0:
            return self.push(offsets), b""
        gone = self.pop(excess, take_piece)
        rest = excess * 8 - len(gone)
        if rest:  # some of the new ones are gone at once
            gone += offsets[:rest]
            self.trimmed = _from_bytes(gone[-8:], "big")
        return self.push(offsets[rest:]), gone


def unpack_offsets(data: bytes, start: int = 0) -> tuple[int, ...]:
    """The offsets that fill ``data`` from ``start`` on."""
    return struct.unpack_from(f">{(len(data) - start) // 8}Q", data, start)
