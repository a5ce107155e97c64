"""The way out of a host: from the bridge's inbox through the spool to the streams in Redis.

Stands between the bus and Redis. Each round puts at most one entry per shard, all in one pipeline, and the next begins
when all of it is answered: so batches grow with the load, and order holds whatever fails. The length to which a stream
is trimmed follows from the size of our entries, so that a stream takes about the same memory for small and large ones.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import msgspec

from ipc import envelope as wire
from ipc.board import FULL_SLOTS, Counter, Record
from ipc.bridge_link import Command, Connection, takes_no_writes
from ipc.bridge_spool import Entry, Item, Spool
from ipc.envelope import TOPIC, Envelope, Header
from ipc.federation import LinkState
from ipc.origins import SHARDS, shard_of

STREAM_BYTES = 16 * 1024 * 1024
"""About so much of a stream is kept."""
SHORTEST, LONGEST = 256, 65536
"""Entries that are kept at least, and at most."""
_ENTRY_OVERHEAD = 100
_REMEMBERED = 16384
SOFT_PAUSE = 0.5
"""Seconds until the next attempt while Redis takes nothing."""

Say = Callable[[LinkState, str], None]


class WayOut:
    """Takes what comes from the bus, and writes it to Redis over one connection after the other."""

    def __init__(self, prefix: str, host: str, say: Say) -> None:
        self.spool = Spool()
        self.record: Record | None = None
        """Where to count, once the bridge is on the bus."""
        self.host = host
        self.is_first = True
        """No bridge of this host was before us: we know all of its numbers."""
        self._say = say
        self._keys = [f"{prefix}:{shard}" for shard in range(SHARDS)]
        self._sizes = [1024.0] * SHARDS
        self._shards: dict[tuple[str, str], int] = {}
        self._wake = asyncio.Event()
        self._counted = 0

    def take_in(self, header: Header, envelopes: list[Envelope], release: Callable[[], None]) -> None:
        """A batch from the bus; what is no message of this host's is left out."""
        items = [self._item(envelope) for envelope in envelopes if envelope.origin and not envelope.origin[0]]
        if header.slot >= FULL_SLOTS:
            self.spool.take_unbacked(items)
            release()
        else:
            self.spool.take((header.slot, header.epoch), items, release)
        self.show()
        self._wake.set()

    def _item(self, envelope: Envelope) -> Item:
        assert envelope.origin is not None
        envelope.offset = 0  # means nothing on another host
        key = (envelope.channel, envelope.topic if envelope.kind == TOPIC else "")
        shard = self._shards.get(key)
        if shard is None:
            if len(self._shards) >= _REMEMBERED:
                self._shards.clear()
            shard = self._shards[key] = shard_of(*key)
        return Item(shard, wire.encode(envelope), envelope.origin[1:])

    def show(self) -> None:
        """Put the figures on the board."""
        if self.record is not None:
            self.record.set(Counter.FEDERATION_SPOOL, self.spool.bytes)
            if self.spool.dropped != self._counted:
                self.record.add(Counter.FEDERATION_DROPPED, self.spool.dropped - self._counted)
                self._counted = self.spool.dropped

    async def run(self, connection: Connection) -> None:
        """Write until cancelled.

        Raises:
            RedisError, OSError, Silent: the connection is of no use any more.
        """
        self.spool.rewind()
        while True:
            self._wake.clear()
            entries = self.spool.round()
            if not entries:
                await self._wake.wait()
                continue
            answers = await connection.pipeline([self._command(entry) for entry in entries])
            await self._settle(entries, answers)

    def _command(self, entry: Entry) -> Command:
        body = wire.encode_array(entry.messages)
        mean = self._sizes[entry.shard] = self._sizes[entry.shard] * 0.9 + (len(body) + _ENTRY_OVERHEAD) * 0.1
        kept = min(max(int(STREAM_BYTES / mean), SHORTEST), LONGEST)
        return (
            "XADD", self._keys[entry.shard], "MAXLEN", "~", kept, "*", "h", self.host, "e", body,
        )  # fmt: skip

    async def _settle(self, entries: list[Entry], answers: list[object]) -> None:
        soft: Exception | None = None
        hard: Exception | None = None
        taken = 0
        for entry, answer in zip(entries, answers, strict=True):
            if not isinstance(answer, Exception):
                taken += self.spool.settle(entry.shard)
            elif takes_no_writes(answer):
                soft = answer
            else:
                hard = answer
        if self.record is not None:
            self.record.add(Counter.FEDERATION_OUT, taken)
        self.show()
        if hard is not None:
            raise hard
        if soft is not None:
            self.spool.rewind()
            self._say(LinkState.OUT_OF_MEMORY, str(soft))
            await asyncio.sleep(SOFT_PAUSE)
        elif taken:
            self._say(LinkState.READY, "")

    async def flush(self, bound: float) -> bool:
        """Wait until Redis has all; False when it has not within ``bound`` seconds."""
        try:
            async with asyncio.timeout(bound):
                # The last answers come on the loop; there is no event for "empty" on the way of each message.
                while len(self.spool):  # noqa: ASYNC110
                    await asyncio.sleep(0.005)
        except TimeoutError:
            return False
        return True

    def marks(self, shards: list[int]) -> list[Command]:
        """Commands that tell the others how far we have come, so that they see what they miss at the end, too."""
        return [
            (
                "XADD", self._keys[shard], "MAXLEN", "~", LONGEST, "*", "h", self.host,
                "m", msgspec.msgpack.encode((self.is_first, self.spool.marks(shard))),
            )
            for shard in shards
        ]  # fmt: skip
