"""The store against a naive model: whatever happens, a recovery is complete or says that it is not."""

from __future__ import annotations

import shutil
from itertools import takewhile

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ipc import store_fold, store_reader
from ipc.store import Entry, Retention, Store, StoredEntry
from ipc.store_records import LOG, TOPIC
from ipc.store_writer import Writer
from tests.ipc.store_model import Model, ModelEntry
from tests.ipc.store_support import GRACE, both_places  # noqa: F401
from tests.support import scratch_directory

CHANNELS = ["hub", "hub", "hub", "other"]
TOPICS = ["a", "a/b", "a/b/c", "a/c", "b", "b/x", "$s/a", "ä/€"]
# Each topic its rule; the windows of more than 128 are kept in pieces.
RULES = {
    "a": (1, 0.0),
    "a/b": (3, 0.0),
    "a/b/c": (150, 50.0),
    "a/c": (200, 10.0),
    "b": (1, 20.0),
    "b/x": (400, 0.0),
    "$s/a": (2, 30.0),
    "ä/€": (64, 100.0),
}
PATTERNS = ["#", "+", "a/#", "a/b/#", "+/b", "a/+", "b/#", "$s/#", "+/+/c", "ä/+", "x/#", *TOPICS]

channels = st.sampled_from(CHANNELS)
topics = st.sampled_from(TOPICS)
patterns = st.lists(st.sampled_from(PATTERNS), min_size=1, max_size=3)


def _plain(entries: list[ModelEntry]) -> list[tuple[int, int, str, str, bytes]]:
    return [(entry.offset, entry.previous, *entry.topic, entry.data) for entry in entries]


def _stored(entries: list[StoredEntry]) -> list[tuple[int, int, str, str, bytes]]:
    return [(entry.offset, entry.previous, entry.channel, entry.topic, entry.data) for entry in entries]


class StoreMachine(RuleBasedStateMachine):
    step = 1000

    @initialize()
    def open(self) -> None:
        self.directory = scratch_directory()
        self.store = Store.open(self.directory, store_size=16 << 20)
        self.now = 1_000_000.0
        self.store.clock = lambda: self.now
        self.model = Model()
        self.running: list[tuple[str, list[str], int, store_reader.Steps]] = []
        self.saved = (store_reader.STEP, store_fold.TRIMS_AT_ONCE)
        store_reader.STEP = self.step
        # Bounded trimming only delays what the model does at once.
        store_fold.TRIMS_AT_ONCE = 10**9
        # What another process knows of the store: each writer has its own memory of it.
        self.other = Writer()
        self.other.max_entry, self.other.max_grace = (
            self.store._writer.max_entry,
            self.store._writer.max_grace,
        )

    def teardown(self) -> None:
        if hasattr(self, "store"):
            store_reader.STEP, store_fold.TRIMS_AT_ONCE = self.saved
            self.running.clear()
            self.store.close()
            shutil.rmtree(self.directory)

    @rule(
        channel=channels,
        names=st.lists(topics, min_size=1, max_size=12),
        repeat=st.sampled_from([1, 1, 7, 70]),
    )
    def append(self, channel: str, names: list[str], repeat: int) -> None:
        names = names * repeat
        data = [b"%d" % (self.model.top + place) for place in range(len(names))]
        entries = [
            Entry(channel, topic, each, Retention(*RULES[topic]))
            for topic, each in zip(names, data, strict=True)
        ]
        positions = self.store.append(entries)
        for topic, each, position in zip(names, data, positions, strict=True):
            expected = self.model.append(channel, topic, each, *RULES[topic], self.now)
            assert (position.offset, position.previous) == (expected.offset, expected.previous)
            assert not position.duplicate

    @rule()
    def go_on_in_another_process(self) -> None:
        self.store._writer, self.other = self.other, self.store._writer

    @rule(names=st.lists(topics, min_size=1, max_size=12), repeat=st.sampled_from([1, 20]))
    def fail(self, names: list[str], repeat: int) -> None:
        """A transaction that is undone."""
        entries = [Entry("hub", topic, b"never", Retention(*RULES[topic])) for topic in names * repeat]

        def work(writer: Writer) -> None:
            for entry in entries:
                writer.append(entry)
            writer.fold()
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            self.store.transact(work)

    @rule(
        channel=channels,
        topic=topics,
        size=st.sampled_from([1, 5, 130, 300]),
        ttl=st.sampled_from([0.0, 15.0]),
    )
    def change_a_rule(self, channel: str, topic: str, size: int, ttl: float) -> None:
        """For one message only; the next one brings the rule that was."""
        data = b"%d" % self.model.top
        (position,) = self.store.append([Entry(channel, topic, data, Retention(size, ttl))])
        expected = self.model.append(channel, topic, data, size, ttl, self.now)
        assert (position.offset, position.previous) == (expected.offset, expected.previous)

    @rule(seconds=st.sampled_from([0.001, 1.0, 9.0, 10.0, 11.0, 49.0, 200.0, 3.5 * 86_400.0, 8 * 86_400.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @precondition(lambda self: self.model.topics)
    @rule(which=st.integers(0, 100))
    def clear(self, which: int) -> None:
        names = list(self.model.topics)
        channel, topic = names[which % len(names)]
        self.store.clear(channel, topic)
        self.model.clear(channel, topic, self.now)

    @rule()
    def maintain(self) -> None:
        assert not self.store.maintain(10**9)
        self.model.maintain(self.now)

    @rule(times=st.sampled_from([1, 3, 40]))
    def evict(self, times: int) -> None:
        self.maintain()  # what is too old may be gone already, or not
        for _ in range(times):
            before = self._things()
            # What nobody counts any more, and is only not deleted yet, goes without a trace.
            while self.store.transact(lambda writer: writer.evict(1, 1)) and self._things() == before:
                pass
            if self._things() != before:
                assert self.model.evict(self.now)

    def _things(self) -> tuple[int, int]:
        """What evicting changes: entries evicted so far, and topics known."""
        with self.store._read() as txn:
            cursor = txn.cursor()
            cursor.set_range(TOPIC)
            topics = sum(1 for _ in takewhile(lambda key: key < LOG, cursor.iternext(values=False)))
        return self.store.stats().evicted, topics

    @rule(wanted=patterns, channel=channels, back=st.integers(0, 1000))
    def recover(self, wanted: list[str], channel: str, back: int) -> None:
        self._recover(channel, wanted, max(0, self.model.top - back))

    @rule(which=st.integers(0, 20))
    def recover_at_every_edge(self, which: int) -> None:
        edges = {0, self.model.top, self.model.top // 2, self.model.floor}
        for topic in self.model.topics.values():
            edges |= {topic.trimmed, topic.trimmed_now(self.now), topic.top}
        edges |= {edge - 1 for edge in edges} | {edge + 1 for edge in edges}
        for place, offset in enumerate(sorted(edges)):
            if 0 <= offset <= self.model.top + 1:
                for pattern in PATTERNS[(which + place) % 3 :: 3]:
                    self._recover("hub", [pattern], offset)

    def _recover(self, channel: str, wanted: list[str], offset: int) -> None:
        recovery = self.store.recover(channel, wanted, self.store.epoch, offset)
        recovered, entries = self.model.recover(channel, wanted, offset, self.now)
        assert recovery.recovered == recovered
        assert _stored(list(recovery.entries)) == _plain(entries)
        assert recovery.top == self.model.top
        if recovered:
            ever = self.model.ever_after(channel, wanted, offset, self.model.top)
            assert _plain(entries) == _plain(ever), "recovered must mean complete"

    @rule(wanted=patterns, channel=channels, back=st.integers(0, 300))
    def begin_recovery(self, wanted: list[str], channel: str, back: int) -> None:
        """A recovery whose pieces lie between other operations."""
        offset = max(0, self.model.top - back)
        steps = self.store.recover_steps(channel, wanted, "", offset)
        self.running.append((channel, wanted, offset, steps))

    @precondition(lambda self: self.running)
    @rule(which=st.integers(0, 100), count=st.integers(1, 5))
    def go_on(self, which: int, count: int) -> None:
        running = self.running[which % len(self.running)]
        channel, wanted, offset, steps = running
        try:
            for _ in range(count):
                next(steps)
        except StopIteration as end:
            self.running.remove(running)
            recovery = end.value
            if recovery.recovered:
                ever = self.model.ever_after(channel, wanted, offset, recovery.top)
                assert _stored(recovery.entries) == _plain(ever), "recovered must mean complete"

    @rule(
        channel=channels,
        topic=topics,
        limit=st.sampled_from([-1, 0, 1, 3, 100]),
        back=st.none() | st.integers(0, 500),
        reverse=st.booleans(),
        cap=st.sampled_from([2, 300, 10**6]),
    )
    def history(
        self, channel: str, topic: str, limit: int, back: int | None, reverse: bool, cap: int
    ) -> None:
        since = None if back is None else max(1, self.model.top - back)
        page = self.store.history(
            channel, topic, limit, None if since is None else (self.store.epoch, since), reverse, cap
        )
        known = self.model.topics.get((channel, topic))
        kept = known.fresh(self.now) if known is not None else []
        if reverse:
            kept = [entry for entry in reversed(kept) if since is None or entry.offset < since]
        else:
            kept = [entry for entry in kept if since is None or entry.offset > since]
        kept = kept[: cap if limit < 0 else min(limit, cap)]
        assert _stored(list(page.entries)) == _plain(kept)
        assert page.top == self.model.top
        assert page.topic_top == (known.top if known is not None else 0)

    @rule()
    def page_at_every_edge(self) -> None:
        for (channel, topic), known in self.model.topics.items():
            kept = known.fresh(self.now)
            for place in {0, len(kept) // 3, len(kept) - 65, len(kept) - 2}:
                if 0 <= place < len(kept):
                    since = (self.store.epoch, kept[place].offset)
                    after = self.store.history(channel, topic, 3, since)
                    assert _stored(list(after.entries)) == _plain(kept[place + 1 : place + 4])
                    before = self.store.history(channel, topic, -1, since, True)
                    assert _stored(list(before.entries)) == _plain(kept[:place][::-1][:300])

    @rule(back=st.integers(0, 400), limit=st.integers(1, 100))
    def read_log(self, back: int, limit: int) -> None:
        offset = max(0, self.model.top - back)
        found: list[StoredEntry] = []
        while True:
            piece = self.store.read_since(offset, limit)
            found += piece.entries
            assert offset <= piece.scanned <= piece.top == self.model.top
            if piece.scanned == piece.top:
                break
            offset = piece.scanned
        start = max(0, self.model.top - back)
        offsets = [entry.offset for entry in found]
        kept = {entry.offset for topic in self.model.topics.values() for entry in topic.kept}
        # At least what counts; what was pushed out may be there still, as it was.
        assert offsets == sorted(set(offsets))
        assert {offset for offset in kept if offset > start} <= set(offsets)
        assert _stored(found) == _plain([self.model.ever[offset - 1] for offset in offsets])

    @invariant()
    def bounded_garbage(self) -> None:
        if hasattr(self, "store"):
            assert self.store.top() == self.model.top

    @rule()
    def nothing_leaks(self) -> None:
        """After housekeeping and some seconds the log holds what counts, and nothing else."""
        self.maintain()
        kept = {entry.offset for topic in self.model.topics.values() for entry in topic.kept}
        self.now += GRACE
        self.maintain()
        there = {entry.offset for entry in self.store.read_since(0, 10**9, 10**9).entries}
        assert {entry.offset for topic in self.model.topics.values() for entry in topic.kept} <= there
        assert there <= kept


class SmallStepsMachine(StoreMachine):
    step = 3


_quick = settings(
    max_examples=40, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)
_thorough = settings(
    max_examples=1500, stateful_step_count=60, deadline=None, suppress_health_check=list(HealthCheck)
)


class TestStore(StoreMachine.TestCase):  # type: ignore[valid-type, misc]
    settings = _quick


class TestStoreInSmallSteps(SmallStepsMachine.TestCase):  # type: ignore[valid-type, misc]
    settings = _quick


@pytest.mark.long
@pytest.mark.timeout(3600)
class TestStoreLong(StoreMachine.TestCase):  # type: ignore[valid-type, misc]
    settings = _thorough


@pytest.mark.long
@pytest.mark.timeout(3600)
class TestStoreInSmallStepsLong(SmallStepsMachine.TestCase):  # type: ignore[valid-type, misc]
    settings = _thorough
