"""The way in from other hosts: from the streams in Redis through the bridge onto the bus.

Stands between Redis and the bus. Own entries are skipped by the host's id, what was here before by its number; what the
numbers show to be missing is counted and logged.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import msgspec

from ipc import envelope as wire
from ipc.board import Counter, Record
from ipc.bridge_link import ANSWER_BOUND, Command, Connection
from ipc.bus import BusFull
from ipc.envelope import Envelope
from ipc.origins import SHARDS, Mark, Seen, source

logger = logging.getLogger("ipc")

BLOCK_MS = 1000
ENTRIES_AT_ONCE = 16
"""Entries of one shard in one answer."""
START = "0-0"

_marks_decoder = msgspec.msgpack.Decoder(tuple[bool, list[Mark]])


class Bus(Protocol):
    """What is wanted of a peer."""

    def publish(self, envelope: Envelope) -> None: ...
    async def accepted(self) -> None: ...


class WayIn:
    """Reads all shards over one connection after the other, from where it was."""

    def __init__(self, prefix: str, host_id: str) -> None:
        self.ids: list[str] = []
        """The last entry read, per shard; empty before it is known where to begin."""
        self.seen = Seen()
        self.record: Record | None = None
        self.echo = b""
        """The last of our own probes that came back."""
        self._host_id = host_id.encode()
        self.waiting: deque[Envelope] = deque()
        """Read, but the bus has no room for it just now."""
        self._keys = [f"{prefix}:{shard}" for shard in range(SHARDS)]
        self._probe = f"{prefix}:probe:{host_id}"
        self._probe_id = START
        self._missing: dict[str, int] = {}

    # -- where to begin --------------------------------------------------------------------------------------------

    async def find_place(self, connection: Connection) -> bool:
        """See that what is to be read next is there; at the very first time begin at the end of the streams.

        Returns:
            True when this was the first time.

        Raises:
            ResponseError: a key of ours is no stream.
        """
        before = tuple(self.ids)  # reading goes on meanwhile
        tops = await self._tops(connection)
        if not before:
            self.ids = tops
            return True
        for shard, top in enumerate(tops):
            if _number(before[shard]) > _number(top):
                # Flushed, or lost with the memory of a Redis that was restarted. What went with it shows by numbers.
                logger.warning(
                    "bridge: stream %d is younger than what was read of it: reading it anew", shard
                )
                self.ids[shard] = START
        return False

    async def _tops(self, connection: Connection) -> list[str]:
        """The id of the last entry ever added to each shard."""
        answers = await connection.pipeline([("XINFO", "STREAM", key) for key in self._keys])
        return [_top(answer) for answer in answers]

    # -- reading ---------------------------------------------------------------------------------------------------

    async def run(self, connection: Connection, bus: Bus) -> None:
        """Read until cancelled; nothing that was read is forgotten then.

        Raises:
            RedisError, OSError, Silent: the connection is of no use any more.
        """
        self._probe_id = START
        while True:
            self._hand_on(bus)
            await bus.accepted()
            if self.waiting:
                continue
            answer = await connection.call(*self._command(), bound=BLOCK_MS / 1000 + ANSWER_BOUND)
            if answer:
                self._take(answer)

    def _command(self) -> Command:
        return (
            "XREAD", "COUNT", ENTRIES_AT_ONCE, "BLOCK", BLOCK_MS, "STREAMS",
            *self._keys, self._probe, *self.ids, self._probe_id,
        )  # fmt: skip

    def _hand_on(self, bus: Bus) -> None:
        put = 0
        try:
            while self.waiting:
                bus.publish(self.waiting[0])
                self.waiting.popleft()
                put += 1
        except BusFull:
            pass  # a worker is behind: the rest goes when it has caught up
        self._count(Counter.FEDERATION_IN, put)

    def _take(self, answer: Sequence[Any]) -> None:
        for key, entries in answer:
            name = key.decode()
            last = entries[-1][0].decode()
            if name == self._probe:
                self._probe_id = last
                self.echo = entries[-1][1][1]
                continue
            shard = self._keys.index(name)
            for _, fields in entries:
                if fields:  # an entry that was deleted has none
                    self.waiting += self._open(shard, fields)
            self.ids[shard] = last

    def _open(self, shard: int, fields: Sequence[bytes]) -> Iterable[Envelope]:
        """The messages of an entry that are news."""
        values = dict(zip(fields[::2], fields[1::2], strict=False))
        host = values.get(b"h", b"")
        if host.partition(b".")[0] == self._host_id:
            return ()
        try:
            origin = source(host.decode("ascii"), shard)
            if b"m" in values:
                complete, marks = _marks_decoder.decode(values[b"m"])
                self.miss(origin, self.seen.mark(origin, marks, complete))
        except (msgspec.MsgspecError, ValueError):
            self._count(Counter.BUS_INVALID, 1)
            return ()
        return self._news(origin, values[b"e"]) if b"e" in values else ()

    def _news(self, origin: str, body: bytes) -> Iterable[Envelope]:
        envelopes, bad = wire.decode_array(body)
        self._count(Counter.BUS_INVALID, bad)
        fresh = []
        for envelope in envelopes:
            if envelope.origin is None:
                self._count(Counter.BUS_INVALID, 1)
                continue
            _, slot, epoch, sequence = envelope.origin
            missing = self.seen.note(origin, slot, epoch, sequence)
            if missing < 0:
                self._count(Counter.FEDERATION_DUPLICATES, 1)
                continue
            self.miss(origin, missing)
            envelope.origin = (origin, slot, epoch, sequence)
            fresh.append(envelope)
        return fresh

    # -- what is missing -------------------------------------------------------------------------------------------

    def miss(self, origin: str, missing: int) -> None:
        """Count messages of a source that do not come."""
        if missing > 0:
            host = origin.partition(".")[0]
            self._missing[host] = self._missing.get(host, 0) + missing
            self._count(Counter.FEDERATION_GAPS, missing)

    def report(self) -> None:
        """Log what was found missing since the last report, one line per host."""
        for host, missing in self._missing.items():
            logger.warning(
                "bridge: %d messages of host %s did not arrive: trimmed, dropped or lost before they were read",
                missing,
                host,
            )
        self._missing.clear()

    def _count(self, counter: Counter, amount: int) -> None:
        if self.record is not None and amount:
            self.record.add(counter, amount)


def _number(entry_id: str) -> tuple[int, int]:
    milliseconds, _, rest = entry_id.partition("-")
    return int(milliseconds), int(rest or 0)


def _top(answer: Any) -> str:
    """``last-generated-id`` of an answer to XINFO STREAM; a stream that is not there has had no entry."""
    if isinstance(answer, Exception):
        if "no such key" in str(answer):
            return START
        raise answer
    fields = dict(zip(answer[::2], answer[1::2], strict=False))
    top: str = fields[b"last-generated-id"].decode()
    return top
