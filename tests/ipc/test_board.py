"""The board: layout, single words, guarded identities, and hostile contents."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ipc import layout
from ipc.board import (
    BOARD_BYTES,
    BOARD_NAME,
    FULL_SLOTS,
    NOBODY,
    SLOTS,
    Board,
    BoardError,
    Counter,
    PeerKind,
    SlotState,
)
from tests.support import until


@pytest.fixture
def dir_fd(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path, os.O_RDONLY)
    yield fd
    os.close(fd)


@pytest.fixture
def board(dir_fd: int) -> Iterator[Board]:
    created = Board.create(dir_fd)
    yield created
    created.close()


def test_what_one_writes_the_other_reads(board: Board, dir_fd: int) -> None:
    other = Board.open(dir_fd)
    record, seen = board.record(5), other.record(5)
    assert record.begin(PeerKind.WORKER, 3) == 1
    assert other.record(5).state is SlotState.FREE, "nobody looks at it before its owner says so"
    record.state = SlotState.READY
    assert other.record(5).state is SlotState.READY
    assert seen.identity()[:4] == (PeerKind.WORKER, os.getpid(), 3, 1)
    assert (seen.kind, seen.pid, seen.listener, seen.epoch) == (PeerKind.WORKER, os.getpid(), 3, 1)
    record.add(Counter.BYTES_IN, 1 << 40)
    record.add(Counter.CONNECTIONS, 2)
    record.add(Counter.CONNECTIONS, -1)
    assert seen.get(Counter.BYTES_IN) == 1 << 40
    assert seen.get(Counter.CONNECTIONS) == 1
    assert seen.heartbeat > 0
    record.end()
    assert (seen.state, seen.kind, seen.pid, seen.epoch) == (SlotState.FREE, PeerKind.NONE, 0, 1)
    assert seen.get(Counter.CONNECTIONS) == 0, "a gauge ends with its owner"
    assert seen.get(Counter.BYTES_IN) == 1 << 40, "a counter does not"
    assert record.begin(PeerKind.TAIL) == 2
    assert seen.listener == -1
    other.close()


def test_every_slot_has_bytes_of_its_own(board: Board) -> None:
    """All that a slot's owner writes, and no two slots write the same byte."""
    written: set[int] = set()
    for slot in (0, 1, 50, 94, 95, 96, 97, 200, 254, 255):
        before = bytes(board.memory)
        record = board.record(slot)
        record.begin(PeerKind.WORKER, 1)
        record.state = SlotState.READY
        record.touch()
        for counter in Counter:
            record.set(counter, -1)
        if slot < FULL_SLOTS:
            offset = board.map_offset(slot)
            board.memory[offset] = board.memory[offset + layout.MAP_BYTES - 1] = 255
            for sender in (0, SLOTS - 1):
                board.words[board.credit_index(slot, sender)] = (1 << 64) - 1
        after = bytes(board.memory)
        mine = _differing(before, after)
        assert not mine & written
        assert min(mine) >= 4096
        written |= mine


def _differing(before: bytes, after: bytes) -> set[int]:
    found: set[int] = set()
    for start in range(0, len(before), 65536):
        if before[start : start + 65536] != after[start : start + 65536]:
            found |= {at for at in range(start, min(start + 65536, len(before))) if before[at] != after[at]}
    return found


def test_one_comparison_tells_that_membership_or_interest_has_changed(board: Board) -> None:
    seen = [board.full_words()]
    board.record(3).begin(PeerKind.WORKER)
    seen.append(board.full_words())
    board.record(3).state = SlotState.JOINING
    seen.append(board.full_words())
    board.record(3).touch()
    seen.append(board.full_words())
    board.record(3).end()
    seen.append(board.full_words())
    assert len(set(seen)) == 5
    board.record(200).begin(PeerKind.PUBLISHER)
    board.record(3).add(Counter.MESSAGES_IN)
    board.record(3).beat()
    assert board.full_words() == seen[-1], "publishers and counters do not make senders look again"


def test_slots_in_use_are_listed(board: Board) -> None:
    for slot in (0, 95, 96, 255):
        board.record(slot).begin(PeerKind.WORKER)
        board.record(slot).state = SlotState.READY
    assert board.used_slots() == [0, 95, 96, 255]
    assert board.live_full_slots() == [(0, 1), (95, 1)]


def test_a_new_owner_starts_without_its_predecessors_interest_and_credits(board: Board) -> None:
    record = board.record(7)
    record.begin(PeerKind.WORKER)
    board.memory[board.map_offset(7) + 100] = 1
    board.words[board.credit_index(7, 9)] = 12345
    board.words[board.credit_index(8, 9)] = 777
    record.end()
    assert board.memory[board.map_offset(7) + 100] == 0
    assert board.words[board.credit_index(7, 9)] == 12345, "the dead one's last word can still be read"
    record.begin(PeerKind.WORKER)
    assert board.words[board.credit_index(7, 9)] == 0
    assert board.words[board.credit_index(8, 9)] == 777


def test_the_file_is_private_and_really_allocated(board: Board, tmp_path: Path) -> None:
    status = (tmp_path / BOARD_NAME).stat()
    assert status.st_mode & 0o777 == 0o600
    assert status.st_size == BOARD_BYTES
    assert status.st_blocks * 512 >= BOARD_BYTES, "a sparse file on a full tmpfs ends the process by SIGBUS"


def test_no_room_is_an_error_and_leaves_nothing(
    dir_fd: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(fd: int, offset: int, size: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(BoardError, match="No space left"):
        Board.create(dir_fd)
    assert list(tmp_path.iterdir()) == []


def test_a_foreign_short_or_newer_file_is_refused_in_words(board: Board, dir_fd: int, tmp_path: Path) -> None:
    board.words[1] = 99
    with pytest.raises(BoardError, match="layout 99"):
        Board.open(dir_fd)
    board.words[0] = 5
    with pytest.raises(BoardError, match="not a flockwire board"):
        Board.open(dir_fd)
    os.truncate(tmp_path / BOARD_NAME, BOARD_BYTES - 1)
    with pytest.raises(BoardError, match=str(BOARD_BYTES - 1)):
        Board.open(dir_fd)
    (tmp_path / BOARD_NAME).unlink()
    with pytest.raises(FileNotFoundError):
        Board.open(dir_fd)
    os.mkfifo(tmp_path / BOARD_NAME)
    with pytest.raises(BoardError, match="0 bytes"):
        Board.open(dir_fd)


def test_hostile_contents_lead_nobody_astray(board: Board) -> None:
    random_bytes = random.Random(5).randbytes(layout.MAPS - 4096)
    board.memory[4096 : layout.MAPS] = random_bytes
    for slot in range(SLOTS):
        record = board.record(slot)
        assert isinstance(record.state, SlotState)
        assert record.identity() == NOBODY
        for counter in Counter:
            assert isinstance(record.get(counter), int)
    assert all(slot < FULL_SLOTS for slot, _ in board.live_full_slots())
    assert all(slot < SLOTS for slot in board.used_slots())


def test_a_writer_killed_in_the_middle_is_read_as_nobody_and_repaired(board: Board) -> None:
    record = board.record(4)
    record.begin(PeerKind.WORKER)
    assert record.identity() != NOBODY
    board.words[record._base] += 1
    board.words[record._base + 3] = 99
    assert record.identity() == NOBODY, "bounded tries, then nobody"
    record.begin(PeerKind.TAIL)
    assert record.identity().kind is PeerKind.TAIL
    assert board.words[record._base] % 2 == 0


def test_after_a_reset_of_its_sequence_a_torn_identity_is_still_noticed(board: Board) -> None:
    record = board.record(4)
    record.begin(PeerKind.WORKER)
    board.words[record._base + 3] ^= 1
    assert record.identity() == NOBODY, "the checksum says so where stores may be seen out of order"


# A writer rewrites one identity, and bumps one counter, as fast as it can; readers must see only what was written.
WRITER = """
import os, sys
from ipc.board import *
board = Board.open(os.open(sys.argv[1], os.O_RDONLY))
record = board.record(1)
print("up", flush=True)
value = 0
while os.getppid() == int(sys.argv[2]):
    value += 1
    record._write_identity(Identity(PeerKind(value % 6), value, value % 64, value, value))
    record.set(Counter.BYTES_IN, value << 31 | value)
"""


@pytest.mark.parametrize("reads", [20_000, pytest.param(2_000_000, marks=pytest.mark.long)])
def test_no_read_is_torn(board: Board, tmp_path: Path, reads: int) -> None:
    record = board.record(1)
    command = [sys.executable, "-c", WRITER, str(tmp_path), str(os.getpid())]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        try:
            assert writer.stdout
            assert writer.stdout.readline() == "up\n"
            until(lambda: record.identity() != NOBODY)
            stale = 0
            last = 0
            for _ in range(reads):
                value = record.get(Counter.BYTES_IN)
                assert value >> 31 == value & 0x7FFFFFFF
                identity = record.identity()
                if identity == NOBODY:
                    stale += 1
                    continue
                assert identity.pid == identity.epoch == identity.started_ns
                assert identity.kind == identity.pid % 6
                assert identity.listener == identity.pid % 64
                assert identity.pid >= last
                last = identity.pid
            assert stale < reads / 2, (
                "against a writer that never rests, bounded tries find a quiet moment mostly"
            )
        finally:
            writer.kill()
    record._write_identity(NOBODY._replace(pid=7))
    assert record.identity().pid == 7, "whoever comes next repairs what the killed writer left"
