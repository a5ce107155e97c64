"""Whose the runtime directory is: ours alone, whatever the umask and whoever was there first."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ipc import runtime as module
from ipc.board import BOARD_NAME
from ipc.rules import Rules
from ipc.runtime import (
    RuntimeDir,
    RuntimeDirError,
    default_runtime_dir,
)


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
