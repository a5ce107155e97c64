"""The receiving half of the mesh: an inbox, from which envelopes go to whoever attached to their channel.

Stands between the sockets of the other peers and the managers of this process. What comes in is checked, counted
and handed on in order; then the sender is given credit on the board. Nothing that comes in ends the process.
Small batches come the short way beside the inbox (``shortcut.py``).
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable

import zmq

from ipc import envelope as wire
from ipc.board import SLOTS, Counter, PeerKind
from ipc.envelope import BadFrame, Envelope, FrameKind, Header
from ipc.flow import ReceiveFlow, pack_credit
from ipc.origins import Seen
from ipc.runtime import RuntimeDir, inbox_name
from ipc.shortcut import ShortcutEnd

logger = logging.getLogger("ipc")

Deliver = Callable[[list[Envelope]], None]
TakeOver = Callable[[Header, list[Envelope], Callable[[], None]], None]
"""Gets every batch, whatever its channel, and calls the function when the sender may be given credit for it."""

BATCHES_A_TURN = 256
BYTES_A_TURN = 1024 * 1024
"""After so many bytes the loop gets its turn, however few the batches."""
SECONDS_A_TURN = 0.01
"""Or after so long, however few the bytes."""
_MAX_ZMQ_MESSAGE = 4 * wire.MAX_FRAME
"""Beyond this ZeroMQ itself cuts the sender off, before it has all in memory."""
_COMPLAINTS = 1024

# As plain numbers: the enumerations cost more than the calls.
_EVENTS = int(zmq.EVENTS)
_POLLIN = int(zmq.POLLIN)
_DONTWAIT = int(zmq.DONTWAIT)


class _Sender:
    """One sender, as this receiver sees it."""

    __slots__ = ("complained", "epoch", "flow", "foreign")

    def __init__(self, epoch: int, foreign: bool) -> None:
        self.foreign = foreign
        """It may be a bridge, which brings messages of other hosts."""
        self.epoch = epoch
        self.flow = ReceiveFlow()
        self.complained = False


class Inbound:
    """The inbox of a full slot. Bound from the constructor on; :meth:`close` it. Belongs to one thread."""

    def __init__(
        self,
        runtime: RuntimeDir,
        slot: int,
        context: zmq.Context[zmq.Socket[bytes]],
        take_over: TakeOver | None = None,
    ) -> None:
        self.on_control: Callable[[Header], None] = _ignore
        """Called for each control message but TAIL."""
        self.on_gap: Callable[[], None] = _nothing
        """Called when the numbering shows that something did not arrive."""
        self._runtime = runtime
        self._board = runtime.board
        self._slot = slot
        self._record = self._board.record(slot)
        self._signed = self._board.signed
        self._received_index = self._record.counter_index(Counter.BUS_RECEIVED)
        self._take_over = take_over
        self._foreign = Seen()
        """Of the messages of other hosts: a bridge that was restarted brings some a second time."""
        self._channels: dict[str, Deliver] = {}
        self._senders: dict[tuple[int, int], _Sender] = {}
        self._newest: dict[int, _Sender] = {}
        self._complained: set[tuple[int, int]] = set()
        self._closed = False
        self._socket = context.socket(zmq.SUB)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.MAXMSGSIZE, _MAX_ZMQ_MESSAGE)
        self._socket.setsockopt(zmq.SUBSCRIBE, wire.destination(slot, self._record.epoch))
        self._socket.bind(f"ipc:///proc/self/fd/{runtime.fd}/{inbox_name(slot, self._record.epoch)}")
        self.fd = int(self._socket.get(zmq.FD))
        self._shortcut = ShortcutEnd(runtime, slot, self._record.epoch)
        self.shortcut_fd = self._shortcut.fd

    def attach(self, channel: str, deliver: Deliver) -> None:
        """Hand the envelopes of a channel to ``deliver``, in order, one call for each run of them.

        Raises:
            ValueError: somebody has attached to it already.
        """
        if channel in self._channels:
            raise ValueError(f"channel {channel!r} has a receiver in this process already")
        self._channels[channel] = deliver

    def detach(self, channel: str) -> None:
        """Hand on nothing more of a channel."""
        self._channels.pop(channel, None)

    @property
    def received(self) -> int:
        """How many envelopes have come in."""
        return self._signed[self._received_index]

    def read(self) -> bool:
        """Take in what is there, up to a turn's worth; True when more may be waiting."""
        if not self._readable():
            return False
        receive = self._socket.recv
        message = receive(_DONTWAIT)
        self._take_in(message)
        # One message at a time is the usual case, and asking costs less than being told "again" by an exception.
        if not self._readable():
            return False
        size = len(message)
        end = time.monotonic() + SECONDS_A_TURN
        for _ in range(BATCHES_A_TURN - 1):
            try:
                message = receive(_DONTWAIT)
            except zmq.Again:
                return False
            self._take_in(message)
            size += len(message)
            if size > BYTES_A_TURN or time.monotonic() > end:
                break
        return True

    def read_shortcut(self) -> None:
        """Take in what came the short way, up to a turn's worth; its descriptor tells again of what is left."""
        end = time.monotonic() + SECONDS_A_TURN
        for _ in range(BATCHES_A_TURN):
            if not self._take_datagram() or time.monotonic() > end:
                break

    def _catch_up(self, sender: _Sender, number: int) -> None:
        """Take in what was sent the short way before what has just come through the mesh, which has this number."""
        for _ in range(self._shortcut.most):
            if sender.flow.number >= number or not self._take_datagram():
                break

    def _take_datagram(self) -> bool:
        message = self._shortcut.receive()
        if message is None:
            return False
        self._take_in(message, through_mesh=False)
        return True

    def _readable(self) -> bool:
        return bool(self._socket.get(_EVENTS) & _POLLIN)  # type: ignore[operator]

    def _take_in(self, message: bytes, through_mesh: bool = True) -> None:
        try:
            header = wire.parse_header(message)
        except BadFrame as error:
            self._invalid(_claimed_sender(message), 1, str(error))
            return
        sender = self._senders.get((header.slot, header.epoch)) or self._meet(header)
        if through_mesh and sender is not None and header.number > sender.flow.number:
            self._catch_up(sender, header.number)
        if sender is None:
            self._invalid(
                (header.slot, header.epoch), max(header.envelopes, 1), "a frame of nobody on the board"
            )
        elif header.kind == FrameKind.DATA:
            self._take_batch(message, header, sender)
        elif header.kind == FrameKind.TAIL:
            self._note_gap(header, sender, sender.flow.accept(header.number, 0))
            self._settle(header, sender, [])
        elif header.kind <= FrameKind.BYE_ACK:
            self.on_control(header)
        else:
            self._invalid((header.slot, header.epoch), 1, f"a frame of unknown kind {header.kind}")

    def _take_batch(self, message: bytes, header: Header, sender: _Sender) -> None:
        gap = sender.flow.accept(header.number, header.envelopes)
        if gap < 0:
            self._invalid((header.slot, header.epoch), header.envelopes, "a batch that was here before")
            return
        if gap:
            self._note_gap(header, sender, gap)
        envelopes, bad = wire.decode_batch(message)
        if bad or len(envelopes) != header.envelopes:
            bad = max(bad, header.envelopes - len(envelopes))
            self._invalid((header.slot, header.epoch), bad, "an envelope that cannot be understood")
        self._signed[self._received_index] += len(envelopes)
        self._settle(header, sender, envelopes)

    def _settle(self, header: Header, sender: _Sender, envelopes: list[Envelope]) -> None:
        """Hand on what came and give credit for it, now or when whoever takes it over says so."""
        if self._take_over is not None:
            self._take_over(header, envelopes, lambda: self._give_credit(header, sender))
            return
        if sender.foreign:
            envelopes = self._unseen(envelopes)
        if envelopes:
            self._hand_on(envelopes)
        self._give_credit(header, sender)

    def _unseen(self, envelopes: list[Envelope]) -> list[Envelope]:
        note = self._foreign.note
        fresh = [
            envelope
            for envelope in envelopes
            if envelope.origin is None or not envelope.origin[0] or note(*envelope.origin) >= 0
        ]
        self._record.add(Counter.FEDERATION_DUPLICATES, len(envelopes) - len(fresh))
        return fresh

    def _hand_on(self, envelopes: list[Envelope]) -> None:
        channel = envelopes[0].channel
        for envelope in envelopes:
            if envelope.channel != channel:
                break
        else:
            self._deliver(channel, envelopes)
            return
        start = 0
        for index, envelope in enumerate(envelopes):
            if envelope.channel != channel:
                self._deliver(channel, envelopes[start:index])
                channel, start = envelope.channel, index
        self._deliver(channel, envelopes[start:])

    def _deliver(self, channel: str, envelopes: list[Envelope]) -> None:
        deliver = self._channels.get(channel)
        if deliver is None:
            return
        try:
            deliver(envelopes)
        except Exception:
            logger.exception("a receiver of channel %r failed; the bus goes on", channel)

    def _give_credit(self, header: Header, sender: _Sender) -> None:
        # A predecessor's late batches are handed on, but the cell belongs to the newest owner of the slot.
        if self._closed:
            return
        if sender.flow.processed(header.position) and self._newest[header.slot] is sender:
            index = self._board.credit_index(self._slot, header.slot)
            self._board.words[index] = pack_credit(header.epoch, header.position)

    def _meet(self, header: Header) -> _Sender | None:
        """A sender that is new to us; None when there is no such slot, or it is not on the board."""
        if header.slot >= SLOTS or not 0 < header.epoch <= self._board.record(header.slot).epoch:
            return None
        newest = self._newest.get(header.slot)
        # Beside the newest owner of a slot one other is remembered, usually its predecessor: that one's last batches
        # come through another pipe and may arrive late.
        for key in [
            key for key, sender in self._senders.items() if key[0] == header.slot and sender is not newest
        ]:
            del self._senders[key]
        identity = self._board.record(header.slot).identity()
        foreign = identity.kind is PeerKind.BRIDGE or identity.epoch != header.epoch
        sender = self._senders[header.slot, header.epoch] = _Sender(header.epoch, foreign)
        if newest is None or header.epoch > newest.epoch:
            self._newest[header.slot] = sender
        return sender

    def _note_gap(self, header: Header, sender: _Sender, gap: int) -> None:
        if gap <= 0:
            return
        self._record.add(Counter.BUS_GAPS, gap)
        self.on_gap()
        if not sender.complained:
            sender.complained = True
            logger.warning("peer %d.%d: %d messages did not arrive here", header.slot, header.epoch, gap)

    def _invalid(self, claimed: tuple[int, int], count: int, why: str) -> None:
        self._record.add(Counter.BUS_INVALID, count)
        if claimed not in self._complained and len(self._complained) < _COMPLAINTS:
            self._complained.add(claimed)
            logger.warning("dropped from the bus, sender %d.%d: %s", *claimed, why)

    def close(self) -> None:
        """Close the inbox and delete its file."""
        self._closed = True
        self._socket.close(0)
        self._shortcut.close()
        try:
            os.unlink(inbox_name(self._slot, self._record.epoch), dir_fd=self._runtime.fd)
        except OSError as error:
            logger.debug("inbox of slot %d: %s", self._slot, error)


def _claimed_sender(message: bytes) -> tuple[int, int]:
    """Who a bad frame says it is from, for the log; (-1, -1) when it does not even say that."""
    start = wire.DESTINATION_BYTES + 2
    if len(message) < start + 6:
        return -1, -1
    return int.from_bytes(message[start : start + 2], "big"), int.from_bytes(
        message[start + 2 : start + 6], "big"
    )


def _ignore(header: Header) -> None:
    pass


def _nothing() -> None:
    pass
