"""The runtime directory: one private place on a host where the processes of a hub meet.

Stands before the way of a message: whoever wants on the bus goes through here for its slot, the board and the names of
the inboxes. The supervisor uses it without loading ZeroMQ or an event loop.

What holds:

- The directory is ours, 0700 and no symbolic link; its files are opened relative to its descriptor, so nobody can slip
  another directory under a process that has checked this one.
- Who lives is told by locks (``locks.py``): byte 0 of the lock file is the *directory lock*, held for the moments in
  which somebody joins, cleans or removes; byte 1 is the supervisor's; each slot has one more.
- Who holds a slot's lock is the one writer of that slot's bytes on the board. When an owner dies the kernel frees its
  lock, and the first process to see it takes the lock, clears up after it and lets go.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import time
from typing import TYPE_CHECKING

from ipc.agreement import RULES_NAME, RulesMismatch, agree
from ipc.board import BOARD_NAME, FULL_SLOTS, SLOTS, Board, BoardError, PeerKind, SlotState
from ipc.directory import (
    RuntimeDirError,
    default_runtime_dir,
    exists,
    is_directory,
    open_directory,
    user_directory,
)
from ipc.locks import LockFile, open_lock_file

if TYPE_CHECKING:
    from ipc.rules import Rules

__all__ = [
    "CONTROL_NAME", "LOCK_NAME", "PID_NAME", "RULES_NAME",
    "DirectoryInUse", "NoFreeSlot", "RulesMismatch", "RuntimeDir", "RuntimeDirError",
    "default_runtime_dir", "inbox_name", "locked_too_long", "shortcut_name",
]  # fmt: skip

logger = logging.getLogger("ipc")

LOCK_NAME = "lock"
CONTROL_NAME = "control.sock"
PID_NAME = "supervisor.pid"
HOST_NAME = "host"
BRIDGE_NAME = "bridge"
_BRIDGE_FILES = (HOST_NAME, f"{HOST_NAME}.new", BRIDGE_NAME, f"{BRIDGE_NAME}.new")
_OUR_FILES = (
    *_BRIDGE_FILES,
    CONTROL_NAME,
    PID_NAME,
    RULES_NAME,
    f"{RULES_NAME}.new",
    BOARD_NAME,
    f"{BOARD_NAME}.new",
    LOCK_NAME,
)
_STORE_FILES = ("store.lock", "store/data.mdb", "store/lock.mdb")
_STORE_DIRECTORIES = ("store", "store.unreadable")
_INBOX = re.compile(r"[id](\d{1,3})\.(\d{1,10})")

_DIRECTORY_BYTE = 0
_SUPERVISOR_BYTE = 1
_FIRST_SLOT_BYTE = 16

_RETRY = 0.005
"""Seconds between two looks at a directory lock that somebody holds; it is held for milliseconds."""
_OBSERVERS_LEAVE = 2.0
"""Seconds that an ordered stop waits for those who only look on; they look four times a second."""


class DirectoryInUse(RuntimeDirError):
    """Living processes use the directory already."""


class NoFreeSlot(RuntimeDirError):
    """As many processes as the board has room for are there."""


class RuntimeDir:
    """An open runtime directory, made by :meth:`open`, :meth:`join` or :meth:`supervise`; :meth:`close` gives it back.

    Useless in a forked child (the child opens its own); there :meth:`close` does nothing.
    """

    def __init__(self, path: str, fd: int, locks: LockFile) -> None:
        self.path = path
        self.fd = fd
        """Descriptor of the directory; the names of inboxes are relative to it."""
        self._locks = locks
        self._board: Board | None = None
        self._mine: set[int] = set()
        self._supervising = False
        self._pid = os.getpid()

    # -- opening ---------------------------------------------------------------------------------------------------

    @classmethod
    def open(cls, path: str, *, create: bool = True) -> RuntimeDir:
        """Open a directory after checking it; nothing is locked, cleaned or read yet.

        Raises:
            FileNotFoundError: it is missing and ``create`` is false.
            RuntimeDirError: it is not ours alone, or cannot be opened or made.
        """
        path = os.path.abspath(path)
        fd = open_directory(path, create)
        try:
            return cls(path, fd, open_lock_file(LOCK_NAME, fd, create=create))
        except FileNotFoundError:
            os.close(fd)
            raise
        except OSError as error:
            os.close(fd)
            raise RuntimeDirError(f"{path}/{LOCK_NAME}: {error.strerror}") from error

    @classmethod
    def enter(cls, path: str, *, create: bool = True) -> RuntimeDir | None:
        """Open a directory and take its directory lock, in one attempt; None when somebody holds it just now.

        Who gets a directory here must call :meth:`unlock_directory`.

        Raises:
            FileNotFoundError: it is missing and ``create`` is false.
            RuntimeDirError: see :meth:`open`.
        """
        runtime = cls.open(path, create=create)
        if runtime._locks.try_lock(_DIRECTORY_BYTE):
            if runtime.is_current():
                return runtime
            # It was removed between our opening it and our getting the lock: try again with what is there now.
            runtime.unlock_directory()
        runtime.close()
        return None

    @classmethod
    def join(
        cls,
        path: str,
        kind: PeerKind,
        *,
        listener: int | None = None,
        create: bool = True,
        timeout: float = 5.0,
    ) -> tuple[RuntimeDir, int]:
        """Enter a directory, clean it if nobody lives in it, and claim a slot there.

        Returns:
            The directory and the slot. The slot's state is FREE until its owner sets it.

        Raises:
            FileNotFoundError: it is missing and ``create`` is false.
            NoFreeSlot: every slot of this kind is taken.
            RuntimeDirError: see :meth:`open`; or the directory stayed locked for ``timeout`` seconds.
        """
        runtime = cls._enter_within(path, create, timeout)
        try:
            runtime.prepare()
            slot = runtime.claim(kind, listener)
        except BaseException:
            runtime.unlock_directory()
            runtime.close()
            raise
        runtime.unlock_directory()
        return runtime, slot

    @classmethod
    def supervise(cls, path: str, *, timeout: float = 5.0) -> RuntimeDir:
        """Take a directory as its supervisor: clean what a dead hub has left, make a new board.

        Raises:
            DirectoryInUse: another supervisor, or any process with an inbox, lives in it.
            RuntimeDirError: see :meth:`open`.
        """
        runtime = cls._enter_within(path, True, timeout)
        try:
            runtime._refuse_if_in_use()
            runtime._locks.try_lock(_SUPERVISOR_BYTE)
            runtime._supervising = True
            runtime._clean()
        except BaseException:
            runtime.unlock_directory()
            runtime.close()
            raise
        runtime.unlock_directory()
        return runtime

    @classmethod
    def _enter_within(cls, path: str, create: bool, timeout: float) -> RuntimeDir:
        deadline = time.monotonic() + timeout
        while True:
            runtime = cls.enter(path, create=create)
            if runtime is not None:
                return runtime
            if time.monotonic() > deadline:
                raise RuntimeDirError(locked_too_long(path, timeout))
            time.sleep(_RETRY)

    def unlock_directory(self) -> None:
        """Let go of the directory lock."""
        self._locks.unlock(_DIRECTORY_BYTE)

    def prepare(self) -> None:
        """Bring the directory into use; the directory lock is held.

        Nobody lives in it: what is there is swept away and a new board made. Somebody does: the board is opened and
        the dead are cleared away.

        Raises:
            RuntimeDirError: the board is none of ours, or there is no room for one.
        """
        if self._in_use():
            self._open_board()
            self.reap_dead()
            self.sweep()
        else:
            self._clean()

    def _in_use(self) -> bool:
        """Somebody with an inbox, or a supervisor, lives here. Publishers alone are none: they find the new board."""
        bytes_ = (_SUPERVISOR_BYTE, *range(_FIRST_SLOT_BYTE, _FIRST_SLOT_BYTE + FULL_SLOTS))
        return any(self._locks.holder(byte) for byte in bytes_) and exists(self.fd, BOARD_NAME)

    def _refuse_if_in_use(self) -> None:
        pid = self._locks.holder(_SUPERVISOR_BYTE)
        if pid:
            raise DirectoryInUse(
                f"{self.path} is in use by another supervisor{_by(pid)}; stop it or name another"
            )
        for slot in range(FULL_SLOTS):
            pid = self._locks.holder(_FIRST_SLOT_BYTE + slot)
            if pid:
                raise DirectoryInUse(
                    f"{self.path} is in use by a running process{_by(pid)} (slot {slot}); stop it or name another"
                )

    def _clean(self) -> None:
        for name in os.listdir(self.fd):
            ours = (CONTROL_NAME, PID_NAME, RULES_NAME, f"{RULES_NAME}.new", *_BRIDGE_FILES)
            if _INBOX.fullmatch(name) or name in ours:
                self._unlink(name)
        self._remove_store()
        try:
            self._board = Board.create(self.fd)
        except (BoardError, OSError) as error:
            raise RuntimeDirError(f"{self.path}: {error}") from error

    def _open_board(self) -> None:
        try:
            self._board = Board.open(self.fd)
        except FileNotFoundError:
            raise RuntimeDirError(f"{self.path} has no board: no hub was started in it") from None
        except (BoardError, OSError) as error:
            raise RuntimeDirError(f"{self.path}: {error}") from error

    def open_board(self) -> Board:
        """Map the board that is there, for a reader that claims no slot.

        Raises:
            RuntimeDirError: there is none, or it is none of ours.
        """
        if self._board is None:
            self._open_board()
        return self.board

    @property
    def board(self) -> Board:
        """The board of the directory, once joined, supervised or opened."""
        if self._board is None:
            raise RuntimeError("the board is not open yet")
        return self._board

    def is_current(self) -> bool:
        """True while this still is the directory, lock file and board that others find under this path."""
        try:
            there = os.stat(self.path)
        except OSError:
            return False
        here = os.fstat(self.fd)
        if (there.st_dev, there.st_ino) != (here.st_dev, here.st_ino) or not self._locks.is_named(
            LOCK_NAME, self.fd
        ):
            return False
        return self._board is None or self._board.is_named(self.fd)

    # -- slots -----------------------------------------------------------------------------------------------------

    def claim(self, kind: PeerKind, listener: int | None = None, *, slot: int | None = None) -> int:
        """Make a free slot ours and raise its epoch; the directory lock is held.

        The one that was used least often is taken, so that what a dead owner leaves on the board (how far it had
        come) can be read for long. ``slot`` asks for a certain one.

        Raises:
            NoFreeSlot: none is free.
        """
        slots = range(FULL_SLOTS, SLOTS) if kind is PeerKind.PUBLISHER else range(FULL_SLOTS)
        records = [self.board.record(number) for number in (slots if slot is None else (slot,))]
        for record in sorted(records, key=lambda record: record.epoch):
            if record.state is SlotState.FREE and self._locks.try_lock(_FIRST_SLOT_BYTE + record.slot):
                record.begin(kind, listener)
                self._mine.add(record.slot)
                return record.slot
        what = "publishers" if kind is PeerKind.PUBLISHER else "processes on the bus"
        raise NoFreeSlot(f"{self.path}: all {len(records)} places for {what} are taken; end one first")

    def free(self, slot: int) -> None:
        """Give a slot of ours back: nobody looks at it any more, its inbox is gone, its lock free."""
        if slot not in self._mine:
            return
        self._mine.discard(slot)
        self._vacate(slot)

    def _vacate(self, slot: int) -> None:
        record = self.board.record(slot)
        self._unlink(inbox_name(slot, record.epoch))
        self._unlink(shortcut_name(slot, record.epoch))
        record.end()
        self._locks.unlock(_FIRST_SLOT_BYTE + slot)

    def slot_is_locked(self, slot: int) -> bool:
        """True while the owner of a slot lives (ours too)."""
        return self._locks.holder(_FIRST_SLOT_BYTE + slot) != 0

    def living(self) -> list[int]:
        """Slots whose owners live and have shown themselves on the board."""
        return [slot for slot in self.board.used_slots() if self.slot_is_locked(slot)]

    def supervisor_lives(self) -> bool:
        """True while a supervisor holds this directory."""
        return self._locks.holder(_SUPERVISOR_BYTE) != 0

    def has_ended(self) -> bool:
        """True once nobody supervises this directory any more, or its hub is just being taken away."""
        return not self.supervisor_lives() or not exists(self.fd, CONTROL_NAME)

    def reap_dead(self) -> list[tuple[int, int]]:
        """Clear up after owners that died without giving their slot back; any process may do so at any time.

        Returns:
            (slot, epoch) of each one that this call has cleared.
        """
        reaped = []
        for slot in self.board.used_slots():
            byte = _FIRST_SLOT_BYTE + slot
            # Getting the lock proves that the owner is dead, and makes us the one writer of its bytes.
            if self._locks.holder(byte) or not self._locks.try_lock(byte):
                continue
            record = self.board.record(slot)
            if record.state is SlotState.FREE:
                # Another one was faster, between our look at the state and our getting the lock.
                self._locks.unlock(byte)
                continue
            reaped.append((slot, record.epoch))
            logger.info("slot %d: its process (epoch %d) is gone, the slot is free again", slot, record.epoch)
            self._vacate(slot)
        return reaped

    def sweep(self) -> list[str]:
        """Delete inboxes that belong to nobody alive; the directory lock is held or this is the supervisor."""
        removed = []
        for name in os.listdir(self.fd):
            match = _INBOX.fullmatch(name)
            if match and not self._is_live_inbox(int(match[1]), int(match[2])):
                self._unlink(name)
                removed.append(name)
        return removed

    def _is_live_inbox(self, slot: int, epoch: int) -> bool:
        return slot < FULL_SLOTS and self.board.record(slot).epoch == epoch and self.slot_is_locked(slot)

    def agree(self, rules: Rules | None) -> Rules:
        """The topic rules of the hub, see :func:`ipc.agreement.agree`; the directory lock is held."""
        return agree(self.fd, self.path, rules)

    def remove(self, *, timeout: float = 5.0) -> bool:
        """Delete the directory at an ordered stop; only names that are ours, and never through a link.

        Returns:
            False when others still live in it, or foreign files are: then what can go is gone and the directory stays.

        Raises:
            RuntimeDirError: the directory stayed locked for ``timeout`` seconds.
        """
        deadline = time.monotonic() + timeout
        for name in (CONTROL_NAME, PID_NAME):
            self._unlink(name)
        self._await_observers()
        while not self._locks.try_lock(_DIRECTORY_BYTE):
            if time.monotonic() > deadline:
                raise RuntimeDirError(locked_too_long(self.path, timeout))
            time.sleep(_RETRY)
        try:
            return self._remove()
        finally:
            self.unlock_directory()

    def _others(self) -> list[int]:
        return [slot for slot in range(FULL_SLOTS) if slot not in self._mine and self.slot_is_locked(slot)]

    def _await_observers(self) -> None:
        """Who only looks on (`tail`) sees that the hub has ended, and leaves."""
        deadline = time.monotonic() + _OBSERVERS_LEAVE
        while (others := self._others()) and time.monotonic() < deadline:
            if any(self.board.record(slot).identity().kind is not PeerKind.TAIL for slot in others):
                break
            time.sleep(_RETRY)

    def _remove(self) -> bool:
        if not self.is_current():
            return False
        others = self._others()
        if others:
            logger.info("%s stays: other processes still use it (slots %s)", self.path, others)
            return False
        for name in os.listdir(self.fd):
            if name in _OUR_FILES or _INBOX.fullmatch(name):
                self._unlink(name)
        self._remove_store()
        try:
            os.rmdir(self.path)
        except OSError as error:
            logger.warning("%s stays: %s", self.path, error.strerror)
            return False
        # The directory of this user in /dev/shm goes with its last hub.
        parent = os.path.dirname(self.path)
        if os.path.basename(parent) == user_directory():
            with contextlib.suppress(OSError):
                os.rmdir(parent)
        return True

    def _remove_store(self) -> None:
        """Delete history and presence kept in this directory: they live as long as the hub."""
        if is_directory(self.fd, "store.unreadable"):
            for name in os.listdir(f"/proc/self/fd/{self.fd}/store.unreadable"):
                self._unlink(f"store.unreadable/{name}")
        if is_directory(self.fd, "store"):
            for name in _STORE_FILES:
                self._unlink(name)
        elif exists(self.fd, _STORE_FILES[0]):
            self._unlink(_STORE_FILES[0])
        for name in _STORE_DIRECTORIES:
            if is_directory(self.fd, name):
                try:
                    os.rmdir(name, dir_fd=self.fd)
                except OSError as error:
                    logger.warning("%s/%s stays: %s", self.path, name, error.strerror)

    def _unlink(self, name: str) -> None:
        try:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name, dir_fd=self.fd)
        except OSError as error:
            logger.warning("%s/%s cannot be deleted: %s", self.path, name, error.strerror)

    def close(self) -> None:
        """Give back slots, board and descriptors; may be called twice. Nothing is deleted but our own inboxes."""
        if self.fd < 0 or os.getpid() != self._pid:
            return
        for slot in tuple(self._mine):
            self.free(slot)
        if self._supervising:
            self._locks.unlock(_SUPERVISOR_BYTE)
        if self._board is not None:
            self._board.close()
            self._board = None
        self._locks.release()
        os.close(self.fd)
        self.fd = -1

    def __enter__(self) -> RuntimeDir:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def inbox_name(slot: int, epoch: int) -> str:
    """The file name of an inbox, in the runtime directory."""
    return f"i{slot}.{epoch}"


def shortcut_name(slot: int, epoch: int) -> str:
    """The file name of the end of the short way to a peer (:mod:`ipc.shortcut`), in the runtime directory."""
    return f"d{slot}.{epoch}"


def locked_too_long(path: str, timeout: float) -> str:
    """The words for a directory lock that somebody does not let go."""
    return f"{path}: another process has held the directory lock for {timeout:g} s; is one of them stopped?"


def _by(pid: int) -> str:
    return f" (pid {pid})" if pid > 0 else ""
