"""Locks of POSIX and their traps."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path

from ipc import runtime as module
from ipc.locks import open_lock_file
from ipc.runtime import (
    RuntimeDir,
)
from tests.ipc.residents import join, open_lock_files, other_process


def test_closing_one_of_two_users_keeps_the_locks(tmp_path: Path) -> None:
    # Closing any descriptor of a file drops all locks the process has on it.
    path = tmp_path / "hub"
    runtime, slot = join(path)
    with runtime:
        for _ in range(3):
            RuntimeDir.open(str(path)).close()
        with other_process(path) as other:
            assert other.said[0] != slot
            other.leave()


def test_a_forked_child_has_no_locks_and_harms_none(tmp_path: Path) -> None:
    # In a process of its own: this one has threads, of pytest.
    code = """
import os, sys
from ipc.board import PeerKind, SlotState
from ipc.runtime import RuntimeDir
runtime, slot = RuntimeDir.join(sys.argv[1], PeerKind.APPLICATION)
runtime.board.record(slot).state = SlotState.READY
pid = os.fork()
if pid == 0:
    runtime.close()
    child = RuntimeDir.open(sys.argv[1], create=False)
    child.open_board()
    assert child.slot_is_locked(slot)
    assert child.reap_dead() == []
    other, another = RuntimeDir.join(sys.argv[1], PeerKind.APPLICATION)
    assert another != slot
    other.close()
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
assert runtime.board.record(slot).state is SlotState.READY
assert RuntimeDir.join(sys.argv[1], PeerKind.APPLICATION)[1] != slot
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "hub")], timeout=30, check=True)


def test_a_removed_and_recreated_directory_is_another_one(tmp_path: Path) -> None:
    path = tmp_path / "hub"
    old, _ = join(path)
    for file in path.iterdir():
        file.unlink()
    path.rmdir()
    new, slot = join(path)
    with old, new:
        assert not old.is_current()
        assert new.is_current()
        assert new.living() == [slot]
    assert open_lock_files() == 0


def test_descriptors_do_not_grow(tmp_path: Path) -> None:
    def cycle() -> int:
        runtime, _ = join(tmp_path / "hub")
        runtime.close()
        runtime.close()
        return len(os.listdir("/proc/self/fd"))

    gc.collect()
    first = cycle()
    assert max(cycle() for _ in range(20)) <= first
    assert open_lock_files() == 0


def test_the_holder_of_a_lock_is_named_by_its_pid(tmp_path: Path) -> None:
    path = tmp_path / "hub"
    with other_process(path, "supervise") as other:
        fd = os.open(path, os.O_RDONLY)
        file = open_lock_file(module.LOCK_NAME, fd)
        assert file.holder(1) == other.said[0]
        assert file.holder(0) == 0
        assert not file.try_lock(1)
        assert file.try_lock(99)
        assert not file.try_lock(99)
        assert file.holder(99) == os.getpid()
        file.unlock(99)
        assert file.holder(99) == 0
        file.release()
        os.close(fd)
