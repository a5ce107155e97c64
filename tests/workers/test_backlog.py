"""What waits for one client: the three policies against a plain model, and a cost that does not grow with it."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.backlog import CHUNK, Backlog, Waiting
from workers.fanout import SlowPolicy

items = st.builds(
    Waiting,
    st.binary(min_size=1, max_size=6),
    st.sampled_from(("close", "drop_oldest", "latest")),
    st.sampled_from("ab"),
)


class Model:
    """The same, as one would say it."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.items: list[Waiting] = []
        self.dropped = 0

    def size(self) -> int:
        return sum(len(item.data) for item in self.items)

    def drop(self, wanted: Callable[[Waiting], bool]) -> bool:
        for index, item in enumerate(self.items):
            if wanted(item):
                del self.items[index]
                self.dropped += 1
                return True
        return False

    def add(self, item: Waiting) -> bool:
        if item.policy == "latest":
            self.drop(lambda old: old.policy == "latest" and old.topic == item.topic)
        self.items.append(item)
        while self.size() > self.limit and self.drop(lambda old: old.policy != "close"):
            pass
        return self.size() <= self.limit


@given(st.lists(items | st.just("pop") | st.just("take"), max_size=60), st.integers(0, 30))
def test_the_policies(steps: list[Waiting | str], limit: int) -> None:
    backlog, model = Backlog(limit), Model(limit)
    for step in steps:
        if isinstance(step, Waiting):
            assert backlog.add(step) == model.add(step)
        elif step == "take":
            assert backlog.take() == [item.data for item in model.items]
            model.items = []
        elif model.items:
            item = backlog.pop()
            backlog.gone(item)
            assert item == model.items.pop(0)
        assert backlog.items == model.items
        assert (backlog.size, backlog.dropped) == (model.size(), model.dropped)
        assert (len(backlog), bool(backlog)) == (len(model.items), bool(model.items))
        assert backlog.kept == sum(item.policy == "close" for item in model.items)


@given(st.lists(items, max_size=60), st.integers(0, 60), st.integers(0, 20))
def test_joined_it_is_the_same_stream_of_bytes(added: list[Waiting], limit: int, already: int) -> None:
    plain, joined = Backlog(limit), Backlog(limit, joins=True)
    for item in added:
        assert plain.add(item, already) == joined.add(item, already)
        assert (plain.size, plain.dropped) == (joined.size, joined.dropped)
    assert b"".join(plain.take()) == b"".join(joined.take())


def test_small_writes_are_not_an_object_each() -> None:
    backlog = Backlog(1 << 20, joins=True)
    for number in range(60_000):
        assert backlog.add(Waiting(b"%16d" % number))
    assert len(backlog) <= 60_000 * 16 // CHUNK + 1
    assert b"".join(backlog.take()) == b"".join(b"%16d" % number for number in range(60_000))


@pytest.mark.parametrize(
    "policies", [["latest"], ["drop_oldest"], ["close", "drop_oldest"], ["close", "latest"]]
)
def test_a_client_that_does_not_read_costs_the_same_however_much_waits(policies: list[SlowPolicy]) -> None:
    """Once 5 ms a message, with a mebibyte of small ones waiting: one client could stop a worker with that."""
    backlog = Backlog(1 << 20)
    for number in range(30_000):
        backlog.add(Waiting(b"x" * 16, policies[0], f"t{number}"))
    start = time.process_time()
    for number in range(60_000):
        backlog.add(Waiting(b"x" * 16, policies[-1], f"u{number % 40_000}"))
    assert time.process_time() - start < 2.0
    assert backlog.size <= 1 << 20


def test_what_was_replaced_a_million_times_is_forgotten() -> None:
    backlog = Backlog(1000)
    for number in range(200_000):
        backlog.add(Waiting(b"%d" % number, "latest", "t"))
    assert backlog.items == [Waiting(b"199999", "latest", "t")]
    assert len(backlog._droppable) < 200
