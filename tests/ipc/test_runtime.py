"""The runtime directory: who lives in it, and what is left of the dead."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from ipc import runtime as module
from ipc.board import BOARD_NAME, FULL_SLOTS, PUBLISHER_SLOTS, PeerKind, SlotState
from ipc.rules import Rules, TopicRule
from ipc.runtime import (
    DirectoryInUse,
    NoFreeSlot,
    RulesMismatch,
    RuntimeDir,
    RuntimeDirError,
    inbox_name,
)
from tests.ipc.residents import OTHER, Other, join, open_lock_files, other_process
from tests.support import until


def test_a_second_supervisor_is_refused_and_the_first_unharmed(tmp_path: Path) -> None:
    path = tmp_path / "hub"
    with other_process(path, "supervise") as first:
        board = (path / BOARD_NAME).stat().st_ino
        with pytest.raises(DirectoryInUse, match=f"pid {first.said[0]}"):
            RuntimeDir.supervise(str(path))
        assert (path / BOARD_NAME).stat().st_ino == board
        first.leave()
    RuntimeDir.supervise(str(path)).close()


def test_a_second_supervisor_in_the_same_process_is_refused_too(tmp_path: Path) -> None:
    # A process never blocks its own POSIX locks; the registry has to.
    with RuntimeDir.supervise(str(tmp_path / "hub")), pytest.raises(DirectoryInUse):
        RuntimeDir.supervise(str(tmp_path / "hub"))
    RuntimeDir.supervise(str(tmp_path / "hub")).close()


def test_a_supervisor_does_not_take_a_directory_from_a_living_peer(tmp_path: Path) -> None:
    path = tmp_path / "hub"
    with other_process(path) as peer:
        with pytest.raises(DirectoryInUse, match="slot 0"):
            RuntimeDir.supervise(str(path))
        peer.kill()
        with RuntimeDir.supervise(str(path)) as runtime:
            assert runtime.board.used_slots() == []
            assert sorted(os.listdir(path)) == [BOARD_NAME, module.LOCK_NAME]


def test_a_publisher_alone_does_not_keep_a_directory_and_notices(tmp_path: Path) -> None:
    path = tmp_path / "hub"
    publisher, slot = join(path, PeerKind.PUBLISHER)
    with publisher:
        assert slot >= FULL_SLOTS
        assert publisher.is_current()
        with RuntimeDir.supervise(str(path)):
            assert not publisher.is_current()


def test_processes_claim_different_slots_and_see_each_other(tmp_path: Path) -> None:
    path = tmp_path / "hub"
    runtime, slot = join(path)
    with runtime, other_process(path) as other:
        assert other.said[0] != slot
        assert runtime.living() == sorted([slot, other.said[0]])
        assert runtime.slot_is_locked(other.said[0])
        other.leave()
        assert runtime.living() == [slot]
        assert not runtime.slot_is_locked(other.said[0])
        assert runtime.reap_dead() == []


def test_a_killed_process_leaves_a_slot_that_any_other_frees(tmp_path: Path) -> None:
    path = tmp_path / "hub"
    runtime, mine = join(path)
    with runtime, other_process(path) as other:
        slot, epoch = other.said
        board = runtime.board
        offset = board.map_offset(slot)
        board.memory[offset + 5] = 0xFF
        version = board.full_words()
        other.kill()
        assert runtime.living() == [mine]
        assert board.record(slot).state is SlotState.READY
        assert runtime.reap_dead() == [(slot, epoch)]
        assert board.record(slot).state is SlotState.FREE
        assert board.memory[offset + 5] == 0
        assert board.full_words() != version
        assert not (path / inbox_name(slot, epoch)).exists()
        assert not runtime.slot_is_locked(slot)
        assert runtime.reap_dead() == []


def test_a_stopped_process_is_not_dead(tmp_path: Path) -> None:
    path = tmp_path / "hub"
    runtime, _ = join(path)
    with runtime, other_process(path) as other:
        os.kill(other.process.pid, signal.SIGSTOP)
        assert runtime.reap_dead() == []
        assert runtime.slot_is_locked(other.said[0])


def test_each_owner_of_a_slot_has_a_higher_epoch_and_the_longest_unused_comes_first(tmp_path: Path) -> None:
    path = tmp_path / "hub"
    keeper, _ = join(path)
    with keeper:
        seen = []
        for _ in range(2 * FULL_SLOTS):
            runtime, slot = join(path)
            seen.append((slot, runtime.board.record(slot).epoch))
            runtime.close()
        assert len(set(seen)) == len(seen)
        assert [slot for slot, _ in seen[: FULL_SLOTS - 1]] == list(range(1, FULL_SLOTS))
        assert max(epoch for _, epoch in seen) <= 4


@pytest.mark.parametrize(
    ("kind", "places"), [(PeerKind.WORKER, FULL_SLOTS), (PeerKind.PUBLISHER, PUBLISHER_SLOTS)]
)
def test_no_free_slot_says_so(tmp_path: Path, kind: PeerKind, places: int) -> None:
    path = tmp_path / "hub"
    with RuntimeDir.supervise(str(path)) as runtime:
        taken = [runtime.claim(kind) for _ in range(places)]
        assert len(set(taken)) == places
        with pytest.raises(NoFreeSlot, match=f"all {places} places"):
            RuntimeDir.join(str(path), kind)
        runtime.free(taken[7])
        assert runtime.claim(kind) == taken[7]


def test_a_directory_lock_that_is_not_let_go_is_an_error_in_time(tmp_path: Path) -> None:
    path = tmp_path / "hub"
    holder = RuntimeDir.enter(str(path))
    assert holder is not None
    with pytest.raises(RuntimeDirError, match="directory lock"):
        RuntimeDir.join(str(path), PeerKind.WORKER, timeout=0.1)
    holder.unlock_directory()
    holder.close()
    runtime, _ = RuntimeDir.join(str(path), PeerKind.WORKER, timeout=0.1)
    runtime.close()


def test_twenty_processes_at_once_get_twenty_slots_of_one_board(tmp_path: Path) -> None:
    path = tmp_path / "hub"
    others = [Other(path) for _ in range(20)]
    try:
        assert len({other.said for other in others}) == 20
        with RuntimeDir.open(str(path), create=False) as runtime:
            runtime.open_board()
            assert len(runtime.living()) == 20
    finally:
        for other in others:
            other.kill()


# -- leaving -------------------------------------------------------------------------------------------------------


def test_an_ordered_stop_removes_the_directory(tmp_path: Path) -> None:
    path = tmp_path / f"flockwire-{os.geteuid()}" / "8000"
    with RuntimeDir.supervise(str(path)) as runtime:
        runtime.agree(Rules())
        (path / inbox_name(3, 9)).touch()
        (path / module.PID_NAME).write_text("1")
        with socket.socket(socket.AF_UNIX) as control:
            control.bind(f"/proc/self/fd/{runtime.fd}/{module.CONTROL_NAME}")
        assert runtime.remove()
        assert not path.parent.exists(), "our directory of directories goes with its last hub"
        assert not runtime.remove(), "twice is no error"


def test_foreign_files_are_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "hub"
    with RuntimeDir.supervise(str(path)) as runtime:
        (path / "notes.txt").write_text("mine")
        (path / "i5").touch()
        assert not runtime.remove()
    assert sorted(os.listdir(path)) == ["i5", "notes.txt"]


def test_a_directory_others_live_in_stays(tmp_path: Path) -> None:
    path = tmp_path / "hub"
    with RuntimeDir.supervise(str(path)) as runtime:
        with other_process(path) as other:
            assert not runtime.remove()
            assert (path / BOARD_NAME).exists()
            other.leave()
        assert runtime.remove()


def test_who_waits_for_a_directory_that_is_removed_gets_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "hub"
    first = RuntimeDir.supervise(str(path))
    waiting = RuntimeDir.open(str(path))
    first.remove()
    first.close()
    assert waiting._locks.try_lock(0)
    assert not waiting.is_current()
    waiting.close()
    runtime, slot = RuntimeDir.join(str(path), PeerKind.WORKER)
    with runtime:
        assert runtime.is_current()
        assert runtime.board.record(slot).epoch == 1


def test_a_sweep_deletes_the_inboxes_of_the_dead_only(tmp_path: Path) -> None:
    path = tmp_path / "hub"
    runtime, slot = join(path)
    with runtime:
        for name in ("i3.1", f"i{slot}.77", "i300.1", "i1.x", "other"):
            (path / name).touch()
        assert set(runtime.sweep()) == {"i3.1", "i300.1", f"i{slot}.77"}
        assert {inbox_name(slot, 1), "i1.x", "other"} <= set(os.listdir(path))


@pytest.mark.parametrize("rounds", [8, pytest.param(100, marks=pytest.mark.long)])
def test_starting_and_killing_again_and_again_leaves_no_more_than_once(tmp_path: Path, rounds: int) -> None:
    path = tmp_path / "hub"
    (path.parent / "hub").mkdir(0o700)
    (path / "foreign").write_text("stays")
    for _ in range(rounds):
        command = [sys.executable, "-c", OTHER, str(path), "kill"]
        assert subprocess.run(command, timeout=30, stdout=subprocess.DEVNULL).returncode == -signal.SIGKILL
    runtime, slot = join(path)
    with runtime:
        assert sorted(os.listdir(path)) == [BOARD_NAME, "foreign", inbox_name(slot, 1), module.LOCK_NAME]
    assert (path / "foreign").read_text() == "stays"


# -- rules ---------------------------------------------------------------------------------------------------------


def test_the_first_writes_the_rules_and_others_must_agree(tmp_path: Path) -> None:
    rules = Rules(topics={"chat/#": TopicRule(publish="anyone")})
    with RuntimeDir.supervise(str(tmp_path / "hub")) as runtime:
        assert runtime.agree(None) == Rules()
        assert runtime.agree(rules) == rules
        assert runtime.agree(None) == rules
        assert runtime.agree(rules) == rules
        with pytest.raises(RulesMismatch, match="anyone") as caught:
            runtime.agree(Rules(topics={"chat/#": TopicRule(publish="nobody")}))
        assert "nobody" in str(caught.value)
        assert "chat/#" in str(caught.value)


def test_rules_that_cannot_be_read_are_an_error_in_words(tmp_path: Path) -> None:
    with RuntimeDir.supervise(str(tmp_path / "hub")) as runtime:
        (tmp_path / "hub" / module.RULES_NAME).write_text("{")
        with pytest.raises(RuntimeDirError, match="cannot be read"):
            runtime.agree(None)


def test_a_dead_hubs_rules_bind_nobody(tmp_path: Path) -> None:
    path = tmp_path / "hub"
    with RuntimeDir.supervise(str(path)) as runtime:
        runtime.agree(Rules(anonymous=False))
    with RuntimeDir.supervise(str(path)) as runtime:
        assert runtime.agree(Rules()) == Rules()


def test_the_directory_lock_is_free_after_every_failure(tmp_path: Path) -> None:
    path = tmp_path / "hub"
    with RuntimeDir.supervise(str(path)):
        os.truncate(path / BOARD_NAME, 100)
        for _ in range(2):
            with pytest.raises(RuntimeDirError, match="100 bytes"):
                RuntimeDir.join(str(path), PeerKind.WORKER, timeout=0.5)
    until(lambda: open_lock_files() == 0, 1)
