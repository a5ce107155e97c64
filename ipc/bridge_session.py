"""The bridge and Redis: connect, take the host's lease, read and write until it breaks, and again.

Stands between the two ways (``bridge_out.py``, ``bridge_in.py``) and their connections. Whatever goes wrong has a state
that the board shows and one line in the log when it changes; nothing that Redis does ends the process.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import AsyncExitStack
from typing import Any

from ipc.bridge_import import Importer
from ipc.bridge_in import WayIn
from ipc.bridge_link import BROKEN, Command, Connection, Refused, Silent, judge, takes_no_writes
from ipc.bridge_out import WayOut
from ipc.federation import LinkState
from ipc.origins import SHARDS
from ipc.peer import Peer
from ipc.redis_link import connections, redacted, retry_delays

logger = logging.getLogger("ipc")

LEASE_MS = 10_000
"""A host's lease lives so long after its last renewal."""
CARE_EVERY = 1.0
"""Seconds between probes and renewals of the lease."""
PROBE_BOUND = 3.0
"""A probe that has not come back after so many seconds: the link is dead though it is up."""
MARKS_EVERY = 5
"""Rounds of care between two marks on the shards that were written meanwhile."""
PLACE_EVERY = 10
"""Rounds of care between two looks whether the streams are still those that are read."""
LONGEST_PAUSE = 3.0
"""Seconds between two attempts to connect, at most."""
STEADY = 5.0
"""Seconds after which a session counts as good, and the pauses begin small again."""


class Session:
    """Keeps a bridge connected.

    Args:
        url, prefix: which Redis, and what its keys begin with.
        host: ``id.start`` of this hub.
    """

    def __init__(
        self, url: str, prefix: str, host: str, peer: Peer, out: WayOut, way_in: WayIn, importer: Importer
    ) -> None:
        self.address = redacted(url)
        self.state = LinkState.CONNECTING
        self.commands = 0
        """Commands sent over all connections that have ended."""
        self._pool = connections(url, {"socket_timeout": None})
        self._host_id, _, self._start = host.partition(".")
        self._lease = f"{prefix}:host:{self._host_id}"
        self._probe = f"{prefix}:probe:{self._host_id}"
        self._peer = peer
        self._out = out
        self._in = way_in
        self._importer = importer
        self._said: LinkState | None = None
        self._probes = 0
        self.placed = asyncio.Event()
        """It is known where reading begins."""

    def say(self, state: LinkState, words: str) -> None:
        """Show a state on the board, and log it when it is another one than before."""
        if state is self._said:
            return
        self._said = self.state = state
        self._peer.record.condition = int(state)
        if state is LinkState.READY:
            logger.info("bridge: ready, connected to %s", self.address)
        else:
            logger.warning(
                "bridge: %s (%s): %s; trying again, this host goes on alone", state.words, self.address, words
            )

    async def run(self) -> None:
        """Stay connected until cancelled."""
        delays = retry_delays(longest=LONGEST_PAUSE)
        loop = asyncio.get_running_loop()
        while True:
            started = loop.time()
            try:
                await self._once()
            except BROKEN as error:
                self.say(judge(error), str(error) or type(error).__name__)
            except Exception:
                logger.exception("bridge: failed in an unforeseen way")
                self.say(LinkState.FAULTY, "an error of its own, see the log")
            if loop.time() - started > STEADY:
                delays = retry_delays(longest=LONGEST_PAUSE)
            await asyncio.sleep(next(delays))

    async def _once(self) -> None:
        async with AsyncExitStack() as stack:
            writer = await self._connect(stack)
            reader = await self._connect(stack)
            await self._take_lease(writer)
            await self._in.find_place(writer)
            self.placed.set()
            await self._tell_marks(writer, list(range(SHARDS)))
            self.say(LinkState.READY, "")
            await self._together(writer, reader)

    async def _connect(self, stack: AsyncExitStack) -> Connection:
        connection = await Connection.open(self._pool)
        stack.push_async_callback(self._hang_up, connection)
        return connection

    async def _hang_up(self, connection: Connection) -> None:
        self.commands += connection.commands
        await connection.close()

    async def _together(self, writer: Connection, reader: Connection) -> None:
        """Write, read and take care until one of them fails; its error is ours."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._out.run(writer))
                group.create_task(self._in.run(reader, self._importer))
                group.create_task(self._care(writer))
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None

    # -- taking care -----------------------------------------------------------------------------------------------

    async def _care(self, writer: Connection) -> None:
        loop = asyncio.get_running_loop()
        self._in.echo = expected = b""
        asked = loop.time()
        rounds = 0
        while True:
            if self._in.echo == expected:
                expected = await self._send_probe(writer)
                asked = loop.time()
            elif loop.time() - asked > PROBE_BOUND:
                raise Silent(f"a probe did not come back within {PROBE_BOUND:g} s")
            await self._take_lease(writer)
            rounds += 1
            if rounds % MARKS_EVERY == 0:
                await self._tell_marks(writer, self._out.spool.news())
            if rounds % PLACE_EVERY == 0:
                await self._in.find_place(writer)
            self._in.report()
            await asyncio.sleep(CARE_EVERY)

    async def _send_probe(self, writer: Connection) -> bytes:
        """Write to ourselves; answers what must come back, which is nothing new while Redis takes no writes."""
        self._probes += 1
        text = b"%s %d" % (self._start.encode(), self._probes)
        commands: list[Command] = [
            ("XADD", self._probe, "MAXLEN", "1", "*", "p", text),
            ("PEXPIRE", self._probe, 6 * LEASE_MS),
        ]
        answers = await writer.pipeline(commands)
        if takes_no_writes(answers[0]):
            return self._in.echo
        _check(answers)
        return text

    async def _tell_marks(self, writer: Connection, shards: list[int]) -> None:
        if shards:
            answers = await writer.pipeline(self._out.marks(shards))
            _check([answer for answer in answers if not takes_no_writes(answer)])

    async def _take_lease(self, writer: Connection) -> None:
        """Make the host's identity ours for a while.

        Raises:
            Refused: another start of it has the lease.
        """
        holder = await writer.call("GET", self._lease)
        if holder is None:
            await writer.call("SET", self._lease, self._start, "NX", "PX", LEASE_MS)
            holder = await writer.call("GET", self._lease)
        if holder is not None and holder != self._start.encode():
            raise Refused(
                f"another hub uses the identity {self._host_id} of this host; give each host a directory of its own"
            )
        await writer.call("PEXPIRE", self._lease, LEASE_MS)

    async def give_back(self) -> None:
        """The end: another start of this host need not wait for the lease to expire."""
        async with AsyncExitStack() as stack:
            connection = await self._connect(stack)
            if await connection.call("GET", self._lease) == self._start.encode():
                await connection.call("DEL", self._lease, self._probe)


def _check(answers: list[Any]) -> None:
    for answer in answers:
        if isinstance(answer, Exception):
            raise answer
