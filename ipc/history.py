"""The log of a host as one process follows it: publishing to topics with history, and delivery in one order.

Stands between ``peer.py`` and the store, on the way of every message whose topic has history. Out: the message is
stored; once that is committed it is delivered here, sent over the bus, and its publisher told. In: the log's offsets
are contiguous, and this process knows up to which one it has delivered or skipped (``scanned``). A message that comes
over the bus with the next offset is delivered at once; one that is further says that something lies between: that is
read from the store. So all processes deliver one same order without a gap or a duplicate, and whatever the bus lost
(a gap, a publisher that died between commit and sending) is healed from the store: when a gap shows, when a peer has
died, and once a second if the log has grown.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ipc.envelope import TOPIC, Envelope
from ipc.inbound import Deliver
from ipc.positions import Position
from ipc.store import Entry, History, Recovery, Retention, Store, StoreError
from ipc.store_append import Appender
from ipc.store_append import recover as recover_from

logger = logging.getLogger("ipc")

LOOK = 1.0
"""Seconds between two looks whether the log has grown unseen."""
_SLICE = 500
_SLICE_BYTES = 2 << 20
_TURN = 0.005
"""Seconds of reading after which the loop gets its turn."""
_MAX_KEPT_BYTES = 16 << 20

Done = Callable[[Position | StoreError], None]


_new = tuple.__new__  # a named tuple's own constructor is a function in Python


class Publication:
    """A message on its way into the log, and who is told of it."""

    __slots__ = ("done", "envelope", "log")

    def __init__(self, envelope: Envelope, done: Done, log: HostLog) -> None:
        self.envelope = envelope
        self.done = done
        self.log = log

    def __call__(self, result: Any) -> None:
        """It was stored alone, or was not."""
        if isinstance(result, StoreError):
            self.done(result)
            return
        log = self.log
        if not result.duplicate:
            self.envelope.offset = result.offset
            alone = [self.envelope]
            log.arrived(alone)
            log.send(alone)
        self.done(_new(Position, (result.offset, log.epoch)))


class HostLog:
    """One per peer whose rules give history to any topic.

    Args:
        store: open; it is closed by :meth:`close`.
        send: gives envelopes to the other processes; raises nothing.
    """

    def __init__(self, store: Store, send: Callable[[Sequence[Envelope]], None]) -> None:
        self.store = store
        self.epoch = store.epoch
        self._loop = asyncio.get_running_loop()
        self.send = send
        self.appender = Appender(store, self._loop)
        self.appender.together = (Publication, self.stored)
        self.appender.start_maintenance()
        self.scanned = store.top()
        """Up to here everything was delivered in this process, or did not concern it."""
        self.healed = 0
        """Messages that the bus should have brought and the store did."""
        self._target = self.scanned
        self._kept: dict[int, Envelope] = {}
        self._kept_bytes = 0
        self._receivers: dict[str, Deliver] = {}
        self._scan_handle: asyncio.Handle | None = None
        self._failing = False
        self._look_timer = self._loop.call_later(LOOK, self._look)
        self._closed = False

    def attach(self, channel: str, deliver: Deliver) -> Deliver:
        """Deliver the log's messages of a channel to ``deliver``; returns what is to receive those of the bus."""
        self._receivers[channel] = deliver

        def receive(envelopes: list[Envelope]) -> None:
            stored = [envelope for envelope in envelopes if envelope.offset]
            if not stored:
                deliver(envelopes)
                return
            if len(stored) < len(envelopes):
                deliver([envelope for envelope in envelopes if not envelope.offset])
            self.arrived(stored)

        return receive

    def detach(self, channel: str) -> None:
        """Deliver nothing more of a channel."""
        self._receivers.pop(channel, None)

    # Out -------------------------------------------------------------------------------------------------------

    def publish(
        self, envelope: Envelope, retention: Retention, done: Done, idempotency_key: str = ""
    ) -> None:
        """Store a message; then deliver it everywhere, here too. ``done`` is told its position, or what went wrong.

        Raises:
            StoreBusy: too much waits already; ``done`` will not be called.
            StoreError: the store is closed.
        """
        self.appender.append(
            Entry(envelope.channel, envelope.topic, envelope.data, retention, idempotency_key, envelope.info),
            Publication(envelope, done, self),
        )

    def stored(self, publications: Sequence[Publication], results: Sequence[Any]) -> None:
        """Deliver what was committed together, send it, then tell who published."""
        fresh = []
        for place, publication in enumerate(publications):
            result = results[place]
            if not result.duplicate:
                envelope = publication.envelope
                envelope.offset = result.offset
                fresh.append(envelope)
        if fresh:
            self.arrived(fresh)
            self.send(fresh)
        for place, publication in enumerate(publications):
            try:
                publication.done(_new(Position, (results[place].offset, self.epoch)))
            except Exception:
                logger.exception("a callback of a publisher failed")

    # In --------------------------------------------------------------------------------------------------------

    def arrived(self, envelopes: list[Envelope]) -> None:
        """Messages of the log, in the order of their publisher, some perhaps known already."""
        scanned = self.scanned
        if not self._kept and self._target == scanned and envelopes[0].offset == scanned + 1:
            if len(envelopes) == 1:
                self.scanned = self._target = scanned + 1
                self._deliver_run(envelopes)
                return
            if all(envelope.offset == scanned + 1 + place for place, envelope in enumerate(envelopes)):
                self.scanned = self._target = scanned + len(envelopes)
                self._deliver(envelopes)
                return
        for envelope in envelopes:
            if envelope.offset > self.scanned:
                self._keep(envelope)
                self._target = max(self._target, envelope.offset)
        if self._target > self.scanned and self._scan_handle is None:
            self._scan()

    def _keep(self, envelope: Envelope) -> None:
        """Until the log was read up to it: a short window may have dropped it from the store by then."""
        if envelope.offset not in self._kept and self._kept_bytes < _MAX_KEPT_BYTES:
            self._kept[envelope.offset] = envelope
            self._kept_bytes += len(envelope.data)

    def heal(self, at_once: bool = False) -> None:
        """Something may have been lost: read what the log has beyond what was delivered."""
        if not self._closed and (at_once or self._scan_handle is None):
            try:
                self._target = max(self._target, self.store.top())
            except StoreError as error:
                logger.debug("the log cannot be looked at: %s", error)
            if self._target > self.scanned:
                self._scan(at_once)

    def catch_up(self) -> None:
        """Deliver all that was stored so far, now: somebody is about to subscribe and shall not get it."""
        self.heal(at_once=True)

    def _look(self) -> None:
        self._look_timer = self._loop.call_later(LOOK, self._look)
        self.heal()

    def _scan(self, at_once: bool = False) -> None:
        """Read the log up to the target and deliver it in order, a few milliseconds at a time."""
        if self._scan_handle is not None:
            self._scan_handle.cancel()
            self._scan_handle = None
        if self._closed:
            return
        until = time.monotonic() + _TURN
        while self.scanned < self._target:
            try:
                piece = self.store.read_since(self.scanned, _SLICE, _SLICE_BYTES)
            except StoreError as error:
                if not self._failing:
                    self._failing = True
                    logger.error("the log cannot be read, topics with history stand still: %s", error)
                return  # the next look, or message, tries again
            self._failing = False
            before, self.scanned = self.scanned, piece.scanned
            if piece.scanned <= before:
                # What was announced is not there: the log was lost.
                self._target = before
                self._kept.clear()
                self._kept_bytes = 0
                return
            self._target = max(self._target, self.scanned)
            self._deliver(self._merge(piece.entries, piece.scanned))
            if self.scanned < self._target and not at_once and time.monotonic() > until:
                self._scan_handle = self._loop.call_soon(self._scan)
                return

    def _merge(self, entries: Iterable[Any], scanned: int) -> list[Envelope]:
        found = []
        kept = self._kept
        for entry in entries:
            envelope = kept.pop(entry.offset, None)
            if envelope is not None:
                self._kept_bytes -= len(envelope.data)
                found.append(envelope)
            elif entry.channel in self._receivers:
                found.append(
                    Envelope(TOPIC, entry.channel, entry.topic, entry.data, (), entry.offset, entry.info)
                )
        late = [offset for offset in kept if offset <= scanned]
        if late:
            for offset in late:
                envelope = kept.pop(offset)
                self._kept_bytes -= len(envelope.data)
                found.append(envelope)
            found.sort(key=_offset)
        return found

    def _deliver(self, envelopes: list[Envelope]) -> None:
        start = 0
        for place in range(1, len(envelopes) + 1):
            if place == len(envelopes) or envelopes[place].channel != envelopes[start].channel:
                self._deliver_run(envelopes[start:place])
                start = place

    def _deliver_run(self, envelopes: list[Envelope]) -> None:
        """Envelopes of one channel."""
        channel = envelopes[0].channel
        deliver = self._receivers.get(channel)
        if deliver is not None:
            try:
                deliver(envelopes)
            except Exception:
                logger.exception("a receiver of channel %r failed", channel)

    # Reading ---------------------------------------------------------------------------------------------------

    def top(self) -> Position:
        """The position after everything that was stored so far."""
        return Position(self.store.top(), self.epoch)

    async def recover(self, channel: str, patterns: str | Iterable[str], since: Position) -> Recovery:
        """What came after a position; see :meth:`ipc.store.Store.recover`."""
        return await recover_from(self.store, channel, patterns, since.epoch, since.offset)

    def history(
        self,
        channel: str,
        topic: str,
        limit: int = 0,
        since: Position | None = None,
        reverse: bool = False,
    ) -> History:
        """A page of a topic's history; see :meth:`ipc.store.Store.history`."""
        place = (since.epoch, since.offset) if since is not None else None
        return self.store.history(channel, topic, limit, place, reverse)

    def flush(self) -> None:
        """Store what waits, if that is possible at once; nothing more is taken."""
        self.appender.close()

    def close(self) -> None:
        """:meth:`flush`, and close the store."""
        if self._closed:
            return
        self.appender.close()
        self._closed = True
        self._look_timer.cancel()
        if self._scan_handle is not None:
            self._scan_handle.cancel()
        self.store.close()


def _offset(envelope: Envelope) -> int:
    return envelope.offset
