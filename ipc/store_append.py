"""The store on the event loop: what one turn of the loop appends shares a transaction, and nobody waits for a lock.

Stands between the workers and ``store.py``. `Appender.append` queues; at the next turn of the loop all that is queued
goes into one transaction, in order, and each caller is told its position. When another process has the append lock,
everything waits in the queue (bounded in number and bytes) and is tried again a moment later; what has waited two
seconds fails with `StoreBusy`. Presence and everything else that writes goes the same way and keeps its place.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NoReturn, TypeVar

from ipc.store import RECOVERY_BYTES, Entry, Position, Recovery, Store, StoreBusy, StoreError, StoreFull
from ipc.store_writer import Writer

T = TypeVar("T")
Done = Callable[[Any], None]

# Half a millisecond is meant; the event loops count whole ones, and uvloop would take 0.0005 for "at once".
RETRY_SECONDS = 0.001
BUSY_SECONDS = 2.0
"""So long an append waits for the lock before it fails."""
MAX_WAITING = 100_000
MAX_WAITING_BYTES = 16 << 20
_BATCH = 1000
_BATCH_BYTES = 4 << 20
_MAINTENANCE_SECONDS = 1.0
_WORK_BYTES = 256

_log = logging.getLogger("ipc")

# What is to be done, who is told, its weight in bytes.
_Item = tuple[Entry | Callable[[Writer], Any], Done, int]


class Appender:
    """The queue before a store's append lock: one per process and store, used on one event loop.

    Args:
        store: must stay open until this is closed.
        loop: the running loop.
        max_waiting, max_waiting_bytes: the bounds of the queue.
    """

    def __init__(
        self,
        store: Store,
        loop: asyncio.AbstractEventLoop,
        *,
        max_waiting: int = MAX_WAITING,
        max_waiting_bytes: int = MAX_WAITING_BYTES,
    ) -> None:
        self.store = store
        self.waiting_bytes = 0
        self._loop = loop
        self._max_waiting = max_waiting
        self._max_bytes = max_waiting_bytes
        self._queue: deque[_Item] = deque()
        self._taken = 0  # how many ever left the queue
        # When the lock was busy, and how many had ever come by then.
        self._tries: deque[tuple[float, int]] = deque()
        self._flush_handle: asyncio.Handle | None = None
        self._maintenance: asyncio.TimerHandle | None = None
        self._closed = False
        self.together: tuple[type[Any], Callable[[Any, list[Any]], None]] = (type(None), _nobody)
        """A type of callbacks, and who is to be called once for many of them with their results, in order."""

    @property
    def waiting(self) -> int:
        """How many appends and other writes wait."""
        return len(self._queue)

    def append(self, what: Entry | Callable[[Writer], Any], done: Done) -> None:
        """Store an entry soon. ``done`` is called once, from the loop, with its `Position` or a `StoreError`.

        In place of an entry may stand any other change: then it is called inside the transaction, and ``done`` with its
        result.

        Entries of one appender are stored, and their callers told, in the order of the calls. ``done`` must not raise.

        Raises:
            StoreBusy: too much waits already; ``done`` will not be called.
        """
        queue = self._queue
        size = len(what.data) + len(what.info) + len(what.tags) if isinstance(what, Entry) else _WORK_BYTES
        waiting = self.waiting_bytes + size
        if self._closed or (queue and (len(queue) >= self._max_waiting or waiting > self._max_bytes)):
            self._refuse()
        self.waiting_bytes = waiting
        queue.append((what, done, size))
        if self._flush_handle is None:
            self._flush_handle = self._loop.call_soon(self._flush)

    def append_future(self, entry: Entry) -> asyncio.Future[Position]:
        """As :meth:`append`, as a future."""
        future: asyncio.Future[Position] = self._loop.create_future()
        self._start(future, lambda done: self.append(entry, done))
        return future

    def write_future(self, work: Callable[[Writer], T]) -> asyncio.Future[T]:
        """As :meth:`write`, as a future."""
        future: asyncio.Future[T] = self._loop.create_future()
        self._start(future, lambda done: self.append(work, done))
        return future

    def _start(self, future: asyncio.Future[Any], begin: Callable[[Done], None]) -> None:
        def done(result: Any) -> None:
            if future.cancelled():
                return
            if isinstance(result, Exception):
                future.set_exception(result)
            else:
                future.set_result(result)

        try:
            begin(done)
        except StoreError as error:
            future.set_exception(error)

    def _refuse(self) -> NoReturn:
        if self._closed:
            raise StoreError("the store is closed")
        raise StoreBusy(
            f"{len(self._queue)} messages already wait for the store ({self.waiting_bytes} bytes)"
        )

    # The queue -------------------------------------------------------------------------------------------------

    def _flush(self) -> None:
        self._flush_handle = None
        queue = self._queue
        if len(queue) <= _BATCH and self.waiting_bytes <= _BATCH_BYTES:
            batch = list(queue)
            queue.clear()
            self._taken += len(batch)
            self.waiting_bytes = 0
        else:
            batch = self._take()
        alone = batch[0] if len(batch) == 1 else None
        try:
            if alone is None:
                results = self.store.transact(partial(_run, batch))
            else:
                result = self.store.transact(alone[0])
        except StoreBusy as error:
            self._busy(batch, error)
            return
        except Exception as error:
            self._one_by_one(batch, error)
        else:
            if alone is None:
                self._tell_all(batch, results)
            else:
                self._tell(alone, result)
        if not self._queue:
            self._tries.clear()
        elif self._flush_handle is None:
            self._flush_handle = self._loop.call_soon(self._flush)

    def _take(self) -> list[_Item]:
        """Take from the queue what one transaction can hold without stopping the loop for long."""
        queue = self._queue
        batch: list[_Item] = []
        size = 0
        while queue and len(batch) < _BATCH and (not batch or size + queue[0][2] <= _BATCH_BYTES):
            item = queue.popleft()
            size += item[2]
            batch.append(item)
        self._taken += len(batch)
        self.waiting_bytes -= size
        return batch

    def _put_back(self, batch: list[_Item]) -> None:
        self._queue.extendleft(reversed(batch))
        self._taken -= len(batch)
        self.waiting_bytes += sum(item[2] for item in batch)

    def _busy(self, batch: list[_Item], error: StoreBusy) -> None:
        """The append lock was held: keep everything, try again in a moment, and give up what has waited too long."""
        self._put_back(batch)
        now = self._loop.time()
        self._tries.append((now, self._taken + len(self._queue)))
        old = 0
        while self._tries and self._tries[0][0] <= now - BUSY_SECONDS:
            old = self._tries.popleft()[1] - self._taken
        given_up = [self._queue.popleft() for _ in range(old)]
        self._taken += len(given_up)
        for item in given_up:
            self.waiting_bytes -= item[2]
            self._tell(item, StoreBusy(f"{error} for {BUSY_SECONDS:g} s"))
        if self._queue and self._flush_handle is None:
            self._flush_handle = self._loop.call_later(RETRY_SECONDS, self._flush)

    def _one_by_one(self, batch: list[_Item], error: Exception) -> None:
        """A transaction failed: find out whose fault it was, so that the others do not suffer."""
        if len(batch) == 1:
            self._tell(batch[0], _failure(error))
            return
        for place, item in enumerate(batch):
            try:
                result = self.store.transact(item[0])
            except StoreBusy:
                self._put_back(batch[place:])
                return
            except Exception as own_error:
                if place == 0 and isinstance(own_error, StoreFull):
                    # Not one that was too large among others that would fit: there is no room.
                    for each in batch:
                        self._tell(each, own_error)
                    return
                result = _failure(own_error)
            self._tell(item, result)

    def _tell_all(self, batch: list[_Item], results: list[Any]) -> None:
        """Tell everybody whose write was committed in one transaction; runs of one kind together."""
        kind, tell = self.together
        dones = []
        for item in batch:
            if type(item[1]) is not kind:
                break
            dones.append(item[1])
        else:
            tell(dones, results)
            return
        for item, result in zip(batch, results, strict=True):
            self._tell(item, result)

    def _tell(self, item: _Item, result: object) -> None:
        try:
            item[1](result)
        except Exception:
            _log.exception("a callback of the store's queue failed")

    # Housekeeping ----------------------------------------------------------------------------------------------

    def start_maintenance(self) -> None:
        """Do the store's housekeeping (`Store.maintain`) about once a second from now on."""
        self._maintenance = self._loop.call_later(_MAINTENANCE_SECONDS, self._maintain)

    def _maintain(self) -> None:
        more = self.store.maintain()
        self._maintenance = self._loop.call_later(
            RETRY_SECONDS if more else _MAINTENANCE_SECONDS, self._maintain
        )

    def close(self) -> None:
        """Store what waits if the lock is free now; what cannot be stored fails. The store stays open."""
        if self._maintenance is not None:
            self._maintenance.cancel()
        self._closed = True
        while self._queue:
            waiting = len(self._queue)
            self._flush()
            if len(self._queue) == waiting:
                break
        if self._flush_handle is not None:
            self._flush_handle.cancel()
        while self._queue:
            self._tell(self._queue.popleft(), StoreError("the store was closed before this could be stored"))
        self.waiting_bytes = 0


async def recover(
    store: Store,
    channel: str,
    patterns: str | Iterable[str],
    epoch: str,
    offset: int,
    limit_bytes: int = RECOVERY_BYTES,
) -> Recovery:
    """As `Store.recover`, giving the loop a turn about every millisecond."""
    steps = store.recover_steps(channel, patterns, epoch, offset, limit_bytes)
    while True:
        try:
            next(steps)
        except StopIteration as end:
            recovery: Recovery = end.value
            return recovery
        await asyncio.sleep(0)


def _run(batch: list[_Item], writer: Writer) -> list[Any]:
    append = writer.append
    results = []
    for what, _, _ in batch:
        results.append(append(what) if type(what) is Entry else what(writer))  # type: ignore[operator]
    return results


def _nobody(dones: Any, results: list[Any]) -> None:
    pass


def _failure(error: Exception) -> Exception:
    return error if isinstance(error, StoreError) else StoreError(f"this cannot be stored: {error}")
