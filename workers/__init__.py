"""The library API: WebSocket connections of one process, and the channel they share with other processes.

Everything here is imported when it is first used, so that ``workers.settings`` alone loads neither a server nor ZeroMQ.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__flockwire__ = True
__version__ = "0.1.0"

if TYPE_CHECKING:
    from ipc.positions import Position as Position
    from ipc.store_records import StoreError as StoreError
    from ipc.store_records import UnrecoverablePosition as UnrecoverablePosition
    from ipc.topics import InvalidTopic as InvalidTopic
    from ipc.topics import matches as matches
    from workers.auth import WebSocketOAuth2PasswordBearer as WebSocketOAuth2PasswordBearer
    from workers.broker_interface import BrokerInterface as BrokerInterface
    from workers.broker_interface import BrokerT as BrokerT
    from workers.broker_interface import is_valid_broker as is_valid_broker
    from workers.brokers import InMemoryBroker as InMemoryBroker
    from workers.brokers import IpcBroker as IpcBroker
    from workers.brokers import create_broker as create_broker
    from workers.centrifuge_hooks import CentrifugeError as CentrifugeError
    from workers.centrifuge_hooks import CentrifugeHooks as CentrifugeHooks
    from workers.centrifuge_hooks import ClientSession as ClientSession
    from workers.centrifuge_hooks import ConnectReply as ConnectReply
    from workers.centrifuge_hooks import ConnectRequest as ConnectRequest
    from workers.centrifuge_hooks import Disconnect as Disconnect
    from workers.centrifuge_hooks import PublishReply as PublishReply
    from workers.centrifuge_hooks import SubscribeReply as SubscribeReply
    from workers.connection import Connection as Connection
    from workers.errors import InvalidSubscription as InvalidSubscription
    from workers.errors import InvalidSubscriptionMessage as InvalidSubscriptionMessage
    from workers.errors import WebSocketException as WebSocketException
    from workers.errors import ahandle as ahandle
    from workers.errors import handle as handle
    from workers.hub import create_hub as create_hub
    from workers.manager import WebSocketManager as WebSocketManager
    from workers.message import Message as Message
    from workers.proxy import WebSocketProxy as WebSocketProxy
    from workers.redis_broker import RedisBroker as RedisBroker
    from workers.stored import HistoryPage as HistoryPage
    from workers.stored import NoHistory as NoHistory
    from workers.stored import StoredMessage as StoredMessage
    from workers.subscribing import handle_subscription_message as handle_subscription_message
    from workers.subscribing import subscribe as subscribe
    from workers.subscribing import unsubscribe as unsubscribe

_HOMES = {
    "CentrifugeError": "workers.centrifuge_hooks",
    "CentrifugeHooks": "workers.centrifuge_hooks",
    "ClientSession": "workers.centrifuge_hooks",
    "ConnectReply": "workers.centrifuge_hooks",
    "ConnectRequest": "workers.centrifuge_hooks",
    "Disconnect": "workers.centrifuge_hooks",
    "PublishReply": "workers.centrifuge_hooks",
    "SubscribeReply": "workers.centrifuge_hooks",
    "HistoryPage": "workers.stored",
    "NoHistory": "workers.stored",
    "StoredMessage": "workers.stored",
    "Position": "ipc.positions",
    "StoreError": "ipc.store_records",
    "UnrecoverablePosition": "ipc.store_records",
    "BrokerInterface": "workers.broker_interface",
    "BrokerT": "workers.broker_interface",
    "Connection": "workers.connection",
    "InMemoryBroker": "workers.brokers",
    "InvalidSubscription": "workers.errors",
    "InvalidSubscriptionMessage": "workers.errors",
    "InvalidTopic": "ipc.topics",
    "IpcBroker": "workers.brokers",
    "Message": "workers.message",
    "RedisBroker": "workers.redis_broker",
    "WebSocketException": "workers.errors",
    "WebSocketManager": "workers.manager",
    "WebSocketOAuth2PasswordBearer": "workers.auth",
    "WebSocketProxy": "workers.proxy",
    "ahandle": "workers.errors",
    "create_broker": "workers.brokers",
    "create_hub": "workers.hub",
    "handle": "workers.errors",
    "handle_subscription_message": "workers.subscribing",
    "is_valid_broker": "workers.broker_interface",
    "matches": "ipc.topics",
    "subscribe": "workers.subscribing",
    "unsubscribe": "workers.subscribing",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'workers' has no attribute {name!r}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
