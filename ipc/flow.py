"""Numbering, credits, window and outbox between one sender and one receiver; and the gaps that the numbering shows.

Stands between the bus and its sockets. Pure: no clock, no socket, no memory but its own. ``outbound.py`` drives
:class:`SendFlow`, ``inbound.py`` drives :class:`ReceiveFlow`.

A sender numbers its envelopes for each receiver and counts the bytes of its frames. The receiver answers on the board
with the position (bytes) up to which it has processed. At most a window is under way; what exceeds it waits in the
outbox; what exceeds the outbox is up to who publishes (it must pause) unless the receiver stands still: then it is
dropped, for that receiver alone, and counted. Numbers are given before anything is dropped, so the receiver sees a gap.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from ipc.envelope import OVERHEAD

WINDOW = 4 * 1024 * 1024
"""Bytes under way to one receiver."""
BACKLOG = 16 * 1024 * 1024
"""Bytes in the outbox for one receiver before publishers must pause; the default of ``--bus-backlog``."""
STALL_AFTER = 1.0
"""Seconds without progress after which a receiver counts as standing still."""
LONGEST_STEP = 0.5
"""Seconds that one look at the clock may add to a stall: after a pause of our own we look again before we judge."""

_POSITION_BITS = 48
_POSITION_MASK = (1 << _POSITION_BITS) - 1


def pack_credit(epoch: int, position: int) -> int:
    """The credit word: whose bytes (the sender's epoch, 16 bits of it) and how many (48 bits)."""
    return (epoch & 0xFFFF) << _POSITION_BITS | (position & _POSITION_MASK)


def unpack_credit(word: int, epoch: int) -> int:
    """The position in a credit word, 0 when the word speaks of a predecessor of this sender."""
    return word & _POSITION_MASK if word >> _POSITION_BITS == epoch & 0xFFFF else 0


class Batch(NamedTuple):
    """Envelopes that travel together, already encoded."""

    number: int
    """How many envelopes were given to this receiver before."""
    envelopes: int
    body: bytes


class _Sent(NamedTuple):
    """What is remembered of a batch that is under way."""

    position: int
    number: int
    envelopes: int
    body: bytes
    """Kept only where a successor is to get it, see :attr:`SendFlow.keep`."""


class SendFlow:
    """What one sender has for one receiver."""

    __slots__ = (
        "_fresh", "_looked", "_outstanding", "_still", "acked", "acked_number", "backlog", "dropped", "keep", "number",
        "outbox", "outbox_bytes", "position", "ready", "stalled", "window",
    )  # fmt: skip

    def __init__(self, window: int = WINDOW, backlog: int = BACKLOG, *, keep: bool = False) -> None:
        self.window = window
        self.backlog = backlog
        self.keep = keep
        """What is under way is remembered whole, for a successor of the receiver: see :meth:`surrender`."""
        self.ready = False
        """The receiver's subscription was seen: what is sent now arrives."""
        self.number = 0
        """Envelopes given, whatever became of them."""
        self.position = 0
        """Bytes sent."""
        self.acked = 0
        """Bytes that the receiver has processed."""
        self.acked_number = 0
        """Envelopes up to here are processed (or were dropped)."""
        self.dropped = 0
        """Envelopes given up."""
        self.outbox: deque[Batch] = deque()
        self.outbox_bytes = 0
        self.stalled = False
        """The receiver stands still; see :meth:`observe`."""
        self._outstanding: deque[_Sent] = deque()
        self._looked = 0.0
        self._still = 0.0
        self._fresh = True

    @property
    def waiting(self) -> bool:
        """Something is due from the receiver: a credit, or its subscription."""
        return bool(self._outstanding) or (bool(self.outbox) and not self.ready)

    @property
    def idle(self) -> bool:
        """Everything given has been processed or dropped."""
        return not self._outstanding and not self.outbox

    @property
    def unacknowledged(self) -> int:
        """Envelopes given and neither processed nor dropped."""
        return sum(sent.envelopes for sent in self._outstanding) + self.waiting_envelopes

    @property
    def last_number(self) -> int:
        """What a TAIL says: the number that the next batch to leave will have."""
        return self.outbox[0].number if self.outbox else self.number

    def offer(self, body: bytes, envelopes: int) -> None:
        """Give a batch; it waits in the outbox, or is dropped when the receiver stands still and its outbox is full."""
        size = len(body) + OVERHEAD
        number = self.number
        self.number = number + envelopes
        if self.stalled and self.outbox_bytes + size > self.backlog:
            self.dropped += envelopes
            return
        if not self.waiting:
            self._fresh = True
        self.outbox.append(Batch(number, envelopes, body))
        self.outbox_bytes += size

    def take(self) -> Batch | None:
        """The next batch to send now (:attr:`position` then includes it), None when there is none or no room for it."""
        if not self.outbox or not self.ready:
            return None
        batch = self.outbox[0]
        size = len(batch.body) + OVERHEAD
        if not self._outstanding:
            self._fresh = True
        elif self.position - self.acked + size > self.window:
            return None
        self.outbox.popleft()
        self.outbox_bytes -= size
        self.position += size
        body = batch.body if self.keep else b""
        self._outstanding.append(_Sent(self.position, batch.number, batch.envelopes, body))
        return batch

    def credit(self, position: int) -> bool:
        """The receiver has processed up to ``position``; True when that is news. A position never sent is ignored."""
        if not self.acked < position <= self.position:
            return False
        self.acked = position
        outstanding = self._outstanding
        while outstanding and outstanding[0].position <= position:
            sent = outstanding.popleft()
            self.acked_number = sent.number + sent.envelopes
        self._still = 0.0
        self._fresh = True
        self.stalled = False
        return True

    def observe(self, now: float) -> bool:
        """Look at the clock (seconds), after the credit was looked at; True when the receiver now counts as stalled.

        What then exceeds the backlog is dropped, the newest first.
        """
        step = 0.0 if self._fresh else min(now - self._looked, LONGEST_STEP)
        self._looked = now
        self._fresh = False
        if not self.waiting:
            self._still = 0.0
            self.stalled = False
            return False
        self._still += step
        if self.stalled or self._still < STALL_AFTER:
            return False
        self.stalled = True
        self._trim()
        return True

    def _trim(self) -> None:
        while self.outbox and self.outbox_bytes > self.backlog:
            batch = self.outbox.pop()
            self.outbox_bytes -= len(batch.body) + OVERHEAD
            self.dropped += batch.envelopes

    def abandon(self) -> int:
        """The receiver is gone: everything not processed is given up. Answers how many envelopes that is."""
        lost = self.unacknowledged
        self.dropped += lost
        self._forget()
        return lost

    def surrender(self) -> list[Batch]:
        """The receiver is gone: everything not processed, in order, for its successor. Needs :attr:`keep`."""
        kept = [Batch(sent.number, sent.envelopes, sent.body) for sent in self._outstanding]
        kept += self.outbox
        stalled = self.stalled
        self._forget()
        self.stalled = stalled
        return kept

    @property
    def waiting_envelopes(self) -> int:
        """Envelopes in the outbox, not sent yet."""
        return sum(batch.envelopes for batch in self.outbox)

    def _forget(self) -> None:
        self._outstanding.clear()
        self.outbox.clear()
        self.outbox_bytes = 0
        self.ready = False
        self.stalled = False


class ReceiveFlow:
    """What one receiver knows of one sender."""

    __slots__ = ("number", "position")

    def __init__(self) -> None:
        self.number = 0
        """Envelopes up to here came in, or are known to be missing."""
        self.position = 0
        """Bytes up to here are processed."""

    def accept(self, number: int, envelopes: int) -> int:
        """A batch came in; answers how many envelopes are missing before it, or -1 when it was here before."""
        gap = number - self.number
        if gap < 0:
            return -1
        self.number = number + envelopes
        return gap

    def processed(self, position: int) -> bool:
        """The sender's bytes up to ``position`` are dealt with; True when that is news."""
        if position <= self.position:
            return False
        self.position = position
        return True
