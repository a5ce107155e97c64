"""The runtime directory: whose it is, who lives in it, and what is left of the dead."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import pytest

from ipc import runtime as module
from ipc.board import BOARD_NAME, FULL_SLOTS, PUBLISHER_SLOTS, PeerKind, SlotState
from ipc.locks import open_lock_file
from ipc.rules import Rules, TopicRule
from ipc.runtime import (
    DirectoryInUse,
    NoFreeSlot,
    RulesMismatch,
    RuntimeDir,
    RuntimeDirError,
    default_runtime_dir,
    inbox_name,
)
from tests.support import until


def join(path: Path, kind: PeerKind = PeerKind.APPLICATION) -> tuple[RuntimeDir, int]:
    runtime, slot = RuntimeDir.join(str(path), kind)
    runtime.board.record(slot).state = SlotState.READY
    (path / inbox_name(slot, runtime.board.record(slot).epoch)).touch()
    return runtime, slot


# What another process does: live in a directory (or supervise it) until its input ends, or kill itself.
OTHER = """
import os, sys
from pathlib import Path
from ipc.board import PeerKind, SlotState
from ipc.runtime import RuntimeDir, inbox_name
path, what = sys.argv[1:]
if what == "supervise":
    runtime = RuntimeDir.supervise(path)
    print(os.getpid(), 0, flush=True)
else:
    runtime, slot = RuntimeDir.join(path, PeerKind.WORKER, timeout=30)
    record = runtime.board.record(slot)
    record.state = SlotState.READY
    Path(path, inbox_name(slot, record.epoch)).touch()
    print(slot, record.epoch, flush=True)
if what == "kill":
    os.kill(os.getpid(), 9)
sys.stdin.read()
runtime.close()
"""


class Other:
    """Another process that lives in the directory until told otherwise."""

    def __init__(self, path: Path, what: str = "live") -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", OTHER, str(path), what],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    @cached_property
    def said(self) -> tuple[int, int]:
        assert self.process.stdout
        first, second = self.process.stdout.readline().split()
        return int(first), int(second)

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate(timeout=10)

    def leave(self) -> None:
        self.process.communicate(timeout=10)
        assert self.process.returncode == 0


@contextmanager
def other_process(path: Path, what: str = "live") -> Iterator[Other]:
    other = Other(path, what)
    try:
        assert other.said
        yield other
    finally:
        if other.process.returncode is None:
            other.kill()


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


# -- whose directory -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [0, 0o022, 0o077, 0o177, 0o777])
def test_everything_is_ours_alone_whatever_the_umask(tmp_path: Path, mask: int) -> None:
    path = tmp_path / "a" / "b" / "hub"
    with umask(mask):
        runtime = RuntimeDir.supervise(str(path))
    with runtime:
        assert [mode(place) for place in (path, path.parent, path.parent.parent)] == [0o700] * 3
        assert {mode(path / name) for name in os.listdir(path)} == {0o600}
        assert runtime.remove()
    assert not path.exists()


@pytest.mark.parametrize("wrong", [0o755, 0o770, 0o701, 0o500])
def test_a_directory_open_to_others_is_refused(tmp_path: Path, wrong: int) -> None:
    path = tmp_path / "hub"
    path.mkdir()
    path.chmod(wrong)
    with pytest.raises(RuntimeDirError, match=f"mode {wrong:04o}"):
        RuntimeDir.open(str(path))
    assert list(path.iterdir()) == []


def test_a_symbolic_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir(0o700)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(RuntimeDirError, match="symbolic link"):
        RuntimeDir.open(str(tmp_path / "link"))


@pytest.mark.parametrize("name", [module.LOCK_NAME, BOARD_NAME, module.RULES_NAME])
def test_a_symbolic_link_in_the_directory_is_not_followed(tmp_path: Path, name: str) -> None:
    path, victim = tmp_path / "hub", tmp_path / "victim"
    path.mkdir(0o700)
    victim.write_text("precious")
    (path / name).symlink_to(victim)
    if name == module.LOCK_NAME:
        with pytest.raises(RuntimeDirError, match="lock"):
            RuntimeDir.supervise(str(path))
    else:
        with RuntimeDir.supervise(str(path)) as runtime:
            runtime.agree(Rules())
            assert runtime.remove()
    assert victim.read_text() == "precious"


def test_a_file_in_place_of_the_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "hub").touch()
    with pytest.raises(RuntimeDirError, match="not a directory"):
        RuntimeDir.open(str(tmp_path / "hub"))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a directory of another user")
def test_a_directory_of_another_user_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "hub"
    path.mkdir(0o700)
    os.chown(path, 65534, 65534)
    with pytest.raises(RuntimeDirError, match="belongs to user 65534"):
        RuntimeDir.open(str(path))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a directory of another user")
def test_another_users_directory_under_our_well_known_name_is_refused(tmp_path: Path) -> None:
    parent = tmp_path / f"flockwire-{os.geteuid()}"
    parent.mkdir(0o777)
    os.chown(parent, 65534, 65534)
    with pytest.raises(RuntimeDirError, match="belongs to user 65534"):
        RuntimeDir.open(str(parent / "8000"))


def test_a_missing_directory_is_made_or_said_to_be_missing(tmp_path: Path) -> None:
    path = tmp_path / "none" / "hub"
    with pytest.raises(FileNotFoundError):
        RuntimeDir.open(str(path), create=False)
    assert not path.parent.exists()
    RuntimeDir.open(str(path)).close()
    assert path.is_dir()


def test_a_reader_makes_no_file(tmp_path: Path) -> None:
    path = tmp_path / "hub"
    path.mkdir(0o700)
    with pytest.raises(FileNotFoundError):
        RuntimeDir.open(str(path), create=False)
    assert list(path.iterdir()) == []


def test_the_default_directory_is_private_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    uid = os.geteuid()
    if os.access("/dev/shm", os.W_OK):
        assert default_runtime_dir(8000) == f"/dev/shm/flockwire-{uid}/8000"
        assert default_runtime_dir() == f"/dev/shm/flockwire-{uid}/default"
    real = os.path.isdir
    monkeypatch.setattr(os.path, "isdir", lambda path: path != "/dev/shm" and real(path))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert default_runtime_dir(80) == f"{tmp_path}/flockwire-{uid}/80"
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "none"))
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    assert default_runtime_dir(80) == f"{tmp_path}/flockwire-{uid}/80"


def test_importing_it_loads_neither_sockets_nor_loops() -> None:
    code = "import sys, ipc, ipc.runtime, ipc.board; print(*{'zmq', 'asyncio', 'lmdb'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True)
    assert out.stdout.split() == []


# -- who lives there -----------------------------------------------------------------------------------------------


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


# -- locks of POSIX and their traps ----------------------------------------------------------------------------------


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


def open_lock_files() -> int:
    from ipc import locks

    return len(locks._files)


def test_descriptors_do_not_grow(tmp_path: Path) -> None:
    def cycle() -> int:
        runtime, _ = join(tmp_path / "hub")
        runtime.close()
        runtime.close()
        return len(os.listdir("/proc/self/fd"))

    first = cycle()
    assert [cycle() for _ in range(20)] == [first] * 20
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
