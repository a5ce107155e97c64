"""Where a federated message comes from: shards, the key of a message, and who has seen which.

Stands at every place that a message from another host passes twice at most once: in the bridge and in each receiving
process. Pure arithmetic, no I/O.

A publishing process numbers what it federates, one count per shard. So per (source, slot, epoch), where the source is
host and shard, the numbers have no holes: a number that was here before is a duplicate, a number left out is a message
that was lost on the way.
"""

from __future__ import annotations

from collections.abc import Iterable
from zlib import crc32

SHARDS = 16
"""Streams that the messages of a prefix are spread over; a topic of a channel is always on the same one."""
MAX_KEYS = 65536
"""Numbering processes that are remembered; beyond it the ones that were silent longest are forgotten."""

Origin = tuple[str, int, int, int]
"""(source, slot, epoch, sequence) of a federated message; the source is empty on the host it was published on."""
Key = tuple[str, int, int]
Mark = tuple[int, int, int]
"""(slot, epoch, highest sequence): how far one process of a host has come on a shard."""


def shard_of(channel: str, topic: str) -> int:
    """The shard of a topic, and with an empty topic that of the channel's broadcasts and direct messages."""
    return crc32(f"{channel}\0{topic}".encode("utf-8", "surrogatepass")) % SHARDS


def source(host: str, shard: int) -> str:
    """What numbers are counted by: a host (its id and start) and a shard."""
    return f"{host}:{shard}"


class Seen:
    """The highest sequence per key. Bounded."""

    def __init__(self, limit: int = MAX_KEYS) -> None:
        self._limit = limit
        self._highest: dict[Key, int] = {}
        self._complete: set[str] = set()

    def note(self, source: str, slot: int, epoch: int, sequence: int) -> int:
        """A message came; answers how many of its process are missing before it, or -1 when it was here before.

        Of a process never heard of nothing is missing, unless its source has told about all of its processes before:
        then this one began with number 1.
        """
        key = (source, slot, epoch)
        last = self._highest.pop(key, None)
        if last is None:
            if len(self._highest) >= self._limit:
                del self._highest[next(iter(self._highest))]
            last = 0 if source in self._complete else sequence - 1
        if sequence <= last:
            self._highest[key] = last
            return -1
        self._highest[key] = sequence
        return sequence - last - 1

    def mark(self, source: str, marks: Iterable[Mark], complete: bool) -> int:
        """A source has told how far it has come; answers how many messages are missing up to there.

        Args:
            source: the host and shard.
            marks: one per process of that host.
            complete: no process of the source is left out, so one not among them begins with number 1.
        """
        missing = 0
        for slot, epoch, sequence in marks:
            if (source, slot, epoch) in self._highest or source in self._complete:
                missing += max(0, self.note(source, slot, epoch, sequence) + 1) if sequence > 0 else 0
            elif sequence > 0:
                self.note(source, slot, epoch, sequence)
        if complete:
            if len(self._complete) >= self._limit:
                self._complete.clear()
            self._complete.add(source)
        return missing

    def snapshot(self) -> list[tuple[str, int, int, int]]:
        """All that is known, for :meth:`restore`."""
        return [(*key, sequence) for key, sequence in self._highest.items()]

    def complete_sources(self) -> list[str]:
        """The sources that have told about all of their processes."""
        return sorted(self._complete)

    def restore(self, known: Iterable[tuple[str, int, int, int]], complete: Iterable[str] = ()) -> None:
        """Take over what a predecessor knew."""
        for source, slot, epoch, sequence in known:
            self._highest[source, slot, epoch] = sequence
        self._complete.update(complete)

    def __len__(self) -> int:
        """Processes known."""
        return len(self._highest)
