"""A peer: this process's place among the processes of a hub, as the layers above see it.

Stands where messages enter and leave the bus. Whoever serves clients opens one, says what its clients are interested
in, publishes envelopes and receives those of others; the directory, the board and the mesh are behind it.
"""

from __future__ import annotations

import asyncio
import atexit
import logging
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from ipc.board import Counter, PeerKind, Record, SlotState
from ipc.bus import Bus, BusClosed, BusFull
from ipc.envelope import BROADCAST, DIRECT, TOPIC, Envelope, EnvelopeTooBig
from ipc.flow import BACKLOG
from ipc.inbound import Deliver, TakeOver
from ipc.interest import InterestKind
from ipc.rules import Rules
from ipc.runtime import RulesMismatch, RuntimeDir, RuntimeDirError, locked_too_long

if TYPE_CHECKING:
    from ipc.history import HostLog
    from ipc.presence import PresenceBoard

logger = logging.getLogger("ipc")

__all__ = [
    "BROADCAST",
    "DIRECT",
    "TOPIC",
    "BusClosed",
    "BusFull",
    "Counter",
    "Envelope",
    "EnvelopeTooBig",
    "InterestKind",
    "Peer",
    "PeerKind",
    "Record",
    "Rules",
    "SlotState",
]

_LOCK_BOUND = 5.0
_LOCK_RETRY = 0.005


class Peer:
    """One process on the bus. Open it by :meth:`open`, give it back by :meth:`close`; both on the same event loop.

    Nothing here may be called from another thread than the loop's.
    """

    def __init__(self, runtime: RuntimeDir, slot: int, rules: Rules, bus: Bus) -> None:
        self.runtime = runtime
        """The runtime directory."""
        self.slot = slot
        self.rules = rules
        """The topic rules of the hub, the same in all its processes."""
        self.record: Record = runtime.board.record(slot)
        """Our record on the board, to count in."""
        self.epoch = self.record.epoch
        self.bus = bus
        """The mesh behind it; for tests and measurements."""
        self.log: HostLog | None = None
        """The history of the host; None where no topic has any."""
        self.presence: PresenceBoard | None = None
        """Who is on which topic; None where no topic has presence."""
        self._users = 0
        self._opening: asyncio.Future[Peer] | None = None

    @classmethod
    async def open(
        cls,
        path: str,
        *,
        kind: PeerKind,
        listener: int | None = None,
        rules: Rules | None = None,
        bus_backlog: int = BACKLOG,
        take_over: TakeOver | None = None,
    ) -> Peer:
        """Join the hub of a runtime directory; when this returns, messages pass both ways.

        A second call for the same directory in the same process and on the same loop returns the same peer, counted;
        only its ``rules`` are looked at then.

        Args:
            path: the runtime directory; made when missing.
            kind: WORKER stays JOINING until :meth:`set_state`; any other is READY at once.
            listener: index of the listening socket that a worker serves.
            rules: the topic rules; None takes those of the running hub.
            bus_backlog: bytes that may wait for one peer before publishers must pause.
            take_over: for a bridge: gets everything that comes, and says itself when it has been dealt with.

        Raises:
            RuntimeDirError: the directory cannot be used, or has no free slot, or its hub has other rules.
        """
        key = (_absolute(path), asyncio.get_running_loop())
        _forget_dead_loops()
        opening = _peers.get(key)
        if opening is not None:
            peer = await asyncio.shield(opening)
            if _peers.get(key) is opening and peer.runtime.is_current():
                return peer._share(rules)
        opening = _peers[key] = asyncio.ensure_future(
            cls._open(path, kind, listener, rules, bus_backlog, take_over)
        )
        try:
            peer = await opening
        except BaseException:
            _forget(opening)
            if opening.done() and not opening.cancelled() and opening.exception() is None:
                # We were cancelled in the very moment in which it opened.
                opening.result()._end()
            raise
        peer._opening = opening
        return peer._share(rules)

    @classmethod
    async def _open(
        cls,
        path: str,
        kind: PeerKind,
        listener: int | None,
        rules: Rules | None,
        bus_backlog: int,
        take_over: TakeOver | None = None,
    ) -> Peer:
        runtime = await _enter(path)
        try:
            try:
                runtime.prepare()
                agreed = runtime.agree(rules)
                slot = runtime.claim(kind, listener)
            finally:
                runtime.unlock_directory()
            federates = None if kind is PeerKind.BRIDGE or agreed.federate is None else agreed.federates
            bus = Bus(runtime, slot, bus_backlog, federates=federates, take_over=take_over)
            try:
                await bus.start()
            except BaseException:
                bus.close()
                raise
        except BaseException:
            runtime.close()
            raise
        peer = cls(runtime, slot, agreed, bus)
        try:
            if kind is not PeerKind.BRIDGE:
                await peer._open_stores()
        except BaseException:
            peer._end()
            raise
        if kind is not PeerKind.WORKER:
            peer.set_state(SlotState.READY)
        logger.debug("on the bus of %s as peer %d.%d", path, slot, peer.epoch)
        return peer

    async def _open_stores(self) -> None:
        """History and presence, where the rules have any; LMDB is not even loaded elsewhere."""
        rules = self.rules
        if not (rules.any_history or rules.any_presence):
            return
        from ipc import store_opening

        if rules.any_history:
            self.log = await store_opening.open_log(self)
            self.bus.on_loss = self.log.heal
        if rules.any_presence:
            self.presence = await store_opening.open_presence(self)

    def _share(self, rules: Rules | None) -> Peer:
        difference = rules.difference(self.rules) if rules is not None else None
        if difference is not None:
            raise RulesMismatch(
                f"{self.runtime.path}: {difference}; give all processes of a hub the same rules"
            )
        self._users += 1
        return self

    # -- messages --------------------------------------------------------------------------------------------------

    def attach(self, channel: str, deliver: Deliver) -> None:
        """Receive what others publish on a channel: ``deliver`` gets lists of envelopes, in order of each publisher.

        What it raises is logged and stops nothing.

        Raises:
            ValueError: the channel has a receiver in this process already.
        """
        self.bus.attach(channel, self.log.attach(channel, deliver) if self.log is not None else deliver)

    def detach(self, channel: str) -> None:
        """Receive nothing more of a channel."""
        self.bus.detach(channel)
        if self.log is not None:
            self.log.detach(channel)

    def publish(self, envelope: Envelope) -> None:
        """Send an envelope to every other process that it concerns, at the end of this turn of the loop.

        Not to this process: local delivery is the caller's.

        Raises:
            BusFull: too much was published without pausing, see :attr:`congested`; the envelope was not taken.
            EnvelopeTooBig: it is larger than 16 MiB.
            ValueError: a text in it is no Unicode.
            BusClosed: the peer was closed.
        """
        self.bus.publish(envelope)

    @property
    def congested(self) -> bool:
        """A peer that moves is behind by more than the bound: who publishes must pause."""
        return self.bus.congested

    def on_clear(self, callback: Callable[[], None]) -> None:
        """Call ``callback`` once when the bus is not congested (any more)."""
        self.bus.on_clear(callback)

    async def accepted(self) -> None:
        """Return when the bus is not congested: at once, or when those who are behind have caught up."""
        while self.bus.congested:
            clear = asyncio.get_running_loop().create_future()
            self.bus.on_clear(lambda clear=clear: None if clear.done() else clear.set_result(None))  # type: ignore[misc]
            await clear

    # -- interest --------------------------------------------------------------------------------------------------

    def interest_add(self, kind: InterestKind, channel: str, text: str) -> None:
        """Want messages, counted. Call it *before* the client is told: from its return on nothing is missed.

        Args:
            kind: EXACT with a topic, PREFIX with :func:`ipc.topics.prefix_run` of a pattern, CONN with a conn_id,
                CHANNEL with ``""`` for the broadcasts of a channel.
            channel: the manager's channel.
            text: what the kind asks for.
        """
        self.bus.interest.add(kind, channel, text)

    def interest_discard(self, kind: InterestKind, channel: str, text: str) -> None:
        """Want it once less.

        Raises:
            ValueError: it was not wanted.
        """
        self.bus.interest.discard(kind, channel, text)

    # -- life ------------------------------------------------------------------------------------------------------

    def set_state(self, state: SlotState) -> None:
        """Show on the board where this process is in its life."""
        self.record.state = state

    async def close(self) -> None:
        """Leave the hub when the last user of this peer has closed it.

        What was published arrives, unless a peer stands still. Takes milliseconds; two seconds when a peer does not
        move, and up to ten when one is far behind.
        """
        self._users -= 1
        if self._users > 0:
            return
        if self._opening is not None:
            _forget(self._opening)
        if self.presence is not None:
            self.presence.close()
        if self.log is not None:
            self.log.flush()
        try:
            await self.bus.stop()
        finally:
            self._end()

    def _end(self) -> None:
        if self.presence is not None:
            self.presence.close()
        if self.log is not None:
            self.log.close()
        self.bus.close()
        self.runtime.close()


_Key = tuple[str, asyncio.AbstractEventLoop]
_peers: dict[_Key, asyncio.Future[Peer]] = {}


def _forget(opening: asyncio.Future[Peer]) -> None:
    """Nobody shares this one any more."""
    for key in [key for key, known in _peers.items() if known is opening]:
        del _peers[key]


def _absolute(path: str) -> str:
    return os.path.abspath(path)


async def _enter(path: str) -> RuntimeDir:
    """The directory with its lock held, without blocking the loop while another process holds it."""
    deadline = time.monotonic() + _LOCK_BOUND
    while True:
        runtime = RuntimeDir.enter(path)
        if runtime is not None:
            return runtime
        if time.monotonic() > deadline:
            raise RuntimeDirError(locked_too_long(path, _LOCK_BOUND))
        await asyncio.sleep(_LOCK_RETRY)


def _forget_dead_loops() -> None:
    """Peers whose loop was closed over their heads give back their slots now."""
    for key in [key for key in _peers if key[1].is_closed()]:
        _give_back(_peers.pop(key))


def _give_back_all() -> None:
    """At the end of the process: who has not closed its peer (no lifespan ran, say) leaves no slot and no inbox."""
    while _peers:
        _give_back(_peers.popitem()[1])


def _give_back(opening: asyncio.Future[Peer]) -> None:
    if opening.done() and not opening.cancelled() and opening.exception() is None:
        opening.result()._end()


atexit.register(_give_back_all)
# A forked child has none of its parent's locks and loops; it opens its own.
os.register_at_fork(after_in_child=_peers.clear)
