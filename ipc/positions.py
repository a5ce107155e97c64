"""Positions: where a subscriber stands in the history of a host. Pure.

What a publisher is told when its message was stored, and what a client brings back to get what it missed: in the
Centrifuge protocol as two fields, elsewhere (``?since=``, ``Last-Event-ID``) as ``EPOCH:OFFSET``.
"""

from __future__ import annotations

from typing import NamedTuple

MAX_OFFSET = (1 << 63) - 1
_MAX_TEXT = 200


class Position(NamedTuple):
    """A place in the one log of a host.

    ``offset`` counts the messages of all topics with history; ``epoch`` names the log, and is another one when the
    log was lost.
    """

    offset: int
    epoch: str

    def __str__(self) -> str:
        return f"{self.epoch}:{self.offset}"

    @classmethod
    def parse(cls, text: str) -> Position:
        """Read ``EPOCH:OFFSET``.

        Raises:
            ValueError: it is none; the text says what one looks like.
        """
        epoch, colon, digits = text[:_MAX_TEXT].rpartition(":")
        if (
            len(text) <= _MAX_TEXT
            and colon
            and digits.isascii()
            and digits.isdigit()
            and int(digits) <= MAX_OFFSET
        ):
            return cls(int(digits), epoch)
        raise ValueError(f"{text[:80]!r} is no position: it must be EPOCH:OFFSET, as it was received")
