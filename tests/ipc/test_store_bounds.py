"""The store's bound: the oldest go first, a full map or file system is a clear error, and there is life after it."""

from __future__ import annotations

import logging
import os
import random
from functools import partial
from pathlib import Path

import lmdb
import pytest

from ipc import store_core
from ipc.store import Entry, Position, Retention, Store, StoreError, StoreFull, default_store_size
from ipc.store_writer import Writer
from tests.ipc.store_support import (  # noqa: F401
    GRACE,
    Clock,
    both_places,
    data_of,
    line,
    opened,
    process,
    put,
    small_file_system,
)

MIB = 1 << 20
EVERYTHING = Retention(10**6)


def test_the_oldest_go_when_it_is_nearly_full(tmp_path: Path) -> None:
    with opened(tmp_path, store_size=4 * MIB) as store:
        for number in range(20_000):
            put(store, f"t/{number % 10}", b"%d" % number + bytes(400), keep=EVERYTHING)
        stats = store.stats()
        assert 0.8 < stats.used / stats.size <= 0.92
        kept = [entry.offset for entry in store.read_since(0, 10**6, 10**9).entries]
        assert kept == list(range(20_001 - len(kept), 20_001)), "the newest, without a gap"
        assert stats.evicted == 20_000 - len(kept)
        assert stats.trouble == ""
        # Who is behind what went is told so.
        assert not store.recover("hub", "#", "", kept[0] - 2).recovered
        assert len(store.recover("hub", "#", "", kept[0] - 1).entries) == len(kept)


def test_memory_of_topics_and_keys_goes_too(tmp_path: Path) -> None:
    clock = Clock()
    with opened(tmp_path, store_size=2 * MIB) as store:
        store.clock = clock
        for number in range(12_000):
            clock.now += 0.01
            put(store, f"request/{number}", bytes(50), keep=Retention(1, 20), key=f"key {number}")
            if number % 100 == 0:
                store.maintain()
        stats = store.stats()
        assert stats.used <= 0.92 * stats.size
        assert 0 < stats.floor < 12_000
        assert not store.recover("hub", "#", "", stats.floor - 1).recovered
        assert store.history("hub", "request/11999", -1).entries


def test_large_messages_and_small_ones(tmp_path: Path) -> None:
    """Large ones need pages in a row, which are rare when the store is full."""
    generator = random.Random(7)
    full = 0
    with opened(tmp_path, store_size=8 * MIB) as store:
        for number in range(2_000):
            size = generator.choice([100, 1000, 5000, 65_536])
            try:
                put(store, f"t/{number % 7}", bytes(size), keep=EVERYTHING)
            except StoreFull:
                full += 1
        assert full == 0
        entries = store.read_since(0, 10**6, 10**9).entries
        assert [entry.offset for entry in entries] == list(range(entries[0].offset, 2_001))


READER = """
import sys
from ipc.store import Store
store = Store.open(sys.argv[1])
print("open", flush=True)
sys.stdin.readline()
with store._read():
    print("reading", flush=True)
    sys.stdin.readline()
print("ended", flush=True)
"""


def test_a_reader_that_stands_still_costs_no_more_than_room(tmp_path: Path) -> None:
    """It keeps every page it could see: then there is no room, history is not given up in vain, and it comes back."""
    with opened(tmp_path, store_size=2 * MIB) as store, process(READER, tmp_path) as reader:
        assert line(reader) == "open"
        for _ in range(500):
            put(store, "a", bytes(1000), keep=EVERYTHING)
        assert reader.stdin is not None
        print("read", file=reader.stdin, flush=True)
        assert line(reader) == "reading"
        with pytest.raises(StoreFull, match="--store-size"):
            for number in range(10_000):
                put(store, f"t/{number % 100}", bytes(1000), keep=Retention(1))
        assert store.trouble
        kept = len(store.read_since(0, 10**6, 10**9).entries)
        refused = 0
        for _ in range(10):
            try:
                put(store, "a", bytes(1000), keep=EVERYTHING)
            except StoreFull:
                refused += 1
        assert refused >= 5
        assert kept - len(store.read_since(0, 10**6, 10**9).entries) < kept // 2
        print("end", file=reader.stdin, flush=True)
        assert line(reader) == "ended"
        put(store, "a", b"again", keep=EVERYTHING)
        assert store.trouble == ""


def test_readers_that_died_are_cleared(tmp_path: Path) -> None:
    script = """
import os, sys
from ipc.store import Store
store = Store.open(sys.argv[1])
store._env.begin()
print("reading", flush=True)
sys.stdin.read()
"""
    with opened(tmp_path, store_size=2 * MIB) as store:
        put(store, "a", b"x")
        with process(script, tmp_path) as child:
            assert line(child) == "reading"
            child.kill()
            child.wait()
            assert str(child.pid) in store._env.readers()
            store.maintain()
            assert str(child.pid) not in store._env.readers()


def test_a_store_that_grows_in_another_process_is_followed(tmp_path: Path) -> None:
    script = """
import sys
from ipc.store import Store, Entry, Retention
store = Store.open(sys.argv[1], store_size=32 << 20)
for _ in range(100):
    store.append([Entry("hub", "a", bytes(100_000), Retention(1000))])
print(store.top(), flush=True)
"""
    with opened(tmp_path, store_size=4 * MIB) as store:
        put(store, "a", b"x", keep=Retention(1000))
        with process(script, tmp_path) as child:
            assert line(child) == "101"
        assert store.top() == 101
        assert put(store, "a", b"y", keep=Retention(1000))[0].offset == 102
        assert len(store.recover("hub", "a", "", 0).entries) == 102
        assert store.stats().size == 32 * MIB


def test_the_size_is_remembered(tmp_path: Path) -> None:
    with opened(tmp_path, store_size=4 * MIB):
        pass
    with opened(tmp_path) as store:
        assert store.size == 4 * MIB
    with opened(tmp_path, store_size=6 * MIB) as store:
        assert store.size == 6 * MIB
    with opened(tmp_path, store_size=1) as store:
        assert store.size == MIB, "there is a least size"


def test_the_default_size_is_at_most_half_of_what_is_free(tmp_path: Path) -> None:
    status = os.statvfs(tmp_path)
    free = status.f_bavail * status.f_frsize
    assert default_store_size(str(tmp_path)) <= min(256 * MIB, max(MIB, free // 2 + MIB))


def test_an_environment_that_lmdb_gave_up_is_opened_anew(tmp_path: Path) -> None:
    with opened(tmp_path, store_size=2 * MIB) as store:
        put(store, "a", b"1")

        def panic(_: object) -> None:
            raise lmdb.PanicError("mdb_txn_commit", -30795)

        with pytest.raises(StoreError, match="failed"):
            store.transact(panic)
        assert store.trouble
        epoch = store.epoch
        assert put(store, "a", b"2")[0].offset == 2
        assert data_of(store.recover("hub", "a", epoch, 0).entries) == [b"1", b"2"]
        assert store.trouble == ""


def fill(store: Store) -> tuple[list[Position], StoreFull]:
    """Append until it is refused."""
    positions = []
    while True:
        try:
            positions += store.append([Entry("hub", "a", bytes(2000), EVERYTHING)])
        except StoreFull as error:
            return positions, error


def test_a_full_file_system_is_an_error_and_not_the_end(tmp_path: Path) -> None:
    other_process = """
import sys
from ipc.store import Store, StoreFull, Entry, Retention
store = Store.open(sys.argv[1])
print(len(store.recover("hub", "a", "", 0).entries), flush=True)
try:
    store.append([Entry("hub", "a", bytes(50_000), Retention(1000))])
except StoreFull as error:
    print("full", flush=True)
"""
    with small_file_system(tmp_path / "small", "4m") as directory:
        filler = directory / "filler"
        filler.write_bytes(bytes(MIB // 2))
        with opened(directory / "run", store_size=64 * MIB) as store:
            put(store, "last", b"1", keep=Retention(1))
            positions, error = fill(store)
            assert "file system" in str(error) and store.trouble == str(error)
            # Reading goes on, and nothing of what was acknowledged is missing.
            entries = store.recover("hub", "a", store.epoch, 1).entries
            assert [entry.offset for entry in entries] == [each.offset for each in positions]
            # Somebody else takes the very last byte; then another process comes.
            with filler.open("ab", buffering=0) as file, pytest.raises(OSError, match="space"):
                while True:
                    file.write(bytes(4096))
            with process(other_process, directory / "run") as child:
                assert line(child) == str(len(positions))
                assert line(child) == "full"
                assert child.wait() == 0
            with pytest.raises(StoreFull):
                put(store, "a", bytes(50_000), keep=EVERYTHING)
            store.maintain()
            filler.unlink()
            assert put(store, "a", b"room again", keep=EVERYTHING)[0].offset == len(positions) + 2
            assert store.trouble == ""


@pytest.mark.parametrize("how", ["expires", "is cleared", "is cleared and folded"])
def test_on_a_full_file_system_what_goes_makes_room_for_what_comes(tmp_path: Path, how: str) -> None:
    """Deleting needs room itself: some is always left, also where the store could not grow to its size."""
    clock = Clock()
    topics = [f"t/{number}" for number in range(20)]
    with small_file_system(tmp_path / "small", "4m") as directory:
        with opened(directory / "run", store_size=64 * MIB) as store:
            store.clock = clock
            stored = 0
            with pytest.raises(StoreFull, match="file system"):
                for number in range(10_000):
                    put(store, topics[number % 20], bytes(1500), keep=Retention(1000, 60.0))
                    stored += 1
            assert stored > 1000
            with (
                (directory / "filler").open("wb", buffering=0) as file,
                pytest.raises(OSError, match="space"),
            ):
                while True:
                    file.write(bytes(4096))
            if how == "expires":
                clock.now += 61
            else:

                def clear(writer: Writer, topic: str) -> int:
                    count = writer.clear("hub", topic)
                    writer.folded = writer.folded or "folded" in how
                    return count

                assert sum(store.transact(partial(clear, topic=topic)) for topic in topics) == stored
            for _ in range(2):
                for _ in range(1000):
                    store.maintain()
                clock.now += GRACE + 1
            for number in range(500):
                put(store, topics[number % 20], bytes(1500), keep=Retention(1000, 60.0))
            assert store.trouble == ""


def test_no_room_for_a_new_store_is_an_error_with_words(tmp_path: Path) -> None:
    with small_file_system(tmp_path / "small", "1m") as directory:
        with (directory / "filler").open("wb", buffering=0) as file, pytest.raises(OSError, match="space"):
            while True:
                file.write(bytes(4096))
        with pytest.raises(StoreError, match="cannot be opened"):
            Store.open(str(directory / "run"))
        (directory / "filler").unlink()
        with opened(directory / "run") as store:
            assert store.top() == 0


@pytest.mark.long
def test_the_defaults_of_a_container(tmp_path: Path) -> None:
    """64 MB of shared memory, filled with history by the default rules: half of it is the store's bound."""
    with small_file_system(tmp_path / "shm", "64m") as directory:
        with opened(directory / "run") as store:
            assert store.size <= 32 * MIB
            for number in range(100_000):
                put(store, f"t/{number % 50}", bytes(500), keep=EVERYTHING)
            assert store.stats().used <= 0.92 * store.size
            status = os.statvfs(directory)
            assert status.f_bavail * status.f_frsize > 30 * MIB


def test_housekeeping_without_room_is_quiet(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with opened(tmp_path, store_size=2 * MIB) as store, caplog.at_level(logging.INFO):
        put(store, "a", b"x")
        store._lock.acquire()
        try:
            assert store.maintain() is False
        finally:
            store._lock.release()
        assert caplog.records == []
    assert store_core.EVICT_ABOVE < 1


def test_what_has_left_its_window_takes_an_eighth_at_most(tmp_path: Path) -> None:
    clock = Clock()
    with opened(tmp_path, store_size=8 * MIB) as store:
        store.clock = clock
        put(store, "old", b"kept")
        for number in range(10_000):
            put(store, f"t/{number % 3}", bytes(1000), keep=Retention(1))
        there = len(store.read_since(0, 10**6, 10**9).entries)
        assert 800 < there < 1300
        assert store.stats().evicted == 0
        assert data_of(store.history("hub", "old", -1).entries) == [b"kept"]
        for _ in range(2):
            clock.now += GRACE
            store.maintain(10**6)
        assert len(store.read_since(0, 10**6, 10**9).entries) == 4
