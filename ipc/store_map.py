"""The map of a store that lies in memory (tmpfs): written through, and never larger than what was set aside for it.

Stands below ``store_files.py``. LMDB may write pages with ``pwrite`` or through its map (``MDB_WRITEMAP``); the latter
takes a quarter of the time. But who touches a page of a map for which a full tmpfs has no room is killed with SIGBUS.
So the pages are allocated before they are mapped: the map ends where the file does, all of the file is allocated, and
LMDB's "map full" is the sign to allocate more, which on a full file system fails with words.

To map the file anew LMDB cuts or stretches it to the size of the map (``ftruncate``). So nobody follows while another
process makes the file larger (a ``flock`` on it, which those who follow share): it could cut off what was just added.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from fcntl import LOCK_EX, LOCK_NB, LOCK_SH, LOCK_UN, flock
from typing import TYPE_CHECKING

from ipc.store_records import StoreBusy

if TYPE_CHECKING:
    from lmdb import Environment

SMALLEST_STEP = 256 << 10
"""Bytes of a new store. A store grows by a quarter, by this at least."""
LARGEST_STEP = 8 << 20
"""And by this at most: the event loop stands still while pages are allocated, a millisecond or two."""
_LEAST = 64 << 10
"""Bytes that are tried last when the file system is nearly full."""
_WAIT = 0.005
"""Seconds that who reads waits for a process that is just making the file larger."""


def is_in_memory(path: str) -> bool:
    """True when a file or directory lies in a tmpfs, where allocated pages are there for good."""
    device = os.stat(path).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    try:
        with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as mounts:
            for line in mounts:
                # proc(5): id, parent, device, root, mount point, options, some optional fields, "-", type, ...
                fields = line.split(" ")
                if fields[2] == number:
                    return fields[fields.index("-") + 1] == "tmpfs"
    except OSError:
        pass
    return False


def first_size(length: int, bound: int) -> int:
    """How large the map is to be when the store is opened: as its file, or the first piece of a new one; bytes."""
    return max(-(-length // 4096) * 4096, min(bound, SMALLEST_STEP))


def allocate(path: str) -> None:
    """Give all of a file its pages.

    Raises:
        OSError: there is no room.
    """
    with open(path, "r+b") as file:
        os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)


def grow(env: Environment, fd: int, bound: int) -> bool:
    """Make the file and this process's map of it larger by a step; False when both are as large as they may be.

    Call it under the append lock, with no transaction open in this process.

    Raises:
        OSError: there is no room; everything is as it was.
        StoreBusy: another process is mapping it; try again.
    """
    with _locked(fd, LOCK_EX, 0):
        size = os.fstat(fd).st_size
        if size <= env.info()["map_size"]:
            if size >= bound:
                return False
            size += _allocate_more(fd, size, bound - size)
        env.set_mapsize(size)
    return True


def follow(env: Environment, fd: int) -> None:
    """Map all of the file, which another process has made larger. With no transaction open in this process.

    Raises:
        StoreBusy: a process has been making it larger for too long.
    """
    with _locked(fd, LOCK_SH, _WAIT):
        env.set_mapsize(os.fstat(fd).st_size)


def _allocate_more(fd: int, size: int, most: int) -> int:
    """Make a file of this size larger by at most so many bytes; returns by how many, or raises OSError."""
    step = min(max(size // 4, SMALLEST_STEP), LARGEST_STEP, most) // 4096 * 4096
    while True:
        try:
            os.posix_fallocate(fd, size, step)
            return step
        except OSError:
            if step <= _LEAST:
                raise
            step = max(step // 8192 * 4096, _LEAST)  # less may fit


@contextmanager
def _locked(fd: int, kind: int, wait: float) -> Iterator[None]:
    deadline = time.monotonic() + wait
    while True:
        try:
            flock(fd, kind | LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise StoreBusy("another process is making the store larger") from None
            time.sleep(0.0005)  # the kernel can wait for a lock only without a time-out
    try:
        yield
    finally:
        flock(fd, LOCK_UN)
