"""Recovery: complete or refused, in the cases that random tests meet too seldom. See also test_store_model.py."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from ipc import store_reader
from ipc.store import Entry, Recovery, Retention, Store
from tests.ipc.store_support import KEEP, Clock, both_places, data_of, opened, put  # noqa: F401

WEEK = 7 * 86_400


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(tmp_path: Path, clock: Clock) -> Iterator[Store]:
    with opened(tmp_path, store_size=64 << 20) as store:
        store.clock = clock
        yield store


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_reader, "STEP", 2)


@pytest.fixture
def along_the_log(small_steps: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Patterns are recovered by reading the log, never topic by topic."""

    def give_up(self: store_reader.Scan, limit: int) -> Generator[None, None, None]:
        return None
        yield

    monkeypatch.setattr(store_reader.Scan, "_topics", give_up)


def recovered(store: Store, patterns: str | list[str], offset: int) -> list[bytes] | None:
    """What is recovered, None when it is refused."""
    answer = store.recover("hub", patterns, store.epoch, offset)
    assert answer.epoch == store.epoch
    assert answer.recovered or not answer.entries, "never a partial list"
    return data_of(answer.entries) if answer.recovered else None


def test_positions(store: Store) -> None:
    put(store, "a", b"1", b"2")
    assert recovered(store, "a", 0) == [b"1", b"2"]
    assert recovered(store, "a", 1) == [b"2"]
    assert recovered(store, "a", 2) == []
    assert recovered(store, "a", 3) is None, "a position that the store has not reached was never given by it"
    assert recovered(store, "unknown", 1) == []
    assert store.recover("hub", "a", "", 1).recovered
    for epoch in ("_", "0", store.epoch + "x"):
        assert store.recover("hub", "a", epoch, 1) == Recovery(False, (), 2, store.epoch)


def test_a_position_after_the_last_trimmed_entry_is_the_last_that_recovers(store: Store) -> None:
    put(store, "a", b"1", b"2", b"3", keep=Retention(1))
    for pattern in ("a", "#", "+"):
        assert recovered(store, pattern, 1) is None
        assert recovered(store, pattern, 2) == [b"3"]


def test_only_topics_that_match_count(store: Store) -> None:
    put(store, "a/b", b"1", b"2", keep=Retention(1))
    put(store, "a", b"3")
    put(store, "$s/a", b"4", b"5", keep=Retention(1))
    assert recovered(store, "a", 0) == [b"3"]
    assert recovered(store, "+", 0) == [b"3"]
    assert recovered(store, "a/#", 0) is None
    assert recovered(store, "a/#", 1) == [b"2", b"3"]
    assert recovered(store, ["a", "a/b"], 1) == [b"2", b"3"]
    assert recovered(store, ["a", "a", "+"], 0) == [b"3"], "once, however many patterns match"
    assert recovered(store, "#", 3) == [], "# does not match what begins with $"
    assert recovered(store, "$s/#", 3) is None


@pytest.mark.parametrize("pattern", ["a", "a/#", "#"])
def test_an_empty_topic_remembers_what_it_lost(store: Store, clock: Clock, pattern: str) -> None:
    put(store, "a", b"1", keep=Retention(5, 10))
    put(store, "b", b"2")
    clock.now += 11
    for _ in range(2):
        assert recovered(store, pattern, 0) is None
        assert recovered(store, pattern, 1) in ([], [b"2"])
        store.maintain()


@pytest.mark.parametrize("pattern", ["a", "a/#", "#"])
def test_a_cleared_topic_remembers_what_it_lost(store: Store, pattern: str) -> None:
    put(store, "a", b"1", b"2")
    put(store, "b", b"3")
    store.clear("hub", "a")
    assert recovered(store, pattern, 1) is None
    put(store, "a", b"4")
    assert recovered(store, pattern, 1) is None
    assert recovered(store, pattern, 2) in ([b"4"], [b"3", b"4"])


@pytest.mark.parametrize("pattern", ["a", "a/#", "unknown"])
def test_the_floor_takes_over_when_a_topic_is_forgotten(store: Store, clock: Clock, pattern: str) -> None:
    put(store, "b", b"1", b"2")
    put(store, "a", b"3", b"4", keep=Retention(5, 10))
    clock.now += 11
    store.maintain()
    clock.now += WEEK
    assert store.stats().floor == 0
    store.maintain()
    assert store.stats().floor == 4
    for offset in range(4):
        assert recovered(store, pattern, offset) is None
    assert recovered(store, pattern, 4) == []
    assert put(store, "a", b"5")[0].previous == 0


def test_an_answer_that_is_too_large_is_refused_whole(store: Store) -> None:
    put(store, "a", *[bytes(1000)] * 50)
    for pattern in ("a", "#"):
        assert len(store.recover("hub", pattern, "", 0, limit_bytes=60_000).entries) == 50
        answer = store.recover("hub", pattern, "", 0, limit_bytes=50_000)
        assert (answer.recovered, list(answer.entries)) == (False, [])
        assert store.recover("hub", pattern, "", 20, limit_bytes=50_000).recovered


def test_there_is_no_cap_of_300(store: Store) -> None:
    put(store, "a", *[b"x"] * 5000, keep=Retention(10_000))
    assert len(recovered(store, "a", 0) or []) == 5000
    assert len(recovered(store, "#", 0) or []) == 5000


def test_a_quiet_topic_is_found_without_reading_a_long_log(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(store, "quiet/a", b"1")
    put(store, "quiet", b"2")
    put(store, "quiets", b"3")
    put(store, "busy", *[b"x"] * 5000, keep=Retention(10_000))
    put(store, "quiet/b", b"4")

    def refuse(*_: object) -> None:
        raise AssertionError("the log was read")

    monkeypatch.setattr(store_reader.Scan, "_scan_piece", refuse)
    assert recovered(store, "quiet/#", 0) == [b"1", b"2", b"4"]
    assert recovered(store, ["+/b", "quiet/+"], 1) == [b"4"]


def test_many_topics_and_a_short_log(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A log that is long, but less than the topics are many: the topics are given up, the log is read."""
    for first in range(0, 6000, 1000):
        store.append([entry for number in range(first, first + 1000) for entry in _one(f"t/{number}")])
    put(store, "t/1", b"again")
    found: list[object] = []
    scan_log = store_reader.Scan._scan_log

    def seen(self: store_reader.Scan, offset: int) -> object:
        found.append(offset)
        return scan_log(self, offset)

    monkeypatch.setattr(store_reader.Scan, "_scan_log", seen)
    entries = recovered(store, "t/#", 4000)
    assert entries is not None and len(entries) == 2001
    assert found == [4000]


def _one(topic: str) -> list[Entry]:
    return [Entry("hub", topic, b"x", KEEP)]


# Between the pieces of one recovery ---------------------------------------------------------------------------------


def finish(steps: store_reader.Steps) -> Recovery:
    while True:
        try:
            next(steps)
        except StopIteration as end:
            answer: Recovery = end.value
            return answer


@pytest.mark.usefixtures("small_steps")
def test_what_comes_meanwhile_is_in_the_answer_or_after_its_top(store: Store) -> None:
    put(store, "a", *[b"%d" % number for number in range(10)])
    for patterns in ("#", "a"):
        steps = store.recover_steps("hub", patterns, "", 0)
        for _ in range(2):
            next(steps)
        put(store, "a", b"new")
        answer = finish(steps)
        assert answer.recovered
        assert [entry.offset for entry in answer.entries] == list(range(1, answer.top + 1))


@pytest.mark.usefixtures("along_the_log")
def test_a_topic_emptied_and_refilled_before_it_was_reached_is_missed(store: Store) -> None:
    """Nothing of this shows in the topic's record when the log's end is reached: only the link does."""
    put(store, "a", b"1", b"2", b"3", b"4", b"5", b"6")
    put(store, "b", b"7")
    put(store, "a", b"8", b"9", b"10")
    steps = store.recover_steps("hub", "#", "", 0)
    next(steps)
    store.clear("hub", "b")
    put(store, "b", b"11")
    assert not finish(steps).recovered


@pytest.mark.usefixtures("along_the_log")
def test_a_topic_emptied_before_it_was_reached_is_missed(store: Store) -> None:
    put(store, "a", *[b"x"] * 6)
    put(store, "b", b"7")
    put(store, "a", *[b"x"] * 6)
    steps = store.recover_steps("hub", "#", "", 0)
    next(steps)
    store.clear("hub", "b")
    assert not finish(steps).recovered


@pytest.mark.usefixtures("along_the_log")
def test_a_topic_emptied_after_it_was_read_is_not_missed(store: Store) -> None:
    put(store, "b", b"1")
    put(store, "a", *[b"x"] * 6)
    steps = store.recover_steps("hub", "#", "", 0)
    next(steps)
    next(steps)
    store.clear("hub", "b")
    answer = finish(steps)
    assert answer.recovered
    assert [entry.offset for entry in answer.entries] == list(range(1, 8))


@pytest.mark.usefixtures("along_the_log")
@pytest.mark.parametrize("patterns", ["#", ["a", "b"]])
def test_a_topic_forgotten_meanwhile_is_missed(store: Store, clock: Clock, patterns: str | list[str]) -> None:
    put(store, "a", *[b"x"] * 6)
    put(store, "b", b"7", keep=Retention(5, 10))
    put(store, "a", *[b"x"] * 6)
    steps = store.recover_steps("hub", patterns, "", 0)
    next(steps)
    clock.now += 11
    store.maintain()
    clock.now += WEEK + 1
    store.maintain()
    assert not finish(steps).recovered


@pytest.mark.usefixtures("small_steps")
def test_a_topic_emptied_before_its_turn_is_missed(store: Store) -> None:
    put(store, "a", *[b"x"] * 6)
    put(store, "b", b"7")
    steps = store.recover_steps("hub", ["a", "b"], "", 0)
    next(steps)
    store.clear("hub", "b")
    assert not finish(steps).recovered


@pytest.mark.usefixtures("small_steps")
def test_trimmed_while_reading_one_topic_is_missed(store: Store) -> None:
    put(store, "a", *[b"x"] * 10, keep=Retention(10))
    steps = store.recover_steps("hub", "a", "", 0)
    next(steps)
    put(store, "a", *[b"x"] * 2, keep=Retention(10))
    assert finish(steps).recovered, "what was trimmed had been read"
    steps = store.recover_steps("hub", "a", "", 2)
    next(steps)
    put(store, "a", *[b"x"] * 8, keep=Retention(10))
    assert not finish(steps).recovered
