"""The board: memory that all processes of a host share, one mapped file in the runtime directory.

Stands beside the way of a message: a sender reads here who lives and who is interested, a receiver writes here how
far it has come (credits), everybody writes what it has counted, and the supervisor reads all of it.

Every byte has exactly one writer, the owner of its slot (who holds the slot's lock, see ``runtime.py``). Single numbers
are aligned 8-byte words, stored and read whole; the identity of several words is guarded by a sequence word and a
checksum. Nothing on the board is a pointer or a length, so hostile contents cannot lead a reader astray.

Layout, in this order::

    header    4 KiB: magic, layout version, numbers of slots, sizes
    full      3 x 96 words: epoch, interest version, state of the full slots. One comparison of this
              slice tells a sender that nothing has changed since it last looked
    rest      3 x 160 words: the same of the publisher slots
    records   256 x 1 KiB: identity, heartbeat, counters
    credits   96 x 256 words: what each full slot has processed of each sender
    maps      96 x 128 KiB: the interest maps
"""

from __future__ import annotations

import mmap
import os
import platform
import threading
import time
from enum import IntEnum
from typing import NamedTuple

FULL_SLOTS = 96
"""Slots with an inbox and an interest map: workers, their successors, bridge, tail, application processes."""
PUBLISHER_SLOTS = 160
SLOTS = FULL_SLOTS + PUBLISHER_SLOTS
INTEREST_BITS = 1 << 20

BOARD_NAME = "board"
_MAGIC = int.from_bytes(b"flockwbd", "big")
_LAYOUT = 1

_WORD = 8
_PAGE = 4096
_RECORD_WORDS = 128
_MAP_BYTES = INTEREST_BITS // 8
_FULL = _PAGE
_FULL_BYTES = 3 * FULL_SLOTS * _WORD
_REST = _FULL + _PAGE
_RECORDS = _REST + _PAGE
_CREDITS = _RECORDS + SLOTS * _RECORD_WORDS * _WORD
_MAPS = _CREDITS + FULL_SLOTS * SLOTS * _WORD
BOARD_BYTES = _MAPS + FULL_SLOTS * _MAP_BYTES

_HEADER = (_MAGIC, _LAYOUT, FULL_SLOTS, SLOTS, _RECORD_WORDS, _MAP_BYTES, BOARD_BYTES)

# Words of a record.
_SEQUENCE, _CHECKSUM, _IDENTITY, _IDENTITY_WORDS = 0, 1, 2, 6
_HEARTBEAT = 8
_COUNTERS, _COUNTER_WORDS = 16, 64

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


_GAUGES = (Counter.CONNECTIONS, Counter.SUBSCRIPTIONS, Counter.BACKLOG, Counter.BUS_BACKLOG)


class BoardError(Exception):
    """The board file is not one of ours, is damaged, or cannot be made. The text says which and what to do."""


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

    __slots__ = ("_board", "_counters", "_epoch", "_signed", "_state", "_version", "_words", "_base", "slot")

    def __init__(self, board: Board, slot: int) -> None:
        self.slot = slot
        self._board = board
        self._words = board.words
        self._signed = board.signed
        self._base = (_RECORDS + slot * _RECORD_WORDS * _WORD) // _WORD
        self._counters = self._base + _COUNTERS
        area, slots, index = (
            (_FULL, FULL_SLOTS, slot) if slot < FULL_SLOTS else (_REST, PUBLISHER_SLOTS, slot - FULL_SLOTS)
        )
        self._epoch = area // _WORD + index
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
        return self._words[self._base + _HEARTBEAT]

    def beat(self) -> None:
        """Say that the owner's loop turns."""
        self._words[self._base + _HEARTBEAT] = time.monotonic_ns()

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
            before = words[base + _SEQUENCE]
            fence()
            body = words[base + _IDENTITY : base + _IDENTITY + _IDENTITY_WORDS].tolist()
            checksum = words[base + _CHECKSUM]
            fence()
            if not before & 1 and words[base + _SEQUENCE] == before and checksum == _checksum(before, body):
                return _identity(body)
        return NOBODY

    def _write_identity(self, identity: Identity) -> None:
        words, base = self._words, self._base
        # `| 1` also takes over from a writer that died in the middle and left it odd.
        sequence = words[base + _SEQUENCE] | 1
        words[base + _SEQUENCE] = sequence
        fence()
        body = [
            int(identity.kind),
            identity.pid,
            identity.listener + 1,
            identity.epoch,
            identity.started_ns,
            0,
        ]
        for offset, value in enumerate(body, base + _IDENTITY):
            words[offset] = value
        sequence = (sequence + 1) & _U64
        words[base + _CHECKSUM] = _checksum(sequence, body)
        fence()
        words[base + _SEQUENCE] = sequence

    def begin(self, kind: PeerKind, listener: int | None = None) -> int:
        """Make the slot this process's own (its lock is held, its state FREE); answers the new epoch.

        The state stays FREE, so nobody looks at the slot, until the owner sets it.
        """
        self._clear()
        if self.slot < FULL_SLOTS:
            self._board.clear_credits(self.slot)
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
        for gauge in _GAUGES:
            self.set(gauge, 0)
        if self.slot < FULL_SLOTS:
            self._board.clear_map(self.slot)
            self.touch()

    def touch(self) -> None:
        """Raise the version of the interest map: everything cached about it is void."""
        fence()
        self._words[self._version] += 1


class Board:
    """The mapped file. Made by :meth:`create` or :meth:`open`; :meth:`close` unmaps it."""

    def __init__(self, memory: mmap.mmap, key: tuple[int, int]) -> None:
        self._memory = memory
        self._key = key
        self._view = memoryview(memory)
        self.words = self._view.cast("Q")
        """The whole board as unsigned words."""
        self.signed = self._view.cast("q")
        """The same as signed words: counters."""
        self._records = [Record(self, slot) for slot in range(SLOTS)]

    @classmethod
    def create(cls, dir_fd: int) -> Board:
        """Make a new board in a directory, in place of any that is there (nobody may live in it).

        Raises:
            BoardError: there is no room for it.
        """
        temporary = f"{BOARD_NAME}.new"
        try:
            os.unlink(temporary, dir_fd=dir_fd)
        except FileNotFoundError:
            pass
        fd = os.open(
            temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=dir_fd
        )
        try:
            os.fchmod(fd, 0o600)
            try:
                # Not a sparse file: writing to one on a full tmpfs ends the process with SIGBUS.
                os.posix_fallocate(fd, 0, BOARD_BYTES)
            except OSError as error:
                os.unlink(temporary, dir_fd=dir_fd)
                raise BoardError(
                    f"no room for the shared board of {BOARD_BYTES} bytes: {error.strerror}"
                ) from error
            board = cls(mmap.mmap(fd, BOARD_BYTES), _key(os.fstat(fd)))
            for index, value in enumerate(_HEADER):
                board.words[index] = value
            os.rename(temporary, BOARD_NAME, src_dir_fd=dir_fd, dst_dir_fd=dir_fd)
            return board
        finally:
            os.close(fd)

    @classmethod
    def open(cls, dir_fd: int) -> Board:
        """Map the board of a directory.

        Raises:
            FileNotFoundError: there is none.
            BoardError: it is too short, or not one of this version.
        """
        fd = os.open(BOARD_NAME, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=dir_fd)
        try:
            size = os.fstat(fd).st_size
            if size != BOARD_BYTES:
                raise BoardError(
                    f"the board has {size} bytes where this version has {BOARD_BYTES}; {_REMEDY}"
                )
            board = cls(mmap.mmap(fd, BOARD_BYTES), _key(os.fstat(fd)))
        finally:
            os.close(fd)
        header = tuple(board.words[: len(_HEADER)])
        if header != _HEADER:
            board.close()
            what = (
                "is not a flockwire board"
                if header[0] != _MAGIC
                else f"has layout {header[1]}, not {_LAYOUT}"
            )
            raise BoardError(f"the board {what}; {_REMEDY}")
        return board

    def record(self, slot: int) -> Record:
        """The record of a slot, 0 to 255 (the full ones are 0 to 95)."""
        return self._records[slot]

    def full_words(self) -> bytes:
        """Epochs, interest versions and states of all full slots: unequal to an earlier answer when any has changed."""
        return self._memory[_FULL : _FULL + _FULL_BYTES]

    def live_full_slots(self) -> list[tuple[int, int]]:
        """(slot, epoch) of every full slot that is not FREE."""
        base = _FULL // _WORD
        states = self.words[base + 2 * FULL_SLOTS : base + 3 * FULL_SLOTS].tolist()
        return [
            (slot, self.words[base + slot])
            for slot, state in enumerate(states)
            if 0 < state <= SlotState.DRAINING
        ]

    def used_slots(self) -> list[int]:
        """Every slot, publishers' too, that is not FREE."""
        full = _FULL // _WORD + 2 * FULL_SLOTS
        rest = _REST // _WORD + 2 * PUBLISHER_SLOTS
        states = [*self.words[full : full + FULL_SLOTS], *self.words[rest : rest + PUBLISHER_SLOTS]]
        return [slot for slot, state in enumerate(states) if 0 < state <= SlotState.DRAINING]

    def credit_index(self, receiver: int, sender: int) -> int:
        """Where in :attr:`words` the cell is that says what ``receiver`` (a full slot) has processed of ``sender``."""
        return (_CREDITS + (receiver * SLOTS + sender) * _WORD) // _WORD

    def clear_credits(self, slot: int) -> None:
        """Forget what the previous owner of a full slot had processed."""
        start = _CREDITS + slot * SLOTS * _WORD
        self._memory[start : start + SLOTS * _WORD] = bytes(SLOTS * _WORD)

    def map_offset(self, slot: int) -> int:
        """Where in :attr:`memory` the interest map of a full slot begins."""
        return _MAPS + slot * _MAP_BYTES

    @property
    def memory(self) -> mmap.mmap:
        """The bytes themselves; indexing one gives an int."""
        return self._memory

    def clear_map(self, slot: int) -> None:
        """All interest of a full slot away."""
        start = self.map_offset(slot)
        self._memory[start : start + _MAP_BYTES] = bytes(_MAP_BYTES)

    def is_named(self, dir_fd: int) -> bool:
        """True while the directory still has this very board, not a successor's."""
        try:
            return _key(os.stat(BOARD_NAME, dir_fd=dir_fd, follow_symlinks=False)) == self._key
        except FileNotFoundError:
            return False

    def close(self) -> None:
        """Unmap; the file stays."""
        self._records = []
        self.words.release()
        self.signed.release()
        self._view.release()
        self._memory.close()


_REMEDY = "stop what uses this directory and remove it, or name another one"
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


def _key(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


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
