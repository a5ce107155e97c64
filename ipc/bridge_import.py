"""Messages of other hosts on their way to the bus: those of topics with history go through this host's store.

Stands between ``bridge_in.py`` and the bus. The store gives them offsets of its own, like any message that is published
here; its key tells one that comes a second time, as after the death of a bridge.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from ipc.bus import BusClosed, BusFull
from ipc.envelope import TOPIC, Envelope, EnvelopeTooBig
from ipc.peer import Peer

if TYPE_CHECKING:
    from ipc.store_append import Appender
    from ipc.store_records import Position, Retention, StoreError

logger = logging.getLogger("ipc")

_BEHIND_BYTES = 8 * 1024 * 1024
"""Bytes that may wait for the store before reading pauses."""
_PAUSE = 0.002


class Importer:
    """Puts messages on the bus of one peer.

    Args:
        peer: the bridge's place on the bus.
        lost: told how many messages of which source could not be stored, and so were delivered to nobody.
    """

    def __init__(self, peer: Peer, lost: Callable[[str, int], None]) -> None:
        self._peer = peer
        self._lost = lost
        self._appender: Appender | None = None
        self.started = 0
        """Messages given to the store, one after the other."""
        self.finished = 0
        """Of these, how many have been dealt with."""

    async def open(self) -> None:
        """Open the store, if any topic has history.

        Raises:
            RuntimeDirError: it cannot be opened.
        """
        if not self._peer.rules.any_history:
            return
        from ipc.store_append import Appender
        from ipc.store_opening import open_store

        self._appender = Appender(await open_store(self._peer), asyncio.get_running_loop())

    def publish(self, envelope: Envelope) -> None:
        """Deliver a message on this host, at once or when it is stored.

        Raises:
            BusFull: too much waits; it was not taken.
        """
        if self._appender is not None and envelope.kind == TOPIC:
            retention = self._peer.rules.retention(envelope.topic)
            if retention is not None:
                self._store(self._appender, envelope, retention)
                return
        self._peer.publish(envelope)

    def _store(self, appender: Appender, envelope: Envelope, retention: Retention) -> None:
        from ipc.store_records import Entry, StoreBusy, StoreError

        origin, envelope.origin = envelope.origin, None  # from here on its offset tells whether it is news
        key = "" if origin is None else f"{origin[0]}/{origin[1]}.{origin[2]}.{origin[3]}"

        def stored(result: Position | StoreError) -> None:
            self.finished += 1
            if isinstance(result, StoreError):
                self._lost("" if origin is None else origin[0], 1)
                logger.error(
                    "bridge: a message of another host was not stored, and so not delivered: %s", result
                )
            elif not result.duplicate:
                envelope.offset = result.offset
                self._hand_over(envelope)

        entry = Entry(envelope.channel, envelope.topic, envelope.data, retention, key, info=envelope.info)
        try:
            appender.append(entry, stored)
        except StoreBusy as error:
            envelope.origin = origin
            raise BusFull(str(error)) from error
        self.started += 1

    def _hand_over(self, envelope: Envelope) -> None:
        try:
            self._peer.publish(envelope)
        except (BusFull, BusClosed, EnvelopeTooBig) as error:
            # The workers find it in the store.
            logger.debug("offset %d did not go over the bus: %r", envelope.offset, error)

    async def accepted(self) -> None:
        """Return when there is room again, on the bus and for the store."""
        await self._peer.accepted()
        appender = self._appender
        # Room comes with the end of a transaction, which tells only those whose entries were in it.
        while appender is not None and appender.waiting_bytes > _BEHIND_BYTES:  # noqa: ASYNC110
            await asyncio.sleep(_PAUSE)

    def close(self) -> None:
        """Give the store back; what waits for it is stored, if that is possible at once."""
        if self._appender is not None:
            self._appender.close()
            self._appender.store.close()
            self._appender = None
