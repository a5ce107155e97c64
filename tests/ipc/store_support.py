"""What the tests of the store share: a store with a clock of its own, other processes, a small file system."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from ipc.store import Entry, Position, Retention, Store
from ipc.store_changes import GRACE_MS

ROOT = Path(__file__).parent.parent.parent
KEEP = Retention(100)
GRACE = GRACE_MS / 1000


class Clock:
    """Seconds that go on only when they are told to."""

    def __init__(self, now: float = 1_000_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


@contextmanager
def opened(directory: Path | str, **options: object) -> Iterator[Store]:
    """A store that is closed at the end."""
    store = Store.open(str(directory), **options)  # type: ignore[arg-type]
    try:
        yield store
    finally:
        store.close()


def put(
    store: Store, topic: str, *data: bytes, keep: Retention = KEEP, channel: str = "hub", key: str = ""
) -> list[Position]:
    """Append messages to one topic."""
    return store.append([Entry(channel, topic, each, keep, key) for each in data])


def data_of(entries: Sequence[object]) -> list[bytes]:
    """The data of entries that were read."""
    return [entry.data for entry in entries]  # type: ignore[attr-defined]


@contextmanager
def process(script: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """A Python process that runs ``script``; it is killed at the end."""
    child = subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    try:
        yield child
    finally:
        child.kill()
        child.communicate()


def line(child: subprocess.Popen[str]) -> str:
    """The next line that a process prints; an error when it has ended."""
    assert child.stdout is not None
    found = child.stdout.readline()
    assert found, "the process ended early"
    return found.strip()


@pytest.fixture(name="tmp_path", params=["disk", "memory"])
def both_places(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A store is written through its map where it lies in memory, and by LMDB's own writes elsewhere."""
    if request.param == "disk":
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(prefix="fw-store-", dir="/dev/shm") as directory:
        yield Path(directory)


class AppendWord(list[int]):
    """In the place of the board's word "in append since": remembers what was written."""

    def __init__(self) -> None:
        super().__init__([0])
        self.told: list[str] = []

    @property
    def begun(self) -> int:
        """How many transactions were tried."""
        return self.told.count("begin")

    def __setitem__(self, place: Any, value: Any) -> None:
        self.told.append("begin" if value else "end")


@contextmanager
def small_file_system(path: Path, size: str) -> Iterator[Path]:
    """A tmpfs of its own; the test is skipped where that is not permitted."""
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "flockwire-test", str(path)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small tmpfs is not permitted here")
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True)
