"""Where on the board everything is: pure numbers, shared by ``record.py`` and ``board.py``.

In this order::

    header    4 KiB: magic, layout version, numbers of slots, sizes
    full      3 x 96 words: epoch, interest version, state of the full slots. One comparison of this
              slice tells a sender that nothing has changed since it last looked
    rest      3 x 160 words: the same of the publisher slots
    records   256 x 1 KiB: identity, heartbeat, counters
    credits   96 x 256 words: what each full slot has processed of each sender
    maps      96 x 128 KiB: the interest maps

Whoever moves anything raises :data:`LAYOUT`: a process of another version then refuses the board, in words.
"""

from __future__ import annotations

FULL_SLOTS = 96
"""Slots with an inbox and an interest map: workers, their successors, bridge, tail, application processes."""
PUBLISHER_SLOTS = 160
SLOTS = FULL_SLOTS + PUBLISHER_SLOTS
INTEREST_BITS = 1 << 20

MAGIC = int.from_bytes(b"flockwbd", "big")
LAYOUT = 1

WORD = 8
RECORD_WORDS = 128
MAP_BYTES = INTEREST_BITS // 8
_PAGE = 4096

# Offsets in bytes.
FULL = _PAGE
FULL_BYTES = 3 * FULL_SLOTS * WORD
REST = FULL + _PAGE
RECORDS = REST + _PAGE
CREDITS = RECORDS + SLOTS * RECORD_WORDS * WORD
MAPS = CREDITS + FULL_SLOTS * SLOTS * WORD
BOARD_BYTES = MAPS + FULL_SLOTS * MAP_BYTES

HEADER = (MAGIC, LAYOUT, FULL_SLOTS, SLOTS, RECORD_WORDS, MAP_BYTES, BOARD_BYTES)

# Words of a record.
SEQUENCE, CHECKSUM, IDENTITY, IDENTITY_WORDS = 0, 1, 2, 6
HEARTBEAT = 8
APPEND_SINCE = 9
CONDITION = 10
COUNTERS = 16
