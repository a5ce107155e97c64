"""One connection of the bridge to Redis, and what an error of it means.

Stands between the bridge and the socket. Commands go out in pipelines: one write for many, then their answers in order.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from redis import exceptions as redis_errors

from ipc.federation import LinkState

ANSWER_BOUND = 3.0
"""Seconds that Redis has to answer anything."""

Command = Sequence[bytes | str | int]


class Refused(Exception):
    """Another hub uses our host's identity."""


class Silent(Exception):
    """The connection is up, but nothing comes through."""


class Connection:
    """A connection and its pipelines; one at a time, others wait for their turn."""

    def __init__(self, raw: Any) -> None:
        self._raw = raw
        self._turn = asyncio.Lock()
        self.commands = 0
        """How many were sent."""

    @classmethod
    async def open(cls, pool: Any) -> Connection:
        """Connect and log in.

        Raises:
            RedisError, OSError, TimeoutError: it does not work; see :func:`judge`.
        """
        raw = pool.make_connection()
        try:
            async with asyncio.timeout(ANSWER_BOUND):
                await raw.connect()
        except BaseException:
            await raw.disconnect(nowait=True)
            raise
        return cls(raw)

    async def pipeline(self, commands: Sequence[Command], bound: float = ANSWER_BOUND) -> list[Any]:
        """Send commands and return their answers; an error that Redis answers stands in its place.

        Raises:
            RedisError, OSError: the connection is broken, or Redis says so for all of it.
            Silent: not all answers came within ``bound`` seconds. The connection is of no use after.
        """
        raw = self._raw
        try:
            async with asyncio.timeout(bound), self._turn:
                self.commands += len(commands)
                await raw.send_packed_command(raw.pack_commands(commands), check_health=False)
                return [await self._answer() for _ in commands]
        except TimeoutError:
            raise Silent(f"no answer within {bound:g} s") from None

    async def call(self, *command: bytes | str | int, bound: float = ANSWER_BOUND) -> Any:
        """One command.

        Raises:
            ResponseError: Redis answers with an error. And as :meth:`pipeline`.
        """
        answer = (await self.pipeline([command], bound))[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def _answer(self) -> Any:
        try:
            return await self._raw.read_response(disable_decoding=True, disconnect_on_error=False)
        except redis_errors.ResponseError as error:
            return error

    async def close(self) -> None:
        """Hang up."""
        await self._raw.disconnect(nowait=True)


BROKEN: tuple[type[Exception], ...] = (redis_errors.RedisError, OSError, Silent, Refused, TimeoutError)
"""What ends a session with Redis; everything else is a mistake of ours."""

_STATES: tuple[tuple[tuple[type[Exception], ...], LinkState], ...] = (
    ((Refused,), LinkState.REFUSED),
    ((Silent, TimeoutError, redis_errors.TimeoutError), LinkState.SILENT),
    (
        (
            redis_errors.AuthenticationError,
            redis_errors.AuthenticationWrongNumberOfArgsError,
            redis_errors.AuthorizationError,
            redis_errors.NoPermissionError,
        ),
        LinkState.DENIED,
    ),
    ((redis_errors.BusyLoadingError, redis_errors.MasterDownError), LinkState.LOADING),
    ((redis_errors.ReadOnlyError,), LinkState.READ_ONLY),
    ((redis_errors.OutOfMemoryError,), LinkState.OUT_OF_MEMORY),
)
_PREFIXES = {
    "WRONGTYPE": LinkState.WRONG_TYPE,
    "MISCONF": LinkState.OUT_OF_MEMORY,
    "OOM": LinkState.OUT_OF_MEMORY,
    "NOAUTH": LinkState.DENIED,
    "WRONGPASS": LinkState.DENIED,
    "NOPERM": LinkState.DENIED,
    "READONLY": LinkState.READ_ONLY,
    "LOADING": LinkState.LOADING,
    "MASTERDOWN": LinkState.LOADING,
}


def judge(error: BaseException) -> LinkState:
    """The state that an error of the connection means."""
    for kinds, state in _STATES:
        if isinstance(error, kinds):
            return state
    word = str(error).partition(" ")[0]
    if word in _PREFIXES:
        return _PREFIXES[word]
    if isinstance(error, redis_errors.ResponseError):
        return LinkState.FAULTY
    return LinkState.CONNECTING


def takes_no_writes(error: object) -> bool:
    """Redis takes nothing new for now, but can be read: the connection is worth keeping."""
    return isinstance(error, Exception) and judge(error) is LinkState.OUT_OF_MEMORY
