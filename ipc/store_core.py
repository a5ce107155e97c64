"""One store as this process has it open: the append lock, a transaction, the bound on its size.

Stands between ``store.py`` (what can be asked of the store) and ``store_writer.py`` (what happens in a transaction).
A write transaction is begun only under the append lock, which is never waited for. The bound is kept here too: what
is in use is looked at every 64 offsets, the oldest go when it is too much, and LMDB's "map full" or a full file
system ends in an exception that says so, after which the store is as it was.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import struct
import threading
import time
from collections.abc import Callable
from time import monotonic_ns
from types import TracebackType
from typing import Any, Self, TypeVar, overload

import lmdb
import msgspec

from ipc.store_changes import GRACE_SHARE
from ipc.store_files import AppendLock, Files, Syncer
from ipc.store_fold import FOLD_EVERY
from ipc.store_reader import read_state, read_top
from ipc.store_records import Entry, Position, StoreBusy, StoreError, StoreFull, StoreState
from ipc.store_writer import Cramped, Writer

T = TypeVar("T")

EVICT_ABOVE, EVICT_BELOW, MAKE_ROOM_ABOVE = 0.90, 0.88, 0.70
"""Shares of the store's size: where the oldest begin to go, where that ends, and what is never given up in need."""
# Removing one thing writes up to a dozen pages anew before it frees any: they must fit in what is kept in reserve.
_PAGES_PER_EVICTION = 16
_EVICT_PER_TRANSACTION = 256
_SMALL = 4 << 20
EVICT_ABOVE_IN_SMALL = 0.75
_MAKE_ROOM_ROUNDS = 16
_LARGE = 16_384
# What reading raises where the bytes are not what was written.
_DAMAGE = (UnicodeDecodeError, struct.error, msgspec.MsgspecError)

_log = logging.getLogger("ipc")


class StoreStats(StoreState, kw_only=True):
    """The store's state and what it takes: for the status, ``/readyz`` and the metrics."""

    top: int
    used: int
    """Bytes in use; free pages inside the file do not count."""
    trouble: str
    """Why the last write failed; empty when it did not."""


class StoreCore:
    """What :class:`ipc.store.Store` is built on."""

    def __init__(self, directory: str, store_size: int | None, durable: bool, wait: float) -> None:
        self.directory = directory
        self.since: tuple[memoryview | list[int], int] = ([0], 0)
        """Words and a place among them, on the board say: since when this process has or tries to get the append lock,
        in nanoseconds of the monotonic clock; 0 when it does not."""
        self.clock: Callable[[], float] = time.time
        """Seconds since 1970; tests replace it."""
        self.trouble = ""
        """Why the last write failed, empty when it did not (a busy lock is no failure). For ``/readyz``."""
        self.users = 1
        self._forked = False
        self._debt = 0
        self._broken = False
        self._durable = durable
        self._lock = AppendLock(directory)
        self._reading = threading.RLock()
        """Held while this process reads: the map must not change meanwhile."""
        try:
            self._lock.acquire_within(wait)
            try:
                self._open_files(store_size)
            finally:
                self._lock.release()
        except BaseException:
            self._lock.close()
            raise
        self._syncer = Syncer(lambda: self._files.sync(), directory) if durable else None

    @classmethod
    def open(
        cls, directory: str, *, store_size: int | None = None, durable: bool = False, wait: float = 2.0
    ) -> Self:
        """Open the store of a directory, or make it. May block for ``wait`` seconds: call it at the start, in a thread.

        Args:
            directory: the runtime directory or ``--data-dir``; ``/proc/self/fd/N`` will do.
            store_size: the bound in bytes; None takes that of the existing store, or the default.
            durable: on disk; survives a crash of the machine but for the last second.
            wait: how long to wait for a process that holds the append lock.

        Raises:
            StoreBusy: the append lock was held all the time.
            StoreFull: no room in the file system.
            StoreError: it cannot be opened for another reason. (Damage is no reason: what cannot be read is moved
                aside, and a new store begins with a new epoch.)
        """
        with _registry_mutex:
            try:
                os.makedirs(directory, mode=0o700, exist_ok=True)
                status = os.stat(directory)
                key = (status.st_dev, status.st_ino)
                known = _registry.get(key)
                if isinstance(known, cls):
                    known.users += 1
                    return known
                opened = cls(directory, store_size, durable, wait)
            except OSError as error:
                raise StoreError(f"the store in {directory} cannot be opened: {error}") from error
            _registry[key] = opened
            return opened

    def close(self) -> None:
        """One user less; the last one closes the files."""
        with _registry_mutex:
            self.users -= 1
            if self.users or self._forked:
                return
            for key in [key for key, store in _registry.items() if store is self]:
                del _registry[key]
        if self._syncer is not None:
            self._sign()
            self._syncer.stop()
        self._files.close()
        self._lock.close()

    def _sign(self) -> None:
        """Say in a store on disk that nothing is missing from it, so that its epoch survives a reboot."""

        def sign(writer: Writer) -> None:
            writer.state.closed_at = writer.top

        with contextlib.suppress(StoreError):  # then a reboot will cost the epoch
            self.transact(sign)

    def _open_files(self, store_size: int | None) -> None:
        self._files = Files(self.directory, store_size, self._durable)
        self._env = self._files.env
        self.epoch = self._files.state.epoch
        """The name of this incarnation of the store; positions of another one cannot be recovered."""
        self.size = self._files.state.size
        """The bound in bytes."""
        self._writer = Writer()
        self._writer.max_entry = self.size // 8
        self._writer.max_grace = self.size // GRACE_SHARE
        self._cramped = self._files.room_to_grow > 0
        """The file is or may be nearly used up: to be looked at before something is appended."""
        self._unmapped = False
        with self._read():
            pass  # takes the reader slot now, so that later reads take no lock

    # One transaction -------------------------------------------------------------------------------------------

    @overload
    def transact(self, work: Entry) -> Position: ...
    @overload
    def transact(self, work: Callable[[Writer], T]) -> T: ...
    def transact(self, work: Entry | Callable[[Writer], object]) -> object:
        """Run ``work`` in one write transaction, or append an entry. It may be run again from the beginning when room
        had to be made.

        What ``work`` raises undoes the transaction and is passed on.

        Raises:
            StoreBusy: another process is at it; try again.
            StoreFull: no room, although old entries went where they may.
            StoreError: LMDB failed.
        """
        words, place = self.since
        words[place] = monotonic_ns()
        try:
            if self._forked:
                raise StoreError("this store was opened before the fork and belongs to the parent process")
            lock = self._lock
            if not lock.acquire():
                raise StoreBusy("another process is writing to the store")
            try:
                if self._broken:
                    self._reopen()
                try:
                    result = self._attempt(work)
                except lmdb.MapFullError as error:
                    result = self._attempt_again(work, isinstance(error, Cramped))
            except lmdb.Error as error:
                raise self._failure(error) from error
            except _DAMAGE as error:
                raise self._fail(StoreError, f"the store in {self.directory} is damaged: {error}") from error
            finally:
                lock.release()
        finally:
            words[place] = 0
        if not self._writer.cramped:
            self.trouble = ""
        if self._syncer is not None:
            self._syncer.dirty = True
        return result

    def _attempt_again(self, work: Entry | Callable[[Writer], Any], cramped: bool) -> Any:
        try:
            while self._grow():
                with contextlib.suppress(lmdb.MapFullError):
                    return self._attempt(work)
        except StoreFull:
            if cramped:
                raise
            with contextlib.suppress(lmdb.MapFullError):
                for _ in range(2):
                    self._attempt(_touch)  # who deletes may need what the last transactions gave back
                return self._attempt(work)
            raise
        for _ in range(2):
            if not self._make_room():
                break
            with contextlib.suppress(lmdb.MapFullError):
                return self._attempt(work)
        raise self._fail(
            StoreFull,
            f"the store's {self.size} bytes are used up (--store-size), and nothing more may be removed",
        )

    def _grow(self) -> bool:
        try:
            return self._remap(self._files.grow)
        except OSError as error:
            raise self._fail(StoreFull, f"the file system of {self.directory} is full: {error}") from error

    def _remap(self, change: Callable[[], T]) -> T:
        """Map the file anew, while nobody in this process reads or writes."""
        try:
            with self._reading:
                return change()
        except lmdb.Error:
            self._broken = self._unmapped = True
            raise

    def _fail(self, kind: type[StoreError], words: str) -> StoreError:
        self.trouble = words
        return kind(words)

    def _attempt(self, work: Entry | Callable[[Writer], Any]) -> Any:
        writer = self._writer
        try:
            txn = self._env.begin(None, None, True)
        except lmdb.MapResizedError:
            self._remap(self._files.follow)
            txn = self._env.begin(None, None, True)
        try:
            txn_id = txn.id()
            writer.begin(txn, txn_id, int(self.clock() * 1000))
            if self._cramped:
                self._cramped = self._is_cramped(_used(txn))
            writer.cramped = self._cramped
            result = writer.append(work) if type(work) is Entry else work(writer)  # type: ignore[operator]
            if len(writer.pending) >= FOLD_EVERY:
                writer.fold()
            if writer.folded or writer.added > _LARGE or self._debt:
                self._keep_below_bound(writer)
            writer.commit(txn_id)
        except BaseException:
            txn.abort()
            raise
        return result

    def _failure(self, error: lmdb.Error) -> StoreError:
        """The exception for the caller, after a transaction failed for another reason than a full map."""
        # A write that the file system cut short is reported as EIO.
        if isinstance(error, lmdb.DiskError) or getattr(error, "code", 0) in (errno.EDQUOT, errno.EIO):
            return self._fail(StoreFull, f"the file system of {self.directory} is full: {error}")
        if isinstance(error, lmdb.PanicError):
            # LMDB could not write the page that makes a transaction valid (a full copy-on-write file system, say)
            # and refuses to go on with this environment; what is in the file is in order.
            self._broken = True
        return self._fail(StoreError, f"the store in {self.directory} failed: {error}")

    def _reopen(self) -> None:
        self._files.close()
        self._open_files(self.size)
        self._broken = False

    # The bound -------------------------------------------------------------------------------------------------

    def _keep_below_bound(self, writer: Writer) -> None:
        """Let the oldest go when the store is nearly full: a bounded number now, the rest with the next appends."""
        if writer.folded or writer.added > _LARGE:
            used = _used(writer.txn)
            self._cramped = self._is_cramped(used)
            above = _reserve_above(self.size)
            below = above - EVICT_ABOVE + EVICT_BELOW
            self._debt = used - int(self.size * below) if used > self.size * above else 0
            writer.folded = False
        writer.added = 0
        if self._debt > 0:
            removed = writer.evict(self._debt, self._evictions())
            self._debt = max(0, self._debt - removed) if removed else 0

    def _is_cramped(self, used: int) -> bool:
        """Whether a file that may grow has to, so that there is always something left to delete with: its file system
        may have no room then, and only deleting would help."""
        size = self._files.room_to_grow
        return size > 0 and used > size * _reserve_above(size)

    def _evictions(self, size: int = 0) -> int:
        """How many things one transaction may remove."""
        size = size or self.size
        reserve = int(size * (1 - _reserve_above(size))) // 4096
        return max(1, min(_EVICT_PER_TRANSACTION, reserve // _PAGES_PER_EVICTION))

    def _make_room(self) -> bool:
        """After "map full": remove old entries, in transactions that are small enough to fit in what is left."""
        limit = self._evictions()
        wanted = self.size // 50

        def remove(writer: Writer) -> int:
            if _used(writer.txn) <= self.size * MAKE_ROOM_ABOVE:
                return 0
            return writer.evict(wanted, limit)

        def fold(writer: Writer) -> int:
            writer.fold(limit)
            return len(writer.pending)

        removed = 0
        with contextlib.suppress(lmdb.Error):
            self._env.reader_check()
            # In small steps too, and before anything is evicted.
            while self._attempt(fold):
                removed += 1
            for _ in range(_MAKE_ROOM_ROUNDS):
                try:
                    now = self._attempt(remove)
                except lmdb.MapFullError:
                    limit //= 4
                    if not limit:
                        break
                    continue
                removed += now
                if not now or removed >= wanted:
                    break
            self._attempt(_touch)
        return removed > 0

    def maintain(self, limit: int = 256) -> bool:
        """Housekeeping, to be called about once a second in every process: it does what is due and returns.

        Trims idle topics by age, forgets what has expired, frees the reader slots of dead processes. Does nothing when
        another process is writing, or there is no room. Returns True when there is more to do at once.
        """

        if self._cramped:
            limit = min(limit, self._evictions(self._files.room_to_grow))

        def work(writer: Writer) -> bool:
            self._env.reader_check()
            return writer.expire(limit) >= limit

        try:
            return self.transact(work)
        except StoreError:
            return False

    # Reading ---------------------------------------------------------------------------------------------------

    def _read(self) -> _Reading:
        return _Reading(self)

    def _begin_read(self) -> lmdb.Transaction[bytes]:
        if self._unmapped:
            raise StoreError(
                "the store is not mapped: there was no address space or memory; it is opened again soon"
            )
        try:
            return self._env.begin()
        except lmdb.MapResizedError:
            # Another process has made it larger; to follow, no thread of this one may be writing.
            with self._lock.between_threads():
                self._remap(self._files.follow)
            return self._env.begin()

    def stats(self) -> StoreStats:
        """The store's state and its use of space."""
        with self._read() as txn:
            state = read_state(txn)
            return StoreStats(
                **{name: getattr(state, name) for name in state.__struct_fields__},
                top=read_top(txn),
                used=_used(txn),
                trouble=self.trouble,
            )

    def is_current(self) -> bool:
        """False when the files were removed or replaced from outside: then close and open again (a new epoch)."""
        return self._files.is_current()


class _Reading:
    """A read transaction as a context; LMDB's errors become `StoreError`."""

    __slots__ = ("_core", "_txn")

    def __init__(self, core: StoreCore) -> None:
        self._core = core

    def __enter__(self) -> lmdb.Transaction[bytes]:
        self._core._reading.acquire()
        try:
            self._txn = self._core._begin_read()
        except BaseException as error:
            self._core._reading.release()
            if isinstance(error, lmdb.Error):
                raise StoreError(f"the store cannot be read: {error}") from error
            raise
        return self._txn

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._txn.abort()
        self._core._reading.release()
        if isinstance(error, (lmdb.Error, *_DAMAGE)):
            raise StoreError(f"the store cannot be read: {error}") from error


def _touch(writer: Writer) -> None:
    """A transaction of nothing: pages become free only with one after that which gave them back."""
    _ = writer.state  # is written again


def _reserve_above(size: int) -> float:
    """The share of so many bytes above which the rest is kept to delete with: of small stores that is a larger part."""
    return EVICT_ABOVE if size >= _SMALL else EVICT_ABOVE_IN_SMALL


def _used(txn: lmdb.Transaction[bytes]) -> int:
    """Bytes of pages that hold something; free pages inside the file do not count."""
    stat = txn.stat()
    return (stat["branch_pages"] + stat["leaf_pages"] + stat["overflow_pages"]) * stat["psize"]


_registry: dict[tuple[int, int], StoreCore] = {}
_registry_mutex = threading.Lock()


def _after_fork() -> None:
    global _registry_mutex
    _registry_mutex = threading.Lock()
    for store in _registry.values():
        store._forked = True
        store._lock.forget()
        store._files.forget()
    _registry.clear()


os.register_at_fork(after_in_child=_after_fork)
