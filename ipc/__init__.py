"""What processes of one host share: topics, rules, the runtime directory, the board and the bus.

Knows no WebSocket, no HTTP and no application; imports nothing of ``workers`` or ``supervisor``. Names are loaded when
they are first used, so that reading the board brings in neither ZeroMQ nor an event loop.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ipc.peer import Peer as Peer
    from ipc.publisher import BusTimeout as BusTimeout
    from ipc.publisher import HubNotFound as HubNotFound
    from ipc.publisher import Publisher as Publisher
    from ipc.runtime import RuntimeDirError as RuntimeDirError
    from ipc.topics import InvalidTopic as InvalidTopic
    from ipc.topics import matches as matches

_HOMES = {
    "BusTimeout": "ipc.publisher",
    "HubNotFound": "ipc.publisher",
    "InvalidTopic": "ipc.topics",
    "Peer": "ipc.peer",
    "Publisher": "ipc.publisher",
    "RuntimeDirError": "ipc.runtime",
    "matches": "ipc.topics",
}

__all__ = ["BusTimeout", "HubNotFound", "InvalidTopic", "Peer", "Publisher", "RuntimeDirError", "matches"]


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted((*globals(), *__all__))


__flockwire__ = True
