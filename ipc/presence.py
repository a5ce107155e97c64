"""Presence: who is on which topic of the host, kept up to date by this process for its own clients.

Stands between ``peer.py`` and the store, beside the way of a message. Joins and leaves are stored first, many in one
transaction, and then told as events to those who want them. Entries of a peer that died are taken out by whichever
process sees it first, which also tells their leaves: there are no time-outs, and no ghosts.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ipc import store_presence
from ipc.board import SlotState
from ipc.envelope import JOIN, LEAVE, Envelope
from ipc.store import Present, Store, StoreError
from ipc.store_append import Appender

if TYPE_CHECKING:
    from ipc.peer import Peer

logger = logging.getLogger("ipc")

LOOK = 0.5
"""Seconds between two looks for entries whose process is gone."""
_REAP = 500


class PresenceBoard:
    """One per peer whose rules give presence to any topic."""

    def __init__(self, peer: Peer, store: Store) -> None:
        self.store = store
        self._peer = peer
        self._board = peer.runtime.board
        self._owner = (peer.slot, peer.epoch)
        self._loop = asyncio.get_running_loop()
        self._appender = Appender(store, self._loop)
        if peer.log is None or peer.log.store is not store:
            self._appender.start_maintenance()
        self._receivers: dict[str, Callable[[Envelope], None]] = {}
        self._reaping: set[tuple[int, int]] = set()
        self._timer = self._loop.call_later(LOOK, self._look)
        self._closed = False

    def attach(self, channel: str, deliver: Callable[[Envelope], None]) -> None:
        """Tell ``deliver`` of the joins and leaves of a channel that begin in this process."""
        self._receivers[channel] = deliver

    def detach(self, channel: str) -> None:
        """Tell nobody any more."""
        self._receivers.pop(channel, None)

    def join(self, channel: str, pattern: str, client: str, user: str, info: bytes) -> None:
        """A client of ours has subscribed to exactly this topic or pattern.

        Raises:
            StoreError: it cannot be stored.
        """
        who = Present(client, user, info, *self._owner)

        def stored(result: Any) -> None:
            if isinstance(result, StoreError):
                logger.warning("presence of %s on %r was not stored: %s", client, pattern, result)
            elif result:
                self._tell(JOIN, channel, pattern, info)

        self._appender.append(lambda writer: store_presence.add(writer.txn, channel, pattern, who), stored)

    def leave(self, channel: str, pattern: str, client: str) -> None:
        """It no longer is."""

        def stored(result: Any) -> None:
            if isinstance(result, StoreError):
                logger.warning("the end of %s on %r was not stored: %s", client, pattern, result)
            elif result is not None:
                self._tell(LEAVE, channel, pattern, result.info)

        try:
            self._appender.append(
                lambda writer: store_presence.remove(writer.txn, channel, pattern, *self._owner, client),
                stored,
            )
        except StoreError as error:
            logger.warning("the end of %s on %r was not stored: %s", client, pattern, error)

    def _tell(self, kind: int, channel: str, pattern: str, info: bytes) -> None:
        envelope = Envelope(kind, channel, pattern, b"", (), 0, info)
        try:
            self._peer.publish(envelope)
        except Exception as error:
            logger.debug("a join or leave did not go over the bus: %r", error)
        deliver = self._receivers.get(channel)
        if deliver is not None:
            deliver(envelope)

    def present(self, channel: str, pattern: str) -> list[Present]:
        """Who is on exactly this topic or pattern.

        Raises:
            StoreError: it cannot be read.
        """
        return self.store.presence(channel, pattern)

    # The dead --------------------------------------------------------------------------------------------------

    def _look(self) -> None:
        self._timer = self._loop.call_later(LOOK, self._look)
        try:
            owners = self.store.presence_owners()
        except StoreError as error:
            logger.debug("presence cannot be read: %s", error)
            return
        for owner in owners:
            if owner != self._owner and owner not in self._reaping and not self._lives(*owner):
                self._reaping.add(owner)
                self._reap(owner)

    def _lives(self, slot: int, epoch: int) -> bool:
        record = self._board.record(slot)
        return record.epoch == epoch and record.state is not SlotState.FREE

    def _reap(self, owner: tuple[int, int]) -> None:
        def removed(result: Any) -> None:
            if isinstance(result, StoreError):
                self._reaping.discard(owner)  # the next look tries again
                return
            for channel, pattern, who in result:
                self._tell(LEAVE, channel, pattern, who.info)
            if len(result) == _REAP and not self._closed:
                self._reap(owner)
            else:
                self._reaping.discard(owner)

        try:
            self._appender.append(lambda writer: store_presence.reap(writer.txn, *owner, _REAP), removed)
        except StoreError:
            self._reaping.discard(owner)

    def close(self) -> None:
        """Store what waits, if that is possible at once, and close the store."""
        if self._closed:
            return
        self._closed = True
        self._timer.cancel()
        self._appender.close()
        self.store.close()
