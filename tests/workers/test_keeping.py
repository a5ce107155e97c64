"""History, positions and presence of ``WebSocketManager``, in one process on a bus of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from ipc.envelope import Envelope
from ipc.store_records import Retention
from tests.support import run
from workers import InvalidTopic, NoHistory, Position, StoreError, UnrecoverablePosition, WebSocketManager
from workers.stored import Storing

CONFIG = """
[topics."chat/#"]
history_size = 5
presence = true
[topics."many/#"]
history_size = 1000
"""


@pytest.fixture
def url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    (tmp_path / "hub.toml").write_text(CONFIG)
    monkeypatch.setenv("FLOCKWIRE_CONFIG", str(tmp_path / "hub.toml"))
    yield f"ipc://{tmp_path}/run"


class Collector:
    """A receiver that remembers."""

    def __init__(self) -> None:
        self.got: list[tuple[str, bytes, int]] = []

    def deliver(self, envelope: Envelope) -> None:
        self.got.append((envelope.topic, envelope.data, envelope.offset))


def test_publish_says_where_it_was_stored_and_history_has_it(url: str) -> None:
    async def main() -> None:
        async with WebSocketManager("c", url) as manager:
            positions = [await manager.publish("chat/1", {"n": number}) for number in range(7)]
            assert [position.offset for position in positions if position] == list(range(1, 8))
            assert await manager.publish("plain", 1) is None
            page = await manager.history("chat/1")
            assert [message.data["n"] for message in page] == [2, 3, 4, 5, 6]
            assert page.position == positions[-1] and len(page) == 5
            assert page.messages[0].topic == "chat/1" and page.messages[0].time > 1e9
            later = await manager.history("chat/1", since=positions[4])
            assert [message.data["n"] for message in later] == [5, 6]
            newest = await manager.history("chat/1", 2, reverse=True)
            assert [message.data["n"] for message in newest] == [6, 5]
            assert len(await manager.history("chat/1", 0)) == 0
            with pytest.raises(UnrecoverablePosition):
                await manager.history("chat/1", since=Position(1, "other"))
            with pytest.raises(NoHistory, match="history_size"):
                await manager.history("plain")
            with pytest.raises(InvalidTopic):
                await manager.publish("chat/#", 1)
            first = await manager.publish("chat/2", 1, idempotency_key="k")
            assert await manager.publish("chat/2", 2, idempotency_key="k") == first

    run(main())


def test_send_may_be_awaited_or_ignored_and_delivers_in_the_order_of_the_log(url: str) -> None:
    async def main() -> None:
        async with WebSocketManager("c", url) as manager:
            collector = Collector()
            await manager.publish("many/1", "before")
            manager.listen("many/#", collector)
            sending = manager.send("many/1", 1)
            assert isinstance(sending, Storing)
            manager.send("many/2", 2)
            manager.send("many/1", 3, local=True)
            assert await sending == Position(2, sending_epoch(manager))
            assert await asyncio.to_thread(lambda: manager.send("many/3", 4)) is not None
            await manager.publish("many/4", 5)
            assert [(topic, data) for topic, data, _ in collector.got if data != b"4"] == [
                ("many/1", b"3"),
                ("many/1", b"1"),
                ("many/2", b"2"),
                ("many/4", b"5"),
            ]
            assert (b"4", 4) in [(data, offset) for _, data, offset in collector.got]
            manager.unlisten("many/#", collector)
            await manager.publish("many/1", 6)
            assert len(collector.got) == 5

    run(main())


def sending_epoch(manager: WebSocketManager) -> str:
    assert manager.log is not None
    return manager.log.epoch


def test_without_a_supervisor_or_rules_there_is_none(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with WebSocketManager("c", "memory://") as manager:
            assert await manager.publish("chat/1", 1) is None
            with pytest.raises(NoHistory):
                await manager.history("chat/1")
            with pytest.raises(ValueError, match="presence"):
                await manager.presence("chat/1")
        async with WebSocketManager("c", url) as manager:
            assert await manager.presence("chat/1") == {}
            with pytest.raises(ValueError, match="presence"):
                await manager.presence("many/1")

    run(main())


def test_after_shutdown_nothing_is_stored(url: str) -> None:
    async def main() -> None:
        manager = WebSocketManager("c", url)
        await manager.startup()
        assert manager.log is not None
        log = manager.log
        await manager.shutdown()
        with pytest.raises(StoreError):
            log.publish(Envelope(0, "c", "chat/1", b"1"), retention_of(manager), lambda result: None)
        await manager.startup()
        assert await manager.publish("chat/1", 1) is not None
        await manager.shutdown()

    run(main())


def retention_of(manager: WebSocketManager) -> Retention:
    found = manager.rules.retention("chat/1")
    assert found is not None
    return found
