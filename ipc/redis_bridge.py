"""The bridge: one process per host that carries messages between the bus and Redis, and so between hosts.

A full peer without clients, which the supervisor forks like a worker. Out: what the processes of this host number and
send it goes through ``bridge_out.py`` to the streams; they are given credit when Redis has it. In: what other hosts put
there comes through ``bridge_in.py`` onto the bus. Only this process talks to Redis, and only with ``--redis-url``.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import os
import signal
import socket
from typing import Any, Final

import msgspec
import uvloop

from ipc.board import SlotState
from ipc.bridge_import import Importer
from ipc.bridge_in import WayIn
from ipc.bridge_link import BROKEN
from ipc.bridge_out import WayOut
from ipc.bridge_session import Session
from ipc.bridge_state import load_position, new_position, save_position
from ipc.federation import LinkState
from ipc.link import Link
from ipc.peer import Peer, PeerKind
from ipc.rules import Rules
from ipc.runtime import RuntimeDirError

logger = logging.getLogger("ipc")

DRAINED: Final = 0
CANNOT_START: Final = 3

FLUSH_BOUND = 1.5
"""Seconds at an ordered stop for what Redis does not have yet."""
SAVE_EVERY = 0.25
"""Seconds between two positions kept for a successor."""
ACK_BOUND = 2.0
"""Seconds to wait for the workers to have what a position covers."""


class BridgeOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What a bridge must be told."""

    url: str
    prefix: str
    host_id: str
    """The identity of this host, see :func:`ipc.bridge_state.host_id`."""
    start: str
    """The supervisor's: a bridge of the same start may take over from one that died."""
    directory: str
    """Where its position is kept."""
    bus_backlog: int
    rules: Rules
    """Those of the hub: the bridge may be the first of its processes."""


def run(options: BridgeOptions, *, control: socket.socket, runtime_dir: str, supervisor_pid: int) -> int:
    """Carry messages until told to drain; returns the exit code.

    Args:
        options: see there.
        control: our end of the socket pair; the same lines as a worker's.
        runtime_dir: where the bus is.
        supervisor_pid: to see whether the supervisor is gone.
    """
    bridge = Bridge(options, control, runtime_dir, supervisor_pid)
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(bridge.main())
    except (RuntimeDirError, ModuleNotFoundError, ValueError) as error:
        bridge.tell({"failed": f"the bridge can not start: {error}"})
        return CANNOT_START


class Bridge:
    """The process: its place on the bus, its two ways, its end."""

    def __init__(
        self, options: BridgeOptions, control: socket.socket, runtime_dir: str, supervisor_pid: int
    ) -> None:
        self._options = options
        self._control = control
        self._runtime_dir = runtime_dir
        self._supervisor_pid = supervisor_pid
        self._drain = asyncio.Event()
        self._input = b""
        host = f"{options.host_id}.{options.start}"
        self._out = WayOut(options.prefix, host, self._say)
        self._in = WayIn(options.prefix, options.host_id)
        self._host = host
        self._where = hashlib.blake2b(
            f"{options.url}\0{options.prefix}\0{options.host_id}".encode(), digest_size=16
        ).hexdigest()
        self._session: Session | None = None
        self._saved: object = None

    def tell(self, line: dict[str, Any]) -> None:
        """One line for the supervisor; it may be gone."""
        try:
            self._control.sendall(msgspec.json.encode(line) + b"\n")
        except OSError as error:
            logger.debug("the supervisor did not hear %r: %s", line, error)

    def _say(self, state: LinkState, words: str) -> None:
        if self._session is not None:
            self._session.say(state, words)

    async def main(self) -> int:
        """Join the bus, carry until told to end, leave nothing that can be brought to Redis."""
        self._listen_to_orders()
        self._take_over_position()
        peer = await Peer.open(
            self._runtime_dir,
            kind=PeerKind.BRIDGE,
            rules=self._options.rules,
            bus_backlog=self._options.bus_backlog,
            take_over=self._out.take_in,
        )
        self._out.record = self._in.record = peer.record
        importer = Importer(peer, self._in.miss)
        try:
            await importer.open()
            self.tell({"claimed": [peer.slot, peer.epoch]})
            self._session = Session(
                self._options.url, self._options.prefix, self._host, peer, self._out, self._in, importer
            )
            self.tell({"ready": True})
            await self._carry(peer, self._session, importer)
        finally:
            importer.close()
            self._out.record = self._in.record = None
            await peer.close()
        return DRAINED

    async def _carry(self, peer: Peer, session: Session, importer: Importer) -> None:
        tasks = [
            asyncio.create_task(session.run()),
            asyncio.create_task(self._keep_positions(peer, session, importer)),
        ]
        try:
            await self._drain.wait()
            peer.set_state(SlotState.DRAINING)
            await self._out.flush(FLUSH_BOUND if session.state is LinkState.READY else 0.0)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        lost = self._out.spool.give_up()
        if lost:
            logger.warning("bridge: %d messages have not reached Redis and are dropped", lost)
        self._out.show()
        if session.state is LinkState.READY:
            with contextlib.suppress(*BROKEN):
                await session.give_back()
        self._in.report()

    # -- the position ----------------------------------------------------------------------------------------------

    def _take_over_position(self) -> None:
        position = load_position(self._options.directory, self._where)
        if position is None:
            return
        if position.start == self._options.start:  # else nobody has numbered yet what this host now sends
            self._out.is_first = False
            self._out.spool.restore(position.marks)
        if all(position.ids):
            self._in.ids = list(position.ids)
            self._in.seen.restore(position.seen, position.complete)

    async def _keep_positions(self, peer: Peer, session: Session, importer: Importer) -> None:
        """Keep for a successor how far we are, a position when the workers have all that it covers.

        So a bridge that is killed brings some messages again, which the workers leave out, and forgets none.
        """
        await session.placed.wait()
        while True:
            if not self._in.waiting:
                await self._keep_position(peer, importer)
            await asyncio.sleep(SAVE_EVERY)

    async def _keep_position(self, peer: Peer, importer: Importer) -> None:
        state = (tuple(self._in.ids), self._out.spool.taken)
        if state == self._saved:
            return
        position = new_position(
            self._where,
            self._options.start,
            list(self._in.ids),
            self._in.seen.snapshot(),
            self._in.seen.complete_sources(),
            [self._out.spool.marks(shard) for shard in range(len(self._in.ids))],
        )
        started = importer.started
        while importer.finished < started:  # noqa: ASYNC110 -- the store tells each message's own waiter
            await asyncio.sleep(0.01)
        await asyncio.sleep(0)  # what was published in this turn of the loop leaves at its end
        await self._everybody_has_it(peer)
        try:
            save_position(self._options.directory, position)
            self._saved = state
        except OSError as error:
            logger.error("bridge: its position can not be kept: %s", error)

    @staticmethod
    async def _everybody_has_it(peer: Peer) -> None:
        outbound = peer.bus.outbound
        wanted = [(link, link.number) for link in outbound.links.values()]

        def has(link: Link, number: int) -> bool:
            outbound.read_credit(link)
            return link.acked_number >= number or outbound.links.get(link.key) is not link or link.stalled

        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(ACK_BOUND):
                # How far they are stands on the board, which wakes nobody.
                while not all(has(link, number) for link, number in wanted):  # noqa: ASYNC110
                    await asyncio.sleep(0.01)

    # -- orders ----------------------------------------------------------------------------------------------------

    def _listen_to_orders(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        loop.add_signal_handler(signal.SIGTERM, self._drain.set)
        self._control.setblocking(False)
        loop.add_reader(self._control.fileno(), self._on_control)
        if os.getppid() != self._supervisor_pid:
            self._drain.set()

    def _on_control(self) -> None:
        try:
            data = self._control.recv(4096)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            asyncio.get_running_loop().remove_reader(self._control.fileno())
            self._drain.set()
            return
        *lines, self._input = (self._input + data).split(b"\n")
        for line in lines:
            if line.strip() == b"quit":
                os._exit(DRAINED)
            elif line.strip() in (b"drain stop", b"drain replaced"):
                self._drain.set()
            else:
                logger.error("unknown order from the supervisor: %r", line)
