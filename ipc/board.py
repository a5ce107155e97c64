"""The board: memory that all processes of a host share, one mapped file in the runtime directory.

Stands beside the way of a message: a sender reads here who lives and who is interested, a receiver writes here how
far it has come (credits), everybody writes what it has counted, and the supervisor reads all of it.

Every byte has exactly one writer, the owner of its slot (who holds the slot's lock, see ``runtime.py``). Nothing on the
board is a pointer or a length, so hostile contents cannot lead a reader astray. ``layout.py`` says what is where,
``record.py`` is one slot's part.
"""

from __future__ import annotations

import mmap
import os

from ipc import layout
from ipc.layout import BOARD_BYTES, FULL_SLOTS, INTEREST_BITS, PUBLISHER_SLOTS, SLOTS
from ipc.record import GAUGES, NOBODY, Counter, Identity, PeerKind, Record, SlotState, fence

__all__ = [
    "BOARD_BYTES", "BOARD_NAME", "FULL_SLOTS", "GAUGES", "INTEREST_BITS", "NOBODY", "PUBLISHER_SLOTS", "SLOTS",
    "Board", "BoardError", "Counter", "Identity", "PeerKind", "Record", "SlotState", "fence",
]  # fmt: skip

BOARD_NAME = "board"
_REMEDY = "stop what uses this directory and remove it, or name another one"


class BoardError(Exception):
    """The board file is not one of ours, is damaged, or cannot be made. The text says which and what to do."""


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
        self._records = [Record(memory, self.words, self.signed, slot) for slot in range(SLOTS)]

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
            for index, value in enumerate(layout.HEADER):
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
        header = tuple(board.words[: len(layout.HEADER)])
        if header != layout.HEADER:
            board.close()
            what = (
                "is not a flockwire board"
                if header[0] != layout.MAGIC
                else f"has layout {header[1]}, not {layout.LAYOUT}"
            )
            raise BoardError(f"the board {what}; {_REMEDY}")
        return board

    def record(self, slot: int) -> Record:
        """The record of a slot, 0 to 255 (the full ones are 0 to 95)."""
        return self._records[slot]

    def full_words(self) -> bytes:
        """Epochs, interest versions and states of all full slots: unequal to an earlier answer when any has changed."""
        return self._memory[layout.FULL : layout.FULL + layout.FULL_BYTES]

    def live_full_slots(self) -> list[tuple[int, int]]:
        """(slot, epoch) of every full slot that is not FREE."""
        base = layout.FULL // layout.WORD
        states = self.words[base + 2 * FULL_SLOTS : base + 3 * FULL_SLOTS].tolist()
        return [
            (slot, self.words[base + slot])
            for slot, state in enumerate(states)
            if 0 < state <= SlotState.DRAINING
        ]

    def used_slots(self) -> list[int]:
        """Every slot, publishers' too, that is not FREE."""
        full = layout.FULL // layout.WORD + 2 * FULL_SLOTS
        rest = layout.REST // layout.WORD + 2 * PUBLISHER_SLOTS
        states = [*self.words[full : full + FULL_SLOTS], *self.words[rest : rest + PUBLISHER_SLOTS]]
        return [slot for slot, state in enumerate(states) if 0 < state <= SlotState.DRAINING]

    def credit_index(self, receiver: int, sender: int) -> int:
        """Where in :attr:`words` the cell is that says what ``receiver`` (a full slot) has processed of ``sender``."""
        return (layout.CREDITS + (receiver * SLOTS + sender) * layout.WORD) // layout.WORD

    def map_offset(self, slot: int) -> int:
        """Where in :attr:`memory` the interest map of a full slot begins."""
        return layout.MAPS + slot * layout.MAP_BYTES

    @property
    def memory(self) -> mmap.mmap:
        """The bytes themselves; indexing one gives an int."""
        return self._memory

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


def _key(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino
