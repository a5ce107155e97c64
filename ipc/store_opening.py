"""How a peer opens the stores that the rules of its hub ask for.

Stands between ``peer.py`` and the stores, at the start only. History lies in ``--data-dir`` or the runtime directory,
presence always in the runtime directory, since it must not outlive the hub.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from ipc.board import Record
from ipc.history import HostLog
from ipc.presence import PresenceBoard
from ipc.runtime import RuntimeDirError
from ipc.store import Store, StoreError

if TYPE_CHECKING:
    from ipc.peer import Peer


async def open_log(peer: Peer) -> HostLog:
    """The log of the host.

    Raises:
        RuntimeDirError: its store cannot be opened; the text says why.
    """
    return HostLog(await open_store(peer), peer.bus.publish_stored)


async def open_store(peer: Peer) -> Store:
    """The store alone, for a bridge, which writes to it and has nobody to deliver to. Raises as :func:`open_log`."""
    rules = peer.rules
    directory = rules.data_dir or runtime_store(peer.runtime.fd)
    return await _open(directory, rules.store_size, bool(rules.data_dir), peer.record)


async def open_presence(peer: Peer) -> PresenceBoard:
    """Who is on which topic. Raises as :func:`open_log`."""
    store = await _open(runtime_store(peer.runtime.fd), peer.rules.store_size, False, peer.record)
    return PresenceBoard(peer, store)


def runtime_store(fd: int) -> str:
    """The runtime directory as a store is told it: a path that cannot be turned to another directory."""
    return f"/proc/self/fd/{fd}"


async def _open(directory: str, size: int, durable: bool, record: Record) -> Store:
    try:
        # In a thread: it may wait for a process that is writing.
        store = await asyncio.to_thread(Store.open, directory, store_size=size or None, durable=durable)
    except StoreError as error:
        raise RuntimeDirError(str(error)) from error
    store.since = record.append_word
    return store
