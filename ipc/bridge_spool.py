"""The spool: what a bridge has taken from the bus and Redis does not have yet.

Stands between the bridge's inbox and its connection to Redis. Pure: no clock, no socket.

Per shard there is a queue, and at most one entry of it is under way to Redis, so that order holds whatever fails. A
sender is given credit for a batch when Redis has all of it, and of all batches before it; so its window and outbox
bound what is here. Processes that only publish may end at any moment: theirs is taken at once, up to its own bound.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

from ipc.origins import SHARDS, Mark

Sender = tuple[int, int]
"""(slot, epoch) of the process that sent something to the bridge."""

ENTRY_BYTES = 64 * 1024
"""An entry of a stream is closed when it has so many bytes; a larger message is one of its own."""
ENTRY_MESSAGES = 512
UNBACKED_BYTES = 16 * 1024 * 1024
"""Bytes that may wait without a sender who keeps them: those of processes that only publish."""

_REMEMBERED = 4096
"""Processes of this host, the dead too, whose last number on a shard is remembered."""


class Item(NamedTuple):
    """One message for one shard, encoded."""

    shard: int
    encoded: bytes
    mark: Mark
    """Who numbered it, and the number."""


class Entry(NamedTuple):
    """What goes to one shard in one command."""

    shard: int
    messages: list[bytes]


class _Batch:
    """What a sender waits for."""

    __slots__ = ("left", "release")

    def __init__(self, left: int, release: Callable[[], None]) -> None:
        self.left = left
        self.release = release


class Spool:
    """Queues by shard. ``taken`` counts what Redis has, ``dropped`` what was given up."""

    def __init__(self, unbacked: int = UNBACKED_BYTES) -> None:
        self.bytes = 0
        self.taken = 0
        self.dropped = 0
        self._unbacked_limit = unbacked
        self._unbacked = 0
        self._queues: list[deque[tuple[bytes, Mark, _Batch | None]]] = [deque() for _ in range(SHARDS)]
        self._under_way = [0] * SHARDS
        self._batches: dict[Sender, deque[_Batch]] = {}
        self._done: list[dict[Sender, int]] = [{} for _ in range(SHARDS)]
        self._news: set[int] = set()

    def __len__(self) -> int:
        """Messages that wait."""
        return sum(map(len, self._queues))

    def take(self, sender: Sender, items: Sequence[Item], release: Callable[[], None]) -> None:
        """Take a batch in; ``release`` is called when Redis has it and every earlier one of this sender."""
        batch = _Batch(len(items), release)
        for shard, encoded, mark in items:
            self._queues[shard].append((encoded, mark, batch))
            self.bytes += len(encoded)
        self._batches.setdefault(sender, deque()).append(batch)
        self._release(sender)

    def take_unbacked(self, items: Sequence[Item]) -> None:
        """Take a batch in whose sender does not wait; what exceeds the bound is dropped and counted."""
        for shard, encoded, mark in items:
            if self._unbacked + len(encoded) > self._unbacked_limit:
                self.dropped += 1
                continue
            self._unbacked += len(encoded)
            self._queues[shard].append((encoded, mark, None))
            self.bytes += len(encoded)

    def round(self) -> list[Entry]:
        """The next entry of every shard that has something; they are under way until settled or rewound."""
        entries = []
        for shard, queue in enumerate(self._queues):
            if queue and not self._under_way[shard]:
                messages = _head(queue)
                self._under_way[shard] = len(messages)
                entries.append(Entry(shard, messages))
        return entries

    def settle(self, shard: int) -> int:
        """Redis has the entry of this shard that was under way; answers how many messages that is."""
        count, self._under_way[shard] = self._under_way[shard], 0
        queue, done = self._queues[shard], self._done[shard]
        finished = False
        for _ in range(count):
            encoded, (slot, epoch, sequence), batch = queue.popleft()
            self.bytes -= len(encoded)
            done.pop((slot, epoch), None)
            done[slot, epoch] = sequence
            if batch is None:
                self._unbacked -= len(encoded)
            else:
                batch.left -= 1
                finished = finished or not batch.left
        while len(done) > _REMEMBERED:
            del done[next(iter(done))]
        if count:
            self._news.add(shard)
        self.taken += count
        if finished:
            for sender in tuple(self._batches):
                self._release(sender)
        return count

    def rewind(self) -> None:
        """Whether Redis has what was under way is not known: it goes again."""
        self._under_way = [0] * SHARDS

    def _release(self, sender: Sender) -> None:
        """Give credit for the batches at the head that are finished."""
        batches = self._batches[sender]
        last = None
        while batches and not batches[0].left:
            last = batches.popleft()
        if not batches:
            del self._batches[sender]
        if last is not None:
            last.release()

    # -- how far we are --------------------------------------------------------------------------------------------

    def marks(self, shard: int) -> list[Mark]:
        """The highest number per process that Redis has of us on a shard."""
        return [(slot, epoch, sequence) for (slot, epoch), sequence in self._done[shard].items()]

    def news(self) -> list[int]:
        """The shards that have got messages since the last call."""
        found, self._news = sorted(self._news), set()
        return found

    def restore(self, marks: Sequence[Sequence[Mark]]) -> None:
        """What a predecessor has put to Redis."""
        for done, known in zip(self._done, marks, strict=False):
            done.update({(slot, epoch): sequence for slot, epoch, sequence in known})

    def give_up(self) -> int:
        """The end: what waits is dropped and counted; answers how many messages."""
        lost = len(self)
        self.dropped += lost
        self.bytes = self._unbacked = 0
        for queue in self._queues:
            queue.clear()
        self._batches.clear()
        self.rewind()
        return lost


def _head(queue: deque[tuple[bytes, Mark, _Batch | None]]) -> list[bytes]:
    messages: list[bytes] = []
    size = 0
    for encoded, _, _ in queue:
        if messages and (size + len(encoded) > ENTRY_BYTES or len(messages) >= ENTRY_MESSAGES):
            break
        messages.append(encoded)
        size += len(encoded)
    return messages
