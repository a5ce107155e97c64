"""The store's files: where they lie, how they are opened, the append lock, and what happens when they are unreadable.

Stands below ``store.py``. In the directory that was given (the runtime directory or ``--data-dir``) lie::

    store.lock          the append lock: nobody begins a write transaction without it
    store/data.mdb      LMDB's data
    store/lock.mdb      LMDB's table of readers, and its own mutex
    store.unreadable/   the last store that could not be read, as it was found
"""

from __future__ import annotations

import errno
import logging
import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fcntl import LOCK_EX, LOCK_NB, LOCK_UN, flock

import lmdb
import msgspec

from ipc import store_map
from ipc.store_reader import read_top
from ipc.store_records import LAYOUT, STATE_KEY, StoreBusy, StoreError, StoreFull, StoreState

MIN_STORE_SIZE = 1 << 20
DEFAULT_STORE_SIZE = 256 << 20
_LOCK_NAME = "store.lock"
_STORE_NAME = "store"
_ASIDE_NAME = "store.unreadable"
# One page of LMDB's reader table holds 64 readers; 16 pages are more than there are slots on the board.
_READER_TABLE_BYTES = 65_536
_MAX_READERS = 1000
_LOOSE_PAGES = 64
_TRY = LOCK_EX | LOCK_NB
_SYNC_SECONDS = 1.0

_log = logging.getLogger("ipc")


def default_store_size(directory: str) -> int:
    """The default of ``--store-size``: 256 MiB, or half of what is free in the directory's file system if less."""
    status = os.statvfs(directory)
    return max(MIN_STORE_SIZE, min(DEFAULT_STORE_SIZE, status.f_bavail * status.f_frsize // 2))


class AppendLock:
    """The lock without which nobody begins a write transaction. Never waits.

    A ``flock`` falls when its holder dies, however that happens, and costs half of what a POSIX record lock does. It
    belongs to the opened file: a forked child closes its copy (:meth:`forget`), and a mutex keeps threads apart.
    """

    def __init__(self, directory: str) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        self._fd = os.open(os.path.join(directory, _LOCK_NAME), flags, 0o600)
        self._mutex = threading.Lock()

    def acquire(self) -> bool:
        """Take the lock; False when another process or thread has it."""
        if not self._mutex.acquire(False):
            return False
        try:
            flock(self._fd, _TRY)
        except OSError:
            self._mutex.release()
            return False
        return True

    def release(self) -> None:
        """Let go of the lock, which this thread holds."""
        flock(self._fd, LOCK_UN)
        self._mutex.release()

    @contextmanager
    def between_threads(self) -> Iterator[None]:
        """While no other thread of this process has the lock.

        Raises:
            StoreBusy: one has it.
        """
        if not self._mutex.acquire(False):
            raise StoreBusy("another thread is writing to the store")
        try:
            yield
        finally:
            self._mutex.release()

    def acquire_within(self, seconds: float) -> None:
        """Take the lock, trying for some time: for the start only, never on an event loop that serves clients.

        Raises:
            StoreBusy: it was held all the time.
        """
        deadline = time.monotonic() + seconds
        while not self.acquire():
            if time.monotonic() > deadline:
                raise StoreBusy(f"another process has held the store's append lock for {seconds:g} s")
            time.sleep(0.001)  # the kernel can wait for a lock only without a time-out

    def close(self) -> None:
        """Close the file; a lock that is held is released."""
        os.close(self._fd)

    def forget(self) -> None:
        """In a forked child: do not keep the parent's lock when the parent has died."""
        os.close(self._fd)
        self._fd = -1


class Files:
    """The opened files of one store; made under the append lock."""

    def __init__(self, directory: str, store_size: int | None, durable: bool) -> None:
        self.directory = directory
        self.durable = durable
        path = os.path.join(directory, _STORE_NAME)
        try:
            self.env, self.state = _open(path, store_size, durable)
        except (lmdb.Error, msgspec.MsgspecError, _UnreadableError) as error:
            if isinstance(error, lmdb.Error) and not _is_unreadable(error):
                raise _open_error(path, error) from error
            self._move_aside(path, error)
            try:
                self.env, self.state = _open(path, store_size, durable)
            except lmdb.Error as again:
                raise _open_error(path, again) from again
        except OSError as error:
            raise _open_error(path, error) from error
        self._in_memory = _in_memory(path, durable)
        self._data = os.open(os.path.join(path, "data.mdb"), os.O_RDWR | os.O_CLOEXEC)
        self._path = path

    def _move_aside(self, path: str, error: Exception) -> None:
        aside = os.path.join(self.directory, _ASIDE_NAME)
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(path, aside)
        _log.error("the store %s is unreadable (%s); moved to %s, history begins anew", path, error, aside)

    def is_current(self) -> bool:
        """False when somebody has removed or replaced the store's files under our feet."""
        try:
            there = os.stat(os.path.join(self._path, "data.mdb"))
        except OSError:
            return False
        return os.path.samestat(there, os.fstat(self._data))

    @property
    def room_to_grow(self) -> int:
        """The bytes of a file that may become larger; 0 when it has its size already."""
        size = int(self.env.info()["map_size"]) if self._in_memory else self.state.size
        return size if size < self.state.size else 0

    def grow(self) -> bool:
        """Make room for "map full", up to the store's size; False when there is no more. See :func:`store_map.grow`."""
        return self._in_memory and store_map.grow(self.env, self._data, self.state.size)

    def follow(self) -> None:
        """Map what another process has made larger. See :func:`store_map.follow`."""
        if self._in_memory:
            store_map.follow(self.env, self._data)
        else:
            self.env.set_mapsize(0)

    def sync(self) -> None:
        """Wait until all that was committed is on the disk. For a thread; the event loop must not."""
        # Not Environment.sync(): it may exclude transactions of other threads while the disk is busy.
        os.fdatasync(self._data)

    def close(self) -> None:
        """Close what was opened; a second time nothing happens."""
        self.env.close()
        self.forget()

    def forget(self) -> None:
        """In a forked child: do not keep the parent's lock on the file when the parent has died."""
        data, self._data = self._data, -1
        if data >= 0:
            os.close(data)


class Syncer:
    """A thread that writes a store on disk through once a second, if something was committed."""

    def __init__(self, sync: Callable[[], None], directory: str) -> None:
        self.dirty = True
        self._sync = sync
        self._directory = directory
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="flockwire-store-sync", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        stopped = False
        while not stopped:
            stopped = self._stop.wait(_SYNC_SECONDS)
            if self.dirty:
                self.dirty = False
                try:
                    self._sync()
                except OSError as error:
                    _log.error("the store in %s could not be written through: %s", self._directory, error)

    def stop(self) -> None:
        """Write through once more and end."""
        self._stop.set()
        self._thread.join()


class _UnreadableError(Exception):
    """What was found is not a store of ours, or a damaged one."""


def _open(path: str, store_size: int | None, durable: bool) -> tuple[lmdb.Environment, StoreState]:
    os.makedirs(path, mode=0o700, exist_ok=True)
    _allocate_reader_table(os.path.join(path, "lock.mdb"))
    data = os.path.join(path, "data.mdb")
    length = os.stat(data).st_size if os.path.exists(data) else 0
    size = _page_multiple(store_size or default_store_size(path))
    in_memory = _in_memory(path, durable)
    env = lmdb.Environment(
        path,
        map_size=store_map.first_size(length, size) if in_memory else size,
        writemap=in_memory,
        mode=0o600,
        # On disk each commit flushes its data, so that a crash of the machine can undo the last ones but not tear
        # them; in memory there is nothing to flush.
        sync=durable,
        metasync=False,
        max_readers=_MAX_READERS,
        max_spare_txns=1,  # the reader slot is kept: reading takes no lock
        readahead=False,
    )
    try:
        env.reader_check()
        _check_length(env, data, length)
        if in_memory:
            store_map.allocate(data)
        state = _load_state(env, store_size, durable)
        if not in_memory and env.info()["map_size"] < state.size:
            env.set_mapsize(state.size)
        return env, state
    except BaseException:
        env.close()
        raise


def _in_memory(path: str, durable: bool) -> bool:
    return not durable and store_map.is_in_memory(path)


def _page_multiple(size: int) -> int:
    return max(MIN_STORE_SIZE, size) // 4096 * 4096


def _allocate_reader_table(path: str) -> None:
    """Give LMDB's table of readers its memory now: it is mapped, and a sparse one dies by SIGBUS on a full tmpfs."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        return
    try:
        os.posix_fallocate(fd, 0, _READER_TABLE_BYTES)
    except OSError:
        os.unlink(path)
        raise
    finally:
        os.close(fd)


def _check_length(env: lmdb.Environment, data: str, length: int) -> None:
    """Reading a data file that was cut off would end in SIGBUS. ``length``: bytes that it had before it was opened."""
    page = env.stat()["psize"]
    wanted = (env.info()["last_pgno"] + 1) * page
    missing = wanted - length if length else 0
    if missing > _LOOSE_PAGES * page:
        raise _UnreadableError(f"the last {missing} bytes of its file are missing")
    if missing > 0:
        # Pages that a transaction took and gave back are counted but never written.
        with open(data, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, wanted)
    with env.begin() as txn:
        read_top(txn)


def _load_state(env: lmdb.Environment, store_size: int | None, durable: bool) -> StoreState:
    """Read the state, or write that of a new store, and bring it up to date."""
    boot = _boot_id() if durable else ""
    with env.begin(write=True) as txn:
        found = txn.get(STATE_KEY)
        if found is None:
            if txn.stat()["entries"]:
                raise _UnreadableError("it holds something else")
            state = StoreState(epoch=_new_epoch(), size=0, boot=boot)
        else:
            state = _decode_state(found)
        wanted = _page_multiple(store_size or state.size or default_store_size(env.path()))
        if state.boot != boot:
            _after_reboot(txn, state, boot)
        state.size = wanted
        encoded = msgspec.msgpack.encode(state)
        if encoded != found:
            txn.put(STATE_KEY, encoded)
    return state


def _decode_state(found: bytes) -> StoreState:
    # Only the layout's number is the same in all versions.
    layout = msgspec.msgpack.decode(found, type=dict[str, msgspec.Raw]).get("layout")
    if layout is None or msgspec.msgpack.decode(layout, type=int) != LAYOUT:
        raise _UnreadableError("it was written by another version")
    return msgspec.msgpack.decode(found, type=StoreState)


def _after_reboot(txn: lmdb.Transaction[bytes], state: StoreState, boot: str) -> None:
    """The machine was started anew: unless the store was closed in order, its last transactions may be missing.

    Then clients may have seen offsets that will be given again, so what is left gets a new epoch.
    """
    if state.closed_at != read_top(txn):
        state.epoch = _new_epoch()
    state.boot = boot


def _new_epoch() -> str:
    return secrets.token_hex(4)


def _boot_id() -> str:
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return "unknown"


def _is_unreadable(error: lmdb.Error) -> bool:
    """Tell damage and foreign formats from a lack of room, rights or memory."""
    damage = (
        lmdb.InvalidError,
        lmdb.VersionMismatchError,
        lmdb.CorruptedError,
        lmdb.PageNotFoundError,
        lmdb.IncompatibleError,
    )
    return isinstance(error, damage)


def _open_error(path: str, error: Exception) -> StoreError:
    full = isinstance(error, lmdb.MapFullError | lmdb.DiskError) or (
        isinstance(error, OSError) and error.errno == errno.ENOSPC
    )
    kind = StoreFull if full else StoreError
    return kind(f"the store {path} cannot be opened: {error}")
