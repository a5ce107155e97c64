"""A slot's record on the board: who owns it, whether it lives, what it has counted.

Stands beside the way of a message: workers count here, the supervisor and everybody who asks for the state of the hub
reads here. Only the owner of a slot writes its record; single numbers are aligned 8-byte words, stored and read whole,
and the identity of several words is guarded by a sequence word and a checksum.
"""

from __future__ import annotations

import os
import platform
import threading
import time
from enum import IntEnum
from mmap import mmap
from typing import NamedTuple, TypeAlias

from ipc import layout

Words: TypeAlias = "memoryview[int]"
"""The board as 8-byte words."""

_READ_TRIES = 64
_U64 = (1 << 64) - 1


class SlotState(IntEnum):
    """Where the owner of a slot is in its life."""

    FREE = 0
    JOINING = 1
    READY = 2
    DRAINING = 3


class PeerKind(IntEnum):
    """What owns a slot."""

    NONE = 0
    WORKER = 1
    APPLICATION = 2
    PUBLISHER = 3
    TAIL = 4
    BRIDGE = 5


class Counter(IntEnum):
    """The numbers each process keeps in its record.

    Gauges say what is now and start at zero with each owner; the others count up over all owners of the slot and
    are never reset, so their sum over all slots only grows.
    """

    CONNECTIONS = 0
    """Gauge: client connections."""
    SUBSCRIPTIONS = 1
    """Gauge: (connection, pattern) pairs."""
    MESSAGES_IN = 2
    """From clients."""
    BYTES_IN = 3
    MESSAGES_OUT = 4
    """To clients."""
    BYTES_OUT = 5
    DELIVERIES = 6
    SLOW_CLOSED = 7
    """Clients closed because they read too slowly."""
    SLOW_DROPPED = 8
    """Messages not given to slow clients."""
    BUS_SENT = 9
    """Envelopes taken for a peer, once per peer."""
    BUS_RECEIVED = 10
    """Envelopes that came in and were handed on."""
    BUS_DROPPED = 11
    """Envelopes given up because their peer stood still or died, once per peer."""
    BUS_INVALID = 12
    """Envelopes or batches that came in and could not be understood."""
    BUS_GAPS = 13
    """Envelopes that never came in, known from the numbering."""
    BACKLOG = 14
    """Gauge: bytes that wait for clients."""
    BUS_BACKLOG = 15
    """Gauge: bytes that wait in the outboxes for other peers."""
    HANDSHAKES = 16
    REJECTED = 17
    """Handshakes refused."""
    ERRORS_OUT = 18
    """Error messages to clients."""
    FEDERATION_OUT = 32
    """Envelopes that Redis has taken from this host."""
    FEDERATION_IN = 33
    """Envelopes of other hosts that were put on the bus."""
    FEDERATION_DROPPED = 34
    """Envelopes of this host that were given up on their way to Redis."""
    FEDERATION_GAPS = 35
    """Envelopes of other hosts that never came, known from their numbering."""
    FEDERATION_DUPLICATES = 36
    """Envelopes of other hosts that came again and were left out."""
    FEDERATION_SPOOL = 37
    """Gauge: bytes that wait in the bridge for Redis."""
    FEDERATION_HELD = 38
    """Gauge: bytes that a process holds for a bridge that is not there."""


GAUGES = (
    Counter.CONNECTIONS,
    Counter.SUBSCRIPTIONS,
    Counter.BACKLOG,
    Counter.BUS_BACKLOG,
    Counter.FEDERATION_SPOOL,
    Counter.FEDERATION_HELD,
)
"""They say what is now, so they count for living owners only; the other counters go up for ever."""


class Identity(NamedTuple):
    """Who owns a slot, read as one."""

    kind: PeerKind
    pid: int
    """For people to read; a pid is never an identity."""
    listener: int
    """Index of the listening socket that a worker serves, -1 for everybody else."""
    epoch: int
    started_ns: int
    """``time.monotonic_ns()`` at the claim."""


NOBODY = Identity(PeerKind.NONE, 0, -1, 0, 0)


class Record:
    """One slot of the board. Anybody may read; only the slot's owner may call what writes."""

    __slots__ = ("_memory", "_counters", "_epoch", "_signed", "_state", "_version", "_words", "_base", "slot")

    def __init__(self, memory: mmap, words: Words, signed: Words, slot: int) -> None:
        self.slot = slot
        self._memory = memory
        self._words = words
        self._signed = signed
        self._base = (layout.RECORDS + slot * layout.RECORD_WORDS * layout.WORD) // layout.WORD
        self._counters = self._base + layout.COUNTERS
        area, slots, index = (
            (layout.FULL, layout.FULL_SLOTS, slot)
            if slot < layout.FULL_SLOTS
            else (layout.REST, layout.PUBLISHER_SLOTS, slot - layout.FULL_SLOTS)
        )
        self._epoch = area // layout.WORD + index
        self._version = self._epoch + slots
        self._state = self._version + slots

    @property
    def state(self) -> SlotState:
        """Where the owner is in its life; a value we do not know counts as FREE."""
        value = self._words[self._state]
        return SlotState(value) if value <= SlotState.DRAINING else SlotState.FREE

    @state.setter
    def state(self, state: SlotState) -> None:
        fence()
        self._words[self._state] = int(state)

    @property
    def epoch(self) -> int:
        """How often this slot has been claimed; never goes back."""
        return self._words[self._epoch]

    @property
    def heartbeat(self) -> int:
        """``time.monotonic_ns()`` when the owner's event loop last came round."""
        return self._words[self._base + layout.HEARTBEAT]

    def beat(self) -> None:
        """Say that the owner's loop turns."""
        self._words[self._base + layout.HEARTBEAT] = time.monotonic_ns()

    @property
    def append_since(self) -> int:
        """``time.monotonic_ns()`` when the owner set about writing to the store; 0 while it does not."""
        return self._words[self._base + layout.APPEND_SINCE]

    @property
    def append_word(self) -> tuple[memoryview, int]:
        """Where it says that: 64-bit words, and which of them."""
        return self._words, self._base + layout.APPEND_SINCE

    @property
    def condition(self) -> int:
        """What a bridge says of its link to Redis: the number of an :class:`ipc.federation.LinkState`."""
        return self._words[self._base + layout.CONDITION]

    @condition.setter
    def condition(self, number: int) -> None:
        self._words[self._base + layout.CONDITION] = number

    @property
    def kind(self) -> PeerKind:
        """What owns the slot."""
        return self.identity().kind

    @property
    def pid(self) -> int:
        """The owner's process id, for people to read."""
        return self.identity().pid

    @property
    def listener(self) -> int:
        """Index of the listening socket the owner serves, -1 when none."""
        return self.identity().listener

    def get(self, counter: Counter) -> int:
        """The value of a counter."""
        return self._signed[self._counters + counter]

    def add(self, counter: Counter, amount: int = 1) -> None:
        """Count; gauges also go down."""
        self._signed[self._counters + counter] += amount

    def set(self, counter: Counter, value: int) -> None:
        """Set a gauge."""
        self._signed[self._counters + counter] = value

    def counter_index(self, counter: Counter) -> int:
        """Where in :attr:`Board.signed` a counter lives, for loops that count every message."""
        return self._counters + int(counter)

    def identity(self) -> Identity:
        """Who owns the slot: all of it from one writing, never torn.

        :data:`NOBODY` after a bounded number of tries: the writer died in the middle, and the next owner repairs it.
        """
        words, base = self._words, self._base
        for _ in range(_READ_TRIES):
            before = words[base + layout.SEQUENCE]
            fence()
            body = words[base + layout.IDENTITY : base + layout.IDENTITY + layout.IDENTITY_WORDS].tolist()
            checksum = words[base + layout.CHECKSUM]
            fence()
            if (
                not before & 1
                and words[base + layout.SEQUENCE] == before
                and checksum == _checksum(before, body)
            ):
                return _identity(body)
        return NOBODY

    def _write_identity(self, identity: Identity) -> None:
        words, base = self._words, self._base
        # `| 1` also takes over from a writer that died in the middle and left it odd.
        sequence = words[base + layout.SEQUENCE] | 1
        words[base + layout.SEQUENCE] = sequence
        fence()
        body = [
            int(identity.kind),
            identity.pid,
            identity.listener + 1,
            identity.epoch,
            identity.started_ns,
            0,
        ]
        for offset, value in enumerate(body, base + layout.IDENTITY):
            words[offset] = value
        sequence = (sequence + 1) & _U64
        words[base + layout.CHECKSUM] = _checksum(sequence, body)
        fence()
        words[base + layout.SEQUENCE] = sequence

    def begin(self, kind: PeerKind, listener: int | None = None) -> int:
        """Make the slot this process's own (its lock is held, its state FREE); answers the new epoch.

        The state stays FREE, so nobody looks at the slot, until the owner sets it.
        """
        self._clear()
        if self.slot < layout.FULL_SLOTS:
            row = layout.SLOTS * layout.WORD
            start = layout.CREDITS + self.slot * row
            self._memory[start : start + row] = bytes(row)
        epoch = self.epoch + 1
        self._write_identity(
            Identity(kind, os.getpid(), -1 if listener is None else listener, epoch, time.monotonic_ns())
        )
        self.beat()
        fence()
        self._words[self._epoch] = epoch
        return epoch

    def end(self) -> None:
        """Give the slot up, for oneself or for an owner that died; the epoch, credits and counters stay to be read."""
        self._clear()
        self._write_identity(NOBODY._replace(epoch=self.epoch))
        self.state = SlotState.FREE

    def _clear(self) -> None:
        for gauge in GAUGES:
            self.set(gauge, 0)
        self._words[self._base + layout.APPEND_SINCE] = 0
        self.condition = 0
        if self.slot < layout.FULL_SLOTS:
            start = layout.MAPS + self.slot * layout.MAP_BYTES
            self._memory[start : start + layout.MAP_BYTES] = bytes(layout.MAP_BYTES)
            self.touch()

    def touch(self) -> None:
        """Raise the version of the interest map: everything cached about it is void."""
        fence()
        self._words[self._version] += 1


_fence_lock = threading.Lock()


def fence() -> None:
    """Keep stores before this call visible before stores after it, and likewise loads.

    x86 does so anyway, and there this is a no-op; elsewhere the release and acquire of a lock is the one fence that
    Python has.
    """
    with _fence_lock:
        pass
    with _fence_lock:
        pass


def _no_fence() -> None:
    """x86 keeps stores in order among themselves, and loads likewise."""


if platform.machine() in ("x86_64", "AMD64", "i686"):
    fence = _no_fence


def _renew_fence() -> None:
    """In a forked child: another thread of the parent may have been inside the lock."""
    global _fence_lock
    _fence_lock = threading.Lock()


os.register_at_fork(after_in_child=_renew_fence)


def _checksum(sequence: int, body: list[int]) -> int:
    value = sequence
    for word in body:
        value = (value * 1_000_003 + word + 1) & _U64
    return value


def _identity(body: list[int]) -> Identity:
    kind, pid, listener, epoch, started, _ = body
    return Identity(
        PeerKind(kind) if kind <= PeerKind.BRIDGE else PeerKind.NONE, pid, listener - 1, epoch, started
    )
