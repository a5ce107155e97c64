"""The fan-out and the backlog: joining, order, policies."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from tests.support import run
from workers.fanout import MAX_TURN_BYTES, Fanout, SlowPolicy, binary_frame, text_frame
from workers.sinks import Backlog, Waiting


class Recorder:
    """A sink that keeps what it was given."""

    def __init__(self) -> None:
        self.pending: bytes | list[bytes] | None = None
        self.fd = -1
        self.writes: list[bytes] = []

    def write(self, data: bytes) -> None:
        self.writes.append(data)

    def write_rest(self, data: memoryview, policy: SlowPolicy) -> None:
        raise AssertionError("it has no descriptor")

    def write_each(self, frames: Sequence[bytes], policy: SlowPolicy, topic: str) -> None:
        self.writes.append(b"".join(frames))

    def overdue(self, now: float) -> bool:
        return False


def turn(send: Any) -> None:
    async def main() -> None:
        fanout = Fanout(asyncio.get_running_loop())
        send(fanout)
        await asyncio.sleep(0)
        await asyncio.sleep(0)

    run(main())


def test_frames_have_the_three_lengths_of_rfc_6455() -> None:
    assert text_frame(b"") == b"\x81\x00"
    assert text_frame(b"x" * 125)[:2] == b"\x81\x7d"
    assert text_frame(b"x" * 126)[:4] == b"\x81\x7e\x00\x7e"
    assert text_frame(b"x" * 65535)[:4] == b"\x81\x7e\xff\xff"
    assert text_frame(b"x" * 65536)[:10] == b"\x81\x7f" + (65536).to_bytes(8, "big")
    assert binary_frame(b"ab") == b"\x82\x02ab"


def test_consecutive_messages_for_one_set_leave_in_one_write() -> None:
    a, b = Recorder(), Recorder()
    both: Any = (a, b)

    def send(fanout: Fanout) -> None:
        fanout.send(both, b"1")
        fanout.send(both, b"2")

    turn(send)
    assert a.writes == b.writes == [text_frame(b"1") + text_frame(b"2")]


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 99)), max_size=40))
def test_every_sink_gets_its_messages_in_order_in_one_write(messages: list[tuple[int, int]]) -> None:
    sinks = [Recorder() for _ in range(3)]
    sets: list[Any] = [(sinks[0], sinks[1]), (sinks[1], sinks[2]), (sinks[2],)]

    def send(fanout: Fanout) -> None:
        for which, number in messages:
            fanout.send(sets[which], b"%d" % number)

    turn(send)
    for sink in sinks:
        wanted = b"".join(text_frame(b"%d" % number) for which, number in messages if sink in sets[which])
        assert b"".join(sink.writes) == wanted
        assert len(sink.writes) <= 1


def test_a_turn_that_never_ends_is_written_in_parts() -> None:
    sink = Recorder()
    targets: Any = (sink,)

    def send(fanout: Fanout) -> None:
        for _ in range(3 * MAX_TURN_BYTES // 1000):
            fanout.send(targets, b"x" * 1000)
        assert len(sink.writes) >= 2

    turn(send)
    assert sum(map(len, sink.writes)) == 3 * MAX_TURN_BYTES // 1000 * 1004


def test_nobody_is_counted_for_nobody() -> None:
    async def main() -> None:
        fanout = Fanout(asyncio.get_running_loop())
        fanout.send((), b"x")
        fanout.flush()
        assert fanout.deliveries == 0

    run(main())


def test_backlog_close_reports_the_overrun() -> None:
    backlog = Backlog(10)
    assert backlog.add(Waiting(b"12345"))
    assert not backlog.add(Waiting(b"123456"))


def test_backlog_drop_oldest_keeps_the_newest_and_never_touches_the_rest() -> None:
    backlog = Backlog(10)
    assert backlog.add(Waiting(b"keep"))
    for text in (b"a1", b"a2", b"a3", b"a4"):
        assert backlog.add(Waiting(text, "drop_oldest", "a"))
    assert backlog.take() == [b"keep", b"a2", b"a3", b"a4"]
    assert backlog.dropped == 1


def test_backlog_latest_keeps_one_per_topic() -> None:
    backlog = Backlog(100)
    for topic, text in (("a", b"a1"), ("b", b"b1"), ("a", b"a2"), ("a", b"a3")):
        assert backlog.add(Waiting(text, "latest", topic))
    assert backlog.take() == [b"b1", b"a3"]
    assert backlog.dropped == 2


policies = st.sampled_from(["close", "drop_oldest", "latest"])


@given(st.lists(st.tuples(st.binary(min_size=1, max_size=8), policies, st.sampled_from("ab")), max_size=40))
def test_backlog_stays_in_its_bound_and_in_order(items: list[tuple[bytes, Any, str]]) -> None:
    backlog = Backlog(20)
    number = 0
    for data, policy, topic in items:
        number += 1
        fits = backlog.add(Waiting(data, policy, topic))
        assert backlog.size == sum(len(item.data) for item in backlog.items)
        assert fits == (backlog.size <= 20)
        if not fits:
            assert all(item.policy == "close" for item in backlog.items)
            break
