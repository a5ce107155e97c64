"""For all tests: hypothesis without deadlines, and a look at what was left behind when all are done.

Every process that a test starts inherits a mark in its environment, however deep; whoever still runs at the end of the
session was forgotten. What tests put into shared memory bears the same mark.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path

import pytest
from hypothesis import settings

from tests.support import until

settings.register_profile("flockwire", deadline=None)
settings.load_profile("flockwire")

MARK = "FW_TEST_RUN"


def pytest_configure(config: pytest.Config) -> None:
    """The first process of the session makes the mark; workers of pytest-xdist inherit it."""
    os.environ.setdefault(MARK, secrets.token_hex(6))


def marked_processes() -> list[str]:
    """Processes of this session that are neither pytest nor its workers."""
    mark = f"{MARK}={os.environ[MARK]}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
            if mark not in (entry / "environ").read_bytes().split(b"\0") or not command:
                continue
        except OSError:
            continue  # it ended meanwhile, or is another user's
        if "exec(eval(sys.stdin.readline()))" not in command:
            found.append(f"{entry.name}: {command[:120]}")
    return found


def marked_files() -> list[str]:
    """What bears the mark in shared memory."""
    shared = Path("/dev/shm")
    return [str(path) for path in shared.glob(f"*{os.environ[MARK]}*")] if shared.is_dir() else []


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Fail the session if a process or a directory was left behind."""
    if hasattr(session.config, "workerinput"):
        return
    try:
        until(lambda: not marked_processes() and not marked_files(), 5.0)
    except AssertionError:
        left = marked_processes() + marked_files()
        print("\nleft behind by the tests:\n  " + "\n  ".join(left))  # noqa: T201
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
