"""The log of a host as processes follow it: nothing is missed, whatever the bus loses and however short the window."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from ipc import store_changes
from ipc.board import PeerKind
from ipc.envelope import TOPIC, Envelope
from ipc.flow import BACKLOG
from ipc.peer import Peer
from ipc.rules import Rules, TopicRule
from tests.ipc.actors import Inbox
from tests.support import run

RULES = Rules(
    topics={"last": TopicRule(history_size=1), "short": TopicRule(history_size=3, history_ttl=0.001)}
)
SENT = [b"%d" % number for number in range(500)]


async def publish(peer: Peer, topic: str, data: bytes) -> None:
    """Publish and wait for the acknowledgement."""
    retention = RULES.retention(topic)
    assert retention is not None and peer.log is not None
    done = asyncio.get_running_loop().create_future()
    peer.log.publish(Envelope(TOPIC, "hub", topic, data), retention, done.set_result)
    await done


async def received_by_a_late_reader(path: Path, topic: str) -> list[bytes]:
    """What a subscriber gets if the bus has lost everything, and its process looks into the log only at the end."""
    peers = [await Peer._open(str(path), PeerKind.APPLICATION, None, RULES, BACKLOG) for _ in range(3)]
    try:
        *publishers, reader = peers
        assert reader.log is not None
        inbox = Inbox(reader)
        reader.bus.on_loss = lambda: None
        reader.log._look_timer.cancel()
        for number, data in enumerate(SENT):
            publisher = publishers[number % 2]
            publisher.bus.drop_fraction = 1.0
            await publish(publisher, topic, data)
        assert inbox.data == []
        assert len(reader.log.history("hub", topic, -1).entries) <= 3, (
            "the window is exact for everybody else"
        )
        reader.log.heal(at_once=True)
        return inbox.data
    finally:
        for peer in peers:
            peer._users = 1
            await peer.close()


@pytest.mark.parametrize("topic", ["last", "short"])
def test_who_is_subscribed_gets_what_has_left_the_window(tmp_path: Path, topic: str) -> None:
    assert run(received_by_a_late_reader(tmp_path / "hub", topic)) == SENT


def test_without_grace_it_would_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That the test above tests something."""
    monkeypatch.setattr(store_changes, "GRACE_MS", 0)
    assert len(run(received_by_a_late_reader(tmp_path / "hub", "last"))) < 200
