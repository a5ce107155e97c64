"""What waits for one client, bounded in bytes, with the three policies for a client that reads too slowly. Pure.

Used by both kinds of sinks (``workers/sinks.py``). Every operation costs the same however much waits: a client that
stops reading must not slow down those who publish.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import Final, NamedTuple

from workers.fanout import SlowPolicy

#: Data below this size is joined with what waits before it, since an object for each would be larger than itself.
SMALL: Final = 512
#: Chunks of joined data end at this size.
CHUNK: Final = 16 * 1024


class Waiting(NamedTuple):
    """Something that waits for its client: one write's bytes, or one message where the policy may drop it."""

    data: bytes | bytearray
    policy: SlowPolicy = "close"
    topic: str = ""


class Backlog:
    """What waits for one client.

    Args:
        limit: bytes that may wait.
        joins: whether what is not to be dropped may be joined, for a stream of bytes rather than of messages.
    """

    __slots__ = (
        "_droppable",
        "_items",
        "_joins",
        "_newest",
        "_next",
        "_tail",
        "dropped",
        "kept",
        "limit",
        "size",
    )

    def __init__(self, limit: int, *, joins: bool = False) -> None:
        self._items: OrderedDict[int, Waiting] = OrderedDict()
        self._next = 0
        self._joins = joins
        self._tail: bytearray | None = None
        # Keys of what may be dropped, oldest first; some are gone already. For "latest", the one key of each topic.
        self._droppable: deque[int] = deque()
        self._newest: dict[str, int] = {}
        self.limit = limit
        self.size = 0
        self.dropped = 0
        #: How many wait that may not be dropped.
        self.kept = 0

    def __len__(self) -> int:
        return len(self._items)

    @property
    def items(self) -> list[Waiting]:
        """All that waits, in order."""
        return list(self._items.values())

    def add(self, item: Waiting, already: int = 0) -> bool:
        """Append ``item``; ``already`` bytes wait beneath us. False: over the limit and nothing may be dropped."""
        if item.policy == "close":
            self._append(item)
        else:
            if item.policy == "latest":
                replaced = self._newest.get(item.topic)
                if replaced is not None:
                    self._drop(replaced)
                self._newest[item.topic] = self._next
            self._tail = None
            self._droppable.append(self._next)
            self._put(item)
        while self.size + already > self.limit and self._droppable:
            self._drop(self._droppable.popleft())
        if len(self._droppable) > 64 + 2 * len(self._items):
            self._droppable = deque(key for key in self._droppable if key in self._items)
        return self.size + already <= self.limit

    def pop(self) -> Waiting:
        """Take out the oldest; its bytes count as waiting until :meth:`gone`."""
        key, item = self._items.popitem(last=False)
        if item.policy == "close":
            self.kept -= 1
        elif self._newest.get(item.topic) == key:
            del self._newest[item.topic]
        if not self._items:
            self._tail = None
            self._droppable.clear()
        return item

    def gone(self, item: Waiting) -> None:
        """What was popped has left."""
        self.size -= len(item.data)

    def take(self) -> list[bytes | bytearray]:
        """All that waits, in order; the backlog is empty afterwards."""
        data = [item.data for item in self._items.values()]
        self._items.clear()
        self._droppable.clear()
        self._newest.clear()
        self._tail = None
        self.size = self.kept = 0
        return data

    def _append(self, item: Waiting) -> None:
        if not self._joins or len(item.data) >= SMALL:
            self._tail = None
            self._put(item)
        elif self._tail is not None and len(self._tail) < CHUNK:
            self._tail += item.data
            self.size += len(item.data)
        else:
            self._tail = bytearray(item.data)
            self._put(Waiting(self._tail))

    def _put(self, item: Waiting) -> None:
        self._items[self._next] = item
        self._next += 1
        self.size += len(item.data)
        if item.policy == "close":
            self.kept += 1

    def _drop(self, key: int) -> None:
        item = self._items.pop(key, None)
        if item is not None:
            self.size -= len(item.data)
            self.dropped += 1
            if self._newest.get(item.topic) == key:
                del self._newest[item.topic]
