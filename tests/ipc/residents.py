"""Who lives in a runtime directory, for the tests of it: here, and in other processes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

from ipc import locks
from ipc.board import PeerKind, SlotState
from ipc.runtime import (
    RuntimeDir,
    inbox_name,
)


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


def open_lock_files() -> int:
    """Lock files this process has open."""
    return len(locks._files)
