"""``?envelope=1`` of the plain protocol: messages with their topic and position, and what was missed.

At the end of a message's way to such a client, instead of the bare data:
``{"type":"message","topic":…,"offset":…,"epoch":…,"data":…}``; without history there is no offset and no epoch.
``?since=EPOCH:OFFSET`` gives what came after that position on the topics of the request; where that is not possible,
the first message is ``{"type":"reset","offset":…,"epoch":…}``, and what follows is what comes from then on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ipc.envelope import Envelope
from ipc.positions import Position
from workers import jsontext
from workers.codes import ErrorCode
from workers.feeds import Feed

if TYPE_CHECKING:
    from workers.connection import Connection
    from workers.manager import WebSocketManager


class EnvelopeFeed(Feed):
    """The messages of one such client."""

    def __init__(self, manager: WebSocketManager, connection: Connection) -> None:
        super().__init__(manager)
        self._connection = connection

    def write(self, envelope: Envelope, missed: bool) -> None:
        """Owe it to the client; what was missed is not held against it, however much it is."""
        text = wrapped(envelope, self.manager.log.epoch if self.manager.log is not None else "")
        if missed:
            self._connection.target[0].push_extra(text)
        else:
            self._connection.push_text(text)

    async def begin(self, patterns: Sequence[str], since: str | None) -> None:
        """Recover if the client wants that, then go live. Before the handshake is answered."""
        position = None
        complete = since is None
        if since is not None:
            try:
                position = Position.parse(since)
            except ValueError as error:
                self._connection.answer_error(str(error), ErrorCode.BAD_REQUEST)
        top, recovered = await self.recover(patterns, position)
        if since is not None:
            complete = position is not None and recovered
        if not complete:
            reset = (
                {"type": "reset"}
                if top is None
                else {"type": "reset", "offset": top.offset, "epoch": top.epoch}
            )
            self._connection.push(reset)
        self.start()


def wrapped(envelope: Envelope, epoch: str) -> bytes:
    """A message in its envelope, as JSON."""
    topic = jsontext.encode(envelope.topic)
    if not envelope.offset:
        return b'{"type":"message","topic":%b,"data":%b}' % (topic, envelope.data)
    return b'{"type":"message","topic":%b,"offset":%d,"epoch":%b,"data":%b}' % (
        topic,
        envelope.offset,
        jsontext.encode(epoch),
        envelope.data,
    )
