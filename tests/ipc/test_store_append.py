"""The store on the event loop: order, batches, the bounds of the queue, and never a wait."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ipc import store_append, store_core
from ipc.store import Entry, EntryTooLarge, Position, Retention, Store, StoreBusy, StoreError, StoreFull
from ipc.store_append import Appender, recover
from tests.ipc.store_support import KEEP, AppendWord, Clock, both_places, data_of, line, opened, process  # noqa: F401
from tests.ipc.test_store_processes import STOP_INSIDE
from tests.support import run, until_async


def entry(data: bytes, topic: str = "a") -> Entry:
    return Entry("hub", topic, data, KEEP)


def with_appender(tmp_path: Path, main: Callable[[Appender, Store], object], **bounds: int) -> None:
    """Run a coroutine function with an appender on a fresh store."""

    async def body(store: Store) -> None:
        appender = Appender(store, asyncio.get_running_loop(), **bounds)
        try:
            await main(appender, store)  # type: ignore[misc]
        finally:
            appender.close()

    with opened(tmp_path, store_size=8 << 20) as store:
        run(body(store))


def test_one_turn_of_the_loop_is_one_transaction_in_order(tmp_path: Path) -> None:
    async def main(appender: Appender, store: Store) -> None:
        told: list[object] = []
        transactions = AppendWord()
        store.since = (transactions, 0)
        for number in range(100):
            appender.append(entry(b"%d" % number, f"t/{number % 3}"), told.append)
        present = appender.write_future(lambda writer: writer.top)
        assert (appender.waiting, told) == (101, [])
        assert await present == 100
        assert [position.offset for position in told if isinstance(position, Position)] == list(range(1, 101))
        assert transactions.begun == 1
        assert (appender.waiting, appender.waiting_bytes) == (0, 0)
        assert data_of(store.read_since(0).entries) == [b"%d" % number for number in range(100)]

    with_appender(tmp_path, main)


def test_a_callback_may_append(tmp_path: Path) -> None:
    async def main(appender: Appender, store: Store) -> None:
        done = asyncio.Event()

        def again(position: Position) -> None:
            if position.offset < 20:
                appender.append(entry(b"x"), again)
            else:
                done.set()

        appender.append(entry(b"x"), again)
        await done.wait()
        assert store.top() == 20

    with_appender(tmp_path, main)


def test_a_callback_that_fails_is_logged_and_the_others_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_: object) -> None:
        raise ZeroDivisionError

    async def main(appender: Appender, store: Store) -> None:
        appender.append(entry(b"1"), fail)
        assert (await appender.append_future(entry(b"2"))).offset == 2

    with caplog.at_level(logging.ERROR, "ipc"):
        with_appender(tmp_path, main)
    assert "callback" in caplog.text


def test_a_cancelled_future_hurts_nobody(tmp_path: Path) -> None:
    async def main(appender: Appender, store: Store) -> None:
        cancelled = appender.append_future(entry(b"1"))
        other = appender.append_future(entry(b"2"))
        cancelled.cancel()
        assert (await other).offset == 2

    with_appender(tmp_path, main)


def test_a_large_backlog_is_stored_in_several_transactions(tmp_path: Path) -> None:
    async def main(appender: Appender, store: Store) -> None:
        transactions = AppendWord()
        store.since = (transactions, 0)
        futures = [appender.append_future(entry(b"x")) for _ in range(2500)]
        futures += [appender.append_future(entry(bytes(500_000))) for _ in range(10)]
        positions = await asyncio.gather(*futures)
        assert [position.offset for position in positions] == list(range(1, 2511))
        assert 4 <= transactions.begun <= 6

    with_appender(tmp_path, main)


def test_the_queue_is_bounded_in_number_and_bytes(tmp_path: Path) -> None:
    async def main(appender: Appender, store: Store) -> None:
        store._lock.acquire()
        try:
            futures = [appender.append_future(entry(b"x" * 100)) for _ in range(5)]
            with pytest.raises(StoreBusy, match="already wait"):
                appender.append(entry(b"x"), print)
            with pytest.raises(StoreBusy, match="already wait"):
                await appender.append_future(entry(b"x"))
        finally:
            store._lock.release()
        await asyncio.gather(*futures)
        # One that is larger than the bound alone may pass when nothing waits.
        assert (await appender.append_future(entry(bytes(2000)))).offset == 6
        with_bytes = appender.append_future(entry(bytes(900)))
        with pytest.raises(StoreBusy, match="already wait"):
            appender.append(entry(bytes(200)), print)
        await with_bytes

    with_appender(tmp_path, main, max_waiting=5, max_waiting_bytes=1000)


def test_a_busy_lock_is_tried_again_in_order(tmp_path: Path) -> None:
    async def main(appender: Appender, store: Store) -> None:
        store._lock.acquire()
        first = [appender.append_future(entry(b"%d" % number)) for number in range(3)]
        tries = AppendWord()
        store.since = (tries, 0)
        await until_async(lambda: tries.begun >= 3)
        second = [appender.append_future(entry(b"%d" % number)) for number in range(3, 6)]
        assert appender.waiting == 6
        store._lock.release()
        positions = await asyncio.gather(*first, *second)
        assert [position.offset for position in positions] == [1, 2, 3, 4, 5, 6]
        assert data_of(store.read_since(0).entries) == [b"%d" % number for number in range(6)]

    with_appender(tmp_path, main)


def test_what_waits_too_long_fails_and_what_came_later_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_append, "BUSY_SECONDS", 0.1)

    async def main(appender: Appender, store: Store) -> None:
        store._lock.acquire()
        old = [appender.append_future(entry(b"old")) for _ in range(3)]
        results = await asyncio.gather(*old, return_exceptions=True)
        assert all(isinstance(result, StoreBusy) for result in results)
        assert (appender.waiting, appender.waiting_bytes) == (0, 0)
        young = appender.append_future(entry(b"young"))
        store._lock.release()
        assert (await young).offset == 1
        assert data_of(store.read_since(0).entries) == [b"young"]

    with_appender(tmp_path, main)


def test_a_process_stopped_inside_a_transaction_never_blocks_the_loop(tmp_path: Path) -> None:
    """The others' loops go on, their reads too; their appends fail after two seconds, and go on when it is killed."""

    async def main(appender: Appender, store: Store) -> None:
        await appender.append_future(entry(b"before"))
        worst = 0.0
        beating = True

        async def heartbeat() -> None:
            nonlocal worst
            while beating:
                began = time.monotonic()
                await asyncio.sleep(0.005)
                worst = max(worst, time.monotonic() - began)
                assert data_of(store.recover("hub", "#", "", 0).entries)[0] == b"before"

        with process(STOP_INSIDE, tmp_path) as child:
            assert await asyncio.to_thread(line, child) == "inside"
            beat = asyncio.create_task(heartbeat())
            began = time.monotonic()
            with pytest.raises(StoreBusy, match="for 2 s"):
                await appender.append_future(entry(b"refused"))
            assert 1.9 <= time.monotonic() - began < 3
            waiting = appender.append_future(entry(b"patient"))
            await asyncio.sleep(0.2)
            os.kill(child.pid, signal.SIGKILL)
            assert (await waiting).offset == 2
            beating = False
            await beat
        assert worst < 0.5
        assert data_of(store.read_since(0).entries) == [b"before", b"patient"]

    with_appender(tmp_path, main)


def test_one_bad_entry_does_not_take_the_others_along(tmp_path: Path) -> None:
    async def main(appender: Appender, store: Store) -> None:
        futures = [
            appender.append_future(entry(b"1")),
            appender.append_future(entry(bytes(2 << 20))),
            appender.append_future(entry(b"2", "\ud800")),
            appender.append_future(entry(b"3")),
            appender.append_future(entry(b"4", "t" * 600)),
            appender.append_future(entry(b"5")),
        ]
        results = await asyncio.gather(*futures, return_exceptions=True)
        kinds = [type(result) for result in results]
        assert kinds == [Position, EntryTooLarge, StoreError, Position, StoreError, Position]
        assert data_of(store.read_since(0).entries) == [b"1", b"3", b"5"]

    with_appender(tmp_path, main)


def test_a_full_store_fails_all_that_wait_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main(appender: Appender, store: Store) -> None:
        tries: list[int] = []

        def full(_: object) -> None:
            tries.append(1)
            raise StoreFull("no room")

        with monkeypatch.context() as patch:
            patch.setattr(store_core.StoreCore, "transact", lambda _, work: full(work))
            futures = [appender.append_future(entry(b"x")) for _ in range(50)]
            results = await asyncio.gather(*futures, return_exceptions=True)
        assert all(isinstance(result, StoreFull) for result in results)
        assert len(tries) == 2
        assert (await appender.append_future(entry(b"x"))).offset == 1

    with_appender(tmp_path, main)


def test_the_lock_lost_while_sorting_out_a_bad_entry_keeps_the_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main(appender: Appender, store: Store) -> None:
        transact = store.transact
        calls: list[int] = []

        def busy_at_the_third(work: Callable[..., object]) -> object:
            calls.append(1)
            if len(calls) == 4:
                raise StoreBusy("another process is writing to the store")
            return transact(work)

        with monkeypatch.context() as patch:
            patch.setattr(store, "transact", busy_at_the_third)
            futures = [appender.append_future(entry(b"%d" % number)) for number in range(3)]
            futures.insert(1, appender.append_future(entry(b"bad", "\ud800")))
            futures += [appender.append_future(entry(b"%d" % number)) for number in range(3, 6)]
            results = await asyncio.gather(*futures, return_exceptions=True)
        assert sum(isinstance(result, StoreError) for result in results) == 1
        assert data_of(store.read_since(0).entries) == [b"%d" % number for number in range(6)]

    with_appender(tmp_path, main)


def test_close_stores_what_waits_and_fails_the_rest(tmp_path: Path) -> None:
    async def main(appender: Appender, store: Store) -> None:
        stored = appender.append_future(entry(b"stored"))
        appender.close()
        assert (await stored).offset == 1
        with pytest.raises(StoreError, match="closed"):
            await appender.append_future(entry(b"late"))

        other = Appender(store, asyncio.get_running_loop())
        store._lock.acquire()
        failed = other.append_future(entry(b"failed"))
        other.close()
        store._lock.release()
        with pytest.raises(StoreError, match="closed"):
            await failed
        assert store.top() == 1

    with_appender(tmp_path, main)


def test_housekeeping_runs_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_append, "_MAINTENANCE_SECONDS", 0.01)

    async def main(appender: Appender, store: Store) -> None:
        clock = store.clock = Clock()
        appender.start_maintenance()
        entries = [Entry("hub", "a", b"x", Retention(1000, 5)) for _ in range(600)]
        await asyncio.gather(*map(appender.append_future, entries))

        def trimmed() -> bool:
            clock.now += 1
            return not store.read_since(0).entries

        await until_async(trimmed, what="the trimming")

    with_appender(tmp_path, main)


def test_a_long_recovery_gives_the_loop_its_turns(tmp_path: Path) -> None:
    async def main(appender: Appender, store: Store) -> None:
        keep = Retention(100_000)
        for _ in range(20):
            store.append([Entry("hub", f"a/{number % 7}", b"x", keep) for number in range(1000)])
        turns = 0

        async def count() -> None:
            nonlocal turns
            while True:
                await asyncio.sleep(0)
                turns += 1

        counting = asyncio.create_task(count())
        for patterns in ("#", "a/1", ["a/1", "a/+"]):
            turns = 0
            answer = await recover(store, "hub", patterns, store.epoch, 0)
            assert answer.recovered
            assert len(answer.entries) == (2860 if patterns == "a/1" else 20_000)
            assert turns >= (2 if patterns == "a/1" else 15)
        counting.cancel()

    with_appender(tmp_path, main)
