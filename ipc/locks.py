"""Byte-range locks of the runtime directory: who lives, told by the kernel and by nobody else.

Stands under ``runtime.py``. One file, one byte per lock: the kernel lets go of a byte however its owner dies, and
anybody may ask for the owner with ``F_GETLK``. Three traits of POSIX locks shape this module:

- they belong to the process, so taking one's own lock again *succeeds*: what this process holds is remembered here;
- closing **any** descriptor of the file drops **all** locks of the process on it: each file is opened once per
  process, found again by (device, inode), and closed only when its last user is gone;
- a forked child has none of its parent's locks: it forgets them at the fork.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import threading

# struct flock of Linux on 64-bit machines: type, whence, start, length, pid.
_FLOCK = struct.Struct("@hhqqi0q")

_BUSY = (errno.EACCES, errno.EAGAIN)


class LockFile:
    """One lock file as this process sees it. Made by :func:`open_lock_file` only; safe to use from several threads."""

    def __init__(self, fd: int, key: tuple[int, int]) -> None:
        self.key = key
        self._fds = [fd]
        self._held: set[int] = set()
        self._mutex = threading.Lock()
        self.users = 1

    def try_lock(self, byte: int) -> bool:
        """Take the lock on ``byte``; False when it is held, by another process or already by this one."""
        with self._mutex:
            if byte in self._held:
                return False
            try:
                fcntl.lockf(self._fds[0], fcntl.LOCK_EX | fcntl.LOCK_NB, 1, byte, os.SEEK_SET)
            except OSError as error:
                if error.errno in _BUSY:
                    return False
                raise
            self._held.add(byte)
            return True

    def unlock(self, byte: int) -> None:
        """Let go of ``byte``; nothing happens when this process does not hold it."""
        with self._mutex:
            if byte in self._held:
                self._held.discard(byte)
                fcntl.lockf(self._fds[0], fcntl.LOCK_UN, 1, byte, os.SEEK_SET)

    def holder(self, byte: int) -> int:
        """The pid of the process that holds ``byte`` (this one's too), 0 when nobody does.

        The pid is for messages to people; it is no identity (it is 0 or foreign across pid namespaces, where -1 is
        answered instead of 0 so that a held lock is never taken for a free one).
        """
        with self._mutex:
            if byte in self._held:
                return os.getpid()
            asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
            kind, _, _, _, pid = _FLOCK.unpack(fcntl.fcntl(self._fds[0], fcntl.F_GETLK, asked))
        return 0 if kind == fcntl.F_UNLCK else (pid or -1)

    def is_named(self, name: str, dir_fd: int) -> bool:
        """True while ``name`` in the directory still is this very file, not a removed one's successor."""
        return _key_of(name, dir_fd) == self.key

    def release(self) -> None:
        """One user less; the last one closes the file, which drops whatever locks are left."""
        with _registry_mutex:
            self.users -= 1
            if self.users == 0:
                if _files.get(self.key) is self:
                    del _files[self.key]
                self._close()

    def _close(self) -> None:
        with self._mutex:
            self._held.clear()
            for fd in self._fds:
                os.close(fd)
            self._fds = [-1]


_files: dict[tuple[int, int], LockFile] = {}
_registry_mutex = threading.Lock()


def open_lock_file(name: str, dir_fd: int, *, create: bool = True) -> LockFile:
    """The lock file ``name`` of a directory, made when missing (0600). Pair with :meth:`LockFile.release`.

    Raises:
        FileNotFoundError: it is missing and ``create`` is false.
        OSError: it cannot be opened, or is a symbolic link.
    """
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | (os.O_CREAT if create else 0)
    with _registry_mutex:
        key = _key_of(name, dir_fd)
        known = _files.get(key) if key else None
        if known is not None:
            known.users += 1
            return known
        fd = os.open(name, flags, 0o600, dir_fd=dir_fd)
        status = os.fstat(fd)
        key = (status.st_dev, status.st_ino)
        known = _files.get(key)
        if known is not None:
            # Renamed into place between the two calls: closing this descriptor would drop our locks.
            known._fds.append(fd)
            known.users += 1
            return known
        os.fchmod(fd, 0o600)
        opened = _files[key] = LockFile(fd, key)
        return opened


def _key_of(name: str, dir_fd: int) -> tuple[int, int] | None:
    try:
        status = os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino


def _forget_after_fork() -> None:
    """In a forked child: the locks stayed with the parent, so the descriptors are of no use here."""
    global _registry_mutex
    _registry_mutex = threading.Lock()
    for file in _files.values():
        file._mutex = threading.Lock()
        for fd in file._fds:
            os.close(fd)
        file._fds = [-1]
        file._held.clear()
    _files.clear()


os.register_at_fork(after_in_child=_forget_after_fork)
