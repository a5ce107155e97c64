"""The spool against a naive model: order per shard, credit only for what Redis has, bounds."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ipc.bridge_spool import ENTRY_BYTES, ENTRY_MESSAGES, Item, Spool
from ipc.origins import SHARDS

STEPS = st.lists(
    st.one_of(
        st.tuples(
            st.just("take"), st.integers(0, 2), st.lists(st.integers(0, SHARDS - 1), max_size=5), st.just(0)
        ),
        st.tuples(st.just("round"), st.just(0), st.lists(st.integers(0, SHARDS - 1)), st.integers(0, 3)),
    ),
    max_size=40,
)


@given(STEPS)
def test_order_holds_and_credit_is_given_when_redis_has_all(
    steps: list[tuple[str, int, list[int], int]],
) -> None:
    spool = Spool()
    redis: list[list[bytes]] = [[] for _ in range(SHARDS)]
    sent: list[list[bytes]] = [[] for _ in range(SHARDS)]
    batches: list[tuple[int, list[tuple[int, bytes]]]] = []
    released: list[int] = []
    count = 0
    for kind, sender, shards, _ in steps:
        if kind == "take":
            items = []
            for shard in shards:
                count += 1
                items.append(Item(shard, b"%d" % count, (sender, 1, count)))
                sent[shard].append(b"%d" % count)
            number = len(batches)
            batches.append((sender, [(item.shard, item.encoded) for item in items]))
            spool.take((sender, 1), items, lambda number=number: released.append(number))  # type: ignore[misc]
        else:
            # Redis takes the entries of some shards; the others have to go again.
            for entry in spool.round():
                if entry.shard not in shards:
                    redis[entry.shard] += entry.messages
                    assert spool.settle(entry.shard) == len(entry.messages)
            spool.rewind()
        for number in released:
            assert all(message in redis[shard] for shard, message in batches[number][1])
    while entries := spool.round():
        for entry in entries:
            redis[entry.shard] += entry.messages
            spool.settle(entry.shard)
    assert redis == sent
    # Only the last credit of each sender needs to be given, and they are given in its order.
    for sender in range(3):
        own = [number for number, (owner, _) in enumerate(batches) if owner == sender]
        given_to = [number for number in released if number in own]
        assert given_to == sorted(given_to)
        assert not own or given_to[-1] == own[-1]
    assert (len(spool), spool.bytes, spool.taken) == (0, 0, count)


def test_an_entry_is_closed_by_size_and_by_number() -> None:
    spool = Spool()
    spool.take((1, 1), [Item(0, bytes(ENTRY_BYTES // 2), (1, 1, n)) for n in range(3)], lambda: None)
    spool.take((1, 1), [Item(1, b"x", (1, 1, n)) for n in range(ENTRY_MESSAGES + 1)], lambda: None)
    spool.take((1, 1), [Item(2, bytes(3 * ENTRY_BYTES), (1, 1, 1))], lambda: None)
    assert [(entry.shard, len(entry.messages)) for entry in spool.round()] == [
        (0, 2),
        (1, ENTRY_MESSAGES),
        (2, 1),
    ]
    assert spool.round() == []


def test_what_nobody_keeps_is_bounded_and_counted() -> None:
    spool = Spool(unbacked=100)
    spool.take_unbacked([Item(0, bytes(60), (100, 1, n)) for n in (1, 2)])
    assert (len(spool), spool.dropped, spool.bytes) == (1, 1, 60)
    spool.round()
    spool.settle(0)
    spool.take_unbacked([Item(0, bytes(60), (100, 1, 3))])
    assert (len(spool), spool.dropped) == (1, 1)


def test_an_empty_batch_waits_for_those_before_it() -> None:
    """As a repeated last number does, which must not acknowledge what Redis does not have."""
    spool = Spool()
    released: list[str] = []
    spool.take((1, 1), [Item(0, b"x", (1, 1, 1))], lambda: released.append("x"))
    spool.take((1, 1), [], lambda: released.append("tail"))
    spool.take((2, 1), [], lambda: released.append("other"))
    assert released == ["other"]
    spool.round()
    spool.settle(0)
    assert released == ["other", "tail"]


def test_marks_say_what_redis_has() -> None:
    spool = Spool()
    spool.restore([[(1, 1, 5)]])
    spool.take((1, 1), [Item(0, b"x", (1, 1, 6)), Item(3, b"x", (1, 1, 1))], lambda: None)
    assert spool.marks(0) == [(1, 1, 5)]
    for entry in spool.round():
        spool.settle(entry.shard)
    assert spool.marks(0) == [(1, 1, 6)]
    assert spool.news() == [0, 3]
    assert spool.news() == []


def test_the_end_counts_what_waits() -> None:
    spool = Spool()
    spool.take((1, 1), [Item(0, b"x", (1, 1, 6)), Item(3, b"x", (1, 1, 1))], lambda: None)
    assert spool.give_up() == spool.dropped == 2
    assert (len(spool), spool.bytes) == (0, 0)
