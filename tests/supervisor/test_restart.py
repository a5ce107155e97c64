"""Back-off, start verdicts, health: pure, in virtual time."""

from __future__ import annotations

import os
import signal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from supervisor.restart import (
    RESTART_DELAYS,
    STABLE_AFTER,
    Backoff,
    Clockwork,
    Health,
    HealthPolicy,
    StartVerdict,
    describe_end,
)
from supervisor.rolling import MAX_REMEMBERED, Rolling


def test_delays_grow_to_30_seconds() -> None:
    backoff = Backoff()
    assert [backoff.ended(None) for _ in range(9)] == [0, 1, 2, 4, 8, 16, 30, 30, 30]


def test_a_stable_worker_resets_the_count() -> None:
    backoff = Backoff()
    for _ in range(5):
        backoff.ended(1.0)
    assert backoff.ended(STABLE_AFTER) == 0
    assert backoff.failures == 0
    assert [backoff.ended(9.9), backoff.ended(None)] == [0, 1]


def test_crash_one_second_after_each_start_makes_few_restarts_in_a_minute() -> None:
    """R7: at most 8."""
    backoff, now, restarts = Backoff(), 0.0, 0
    while now < 60:
        now += 1 + backoff.ended(1.0)
        restarts += now < 60
    assert restarts <= 8


@given(st.lists(st.one_of(st.none(), st.floats(0, 100))))
def test_delay_is_always_one_of_the_table(lives: list[float | None]) -> None:
    backoff = Backoff()
    for life in lives:
        assert backoff.ended(life) in RESTART_DELAYS


def test_exit_code_3_before_the_first_readiness_ends_the_hub() -> None:
    assert StartVerdict().start_failed(3)


def test_the_fifth_failed_start_ends_the_hub() -> None:
    verdict = StartVerdict()
    assert [verdict.start_failed(code) for code in (1, None, 1, 0, 1)] == [False] * 4 + [True]


def test_nothing_but_a_signal_ends_a_hub_that_was_ready_once() -> None:
    verdict = StartVerdict()
    verdict.all_ready()
    assert not any(verdict.start_failed(3) for _ in range(20))


@pytest.mark.parametrize(
    ("age", "health"), [(0.6, Health.FRESH), (2.0, Health.FRESH), (2.1, Health.STALE), (10.1, Health.HUNG)]
)
def test_health(age: float, health: Health) -> None:
    assert HealthPolicy(worker_timeout=10.0).judge(age) is health


def test_who_stood_still_itself_does_not_blame_the_workers() -> None:
    """Ctrl-Z, a minute, fg: every heartbeat is a minute old."""
    clock = Clockwork(100.0, tolerance=1.0)
    clock.tick(100.5)
    assert clock.age(98.0, 100.5) == pytest.approx(0.5)  # never more than this process has seen
    clock.tick(160.0)
    assert clock.age(100.4, 160.0) == 0.0
    clock.tick(161.0)
    assert clock.age(100.4, 161.0) == pytest.approx(1.0)
    assert clock.age(160.9, 161.0) == pytest.approx(0.1)
    assert clock.age(999.0, 161.0) == 0.0


def test_words_for_an_end() -> None:
    assert describe_end(0) == "ended with exit code 0"
    assert describe_end(7 << 8) == "ended with exit code 7"
    assert describe_end(int(signal.SIGKILL)) == "was killed by SIGKILL; perhaps out of memory?"
    assert describe_end(int(signal.SIGKILL), ordered=True) == "was killed by SIGKILL"
    assert describe_end(int(signal.SIGSEGV)) == "was killed by SIGSEGV"
    assert os.waitstatus_to_exitcode(40) == -40
    assert describe_end(40) == "was killed by signal 40"


def test_a_round_goes_through_all_indexes_once() -> None:
    rolling = Rolling()
    number = rolling.request()
    assert rolling.wanted
    rolling.begin([0, 1, 2])
    assert [rolling.next() for _ in range(4)] == [0, 1, 2, None]
    assert rolling.outcome(number) is None
    rolling.finish()
    assert rolling.outcome(number) == ""
    assert not rolling.wanted


def test_requests_during_a_round_make_one_more() -> None:
    rolling = Rolling()
    first = rolling.request()
    rolling.begin([0])
    numbers = {rolling.request() for _ in range(5)}
    assert numbers == {first + 1}
    assert not rolling.wanted
    rolling.finish("worker 0 failed")
    assert rolling.outcome(first) == "worker 0 failed"
    assert rolling.wanted
    rolling.begin([0])
    rolling.finish()
    assert rolling.outcome(first + 1) == ""
    assert not rolling.wanted


def test_cancel_tells_those_who_wait() -> None:
    rolling = Rolling()
    number = rolling.request()
    rolling.begin([0])
    rolling.cancel()
    assert rolling.outcome(number) == "the hub stops"
    rolling.request()
    rolling.cancel()
    assert not rolling.wanted


def test_outcomes_are_bounded() -> None:
    rolling = Rolling()
    for _ in range(3 * MAX_REMEMBERED):
        rolling.request()
        rolling.begin([])
        rolling.finish()
    assert rolling.outcome(1) is None
    assert sum(rolling.outcome(number) is not None for number in range(100)) == MAX_REMEMBERED
