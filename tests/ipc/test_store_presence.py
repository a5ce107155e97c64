"""Presence: exact for the whole host, by filter and by the process it belongs to."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from ipc.store import Present, Store
from tests.ipc.store_support import both_places, opened  # noqa: F401


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with opened(tmp_path, store_size=16 << 20) as store:
        yield store


def clients(store: Store, topic: str, channel: str = "hub") -> list[str]:
    return sorted(present.client for present in store.presence(channel, topic))


def test_joining_and_leaving(store: Store) -> None:
    assert store.presence_add("hub", "a", 1, 7, "c1", "u1", b'{"n":1}') is True
    assert store.presence_add("hub", "a", 1, 7, "c1", "u1", b'{"n":2}') is False
    assert store.presence("hub", "a") == [Present("c1", "u1", b'{"n":2}', 1, 7)]
    assert store.presence_remove("hub", "a", 1, 7, "c1") == Present("c1", "u1", b'{"n":2}', 1, 7)
    assert store.presence_remove("hub", "a", 1, 7, "c1") is None
    assert store.presence("hub", "a") == []


def test_a_filter_is_taken_literally(store: Store) -> None:
    for name in ("a", "a/b", "a/#", "#", "ä"):
        store.presence_add("hub", name, 1, 1, f"in {name}")
        store.presence_add("other", name, 1, 1, f"elsewhere in {name}")
    for name in ("a", "a/b", "a/#", "#", "ä"):
        assert clients(store, name) == [f"in {name}"]


def test_users_are_counted_once(store: Store) -> None:
    for number in range(10):
        store.presence_add("hub", "a", number % 3, 1, f"c{number}", f"u{number % 4}")
    assert store.presence_stats("hub", "a") == (10, 4)
    assert store.presence_stats("hub", "b") == (0, 0)


def test_the_same_client_name_on_two_peers_is_two_entries(store: Store) -> None:
    store.presence_add("hub", "a", 1, 1, "same")
    store.presence_add("hub", "a", 2, 1, "same")
    assert store.presence_reap(1, 1) == [("hub", "a", Present("same", "", b"", 1, 1))]
    assert [present.slot for present in store.presence("hub", "a")] == [2]


def test_a_dead_peers_entries_go_and_no_others(store: Store) -> None:
    generator = random.Random(3)
    expected: dict[tuple[int, int], set[tuple[str, str, str]]] = {}
    for number in range(2000):
        peer = (generator.randrange(3), generator.randrange(1, 3))
        channel, topic, client = generator.choice(["hub", "x"]), f"t/{number % 20}", f"{number}"
        store.presence_add(channel, topic, *peer, client)
        expected.setdefault(peer, set()).add((channel, topic, client))
    for peer, entries in expected.items():
        removed = []
        while piece := store.presence_reap(*peer, limit=100):
            assert len(piece) <= 100
            removed += piece
        assert {(channel, topic, present.client) for channel, topic, present in removed} == entries
        assert len(removed) == len(entries)
    with store._read() as txn:
        assert [key for key, _ in txn.cursor() if key[:1] in (b"p", b"q")] == []


def test_names_of_any_length(store: Store) -> None:
    topic, client = "t" * 255, "c" * 1000
    assert store.presence_add("channel " * 50, topic, 95, 2**63, client, "u" * 5000, bytes(3000))
    (present,) = store.presence("channel " * 50, topic)
    assert (present.client, present.user, len(present.info)) == (client, "u" * 5000, 3000)
    assert store.presence_reap(95, 2**63) == [("channel " * 50, topic, present)]
    assert store.presence("channel " * 50, topic) == []
