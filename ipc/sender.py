"""An open publisher: its slot, its socket, and what has yet to be processed by whom.

Stands between ``publisher.py``, which offers it to programs in two forms, and the sending half of the mesh. It has no
thread and no loop: whoever owns it calls :meth:`Sender.poll`, and looks at the board by that.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Generator, Iterable
from typing import TYPE_CHECKING, TypeVar

import zmq

from ipc import envelope as wire
from ipc.board import FULL_SLOTS, PeerKind, SlotState
from ipc.envelope import TOPIC, Envelope
from ipc.federation import Federation
from ipc.flow import BACKLOG
from ipc.outbound import Link, Outbound
from ipc.positions import Position
from ipc.rules import Rules
from ipc.runtime import RuntimeDir

if TYPE_CHECKING:
    from ipc.store import Store

T = TypeVar("T")

_OPEN_PAUSE = 5e-3
_STORE_PAUSE = 5e-4
_TICK = 0.25
_TRUST = 0.05
"""Seconds for which the directory is taken for the same without looking."""


class HubNotFound(ConnectionError):
    """No hub runs in the runtime directory. The text says where it was looked for."""


class Delivery:
    """Counts down the processes that have yet to process one message."""

    __slots__ = ("_done", "remaining")

    def __init__(self, done: Callable[[], None] | None = None) -> None:
        self.remaining = 0
        self._done = done

    def one_done(self) -> None:
        """One of them has, or is gone."""
        self.remaining -= 1
        if self.remaining == 0 and self._done is not None:
            self._done()


class Sender:
    """An open publisher: slot, socket, board. No loop and no thread: its owner calls :meth:`poll`."""

    def __init__(self, runtime: RuntimeDir, slot: int, rules: Rules) -> None:
        self.pid = os.getpid()
        self._runtime = runtime
        self._record = runtime.board.record(slot)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        try:
            federates = None if rules.federate is None else rules.federates
            self._outbound = Outbound(
                runtime, slot, self._context, BACKLOG, lossless=True, federates=federates
            )
        except BaseException:
            self._context.destroy(0)
            raise
        self._outbound.refresh()
        self._next_tick = 0.0
        self._looked = time.monotonic()
        self._store: Store | None = None
        self._rules = rules
        self._record.state = SlotState.READY

    def stored(
        self, envelope: Envelope, idempotency_key: str, deadline: float
    ) -> Generator[float, None, Position | None]:
        """Store a message whose topic has history, which gives it its offset; yields seconds to pause.

        Returns its position; None for a topic without history. An envelope without an offset was stored before.

        Raises:
            StoreError: it could not be stored (StoreBusy: in time).
        """
        retention = self._rules.retention(envelope.topic) if envelope.kind == TOPIC else None
        if retention is None:
            return None
        from ipc.store import Entry, StoreBusy

        store = self._opened_store()
        entry = Entry(envelope.channel, envelope.topic, envelope.data, retention, idempotency_key)
        while True:
            try:
                (stored,) = store.append([entry])
            except StoreBusy:
                if time.monotonic() > deadline:
                    raise
                yield _STORE_PAUSE
            else:
                envelope.offset = 0 if stored.duplicate else stored.offset
                return Position(stored.offset, store.epoch)

    def _opened_store(self) -> Store:
        if self._store is None:
            from ipc.store import Store

            rules = self._rules
            directory = rules.data_dir or f"/proc/self/fd/{self._runtime.fd}"
            self._store = Store.open(
                directory, store_size=rules.store_size or None, durable=bool(rules.data_dir)
            )
        return self._store

    def hub_is_there(self) -> bool:
        """False when the directory was given to another hub, or everybody in it is gone."""
        self._outbound.refresh()
        now = time.monotonic()
        if now - self._looked > _TRUST:
            self._looked = now
            if not self._runtime.is_current():
                return False
        return bool(self._outbound.links)

    def is_full(self) -> bool:
        """Too much waits for somebody to take more."""
        return self._outbound.fullest > BACKLOG

    @property
    def waiting(self) -> bool:
        """Somebody has yet to process something."""
        return any(link.waiters for link in self._outbound.links.values())

    @property
    def late(self) -> list[int]:
        """The slots of those who have yet to process something."""
        return [link.slot for link in self._outbound.links.values() if link.waiters]

    def submit(self, entries: Iterable[tuple[Envelope, bytes, Delivery]]) -> None:
        """Send messages; the delivery of each that concerns nobody is done at once."""
        outbound = self._outbound
        outbound.refresh()
        federation = outbound.federation
        touched: dict[tuple[int, int], Link] = {}
        for envelope, plain, delivery in entries:
            encoded = plain
            if federation is not None:
                federation.number(envelope)
                encoded = _encode_numbered(envelope, federation)
            # Held back by one until all have it, or the first to be gone could end it.
            delivery.remaining = 1
            for link in outbound.route(envelope):
                delivery.remaining += 1
                link.turn.append(encoded)
                link.waiters.append((link.number + len(link.turn), delivery))
                touched[link.key] = link
            if federation is not None and envelope.origin is not None:
                bridge = federation.link
                bridge.turn.append(encoded)
                touched[bridge.key] = bridge
                if not federation.waits_for_bridge:
                    delivery.remaining += 1
                    bridge.waiters.append((bridge.number + len(bridge.turn), delivery))
            delivery.one_done()
        for link in touched.values():
            outbound.give_turn(link)
        outbound.after_sending()

    def poll(self, now: float) -> bool:
        """Look at the credits, send what waits; now and then see who has died. True when something has moved."""
        outbound = self._outbound
        moved = [outbound.poll(now)]
        moved += [outbound.read_credit(link) for link in outbound.links.values() if link.waiters]
        if now >= self._next_tick:
            self._next_tick = now + _TICK
            self._record.beat()
            if self._runtime.is_current():
                self._runtime.reap_dead()
                outbound.tick(now)
            else:
                outbound.forget_all()
        return any(moved)

    def close(self) -> None:
        """Give everything back."""
        if self._store is not None:
            self._store.close()
        self._outbound.close()
        self._context.term()
        self._runtime.close()


def _encode_numbered(envelope: Envelope, federation: Federation) -> bytes:
    """An envelope with its number; one that the number has made too large stays on this host."""
    try:
        return wire.encode(envelope)
    except wire.EnvelopeTooBig:
        federation.take_back(envelope)
        return wire.encode(envelope)


def opening(path: str, deadline: float) -> Generator[float, None, Sender]:
    """Open a publisher; yields the seconds to pause while the directory is locked or the hub about to start.

    Raises:
        HubNotFound: there is no hub, or it did not start in time.
        RuntimeDirError: the directory cannot be used.
    """
    while True:
        try:
            sender = _try_open(path)
        except FileNotFoundError:
            raise HubNotFound(f"no hub runs in {path}: there is no such runtime directory") from None
        if sender is not None:
            return sender
        if time.monotonic() > deadline:
            raise HubNotFound(f"no worker is ready in {path}, though its supervisor runs")
        yield _OPEN_PAUSE


def _try_open(path: str) -> Sender | None:
    """One attempt; None when it is worth another."""
    runtime = RuntimeDir.enter(path, create=False)
    if runtime is None:
        return None
    try:
        runtime.open_board()
        runtime.reap_dead()
        if not any(slot < FULL_SLOTS for slot in runtime.living()):
            if not runtime.supervisor_lives():
                raise HubNotFound(f"no hub runs in {path}: nobody in it is alive")
            runtime.unlock_directory()
            runtime.close()
            return None
        slot = runtime.claim(PeerKind.PUBLISHER)
        sender = Sender(runtime, slot, runtime.agree(None))
    except BaseException:
        runtime.unlock_directory()
        runtime.close()
        raise
    runtime.unlock_directory()
    return sender


def drive(steps: Generator[float, None, T]) -> T:
    while True:
        try:
            time.sleep(next(steps))
        except StopIteration as stop:
            result: T = stop.value
            return result


async def drive_async(steps: Generator[float, None, T]) -> T:
    while True:
        try:
            pause = next(steps)
        except StopIteration as stop:
            result: T = stop.value
            return result
        await asyncio.sleep(pause)
