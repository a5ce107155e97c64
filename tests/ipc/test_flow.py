"""Numbering, credits, window, outbox and gaps: examples, and a model that a whole exchange must obey."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ipc.envelope import OVERHEAD
from ipc.flow import STALL_AFTER, Batch, ReceiveFlow, SendFlow, pack_credit, unpack_credit


def ready_flow(window: int = 10 * (OVERHEAD + 10), backlog: int = 1 << 20) -> SendFlow:
    flow = SendFlow(window=window, backlog=backlog)
    flow.ready = True
    return flow


def give(flow: SendFlow, *bodies: bytes) -> None:
    for body in bodies:
        flow.offer(body, 1)


def take_all(flow: SendFlow) -> list[Batch]:
    batches = []
    while (batch := flow.take()) is not None:
        batches.append(batch)
    return batches


def let_stall(flow: SendFlow, now: float = 0.0) -> float:
    """Look at the clock until the receiver counts as stalled; answers when that was."""
    for _ in range(100):
        if flow.observe(now):
            return now
        now += 0.25
    raise AssertionError("never stalled")


def test_nothing_leaves_before_the_subscription_was_seen() -> None:
    flow = SendFlow()
    give(flow, b"a", b"b")
    assert flow.take() is None
    flow.ready = True
    assert [batch.body for batch in take_all(flow)] == [b"a", b"b"]


def test_the_window_holds_back_and_a_credit_lets_on() -> None:
    flow = ready_flow()
    give(flow, *[bytes(10)] * 25)
    assert len(take_all(flow)) == 10
    assert flow.outbox_bytes == 15 * (OVERHEAD + 10)
    assert flow.credit(3 * (OVERHEAD + 10))
    assert len(take_all(flow)) == 3
    assert not flow.credit(3 * (OVERHEAD + 10)), "the same position is no news"


def test_a_batch_larger_than_the_window_goes_alone() -> None:
    flow = ready_flow()
    give(flow, bytes(10), bytes(flow.window * 3), bytes(10))
    assert len(take_all(flow)) == 1
    flow.credit(flow.position)
    assert [len(batch.body) for batch in take_all(flow)] == [flow.window * 3]
    flow.credit(flow.position)
    assert len(take_all(flow)) == 1


def test_a_position_never_sent_is_ignored() -> None:
    flow = ready_flow()
    give(flow, b"a")
    take_all(flow)
    assert not flow.credit(1 << 40)
    assert flow.unacknowledged == 1


def test_a_receiver_that_moves_is_never_stalled_however_slow() -> None:
    flow = ready_flow(window=OVERHEAD + 10)
    give(flow, *[bytes(10)] * 50)
    now = 0.0
    for _ in range(50):
        take_all(flow)
        assert not flow.observe(now)
        assert not flow.observe(now + 0.4)
        assert not flow.observe(now + 0.9)
        assert flow.credit(flow.position)
        now += 0.95
    assert flow.dropped == 0
    assert flow.idle


def test_an_idle_receiver_is_never_stalled() -> None:
    flow = ready_flow()
    for second in range(100):
        assert not flow.observe(float(second))
    give(flow, b"a")
    take_all(flow)
    assert not flow.observe(100.2), "the batch has been under way for an instant, not for a second"


def test_standing_still_takes_a_second_of_looks_not_one_late_look() -> None:
    flow = ready_flow()
    give(flow, b"a")
    take_all(flow)
    assert not flow.observe(0.0)
    assert not flow.observe(60.0), "it was this process that stood still"
    assert not flow.stalled
    assert let_stall(flow, 60.25) <= 61.25


def test_a_peer_whose_subscription_never_comes_stalls_too() -> None:
    flow = SendFlow(backlog=100)
    give(flow, bytes(1000))
    assert let_stall(flow) >= STALL_AFTER
    assert flow.dropped == 1


def test_what_overflows_the_outbox_of_a_stalled_peer_is_dropped_and_shows_as_a_gap() -> None:
    size = OVERHEAD + 10
    flow = ready_flow(window=size, backlog=5 * size)
    give(flow, *[bytes(10)] * 9)
    assert len(take_all(flow)) == 1
    assert flow.dropped == 0, "a moving peer's overflow waits; the publisher has to pause"
    let_stall(flow)
    assert flow.dropped == 3
    give(flow, *[bytes(10)] * 4)
    assert flow.dropped == 7
    assert flow.outbox_bytes <= flow.backlog

    receiver = ReceiveFlow()
    receiver.accept(0, 1)
    flow.credit(flow.position)
    assert not flow.stalled
    gaps = 0
    while (batch := flow.take()) is not None:
        gaps += receiver.accept(batch.number, batch.envelopes)
        flow.credit(flow.position)
    gaps += receiver.accept(flow.last_number, 0)
    assert gaps == 7, "the tail's gap shows by the repeated last number"


def test_what_a_dead_peer_has_not_processed_is_dropped_once() -> None:
    flow = ready_flow()
    give(flow, *[bytes(10)] * 30)
    take_all(flow)
    flow.credit(4 * (OVERHEAD + 10))
    assert flow.abandon() == 26
    assert flow.dropped == 26
    assert flow.abandon() == 0
    assert flow.idle


def test_a_gap_is_counted_and_a_repetition_refused() -> None:
    flow = ReceiveFlow()
    assert flow.accept(0, 5) == 0
    assert flow.accept(7, 1) == 2
    assert flow.accept(7, 1) == -1
    assert flow.accept(8, 0) == 0
    assert flow.processed(100)
    assert not flow.processed(100)
    assert not flow.processed(50)


@given(st.integers(1, 1 << 32), st.integers(0, (1 << 48) - 1), st.integers(1, 1 << 32))
def test_a_credit_is_only_its_own_senders(epoch: int, position: int, other: int) -> None:
    word = pack_credit(epoch, position)
    assert 0 <= word < 1 << 64
    assert unpack_credit(word, epoch) == position
    if other & 0xFFFF != epoch & 0xFFFF:
        assert unpack_credit(word, other) == 0


class Exchange(RuleBasedStateMachine):
    """A sender, a pipe that loses nothing but what it is told to lose, and a receiver."""

    @initialize(window=st.integers(1, 2000), backlog=st.integers(0, 5000))
    def begin(self, window: int, backlog: int) -> None:
        self.flow = SendFlow(window=window, backlog=backlog)
        self.receiver = ReceiveFlow()
        self.pipe: list[tuple[Batch, int]] = []
        self.now = 0.0
        self.given = 0
        self.received = 0
        self.gaps = 0
        self.lost = 0
        self.order: list[int] = []

    @rule(sizes=st.lists(st.tuples(st.integers(0, 500), st.integers(1, 5)), max_size=8))
    def offer(self, sizes: list[tuple[int, int]]) -> None:
        for size, envelopes in sizes:
            self.flow.offer(bytes(size), envelopes)
            self.given += envelopes

    @rule(ready=st.booleans())
    def subscribe(self, ready: bool) -> None:
        self.flow.ready = ready

    @rule()
    def send(self) -> None:
        while (batch := self.flow.take()) is not None:
            self.pipe.append((batch, self.flow.position))

    @precondition(lambda self: bool(self.pipe))
    @rule(count=st.integers(1, 5))
    def arrive(self, count: int) -> None:
        for batch, position in self.pipe[:count]:
            gap = self.receiver.accept(batch.number, batch.envelopes)
            assert gap >= 0
            self.gaps += gap
            self.received += batch.envelopes
            self.order.append(batch.number)
            self.receiver.processed(position)
        del self.pipe[:count]

    @precondition(lambda self: bool(self.pipe))
    @rule()
    def lose(self) -> None:
        self.lost += self.pipe.pop(0)[0].envelopes

    @rule()
    def credit(self) -> None:
        self.flow.credit(self.receiver.position)

    @rule(seconds=st.floats(0, 3))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.flow.observe(self.now)

    @rule()
    def tail(self) -> None:
        if not self.pipe and self.flow.ready:
            self.gaps += self.receiver.accept(self.flow.last_number, 0)
            self.receiver.processed(self.flow.position)

    @invariant()
    def nothing_is_unaccounted_for(self) -> None:
        if not hasattr(self, "flow"):
            return
        flow = self.flow
        flow.credit(self.receiver.position)
        assert flow.number == self.given
        under_way = sum(batch.envelopes for batch, _ in self.pipe)
        waiting = sum(batch.envelopes for batch in flow.outbox)
        assert self.given == self.received + self.lost + flow.dropped + under_way + waiting
        assert self.order == sorted(self.order)
        assert self.gaps <= self.lost + flow.dropped
        assert flow.outbox_bytes == sum(len(batch.body) + OVERHEAD for batch in flow.outbox)
        if flow.stalled:
            assert flow.outbox_bytes <= flow.backlog

    def teardown(self) -> None:
        if not hasattr(self, "flow"):
            return
        flow = self.flow
        flow.ready = True
        while flow.outbox or self.pipe:
            self.send()
            if self.pipe:
                self.arrive(len(self.pipe))
            self.tail()
            flow.credit(self.receiver.position)
        self.tail()
        assert self.gaps == self.lost + flow.dropped, "after the tail every loss has shown"
        assert self.given == self.received + self.gaps


TestExchange = Exchange.TestCase
TestExchange.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
