"""The store: history and presence of a host, in LMDB, shared by all its processes and surviving them.

On the way of a message whose topic has history it stands between the worker that received the message and the bus:
what is published is appended here first, under the next offset of the host, and only then sent. Whoever missed it
reads it here: a client that comes back, a worker that sees a gap.

This is the synchronous core, called on the event loop's thread. It never waits for a lock: a write transaction is
begun only under the append lock, and when that is held elsewhere the answer is `StoreBusy` at once. (Reading waits up
to 5 ms where another process is making the file larger, see ``store_map.py``.)
``store_append.py`` has the queue, the batches and the retries. Where things are: ``store_core.py`` opening, locking,
committing, the bound on the size; ``store_records.py`` what is stored and its bytes; ``store_window.py`` a topic's
record; ``store_writer.py`` appends, on ``store_changes.py`` a transaction, ``store_fold.py`` how the log gets into the
topics' records, ``store_upkeep.py`` what leaves; ``store_reader.py`` recovery, ``store_topic.py`` one topic;
``store_presence.py`` presence; ``store_files.py`` the files.

Rules: a Store is opened after the fork, never used in a forked child, and one process has one per directory
(`Store.open` counts). Presence belongs to the runtime directory's store even where ``--data-dir`` has the history: it
must not outlive the hub.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ipc import store_presence as presence
from ipc.store_core import StoreCore, StoreStats
from ipc.store_files import default_store_size
from ipc.store_presence import Present
from ipc.store_reader import Scan, Steps, read_top
from ipc.store_records import (
    Entry,
    EntryTooLarge,
    History,
    LogSlice,
    Position,
    Recovery,
    Retention,
    StoreBusy,
    StoredEntry,
    StoreError,
    StoreFull,
    UnrecoverablePosition,
    is_tombstone,
    log_key,
    number,
    stored_entry,
)
from ipc.store_topic import history_offsets, read_entry, read_window

__all__ = [
    "Entry",
    "EntryTooLarge",
    "History",
    "LogSlice",
    "Position",
    "Present",
    "Recovery",
    "Retention",
    "Store",
    "StoreBusy",
    "StoreError",
    "StoreFull",
    "StoreStats",
    "StoredEntry",
    "UnrecoverablePosition",
    "default_store_size",
]

RECOVERY_BYTES = 32 << 20
"""A recovery that would be larger is answered "not recovered"."""
HISTORY_CAP = 300
"""A page of history has at most so many entries."""


class Store(StoreCore):
    """The store of one directory in this process. Made by :meth:`open`."""

    # Writing ---------------------------------------------------------------------------------------------------

    def append(self, entries: Sequence[Entry]) -> list[Position]:
        """Store entries in one transaction, all or none; their positions in the same order.

        Raises as :meth:`transact`: `StoreBusy`, `StoreFull`, `StoreError`.
        """
        return self.transact(lambda writer: [writer.append(entry) for entry in entries])

    def clear(self, channel: str, topic: str) -> int:
        """Remove a topic's history; returns how many entries that were. Raises as :meth:`transact`."""
        return self.transact(lambda writer: writer.clear(channel, topic))

    # Reading ---------------------------------------------------------------------------------------------------

    def top(self) -> int:
        """The host's last offset; 0 when nothing was ever stored."""
        with self._read() as txn:
            return read_top(txn)

    def get(self, offset: int) -> StoredEntry | None:
        """The entry at an offset, or None when it is no longer kept."""
        with self._read() as txn:
            return read_entry(txn, offset)

    def read_since(self, offset: int, limit: int = 1000, limit_bytes: int = 4 << 20) -> LogSlice:
        """The host's log after an offset, all channels and topics, at most ``limit`` entries and ``limit_bytes``.

        For a worker that catches up: ``scanned`` is where to go on; it is ``top`` when all was read. Entries that have
        left their topic's window are among them for `GRACE_MS`: they were promised when they were acknowledged.
        """
        found: list[StoredEntry] = []
        with self._read() as txn:
            top = read_top(txn)
            cursor = txn.cursor()
            if top > offset and cursor.set_range(log_key(offset + 1)):
                for key, value in cursor.iternext():
                    if len(found) >= limit or limit_bytes <= 0:
                        return LogSlice(found, number(key) - 1, top)
                    if not is_tombstone(value):
                        found.append(stored_entry(number(key), value))
                        limit_bytes -= len(value)
        return LogSlice(found, max(top, offset), top)

    def recover(
        self,
        channel: str,
        patterns: str | Iterable[str],
        epoch: str,
        offset: int,
        limit_bytes: int = RECOVERY_BYTES,
    ) -> Recovery:
        """Everything after a position on the topics that match; complete, or "not recovered" and nothing.

        Args:
            channel: the broker channel.
            patterns: one topic or pattern, or several (then the union, each entry once).
            epoch: of the position; "" goes for any.
            offset: of the position: the last entry that the client has.
            limit_bytes: an answer larger than this is "not recovered".
        """
        steps = self.recover_steps(channel, patterns, epoch, offset, limit_bytes)
        while True:
            try:
                next(steps)
            except StopIteration as end:
                recovery: Recovery = end.value
                return recovery

    def recover_steps(
        self,
        channel: str,
        patterns: str | Iterable[str],
        epoch: str,
        offset: int,
        limit_bytes: int = RECOVERY_BYTES,
    ) -> Steps:
        """As :meth:`recover`, as a generator that yields about every millisecond and returns the answer."""
        if epoch not in ("", self.epoch):
            return Recovery(False, (), self.top(), self.epoch)
        wanted = (patterns,) if isinstance(patterns, str) else tuple(patterns)
        now = int(self.clock() * 1000)
        return (yield from Scan(self._read, channel, wanted, now, limit_bytes, self.epoch).steps(offset))

    def history(
        self,
        channel: str,
        topic: str,
        limit: int = 0,
        since: tuple[str, int] | None = None,
        reverse: bool = False,
        cap: int = HISTORY_CAP,
    ) -> History:
        """A page of one topic's history (centrifuge-protocol 3).

        Args:
            channel: the broker channel.
            topic: an exact topic.
            limit: 0 for the position alone, -1 for all up to ``cap``, else the first so many.
            since: (epoch, offset), exclusive: what came after it, or before it if ``reverse``; epoch "" is any.
            reverse: the newest first.
            cap: the most that is returned.

        Raises:
            UnrecoverablePosition: ``since`` is of another epoch.
            ValueError: ``reverse`` before offset 0.
        """
        if since is not None and since[0] not in ("", self.epoch):
            raise UnrecoverablePosition(f"epoch {since[0]!r} is gone, this is {self.epoch!r}")
        if since is not None and reverse and since[1] == 0:
            raise ValueError("nothing comes before offset 0: reverse needs a position, or none at all")
        count = cap if limit < 0 else min(limit, cap)
        found: list[StoredEntry] = []
        with self._read() as txn:
            top = read_top(txn)
            window = read_window(txn, channel, topic)
            if window is None:
                return History(found, top, 0, self.epoch)
            offsets = history_offsets(txn, window, int(self.clock() * 1000), since and since[1], reverse)
            while len(found) < count and (offset := next(offsets, 0)):
                entry = read_entry(txn, offset)
                if entry is not None:
                    found.append(entry)
        return History(found, top, window.top, self.epoch)

    # Presence --------------------------------------------------------------------------------------------------

    def presence_add(
        self, channel: str, topic: str, slot: int, epoch: int, client: str, user: str = "", info: bytes = b""
    ) -> bool:
        """Enter a subscriber of exactly this filter; False when it was there (its data are replaced).

        ``slot`` and ``epoch`` are the peer's that has the client; ``client`` is unique within it and filter.
        Raises as :meth:`transact`.
        """
        who = Present(client, user, info, slot, epoch)
        return self.transact(lambda writer: presence.add(writer.txn, channel, topic, who))

    def presence_remove(self, channel: str, topic: str, slot: int, epoch: int, client: str) -> Present | None:
        """Take a subscriber out; what was known of it, or None when it was not there. Raises as :meth:`transact`."""
        return self.transact(lambda writer: presence.remove(writer.txn, channel, topic, slot, epoch, client))

    def presence_reap(self, slot: int, epoch: int, limit: int = 500) -> list[tuple[str, str, Present]]:
        """Take out everybody whom a dead peer had: (channel, filter, subscriber), for the leave events.

        At most ``limit`` in one transaction: call it again until it returns nothing. Raises as :meth:`transact`.
        """
        return self.transact(lambda writer: presence.reap(writer.txn, slot, epoch, limit))

    def presence(self, channel: str, topic: str) -> list[Present]:
        """Who has subscribed to exactly this filter, on the whole host."""
        with self._read() as txn:
            return presence.read(txn, channel, topic)

    def presence_owners(self) -> list[tuple[int, int]]:
        """The peers (slot, epoch) that have anybody in presence: some may be dead."""
        with self._read() as txn:
            return presence.owners(txn)

    def presence_stats(self, channel: str, topic: str) -> tuple[int, int]:
        """How many clients, and how many different users, :meth:`presence` would list."""
        present = self.presence(channel, topic)
        return len(present), len({each.user for each in present})
