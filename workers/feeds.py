"""Messages of several topics for one client that keeps one position over all of them.

At the end of a message's way, beside the fan-out: what ``?envelope=1`` of the plain protocol and Server-Sent Events
have in common. A feed takes the messages of its topics from the manager. Until it is told where to begin it holds
them; then what was missed comes first, and nothing comes twice.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from ipc.envelope import TOPIC, Envelope
from ipc.positions import Position
from ipc.store_records import StoreError

if TYPE_CHECKING:
    from workers.manager import WebSocketManager

logger = logging.getLogger("workers")


class Receiver(Protocol):
    """Somebody who encodes messages in its own way: see :meth:`workers.keeping.Keeping.listen`."""

    def __hash__(self) -> int: ...

    def deliver(self, envelope: Envelope) -> None:
        """A message to a topic that matches; in the order of the log where it has an offset."""


class Feed:
    """Derive, and say in :meth:`write` what becomes of a message."""

    def __init__(self, manager: WebSocketManager) -> None:
        self.manager = manager
        self.recoverable = False
        """Whether all topics have history, so that a position means something."""
        self._held: list[Envelope] | None = []
        self._held_bytes = 0
        self._overflowed = False
        self._covered = 0

    def write(self, envelope: Envelope, missed: bool) -> None:
        """One message for the client; ``missed``: from the time it was away."""
        raise NotImplementedError

    def deliver(self, envelope: Envelope) -> None:
        """A message of the manager's."""
        if self._held is None:
            if not envelope.offset or envelope.offset > self._covered:
                self.write(envelope, False)
            return
        self._held_bytes += len(envelope.data)
        if self._held_bytes <= self.manager.settings.max_backlog:
            self._held.append(envelope)
        else:
            self._overflowed = True

    async def recover(self, patterns: Sequence[str], since: Position | None) -> tuple[Position | None, bool]:
        """Read what was missed; the topics are listened to already. Then call :meth:`start`.

        Returns:
            The position from which live messages go on (None where there is none), and whether all that came since
            ``since`` was or will be written. Without ``since`` nothing was missed.
        """
        manager, log = self.manager, self.manager.log
        self.recoverable = (
            log is not None and bool(patterns) and all(map(manager.rules.recoverable, patterns))
        )
        if log is None or not self.recoverable:
            return None, since is None
        try:
            if since is None:
                return log.top(), True
            found = await log.recover(manager.broker_channel, patterns, since)
            if self._overflowed:
                return log.top(), False
        except StoreError as error:
            logger.warning("recovery failed: %s", error)
            return None, False
        self._covered = found.top
        for entry in found.entries:
            self.write(
                Envelope(TOPIC, entry.channel, entry.topic, entry.data, (), entry.offset, entry.info), True
            )
        return Position(found.top, found.epoch), found.recovered

    def start(self) -> None:
        """From now on messages go straight through; those that were held come first."""
        held, self._held = self._held or [], None
        for envelope in held:
            self.deliver(envelope)
