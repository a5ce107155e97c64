"""The sending half of the mesh: which peers an envelope goes to, and one ZeroMQ socket that takes it there.

Stands between whoever publishes (``bus.py`` on an event loop, ``publisher.py`` without one) and the inboxes of the
others. One XPUB socket connects to the inbox of every living full peer; ``flow.py`` decides what may leave, and small
batches take the short way beside it (``shortcut.py``).

The destinations of an envelope are looked up when its batch is built, on the board, and remembered only as long as no
word of epochs, interest versions and states has changed: a subscription that its owner has confirmed is on the board
before the confirmation, so it misses nothing that is published after.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterable, Iterator

import zmq

from ipc import envelope as wire
from ipc.board import Counter, PeerKind, fence
from ipc.envelope import Envelope, FrameKind
from ipc.federation import NO_SLOT, Federation
from ipc.flow import unpack_credit
from ipc.interest import InterestKind, Place, PlaceCache, interest_in
from ipc.link import FIRST_TAIL, Key, Link, Waiter
from ipc.runtime import RuntimeDir, inbox_name
from ipc.shortcut import Shortcut

logger = logging.getLogger("ipc")

__all__ = ["Key", "Link", "Outbound", "Waiter"]

_ROUTES = 16384
_LONGEST_TAIL = 32.0
_ALONE = 0.5
"""Seconds after a heartbeat, half of :data:`ipc.bus.STALE_HEARTBEAT`."""

# As plain numbers: the enumerations cost more than the calls.
_EVENTS = int(zmq.EVENTS)
_POLLIN = int(zmq.POLLIN)
_DONTWAIT = int(zmq.DONTWAIT)


class Outbound:
    """The sender. Open from the constructor on; :meth:`close` it. Belongs to one thread."""

    def __init__(
        self,
        runtime: RuntimeDir,
        slot: int,
        context: zmq.Context[zmq.Socket[bytes]],
        backlog: int,
        *,
        lossless: bool = False,
        federates: Callable[[str], bool] | None = None,
    ) -> None:
        self.backlog = backlog
        self.drop_fraction = 0.0
        """Test hook: so many of the DATA frames are lost on purpose, between numbering and sending."""
        self.on_ready: Callable[[Link], None] = _ignore
        """Called when a peer's subscription was seen."""
        self.on_gone: Callable[[Link], None] = _ignore
        """Called when a peer has left or died."""
        self.links: dict[Key, Link] = {}
        self._runtime = runtime
        self._board = runtime.board
        self._lossless = lossless
        self._slot = slot
        self._epoch = self._board.record(slot).epoch
        self._record = self._board.record(slot)
        self._signed = self._board.signed
        self._sent_index = self._record.counter_index(Counter.BUS_SENT)
        self.federation: Federation | None = None
        """Numbers and holds what is for the bridge; None in a hub without one."""
        if federates is not None:
            held = Link(NO_SLOT, 0, "", backlog, 0, 0, keep=True)
            self.federation = Federation(federates, slot, self._epoch, held)
        self.alone_until = 0.0
        """By the monotonic clock: until then nobody else is there, nor anybody on other hosts, and nobody need look.

        Whoever joins waits for our answer, for which it has a link here, unless our heart has not beaten for a second.
        """
        self._seen = b""
        self._members: set[Key] = set()
        self._routes: dict[tuple[str, str], tuple[Link, ...]] = {}
        self._places = PlaceCache()
        self._queued: dict[Key, Link] = {}
        """Links whose outbox is not empty."""
        self._unready: set[Key] = set()
        """Links whose subscription we have not seen."""
        self._socket = context.socket(zmq.XPUB)
        self._socket.setsockopt(zmq.XPUB_VERBOSE, 1)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.setsockopt(zmq.LINGER, 0)
        self.fd = int(self._socket.get(zmq.FD))

    # -- who is there ----------------------------------------------------------------------------------------------

    def refresh(self) -> None:
        """Look at the board: connect to who came, disconnect from who left, forget routes when anything changed."""
        words = self._board.full_words()
        if words == self._seen:
            return
        fence()
        self._routes.clear()
        if _without_versions(words) != _without_versions(self._seen):
            self._meet({key for key in self._board.live_full_slots() if key[0] != self._slot})
        self._seen = words

    def _meet(self, members: set[Key]) -> None:
        for key in self._members - members:
            self._forget(self.links[key])
        for slot, epoch in members - self._members:
            self._connect(slot, epoch)
        self._members = members

    def _connect(self, slot: int, epoch: int) -> None:
        endpoint = f"ipc:///proc/self/fd/{self._runtime.fd}/{inbox_name(slot, epoch)}"
        bridge = self.federation is not None and self._board.record(slot).kind is PeerKind.BRIDGE
        backlog = 1 << 62 if self._lossless and not bridge else self.backlog
        link = Link(
            slot,
            epoch,
            endpoint,
            backlog,
            self._board.credit_index(slot, self._slot),
            self._board.map_offset(slot),
            keep=bridge,
        )
        self.links[link.key] = link
        self.alone_until = 0.0
        self._unready.add(link.key)
        if bridge and self.federation is not None and self.federation.arrived(link):
            self._advance(link)
            self._record.set(Counter.FEDERATION_HELD, 0)
        self._socket.connect(endpoint)
        if not bridge:  # what is for one may have to wait for Redis
            link.shortcut = Shortcut.open(self._runtime, slot, epoch)

    def _forget(self, link: Link) -> None:
        self.read_credit(link)
        if self.federation is not None and self.federation.departed(link):
            self._next_bridge(self.federation)
        lost = link.abandon()
        if lost:
            logger.warning("peer %d.%d is gone; %d messages for it are dropped", link.slot, link.epoch, lost)
        self._count_dropped(link)
        del self.links[link.key]
        self._queued.pop(link.key, None)
        self._unready.discard(link.key)
        while link.waiters:
            link.waiters.popleft()[1].one_done()
        if link.shortcut is not None:
            link.shortcut.close()
        try:
            self._socket.disconnect(link.endpoint)
        except zmq.ZMQError as error:
            logger.debug("disconnect from %s: %s", link.endpoint, error)
        self.on_gone(link)

    def _next_bridge(self, federation: Federation) -> None:
        """Ours is gone: another that has come already takes over, or what was for it is held."""
        others = (link for link in self.links.values() if link.keep and link.key in self._board_members())
        link = next(others, None)
        if link is not None and federation.arrived(link):
            self._advance(link)
        else:
            self._note_held(federation.link)

    def _board_members(self) -> set[Key]:
        return set(self._board.live_full_slots())

    def _note_held(self, held: Link) -> None:
        self._record.set(Counter.FEDERATION_HELD, held.outbox_bytes)
        if held.dropped != held.counted:
            self._count_dropped(held)

    def read_subscriptions(self) -> None:
        """Read what the socket has to say: after each event, and see :meth:`after_sending`."""
        socket = self._socket
        while socket.get(_EVENTS) & _POLLIN:  # type: ignore[operator]
            frame = socket.recv(_DONTWAIT)
            if len(frame) != 1 + wire.DESTINATION_BYTES:
                continue
            link = self.links.get(wire.parse_destination(frame[1:]))
            if link is None:
                continue
            link.ready = frame[0] == 1
            if link.ready:
                self._unready.discard(link.key)
                self.on_ready(link)
                self._advance(link)
            else:
                self._unready.add(link.key)

    # -- where to --------------------------------------------------------------------------------------------------

    def route(self, envelope: Envelope) -> tuple[Link, ...]:
        """The peers that an envelope concerns, each once; true as long as :meth:`refresh` finds nothing new."""
        if envelope.kind == wire.TOPIC:
            key = (envelope.channel, envelope.topic)
            links = self._routes.get(key)
            if links is None:
                links = self._remember(key, self._places.topic(*key))
            return links
        if envelope.kind == wire.BROADCAST:
            # No topic is empty, so the key is free for the broadcasts of a channel.
            key = (envelope.channel, "")
            links = self._routes.get(key)
            if links is None:
                links = self._remember(key, (self._places.other(InterestKind.CHANNEL, envelope.channel, ""),))
            return links
        if envelope.kind in (wire.JOIN, wire.LEAVE):
            # For those who subscribed to exactly this filter; NUL is in no topic, so the key is free.
            key = (envelope.channel, "\0" + envelope.topic)
            links = self._routes.get(key)
            if links is None:
                kind, text = interest_in(envelope.topic)
                links = self._remember(key, (self._places.other(kind, envelope.channel, text),))
            return links
        places = [
            self._places.other(InterestKind.CONN, envelope.channel, conn_id) for conn_id in envelope.conn_ids
        ]
        return self._wanting(places)

    def _remember(self, key: tuple[str, str], places: tuple[Place, ...]) -> tuple[Link, ...]:
        if len(self._routes) >= _ROUTES:
            self._routes.clear()
        links = self._routes[key] = self._wanting(places)
        return links

    def _wanting(self, places: Iterable[Place]) -> tuple[Link, ...]:
        # Written out: after each change of anybody's interest this runs for every topic anew.
        memory = self._board.memory
        found = []
        for link in self.links.values():
            offset = link.map_offset
            for byte, mask in places:
                if memory[offset + byte] & mask:
                    found.append(link)
                    break
        return tuple(found)

    # -- on the way ------------------------------------------------------------------------------------------------

    def send(self, entries: Iterable[tuple[Envelope, bytes | None]]) -> None:
        """Send envelopes (with their encoded form, when there is one yet) to whom they concern, in this order."""
        self.refresh()
        if not self.links and self.federation is None:
            return
        touched: dict[Key, Link] = {}
        known = self._routes.get
        federation = self.federation
        topic = channel = ""  # no topic is empty
        before: tuple[Link, ...] = ()
        for envelope, encoded in entries:
            if envelope.kind != wire.TOPIC:
                links = self.route(envelope)
            elif envelope.topic == topic and envelope.channel == channel:
                links = before  # messages to one topic come in runs
            else:
                topic, channel = envelope.topic, envelope.channel
                found = known((channel, topic))
                links = before = self.route(envelope) if found is None else found
            if federation is not None and envelope.origin is not None:
                links = (*links, federation.link)
            if not links:
                continue
            if encoded is None:
                encoded = wire.encode(envelope)
            for link in links:
                turn = link.turn
                if not turn:
                    touched[link.slot, link.epoch] = link
                turn.append(encoded)
        for link in touched.values():
            self.give_turn(link)
        self.after_sending()

    def to_bridge(self, envelope: Envelope) -> None:
        """Send an envelope to other hosts alone: it is stored, and so published, though the bus has no room for it."""
        federation = self.federation
        if federation is not None:
            federation.number(envelope)
            if envelope.origin is not None:
                federation.link.turn.append(wire.encode(envelope))
                self.give_turn(federation.link)

    def after_sending(self) -> None:
        """The socket's descriptor is edge-triggered, and a send may swallow the signal that a subscription has come in.

        To be called after each burst of sends; looks only while a subscription is still due.
        """
        if self._unready:
            self.read_subscriptions()

    def give_turn(self, link: Link) -> None:
        """Make batches of what a turn has brought for a peer and let leave what may."""
        turn = link.turn
        link.turn = []
        self._signed[self._sent_index] += len(turn)
        body = b"".join(turn)
        if len(body) <= wire.BATCH_TARGET:
            link.offer(body, len(turn))
        else:
            for part in _split(turn):
                link.offer(b"".join(part), len(part))
        if link.slot == NO_SLOT:
            self._note_held(link)
        else:
            self._advance(link)

    def _advance(self, link: Link) -> None:
        """Send what the window permits; remember the link while something is left."""
        while True:
            batch = link.take()
            if batch is not None:
                if not self.drop_fraction or random.random() >= self.drop_fraction:
                    number, envelopes, body = batch
                    frame = wire.data_frame(
                        link.to, self._slot, self._epoch, number, envelopes, link.position, body
                    )
                    if link.shortcut is None or not self._send_short(link, link.shortcut, frame):
                        link.detour = number + envelopes
                        self._socket.send(frame, _DONTWAIT)
            elif not link.outbox or not self.read_credit(link):
                break
        if link.outbox:
            self._queued[link.key] = link
        else:
            self._queued.pop(link.key, None)
        if link.dropped != link.counted:
            self._count_dropped(link)

    def _send_short(self, link: Link, shortcut: Shortcut, frame: bytes) -> bool:
        """Send a frame the short way, unless that is full, or something before it may still be in the mesh."""
        if link.acked_number < link.detour and not (
            self.read_credit(link) and link.acked_number >= link.detour
        ):
            return False
        return shortcut.send(frame)

    def control(self, link: Link, kind: FrameKind) -> None:
        """Send a control message; only to a link that is ready."""
        self._socket.send(
            wire.control_frame(link.to, kind, self._slot, self._epoch, link.last_number, link.position),
            _DONTWAIT,
        )

    def read_credit(self, link: Link) -> bool:
        """Look on the board how far a peer has come; True when it has moved."""
        was_stalled = link.stalled
        if not link.credit(unpack_credit(self._board.words[link.credit_index], self._epoch)):
            return False
        link.tail_pause = FIRST_TAIL
        link.tail_at = 0.0
        while link.waiters and link.waiters[0][0] <= link.acked_number:
            link.waiters.popleft()[1].one_done()
        if was_stalled:
            logger.warning("peer %d.%d moves again; %d messages for it were dropped", *link.key, link.dropped)
        return True

    def _count_dropped(self, link: Link) -> None:
        self._record.add(Counter.BUS_DROPPED, link.dropped - link.counted)
        if link.keep:
            self._record.add(Counter.FEDERATION_DROPPED, link.dropped - link.counted)
        link.counted = link.dropped

    # -- time ------------------------------------------------------------------------------------------------------

    @property
    def queued(self) -> bool:
        """Something waits in an outbox."""
        return bool(self._queued)

    @property
    def urgent(self) -> bool:
        """Something waits for a peer that moves: look at the credits soon. For the others a tick is soon enough."""
        return any(not link.stalled for link in self._queued.values())

    @property
    def queued_bytes(self) -> int:
        """Bytes in all outboxes."""
        return sum(link.outbox_bytes for link in self._queued.values())

    @property
    def processed_bytes(self) -> int:
        """What all that are there have processed of ours; grows as long as any of them moves."""
        return sum(link.acked for link in self.links.values())

    @property
    def fullest(self) -> int:
        """Bytes in the fullest outbox of those that publishers have to wait for."""
        return max(
            (
                link.outbox_bytes
                for link in self._queued.values()
                if not link.stalled or (self._lossless and not link.keep)
            ),
            default=0,
        )

    def poll(self, now: float) -> bool:
        """Look at the credits of the peers with something in their outbox, and send on; True when any has moved."""
        moved = False
        for link in tuple(self._queued.values()):
            moved |= self.read_credit(link)
            self._observe(link, now)
            self._advance(link)
        self.after_sending()
        return moved

    def tick(self, now: float) -> None:
        """A few times a second: look at everybody, judge who stands still, repeat last numbers."""
        self.refresh()
        if not self.links and self.federation is None:
            self.alone_until = self._record.heartbeat / 1e9 + _ALONE
        for link in tuple(self.links.values()):
            self.read_credit(link)
            self._observe(link, now)
            self._advance(link)
            self._repeat_tail(link, now)
        self.read_subscriptions()

    def _observe(self, link: Link, now: float) -> None:
        if link.observe(now):
            logger.warning(
                "peer %d.%d stands still; what exceeds its outbox of %d bytes is dropped",
                *link.key,
                self.backlog,
            )

    def _repeat_tail(self, link: Link, now: float) -> None:
        said = (link.last_number, link.position)
        if not link.ready or now < link.tail_at or (said == link.tail_said and link.acked == link.position):
            return
        # Ever more rarely as long as nothing moves: a stopped process must not be sent these for ever.
        link.tail_pause = FIRST_TAIL if said != link.tail_said else min(link.tail_pause * 2, _LONGEST_TAIL)
        link.tail_at = now + link.tail_pause
        link.tail_said = said
        self.control(link, FrameKind.TAIL)

    def forget_all(self) -> None:
        """Everybody is gone."""
        for link in tuple(self.links.values()):
            self._forget(link)
        self._members.clear()
        self._routes.clear()

    def close(self) -> None:
        """Close the socket; what was not processed by then counts as dropped.

        But not what a living bridge has been sent: it will go on without us.
        """
        if self.federation is not None:
            link = self.federation.link
            link.dropped += link.waiting_envelopes
            self._count_dropped(link)
            self.federation = None
            link.surrender()
        self.forget_all()
        self._socket.close(0)


def _split(turn: list[bytes]) -> Iterator[list[bytes]]:
    """Parts of at most :data:`ipc.envelope.BATCH_TARGET` bytes; a larger envelope is a part of its own."""
    part: list[bytes] = []
    size = 0
    for encoded in turn:
        if part and size + len(encoded) > wire.BATCH_TARGET:
            yield part
            part, size = [], 0
        part.append(encoded)
        size += len(encoded)
    yield part


def _without_versions(words: bytes) -> bytes:
    """Of what :meth:`Board.full_words` answers, what tells who is there."""
    third = len(words) // 3
    return words[:third] + words[2 * third :]


def _ignore(link: Link) -> None:
    pass
