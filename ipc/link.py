"""One receiver as a sender sees it: its flow, where its bits and credits are, and what is due to it.

Stands between ``outbound.py``, which drives it, and ``flow.py``, whose numbers it has. No socket, no clock.
"""

from __future__ import annotations

from collections import deque
from typing import Protocol

from ipc import envelope as wire
from ipc.flow import SendFlow
from ipc.shortcut import Shortcut

FIRST_TAIL = 0.5
"""Seconds until a last number is said again."""

Key = tuple[int, int]
"""(slot, epoch): who a peer is, for ever."""


class Waiter(Protocol):
    """Somebody who wants to know when an envelope has been dealt with by a peer, or the peer is gone."""

    def one_done(self) -> None: ...


class Link(SendFlow):
    """One receiver, as this sender sees it."""

    __slots__ = (
        "bye_answered", "counted", "credit_index", "detour", "endpoint", "epoch", "greeted", "hello_answered",
        "map_offset", "owes_bye", "owes_hello", "shortcut", "slot", "tail_at", "tail_pause", "tail_said", "to",
        "turn", "waiters",
    )  # fmt: skip

    def __init__(
        self,
        slot: int,
        epoch: int,
        endpoint: str,
        backlog: int,
        credit_index: int,
        map_offset: int,
        *,
        keep: bool = False,
    ) -> None:
        super().__init__(backlog=backlog, keep=keep)
        self.slot = slot
        self.epoch = epoch
        self.endpoint = endpoint
        self.to = wire.destination(slot & 0xFFFFFFFF, epoch)
        self.credit_index = credit_index
        self.map_offset = map_offset
        self.turn: list[bytes] = []
        """What this turn has brought for it."""
        self.counted = 0
        """How much of ``dropped`` is on the board."""
        self.greeted = False
        """It was told HELLO, so the way there is open and it knows us."""
        self.hello_answered = False
        self.owes_hello = False
        """It waits for our HELLO_ACK, which we can send when its subscription is seen."""
        self.owes_bye = False
        self.bye_answered = False
        self.tail_at = 0.0
        self.tail_pause = FIRST_TAIL
        self.tail_said = (0, 0)
        self.shortcut: Shortcut | None = None
        self.detour = 0
        """Envelopes up to this number may be on the long way, through the mesh."""
        self.waiters: deque[tuple[int, Waiter]] = deque()

    @property
    def key(self) -> Key:
        """Who it is."""
        return self.slot, self.epoch
