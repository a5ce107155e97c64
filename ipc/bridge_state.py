"""What a bridge remembers over its own death: who its host is, and how far it has read and written.

Beside the way of a message. Small files, replaced whole by renaming, so that a reader never finds half of one.
"""

from __future__ import annotations

import logging
import os
import secrets

import msgspec

from ipc.origins import SHARDS, Mark
from ipc.runtime import BRIDGE_NAME, HOST_NAME

logger = logging.getLogger("ipc")

_VERSION = 1


class Position(msgspec.Struct, array_like=True):
    """How far a bridge has come."""

    version: int
    url: str
    """Which Redis and prefix it speaks of, as a digest: positions in another one mean nothing."""
    start: str
    """Which start of the host's hub its marks speak of."""
    ids: list[str]
    """The last entry read, per shard; empty before it is known where to begin."""
    seen: list[tuple[str, int, int, int]]
    """See :meth:`ipc.origins.Seen.snapshot`."""
    complete: list[str]
    marks: list[list[Mark]]
    """What Redis has of this host, per shard."""


def load_position(directory: str, url: str) -> Position | None:
    """The position of the predecessor; None when there is none that can be used."""
    try:
        with open(os.path.join(directory, BRIDGE_NAME), "rb") as file:
            position = msgspec.msgpack.decode(file.read(), type=Position)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.MsgspecError, ValueError) as error:
        logger.error("bridge: its position can not be read, it begins anew: %s", error)
        return None
    usable = position.version == _VERSION and position.url == url and len(position.ids) == SHARDS
    return position if usable and len(position.marks) == SHARDS else None


def save_position(directory: str, position: Position) -> None:
    """Keep a position for the successor.

    Raises:
        OSError: it can not be written.
    """
    _replace(directory, BRIDGE_NAME, msgspec.msgpack.encode(position))


def new_position(
    url: str,
    start: str,
    ids: list[str],
    seen: list[tuple[str, int, int, int]],
    complete: list[str],
    marks: list[list[Mark]],
) -> Position:
    """A position of this version."""
    return Position(_VERSION, url, start, ids, seen, complete, marks)


def host_id(directory: str) -> str:
    """The identity of the host that a directory belongs to: random, made when it is first asked for.

    Raises:
        OSError: it can neither be read nor made.
    """
    path = os.path.join(directory, HOST_NAME)
    try:
        with open(path, encoding="ascii") as file:
            known = file.read().strip()
    except (FileNotFoundError, UnicodeDecodeError):
        known = ""
    if len(known) != 16 or not known.isalnum():
        known = secrets.token_hex(8)
        _replace(directory, HOST_NAME, known.encode())
    return known


def _replace(directory: str, name: str, content: bytes) -> None:
    path = os.path.join(directory, name)
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    with open(os.open(f"{path}.new", flags, 0o600), "wb") as file:
        file.write(content)
    os.rename(f"{path}.new", path)
