"""The bus: one peer's place in the ZeroMQ mesh, on an event loop.

Stands between ``peer.py``, which workers use, and the two halves of the mesh (``outbound.py``, ``inbound.py``): it
drives both from the loop, joins and leaves, keeps the time, and says when publishers must pause.

Joining: the inbox is bound, then the record shows us, then we connect to every living peer and greet it as soon as we
have seen its subscription; it answers when it has seen ours. The bus is ready when all who live and move have answered.
Leaving: our interest is withdrawn and everybody told; each answers when what it still had for us has been sent.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterable

import zmq

from ipc import envelope as wire
from ipc.board import Counter, SlotState
from ipc.envelope import Envelope, FrameKind, Header
from ipc.inbound import Deliver, Inbound, TakeOver
from ipc.interest import OwnInterest
from ipc.outbound import Link, Outbound
from ipc.runtime import RuntimeDir

logger = logging.getLogger("ipc")

TICK = 0.25
"""Seconds between two rounds of housekeeping: heartbeat, the dead, the stalled, last numbers."""
POLL = 0.002
"""Seconds between two looks at the credits while something waits in an outbox."""
JOIN_BOUND = 1.8
"""Seconds after which the bus is ready even if a peer has not answered: what is for it waits in the outbox."""
LEAVE_BOUND = 2.0
"""Seconds without any progress after which a leaving peer gives up on what others have not processed."""
LONGEST_LEAVE = 10.0
_LOOK_AGAIN = 0.01
STALE_HEARTBEAT = 1.0
"""Seconds without a heartbeat after which nobody waits for a peer at join and leave."""
FLUSH_BYTES = 1024 * 1024
"""A turn that publishes more than this is sent in parts, so that the bound of the outboxes is seen in time."""
LOOKS = 4
"""So many turns after something has come in look for more at their end: mostly there is, and else it costs little."""

SURE_BYTES = wire.MAX_ENVELOPE // 4
"""Text in ASCII up to this size can be encoded, and is not too large in the end."""
_ENVELOPE_COST = 128
"""Bytes that an envelope without data counts for."""


class BusFull(Exception):
    """More was published without awaiting than twice ``--bus-backlog``; this message was not taken."""


class BusClosed(Exception):
    """The bus of this process is not open."""


class Bus:
    """One peer of the mesh. Call :meth:`start`, then use it, then :meth:`stop`, all on one loop."""

    def __init__(
        self,
        runtime: RuntimeDir,
        slot: int,
        backlog: int,
        *,
        federates: Callable[[str], bool] | None = None,
        take_over: TakeOver | None = None,
    ) -> None:
        self._runtime = runtime
        self._record = runtime.board.record(slot)
        self._slot = slot
        self.backlog = backlog
        self.loop = asyncio.get_running_loop()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        with contextlib.ExitStack() as opened:
            # No more descriptors, say: what was opened by then must not stay.
            opened.callback(self._context.destroy, 0)
            self.inbound = Inbound(runtime, slot, self._context, take_over)
            opened.callback(self.inbound.close)
            self.outbound = Outbound(runtime, slot, self._context, backlog, federates=federates)
            opened.pop_all()
        self.outbound.on_ready = self._on_ready
        self.outbound.on_gone = self._on_change
        self.inbound.on_control = self._on_control
        board = runtime.board
        self.interest = OwnInterest(board.memory, board.map_offset(slot), self._record.touch)
        self.on_loss: Callable[[], None] = _nothing
        """Called when something may have been lost: a gap shows, or a peer is gone."""
        self.inbound.on_gap = lambda: self.on_loss()
        self._turn: list[tuple[Envelope, bytes | None]] = []
        self._turn_bytes = 0
        self._flush_at = min(FLUSH_BYTES, max(backlog, wire.BATCH_TARGET))
        self._flush_scheduled = False
        self._read_scheduled = False
        self._looks = 0
        self._poll_timer: asyncio.TimerHandle | None = None
        self._tick_timer: asyncio.TimerHandle | None = None
        self._changed = asyncio.Event()
        self._when_clear: list[Callable[[], None]] = []
        self.congested = False
        """Some moving peer's outbox is over its bound: who publishes must pause."""
        self._lost = False
        self._leaving = False
        self._open = True

    @property
    def drop_fraction(self) -> float:
        """Test hook: the fraction of outgoing batches that is lost on purpose."""
        return self.outbound.drop_fraction

    @drop_fraction.setter
    def drop_fraction(self, fraction: float) -> None:
        self.outbound.drop_fraction = fraction

    # -- joining and leaving ---------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Join; ready on return: what anybody publishes from now on arrives, both ways."""
        self.loop.add_reader(self.inbound.fd, self._on_inbox)
        self.loop.add_reader(self.inbound.shortcut_fd, self._on_shortcut)
        self.loop.add_reader(self.outbound.fd, self._on_outbound)
        self._record.state = SlotState.JOINING
        self._tick()
        self._on_inbox()
        await self._until(self._all_greeted, JOIN_BOUND)
        for link in self.outbound.links.values():
            if not link.hello_answered:
                logger.warning("joined without an answer of peer %d.%d", *link.key)

    async def stop(self) -> None:
        """Leave: see that nothing is lost that can be kept, then close. May be called twice.

        Takes milliseconds; while others are behind but move, up to :data:`LONGEST_LEAVE` seconds.
        """
        if not self._open or self._leaving:
            return
        self._leaving = True
        self._flush()
        self.interest.clear()
        for link in self.outbound.links.values():
            if link.ready:
                self.outbound.control(link, FrameKind.BYE)
        self.outbound.after_sending()
        longest = time.monotonic() + LONGEST_LEAVE
        progress = -1
        while progress != (progress := self.outbound.processed_bytes) and time.monotonic() < longest:
            if await self._until(self._all_parted, LEAVE_BOUND):
                break
        self.close()

    async def _until(self, done: Callable[[], bool], bound: float) -> bool:
        """Wait until ``done``, looking again after each event of the mesh and every few milliseconds."""
        deadline = time.monotonic() + bound
        while not done():
            if time.monotonic() > deadline:
                return False
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_AGAIN):
                    await self._changed.wait()
        return True

    def _all_greeted(self) -> bool:
        self.outbound.refresh()
        return all(link.hello_answered or self._excused(link) for link in self.outbound.links.values())

    def _all_parted(self) -> bool:
        self.outbound.refresh()
        self.outbound.poll(time.monotonic())
        for link in tuple(self.outbound.links.values()):
            self.outbound.read_credit(link)
        return all(
            (self._parted(link) and (link.bye_answered or not link.ready)) or self._excused(link)
            for link in self.outbound.links.values()
        )

    @staticmethod
    def _parted(link: Link) -> bool:
        """It needs us no more; a bridge goes on with what it has been sent."""
        return not link.outbox if link.keep else link.idle

    def _excused(self, link: Link) -> bool:
        """Nobody waits for who stands still: its credit does not move, or it owes nothing and its heart is still."""
        heartbeat = self._runtime.board.record(link.slot).heartbeat
        # A bridge without Redis gives no credit, but it reads, and answers when it has all that could be sent to it.
        stalled = link.stalled and (not link.keep or bool(link.outbox))
        return stalled or (
            (link.idle or link.keep) and time.monotonic_ns() - heartbeat > STALE_HEARTBEAT * 1e9
        )

    def close(self) -> None:
        """Close sockets and timers at once; what is under way to others then counts as dropped."""
        if not self._open:
            return
        self._open = False
        if not self.loop.is_closed():
            self.loop.remove_reader(self.inbound.fd)
            self.loop.remove_reader(self.inbound.shortcut_fd)
            self.loop.remove_reader(self.outbound.fd)
        for timer in (self._poll_timer, self._tick_timer):
            if timer is not None:
                timer.cancel()
        self._turn.clear()
        self.outbound.close()
        self.inbound.close()
        self._context.term()
        self._release_publishers()

    # -- out -------------------------------------------------------------------------------------------------------

    def publish(self, envelope: Envelope) -> None:
        """Take an envelope; it leaves at the end of this turn of the loop.

        Raises:
            BusFull: twice the bound waits already for a peer that moves; the envelope was not taken.
            EnvelopeTooBig, ValueError: it cannot travel, see :func:`ipc.envelope.encode`.
            BusClosed: the bus was stopped.
        """
        if not self._open:
            raise BusClosed("the bus of this process is closed")
        outbound = self.outbound
        if self.congested and outbound.fullest > 2 * self.backlog:
            if envelope.offset:
                # The others of this host find it in the store; other hosts must get it from us, in order.
                self._flush()
                outbound.to_bridge(envelope)
            raise BusFull(f"{outbound.fullest} bytes wait for a peer; await what you send")
        federation = outbound.federation
        if federation is not None:
            federation.number(envelope)
            try:
                self._turn.append((envelope, wire.encode(envelope)))
            except ValueError:
                federation.take_back(envelope)
                raise
        elif (
            len(envelope.data) < SURE_BYTES
            and not envelope.conn_ids
            and len(envelope.topic) < SURE_BYTES
            and envelope.topic.isascii()
            and envelope.channel.isascii()
        ):
            # Nobody else is there. (It is zero while somebody is, and then the clock need not be asked.)
            if outbound.alone_until and not self._turn and time.monotonic() < outbound.alone_until:
                return
            self._turn.append((envelope, None))  # encoded if somebody turns out to want it, which cannot fail
        else:
            self._turn.append((envelope, wire.encode(envelope)))
        self._turn_bytes += len(envelope.data) + _ENVELOPE_COST
        if self._turn_bytes > self._flush_at:
            self._flush()
        elif not self._flush_scheduled:
            self._flush_scheduled = True
            self.loop.call_soon(self._end_of_turn)

    def publish_stored(self, envelopes: Iterable[Envelope]) -> None:
        """As :meth:`publish`, and it leaves now; what cannot be taken the others find in the log."""
        if not self._open or (not self._turn and time.monotonic() < self.outbound.alone_until):
            return
        scheduled, self._flush_scheduled = self._flush_scheduled, True
        for envelope in envelopes:
            try:
                self.publish(envelope)
            except Exception as error:
                logger.debug("offset %d did not go over the bus: %r", envelope.offset, error)
        self._flush_scheduled = scheduled
        self._flush()

    def _end_of_turn(self) -> None:
        self._flush_scheduled = False
        if self._open:
            self._flush()
            if self._looks:
                # What came in during a long turn goes out to clients together with what the turn has for them.
                self._looks -= 1
                self.inbound.read_shortcut()
                # What is to be read on in the next turn is not read in this one as well: a turn has its bound.
                if not self._read_scheduled:
                    self._on_inbox()

    def _flush(self) -> None:
        turn = self._turn
        if turn:
            self._turn = []
            self._turn_bytes = 0
            self.outbound.send(turn)
            if self.outbound.queued:
                self._watch()

    def _watch(self) -> None:
        """Something waits in an outbox: judge the congestion, look at the credits soon."""
        self._judge()
        if self._poll_timer is None and self.outbound.urgent and self._open:
            self._poll_timer = self.loop.call_later(POLL, self._poll)

    def _poll(self) -> None:
        self._poll_timer = None
        self.outbound.poll(time.monotonic())
        self._part_with_leavers()
        self._watch()

    def _judge(self) -> None:
        fullest = self.outbound.fullest
        self._record.set(Counter.BUS_BACKLOG, self.outbound.queued_bytes)
        if fullest > self.backlog:
            self.congested = True
        elif self.congested and fullest <= self.backlog // 2:
            self.congested = False
            self._release_publishers()

    def _release_publishers(self) -> None:
        callbacks, self._when_clear = self._when_clear, []
        for callback in callbacks:
            try:
                callback()
            except Exception:
                logger.exception("a callback after congestion failed")

    def on_clear(self, callback: Callable[[], None]) -> None:
        """Call once when the bus is not congested (any more), or is closed."""
        if self.congested and self._open:
            self._when_clear.append(callback)
        else:
            self.loop.call_soon(callback)

    # -- in --------------------------------------------------------------------------------------------------------

    def attach(self, channel: str, deliver: Deliver) -> None:
        """See :meth:`ipc.inbound.Inbound.attach`."""
        self.inbound.attach(channel, deliver)

    def detach(self, channel: str) -> None:
        """See :meth:`ipc.inbound.Inbound.detach`."""
        self.inbound.detach(channel)

    def _on_inbox(self) -> None:
        if not self._open:
            return
        before = self.inbound.received
        more = self.inbound.read()
        if self.inbound.received != before:
            self._looks = LOOKS
        if more and not self._read_scheduled:
            # The descriptor will not tell again of what is there already.
            self._read_scheduled = True
            self.loop.call_soon(self._read_on)

    def _read_on(self) -> None:
        self._read_scheduled = False
        self._on_inbox()

    def _on_shortcut(self) -> None:
        if self._open:
            self._looks = LOOKS
            self.inbound.read_shortcut()

    def _on_outbound(self) -> None:
        if self._open:
            self.outbound.read_subscriptions()
            if self.outbound.queued:
                self._watch()

    # -- the mesh --------------------------------------------------------------------------------------------------

    def _on_ready(self, link: Link) -> None:
        if not link.greeted:
            link.greeted = True
            self.outbound.control(link, FrameKind.HELLO)
        if link.owes_hello:
            link.owes_hello = False
            self.outbound.control(link, FrameKind.HELLO_ACK)
        self._changed.set()

    def _on_change(self, link: Link) -> None:
        self._changed.set()
        self.loop.call_soon(self.on_loss)

    def _on_control(self, header: Header) -> None:
        key = (header.slot, header.epoch)
        if header.kind == FrameKind.HELLO and key not in self.outbound.links:
            self.outbound.refresh()
        link = self.outbound.links.get(key)
        if link is None:
            return
        if header.kind == FrameKind.HELLO:
            self._answer(link)
        elif header.kind == FrameKind.HELLO_ACK:
            link.hello_answered = True
        elif header.kind == FrameKind.BYE:
            link.owes_bye = True
            self._flush()
            self._part_with_leavers()
        elif header.kind == FrameKind.BYE_ACK:
            link.bye_answered = True
        self._changed.set()

    def _answer(self, link: Link) -> None:
        if link.ready:
            self.outbound.control(link, FrameKind.HELLO_ACK)
            self.outbound.after_sending()
        else:
            link.owes_hello = True

    def _part_with_leavers(self) -> None:
        """Answer each BYE as soon as nothing of ours waits for the one who leaves."""
        for link in self.outbound.links.values():
            if link.owes_bye and link.ready and not link.outbox:
                link.owes_bye = False
                self.outbound.control(link, FrameKind.BYE_ACK)
        self.outbound.after_sending()

    def _tick(self) -> None:
        if not self._open:
            return
        # First of all, so that nothing that goes wrong below ends the housekeeping.
        self._tick_timer = self.loop.call_later(TICK, self._tick)
        self._record.beat()
        self._runtime.reap_dead()
        self.outbound.tick(time.monotonic())
        self._part_with_leavers()
        self._watch()
        self._changed.set()
        self._check_directory()

    def _check_directory(self) -> None:
        if not self._lost and not self._runtime.is_current():
            self._lost = True
            logger.error(
                "%s was removed or replaced while this process uses it: who starts from now on does not see it",
                self._runtime.path,
            )


def _nothing() -> None:
    pass
