"""One subscription of one Centrifuge connection: its position, and what waits until its reply has left.

Between the fan-out, which asks `Subscription.admits` for every push, and `workers/centrifuge_channels.py`, which
owns it. Clients drop pushes of a channel whose subscribe reply they have not seen: so these are kept, and leave
with the reply. And they take a position for granted: so what it covers is never pushed again.
"""

from __future__ import annotations

import math

from .centrifuge_effects import Unsubscribe
from .centrifuge_messages import SubscribeRequest, UnsubscribeRequest

Waiting = tuple[int, SubscribeRequest | UnsubscribeRequest] | int
"""What comes next on a channel: a command of the client with its id, or the code of a server's unsubscribe."""


class Subscription:
    """Made when a client asks to subscribe, live from the reply on.

    Attributes:
        channel: the topic or pattern, as the client wrote it.
        number: the id of the subscribe command; 0 for a server-side subscription.
        request: what was asked.
        server_side: the application wanted it, not the client.
        established: the shell has answered with `subscribed` and must be told when it ends.
        position: what the client has or knows of, up to this offset; 0 as long as it has no position.
        info: the JSON told to others as `chan_info`.
        expires_at: when it ends for want of a fresh token.
        waiting: what came for the channel while it was being made.
    """

    __slots__ = (
        "_kept",
        "_ordered",
        "_room",
        "channel",
        "established",
        "expires_at",
        "info",
        "number",
        "position",
        "request",
        "server_side",
        "waiting",
    )

    def __init__(self, number: int, request: SubscribeRequest, server_side: bool, max_buffered: int) -> None:
        self.channel = request.channel
        self.number = number
        self.request = request
        self.server_side = server_side
        self.established = False
        self.position = 0
        self.info = b""
        self.expires_at = math.inf
        self.waiting: list[Waiting] = []
        self._ordered = True
        self._kept: list[tuple[int, bytes]] | None = []
        self._room = max_buffered

    @property
    def live(self) -> bool:
        """The reply has left."""
        return self._kept is None

    @property
    def overflowed(self) -> bool:
        """More came while it was being made than is kept."""
        return self._room < 0

    def ends_before_next(self) -> bool:
        """Tell whether it will have ended when a command that comes now has its turn."""
        if not self.waiting:
            return False
        last = self.waiting[-1]
        return isinstance(last, int) or isinstance(last[1], UnsubscribeRequest)

    def admits(self, offset: int, push: bytes) -> bool:
        """Tell whether `push` is to be written now; if not, it was a duplicate, or is kept.

        Args:
            offset: of the publication in the log; 0 for one without history, and for joins and leaves.
            push: the bytes for this channel, kept if the reply has not left yet.
        """
        if self._kept is not None:
            self._keep(offset, push)
            return False
        if offset and self._ordered:
            if offset <= self.position:
                return False
            self.position = offset
        return True

    def _keep(self, offset: int, push: bytes) -> None:
        assert self._kept is not None
        self._room -= len(push)
        if self._room >= 0:
            self._kept.append((offset, push))
        else:
            self._kept.clear()

    def start(self, position: int, ordered: bool) -> None:
        """The client learns its position with the reply that is made now.

        Args:
            position: everything up to here was told, or is not wanted.
            ordered: offsets only rise. Those of a pattern do so only where all its topics have history: then they
                are delivered in the log's order.
        """
        self.position = position
        self._ordered = ordered

    def go_live(self) -> list[bytes]:
        """Return what is to be pushed right behind the reply; from now on `admits` decides."""
        kept, self._kept = self._kept or [], None
        if self._ordered:
            kept.sort(key=_offset)  # stable: what has no offset keeps its order
        return [push for offset, push in kept if self.admits(offset, push)]

    def ended(self, code: int, client_info: bytes) -> Unsubscribe:
        """Return the effect that ends it."""
        return Unsubscribe(self.channel, code, client_info, self.server_side)


def _offset(kept: tuple[int, bytes]) -> int:
    return kept[0]
