"""What counts as a broker."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support import run
from workers.broker_interface import BrokerInterface, BrokerT, BrokerUnavailable, is_valid_broker
from workers.message import Message
from workers.redis_broker import RedisBroker

METHODS = ("connect", "disconnect", "subscribe", "unsubscribe", "publish", "get_message")


class Recording(BrokerInterface):
    """A broker that notes which methods were called."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    async def connect(self) -> None:
        self.calls.append("connect")

    async def disconnect(self) -> None:
        self.calls.append("disconnect")

    async def subscribe(self, channel: str) -> None: ...

    async def unsubscribe(self, channel: str) -> None: ...

    async def publish(self, channel: str, message: Any) -> None: ...

    async def get_message(self, **kwargs: Any) -> Message | None:
        return None


def test_the_interface_cannot_be_used_itself() -> None:
    with pytest.raises(TypeError):
        BrokerInterface()  # type: ignore[abstract]
    assert not is_valid_broker(BrokerInterface)
    assert BrokerT is BrokerInterface


def test_classes_and_objects_with_the_six_methods_are_brokers() -> None:
    duck = type("Duck", (), {name: lambda self: None for name in METHODS})
    for broker in (Recording, Recording(), RedisBroker, RedisBroker("redis://127.0.0.1"), duck, duck()):
        assert is_valid_broker(broker)


@pytest.mark.parametrize("missing", METHODS)
def test_without_one_of_them_it_is_none(missing: str) -> None:
    methods = {name: lambda self: None for name in METHODS if name != missing}
    assert not is_valid_broker(type("Duck", (), methods))
    assert not is_valid_broker(type("Duck", (), {**methods, missing: 5})())


@pytest.mark.parametrize("broker", [None, object(), "redis://127.0.0.1", int])
def test_other_things_are_none(broker: object) -> None:
    assert not is_valid_broker(broker)


def test_a_broker_is_connected_inside_its_block() -> None:
    broker = Recording()

    async def main() -> None:
        async with broker as entered:
            assert entered is broker
            assert broker.calls == ["connect"]
            raise BrokerUnavailable("gone")

    with pytest.raises(ConnectionError, match="gone"):
        run(main())
    assert broker.calls == ["connect", "disconnect"]
