"""Publications to clients of the Centrifuge protocol: one frame for all that have subscribed with the same words.

At the end of a message's way, between ``workers/manager.py``, which finds the groups that a topic concerns, and the
fan-out. A group has the clients of this worker that subscribed to one topic or pattern. Each message is encoded once
for all of them. Who is only just subscribing, and whom the message may have reached with a recovery, is asked one by
one; all others need no question, since the log's offsets only rise.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ipc.envelope import JOIN, Envelope
from workers.centrifuge_messages import encode_join, encode_leave, encode_publication
from workers.fanout import current_fanout

if TYPE_CHECKING:
    from workers.centrifuge_client import CentrifugeClient
    from workers.centrifuge_subscription import Subscription
    from workers.manager import WebSocketManager
    from workers.sinks import AnySink


class Group:
    """Clients of this worker that subscribed with the same topic or pattern."""

    __slots__ = ("_covered", "_live", "_making", "_manager", "_targets", "channel")

    def __init__(self, channel: str, manager: WebSocketManager) -> None:
        self.channel = channel
        self._manager = manager
        self._making: dict[CentrifugeClient, Subscription] = {}
        self._live: dict[CentrifugeClient, Subscription] = {}
        self._covered = 0
        """No live client's position is beyond this: what has a higher offset is new to all of them."""
        self._targets: tuple[AnySink, ...] | None = None

    def add(self, client: CentrifugeClient, subscription: Subscription) -> None:
        """A client subscribes: from now on it is asked for each message."""
        self._making[client] = subscription

    def remove(self, client: CentrifugeClient) -> bool:
        """It no longer does; True when it was the last one."""
        self._making.pop(client, None)
        if self._live.pop(client, None) is not None:
            self._targets = None
        return not self._making and not self._live

    def deliver(self, envelope: Envelope) -> None:
        """A message to a topic that matches."""
        offset, topic = envelope.offset, envelope.topic
        push = encode_publication(self.channel, envelope.data, offset, envelope.info, topic)
        if self._making:
            self._ask(offset, push)
        if offset and offset <= self._covered:
            targets = tuple(
                client.sink
                for client, subscription in self._live.items()
                if subscription.admits(offset, push)
            )
        else:
            if self._targets is None:
                self._targets = tuple(client.sink for client in self._live)
            targets = self._targets
        if targets:
            # Who has a position loses nothing: such a client is closed, and recovers when it comes back.
            policy = "close" if offset else self._manager.rules.slow_consumer(topic)
            current_fanout().send(targets, push, policy, topic)

    def _ask(self, offset: int, push: bytes) -> None:
        """Those whose subscribe reply has left are as all others from now on; the others keep the push."""
        for client, subscription in list(self._making.items()):
            if subscription.live:
                del self._making[client]
                self._live[client] = subscription
                self._covered = max(self._covered, subscription.position)
                self._targets = None
            else:
                subscription.admits(offset, push)

    def tell(self, event: Envelope) -> None:
        """Somebody has joined or left, for those who asked to be told."""
        push = (encode_join if event.kind == JOIN else encode_leave)(self.channel, event.info)
        targets = tuple(
            client.sink
            for client, subscription in (*self._live.items(), *self._making.items())
            if subscription.request.join_leave and subscription.admits(0, push)
        )
        if targets:
            current_fanout().send(targets, push)


class Groups:
    """All groups of a manager's clients in this worker."""

    def __init__(self, manager: WebSocketManager) -> None:
        self._manager = manager
        self._groups: dict[str, Group] = {}

    def join(self, channel: str, client: CentrifugeClient, subscription: Subscription) -> None:
        """Subscribe a client: when this returns, it is in force on the whole host."""
        group = self._groups.get(channel)
        if group is None:
            group = self._groups[channel] = Group(channel, self._manager)
            self._manager.listen(channel, group)
        group.add(client, subscription)

    def leave(self, channel: str, client: CentrifugeClient) -> None:
        """The end of :meth:`join`; may be called twice."""
        group = self._groups.get(channel)
        if group is not None and group.remove(client):
            del self._groups[channel]
            self._manager.unlisten(channel, group)

    def tell(self, event: Envelope) -> None:
        """A join or leave on the host."""
        group = self._groups.get(event.topic)
        if group is not None:
            group.tell(event)
