"""The publishing side of federation: which messages leave the host, their numbers, and what waits for the bridge.

Stands between a publisher and its outbox for the bridge. Only processes of a hub with a bridge have one; the others
ask once per message whether there is any. The bridge acknowledges what Redis has. When it dies, what it had not
acknowledged is kept here, within the bound of an outbox, until its successor comes.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from typing import TYPE_CHECKING

from ipc.envelope import DIRECT, TOPIC, Envelope
from ipc.origins import SHARDS, shard_of

if TYPE_CHECKING:
    from ipc.link import Link

_REMEMBERED = 16384
NO_SLOT = -1


class LinkState(IntEnum):
    """How a bridge stands with Redis, as its record on the board says."""

    CONNECTING = 0
    READY = 1
    LOADING = 2
    """Redis reads its data after a start."""
    READ_ONLY = 3
    """A replica: a failover is under way, or the address is wrong."""
    OUT_OF_MEMORY = 4
    """Redis takes no more: ``maxmemory`` is reached, or its disk fails."""
    DENIED = 5
    """Wrong password, or the user may not do what the bridge does."""
    WRONG_TYPE = 6
    """A key with one of our names holds something else."""
    REFUSED = 7
    """Another hub uses the identity of this host."""
    SILENT = 8
    """The connection is up, but nothing comes through."""
    FAULTY = 9
    """Redis answers with an error that fits none of these."""

    @property
    def words(self) -> str:
        """For people and for ``status``."""
        return self.name.lower().replace("_", "-")

    @classmethod
    def of(cls, number: int) -> LinkState:
        """The state with this number; one we do not know counts as FAULTY."""
        return cls(number) if 0 <= number <= cls.FAULTY else cls.FAULTY


class Federation:
    """Numbers what one process federates, and holds it for the bridge.

    Args:
        federates: whether the messages of a topic leave the host.
        slot, epoch: who publishes.
        held: a link that leads nowhere, for the time without a bridge.
    """

    def __init__(self, federates: Callable[[str], bool], slot: int, epoch: int, held: Link) -> None:
        self._federates = federates
        self._slot = slot
        self._epoch = epoch
        self._held = held
        self._shards: dict[tuple[str, str], int] = {}
        self._sequences = [0] * SHARDS
        held.stalled = True  # nobody waits for it, and what exceeds its outbox is dropped and counted
        self.link = held
        """Where federated messages go: the bridge that lives, or what is held for the next one."""

    def number(self, envelope: Envelope) -> None:
        """Give an envelope its number, if it is to leave the host."""
        shard = self._shard(envelope)
        if shard >= 0:
            self._sequences[shard] += 1
            envelope.origin = ("", self._slot, self._epoch, self._sequences[shard])

    def take_back(self, envelope: Envelope) -> None:
        """The envelope just numbered was refused: its number goes to the next one."""
        if envelope.origin is not None:
            envelope.origin = None
            self._sequences[self._shard(envelope)] -= 1

    def _shard(self, envelope: Envelope) -> int:
        if envelope.kind > DIRECT:
            return -1  # who is on a topic is known per host
        topic = envelope.topic if envelope.kind == TOPIC else ""
        key = (envelope.channel, topic)
        shard = self._shards.get(key)
        if shard is None:
            if len(self._shards) >= _REMEMBERED:
                self._shards.clear()
            wanted = envelope.kind != TOPIC or self._federates(topic)
            shard = self._shards[key] = shard_of(*key) if wanted else -1
        return shard

    @property
    def waits_for_bridge(self) -> bool:
        """There is no bridge just now."""
        return self.link is self._held

    def arrived(self, link: Link) -> bool:
        """A bridge has come; True when it is the one that gets our messages, what was held first."""
        if self.link is not self._held:
            return False
        self.link = link
        for batch in self._held.surrender():
            link.offer(batch.body, batch.envelopes)
        return True

    def departed(self, link: Link) -> bool:
        """A bridge is gone; True when it was ours, and what it had not acknowledged is held from now on."""
        if self.link is not link:
            return False
        self.link = self._held
        for batch in link.surrender():
            self._held.offer(batch.body, batch.envelopes)
        return True
