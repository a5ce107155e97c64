"""Numbers of federated messages against a naive model: what was here before, and how much is missing."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ipc.origins import SHARDS, Seen, shard_of

PROCESSES = st.tuples(st.sampled_from(["a:0", "a:1", "b:0"]), st.integers(0, 2), st.integers(1, 2))


@given(st.text(), st.text())
def test_a_topic_is_always_on_the_same_shard(channel: str, topic: str) -> None:
    assert 0 <= shard_of(channel, topic) < SHARDS
    assert shard_of(channel, topic) == shard_of(channel, topic)


@given(st.lists(st.tuples(PROCESSES, st.integers(1, 30))))
def test_each_number_passes_once_and_what_is_skipped_is_counted(
    arrivals: list[tuple[tuple[str, int, int], int]],
) -> None:
    seen = Seen()
    highest: dict[tuple[str, int, int], int] = {}
    for process, number in arrivals:
        before = highest.get(process)
        expected = -1 if before is not None and number <= before else number - (before or number - 1) - 1
        if before is None:
            expected = 0
        assert seen.note(*process, number) == expected
        highest[process] = max(number, before or 0)
    assert sorted(seen.snapshot()) == sorted((*key, value) for key, value in highest.items())


@given(
    st.lists(st.booleans(), max_size=60),
    st.integers(0, 59),
    st.sets(st.integers(0, 59)),
)
def test_what_came_and_what_was_missed_is_all_that_was_sent(
    arrives: list[bool], repeat_from: int, marked: set[int]
) -> None:
    """One process of a host that is known from its first mark on; lost messages, a repetition, marks now and then."""
    seen = Seen()
    missing = seen.mark("a:0", [], complete=True)
    came = []
    numbers = [number + 1 for number, arrived in enumerate(arrives) if arrived]
    for number in [*numbers, *numbers[repeat_from:]]:
        gap = seen.note("a:0", 1, 1, number)
        if gap >= 0:
            came.append(number)
            missing += gap
        if number in marked:
            missing += seen.mark("a:0", [(1, 1, number)], complete=True)
    missing += seen.mark("a:0", [(1, 1, len(arrives))], complete=True)
    assert came == numbers
    assert missing == len(arrives) - len(numbers)


def test_of_a_process_first_heard_of_nothing_is_missing_unless_its_host_has_told_of_all() -> None:
    seen = Seen()
    assert seen.note("a:0", 1, 1, 500) == 0
    assert seen.mark("b:0", [(1, 1, 40)], complete=True) == 0
    assert seen.note("b:0", 1, 1, 41) == 0
    assert seen.note("b:0", 2, 1, 3) == 2
    assert seen.mark("c:0", [(1, 1, 40)], complete=False) == 0
    assert seen.note("c:0", 2, 1, 7) == 0


def test_the_memory_is_bounded_and_forgets_who_was_silent_longest() -> None:
    seen = Seen(limit=3)
    for slot in (1, 2, 3):
        seen.note("a:0", slot, 1, 10)
    seen.note("a:0", 1, 1, 11)
    seen.note("a:0", 4, 1, 10)
    assert len(seen) == 3
    assert seen.note("a:0", 1, 1, 11) == -1
    assert seen.note("a:0", 2, 1, 10) == 0


def test_a_successor_knows_what_its_predecessor_knew() -> None:
    seen, successor = Seen(), Seen()
    seen.mark("a:0", [(1, 1, 5)], complete=True)
    seen.note("a:0", 1, 1, 6)
    successor.restore(seen.snapshot(), seen.complete_sources())
    assert successor.note("a:0", 1, 1, 6) == -1
    assert successor.note("a:0", 1, 1, 8) == 1
    assert successor.note("a:0", 2, 1, 2) == 1
