"""The store in one process: what is kept, what is read back, in which order, and what is refused."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from ipc.store import Entry, EntryTooLarge, Retention, Store, StoreError, UnrecoverablePosition
from tests.ipc.store_support import GRACE, KEEP, Clock, data_of, opened, put


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(tmp_path: Path, clock: Clock) -> Iterator[Store]:
    with opened(tmp_path, store_size=16 << 20) as store:
        store.clock = clock
        yield store


def test_offsets_are_one_sequence_for_the_host_with_a_link_per_topic(store: Store) -> None:
    positions = put(store, "a", b"1", b"2") + put(store, "b", b"3") + put(store, "a", b"4")
    assert [(each.offset, each.previous) for each in positions] == [(1, 0), (2, 1), (3, 0), (4, 2)]
    assert store.top() == 4
    assert data_of(store.read_since(0).entries) == [b"1", b"2", b"3", b"4"]


def test_an_entry_comes_back_as_it_went_in(store: Store, clock: Clock) -> None:
    channel, topic = "a channel that is much too long for a key " * 3, "ä/€/" + "x" * 240
    for data, info, tags in ((b"", b"", b""), (b"{}", b'{"user":"u"}', b""), (b"[1]", b"", b"t" * 70_000)):
        (position,) = store.append([Entry(channel, topic, data, KEEP, info=info, tags=tags)])
        entry = store.get(position.offset)
        assert entry is not None
        assert (entry.channel, entry.topic, entry.data, entry.info, entry.tags) == (
            channel,
            topic,
            data,
            info,
            tags,
        )
        assert (entry.offset, entry.previous) == (position.offset, position.previous)
        assert entry.time == int(clock.now * 1000)
    assert len(store.history(channel, topic, -1).entries) == 3


def test_a_window_keeps_the_newest(store: Store) -> None:
    for number in range(250):
        put(store, "last", b"%d" % number, keep=Retention(1))
        put(store, "few", b"%d" % number, keep=Retention(3))
        put(store, "many", b"%d" % number, keep=Retention(200))
    assert data_of(store.history("hub", "last", -1).entries) == [b"249"]
    assert data_of(store.history("hub", "few", -1).entries) == [b"247", b"248", b"249"]
    assert data_of(store.history("hub", "many", -1).entries) == [b"%d" % number for number in range(50, 250)]


def test_what_is_too_old_is_gone_before_it_is_removed(store: Store, clock: Clock) -> None:
    put(store, "a", b"1", keep=Retention(10, 60))
    clock.now += 30
    put(store, "a", b"2", keep=Retention(10, 60))
    clock.now += 29.999
    assert data_of(store.history("hub", "a", -1).entries) == [b"1", b"2"]
    clock.now += 0.001
    assert data_of(store.history("hub", "a", -1).entries) == [b"2"]
    assert data_of(store.history("hub", "a", -1, reverse=True).entries) == [b"2"]
    clock.now += 60
    assert data_of(store.history("hub", "a", -1).entries) == []
    assert store.history("hub", "a").topic_top == 2
    # It was acknowledged: a worker that catches up still gets it, for a while.
    assert data_of(store.read_since(0).entries) == [b"1", b"2"]
    store.maintain()
    assert data_of(store.read_since(0).entries) == [b"1", b"2"]
    clock.now += GRACE
    store.maintain()
    assert store.read_since(0).entries == []
    assert store.top() == 2
    assert put(store, "a", b"3")[0].previous == 2


def test_a_rule_may_change(store: Store, clock: Clock) -> None:
    for number in range(400):
        put(store, "a", b"%d" % number, keep=Retention(300))
    for number in range(400, 450):
        put(store, "a", b"%d" % number, keep=Retention(5))
    assert data_of(store.history("hub", "a", -1).entries) == [b"%d" % number for number in range(445, 450)]
    put(store, "a", b"450", keep=Retention(200, 10))
    clock.now += 5
    put(store, "a", b"451", keep=Retention(200, 10))
    clock.now += 6
    assert data_of(store.history("hub", "a", -1).entries) == [b"451"]
    put(store, "a", b"452", keep=Retention(200))
    clock.now += 1e6
    assert data_of(store.history("hub", "a", -1).entries) == [b"451", b"452"]


def test_a_clock_that_goes_back_keeps_the_order_of_times(store: Store, clock: Clock) -> None:
    put(store, "a", b"1", keep=Retention(10, 60))
    clock.now -= 20
    put(store, "a", b"2", keep=Retention(10, 60))
    times = [entry.time for entry in store.read_since(0).entries]
    assert times[0] == times[1]
    clock.now -= 86_400  # it had been far ahead: that must not hold for ever
    put(store, "a", b"3", keep=Retention(10, 60))
    assert store.read_since(2).entries[0].time == int(clock.now * 1000)


def test_history_pages(store: Store) -> None:
    put(store, "other", b"x")
    put(store, "a", *(b"%d" % number for number in range(2, 12)))
    put(store, "other", b"x")
    epoch = store.epoch

    def page(limit: int, since: int | None = None, reverse: bool = False, cap: int = 300) -> list[int]:
        position = None if since is None else (epoch, since)
        return [entry.offset for entry in store.history("hub", "a", limit, position, reverse, cap).entries]

    assert page(0) == []
    assert page(3) == [2, 3, 4]
    assert page(-1) == list(range(2, 12))
    assert page(-1, cap=4) == [2, 3, 4, 5]
    assert page(100, cap=4) == [2, 3, 4, 5]
    assert page(3, since=4) == [5, 6, 7]
    assert page(-1, since=11) == []
    assert page(2, reverse=True) == [11, 10]
    assert page(3, since=5, reverse=True) == [4, 3, 2]
    assert page(-1, since=2, reverse=True) == []
    answer = store.history("hub", "a")
    assert (answer.top, answer.topic_top, answer.epoch) == (12, 11, epoch)
    assert store.history("hub", "a", 1, ("", 3)).entries[0].offset == 4
    unknown = store.history("hub", "unknown", -1)
    assert (unknown.entries, unknown.top, unknown.topic_top) == ([], 12, 0)
    with pytest.raises(UnrecoverablePosition, match="epoch"):
        store.history("hub", "a", -1, ("another", 3))
    with pytest.raises(ValueError, match="offset 0"):
        store.history("hub", "a", -1, (epoch, 0), reverse=True)


def test_history_of_a_long_window_from_every_place(store: Store) -> None:
    for _ in range(40):
        put(store, "a", *[b"x"] * 10, keep=Retention(330))
        put(store, "b", b"x")
    offsets = [entry.offset for entry in store.history("hub", "a", -1, cap=10**6).entries]
    assert len(offsets) == 330
    epoch = store.epoch
    for since in range(1, store.top() + 1):
        after = store.history("hub", "a", 2, (epoch, since)).entries
        assert [entry.offset for entry in after] == [offset for offset in offsets if offset > since][:2]
        before = store.history("hub", "a", 2, (epoch, since), reverse=True).entries
        assert [entry.offset for entry in before] == [
            offset for offset in reversed(offsets) if offset < since
        ][:2]


def test_the_log_is_read_in_pieces(store: Store) -> None:
    put(store, "a", *[b"x" * 1000] * 10)
    first = store.read_since(0, limit=4)
    assert ([entry.offset for entry in first.entries], first.scanned, first.top) == ([1, 2, 3, 4], 4, 10)
    second = store.read_since(first.scanned, limit_bytes=2500)
    assert ([entry.offset for entry in second.entries], second.scanned) == ([5, 6, 7], 7)
    rest = store.read_since(second.scanned)
    assert ([entry.offset for entry in rest.entries], rest.scanned) == ([8, 9, 10], 10)
    assert store.read_since(10) == ([], 10, 10)
    assert store.get(11) is None


def test_channels_are_apart(store: Store) -> None:
    put(store, "a", b"1", channel="one")
    put(store, "a", b"2", channel="two")
    assert data_of(store.history("one", "a", -1).entries) == [b"1"]
    assert data_of(store.recover("two", "#", "", 0).entries) == [b"2"]
    assert store.read_since(0).entries[1].channel == "two"
    store.clear("one", "a")
    assert data_of(store.history("two", "a", -1).entries) == [b"2"]


def test_an_idempotency_key_stores_once_in_five_minutes(store: Store, clock: Clock) -> None:
    put(store, "a", b"0")
    (first,) = put(store, "a", b"1", key="k")
    (other_topic,) = put(store, "b", b"2", key="k")
    (other_channel,) = put(store, "a", b"3", key="k", channel="other")
    clock.now += 299.9
    (again,) = put(store, "a", b"4", key="k")
    assert (again.offset, again.previous, again.duplicate) == (first.offset, 1, True)
    assert not first.duplicate and not other_topic.duplicate and not other_channel.duplicate
    assert store.top() == 4
    clock.now += 0.1
    (later,) = put(store, "a", b"5", key="k")
    assert (later.offset, later.previous, later.duplicate) == (5, 2, False)
    (again,) = put(store, "a", b"6", key="k")
    assert (again.offset, again.duplicate) == (5, True)


def test_a_key_twice_in_one_transaction_stores_once(store: Store) -> None:
    positions = put(store, "a", b"1", b"2", key="k")
    assert [(each.offset, each.duplicate) for each in positions] == [(1, False), (1, True)]


def test_idempotency_keys_do_not_pile_up(store: Store, clock: Clock) -> None:
    for number in range(1000):
        clock.now += 1
        put(store, "a", b"x", key=f"k{number}", keep=Retention(1))
    clock.now += 301
    store.maintain(10**6)
    with store._read() as txn:
        left = [key for key, _ in txn.cursor() if key[:1] in (b"i", b"j")]
    assert left == []


def test_clear_removes_a_topic_at_once_and_its_long_window_bit_by_bit(store: Store) -> None:
    put(store, "a", *[b"x"] * 1000, keep=Retention(1000))
    put(store, "b", *[b"y"] * 1000, keep=Retention(1000))
    assert store.clear("hub", "a") == 1000
    assert store.clear("hub", "a") == 0
    assert store.clear("hub", "unknown") == 0
    assert store.history("hub", "a", -1).entries == []
    put(store, "a", *[b"new"] * 300, keep=Retention(1000))
    assert store.maintain(100), "there is more to do"
    while store.maintain(100):
        pass
    assert data_of(store.history("hub", "a", -1).entries) == [b"new"] * 300
    assert len(store.history("hub", "b", -1, cap=2000).entries) == 1000
    assert len(store.read_since(0, 5000).entries) == 1300


def test_a_removed_last_entry_leaves_the_sequence_and_no_garbage(store: Store, clock: Clock) -> None:
    for _ in range(64):
        put(store, "a", b"x")
        store.clear("hub", "a")
    assert store.top() == 64
    (position,) = put(store, "a", b"x")
    assert (position.offset, position.previous) == (65, 64)
    put(store, "a", *[b"x"] * 200)
    store.clear("hub", "a")
    for _ in range(2):
        clock.now += GRACE
        store.maintain(10**6)
        assert store.top() == 265
    with store._read() as txn:
        left = [key for key, _ in txn.cursor() if key[:1] == b"z"]
    assert len(left) == 1, "one tombstone, which holds the place of the last offset"


def test_what_was_pushed_out_is_deleted_whatever_happens_meanwhile(store: Store, clock: Clock) -> None:
    for number in range(200):
        put(store, "a", b"%d" % number, keep=Retention(1))
        if number % 7 == 0:
            store.clear("hub", "a")
        if number % 11 == 0:
            store.transact(lambda writer: writer.evict(1, 3))
    put(store, "b", *[b"x"] * 128, keep=Retention(1))
    clock.now += GRACE
    store.maintain(10**6)
    with store._read() as txn:
        left = [key for key, _ in txn.cursor() if key[:1] == b"z"]
    assert len(left) == 2


def test_evicting_while_a_long_window_turns_loses_nothing_else(store: Store) -> None:
    for number in range(700):
        put(store, "a", b"x", keep=Retention(200))
        if number > 250:
            store.transact(lambda writer: writer.evict(1, 1))
            offsets = [entry.offset for entry in store.history("hub", "a", -1, cap=10**6).entries]
            assert offsets == list(range(number + 2 - len(offsets), number + 2))
            assert len(offsets) > 130


def test_a_failed_transaction_changes_nothing(store: Store) -> None:
    put(store, "a", b"1")
    good, bad = Entry("hub", "a", b"2", KEEP), Entry("hub", "\ud800", b"3", KEEP)
    with pytest.raises(UnicodeEncodeError):
        store.append([good, bad])
    with pytest.raises(StoreError, match="failed"):
        store.append([good, Entry("hub", "t" * 600, b"3", KEEP)])
    assert store.trouble
    assert put(store, "a", b"2")[0].offset == 2
    assert store.trouble == ""


def test_a_message_that_would_push_out_everything_is_refused(store: Store) -> None:
    put(store, "a", b"1")
    with pytest.raises(EntryTooLarge, match="does not fit"):
        put(store, "a", bytes(store.size // 8))
    assert data_of(store.history("hub", "a", -1).entries) == [b"1"]


@pytest.mark.parametrize(("size", "ttl"), [(0, 0), (-1, 0), (2**32, 0), (1, -1), (1, 1e12)])
def test_a_senseless_rule_is_refused(size: int, ttl: float) -> None:
    with pytest.raises(ValueError, match="history_"):
        Retention(size, ttl)


def test_random_payloads_of_all_sizes_come_back(store: Store) -> None:
    generator = random.Random(1)
    sent = [generator.randbytes(generator.choice([0, 1, 200, 2000, 2100, 5000, 70_000])) for _ in range(60)]
    put(store, "a", *sent)
    assert data_of(store.recover("hub", "a", "", 0).entries) == sent
    assert data_of(store.recover("hub", "#", "", 0).entries) == sent
