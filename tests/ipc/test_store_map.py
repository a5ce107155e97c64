"""A store in memory: its file is allocated before it is mapped, and grows while others read, write and are killed."""

from __future__ import annotations

import fcntl
import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import lmdb
import pytest

from ipc import store_map
from ipc.store import Entry, Retention, StoreBusy, StoredEntry, StoreError
from tests.ipc.store_support import line, opened, process, put

MIB = 1 << 20
EVERYTHING = Retention(10**6)


@pytest.fixture(name="memory")
def memory_of_its_own() -> Iterator[Path]:
    """A directory in a tmpfs."""
    with tempfile.TemporaryDirectory(prefix="fw-store-", dir="/dev/shm") as directory:
        yield Path(directory)


def data_file(directory: Path) -> Path:
    return directory / "store" / "data.mdb"


def assert_allocated(directory: Path) -> None:
    status = data_file(directory).stat()
    assert status.st_blocks * 512 >= status.st_size, "a hole in the map is a SIGBUS on a full file system"


def test_what_lies_in_memory() -> None:
    assert store_map.is_in_memory("/dev/shm")
    assert not store_map.is_in_memory("/proc")


def test_the_file_has_all_its_pages_and_grows_in_steps(memory: Path) -> None:
    with opened(memory, store_size=16 * MIB) as store:
        sizes = [data_file(memory).stat().st_size]
        assert sizes == [store_map.SMALLEST_STEP]
        for number in range(6_000):
            put(store, f"t/{number % 10}", bytes(1000), keep=EVERYTHING)
            size = data_file(memory).stat().st_size
            if size != sizes[-1]:
                sizes.append(size)
                assert_allocated(memory)
        assert 7 * MIB < sizes[-1] <= 16 * MIB
        assert len(sizes) > 10
        assert store.append([Entry("hub", "large", bytes(1_900_000), EVERYTHING)])[0].offset == 6_001
        assert_allocated(memory)
    with opened(memory) as store:
        assert data_file(memory).stat().st_size >= sizes[-1], "it is opened as large as it is"
        assert len(store.read_since(0, 10**6, 10**9).entries) == 6_001


def test_it_never_grows_beyond_its_bound(memory: Path) -> None:
    with opened(memory, store_size=3 * MIB) as store:
        for number in range(10_000):
            put(store, f"t/{number % 10}", bytes(1000), keep=EVERYTHING)
        assert data_file(memory).stat().st_size <= 3 * MIB
        assert_allocated(memory)


WRITER = """
import sys
from ipc.store import Store, StoreBusy, Entry, Retention
store = Store.open(sys.argv[1])
print("open", flush=True)
count = 0
while True:
    try:
        position, = store.append([Entry("hub", sys.argv[2], b"%d" % count + bytes(3000), Retention(10**6))])
    except StoreBusy:
        continue
    count += 1
    print(position.offset, flush=True)
"""

FOLLOWER = """
import sys
from ipc.store import Store, StoreBusy
store = Store.open(sys.argv[1])
print("open", flush=True)
seen = 0
while seen < 12_000:
    try:
        piece = store.read_since(seen)
    except StoreBusy:
        continue
    assert [entry.offset for entry in piece.entries] == list(range(seen + 1, piece.scanned + 1))
    seen = piece.scanned
print("seen", flush=True)
"""


def test_it_grows_while_others_read_and_write_and_are_killed(memory: Path) -> None:
    """Four follow, two write; the writers are killed ever again. Nothing acknowledged is lost, no reader dies."""
    with (
        opened(memory, store_size=128 * MIB) as store,
        process(FOLLOWER, memory) as first,
        process(FOLLOWER, memory) as second,
    ):
        followers = (first, second)
        assert [line(each) for each in followers] == ["open", "open"]
        number = 0
        while store.top() < 12_000:
            number += 1
            with (
                process(WRITER, memory, f"a/{number}") as one,
                process(WRITER, memory, f"b/{number}") as other,
            ):
                assert (line(one), line(other)) == ("open", "open")
                last = 0
                for _ in range(700):
                    last = max(last, int(line(one)), int(line(other)))
                one.kill()
                other.kill()
            assert store.top() >= last
            put(store, "ours", b"x")
        assert [line(each) for each in followers] == ["seen", "seen"]
        assert [each.wait() for each in followers] == [0, 0]
        assert_allocated(memory)
        entries: list[StoredEntry] = []
        while len(entries) < store.top():
            entries += store.read_since(len(entries), 5000, 10**9).entries
        assert [entry.offset for entry in entries] == list(range(1, store.top() + 1))


def test_who_is_being_followed_too_slowly_is_not_waited_for(memory: Path) -> None:
    """Another process has stopped while it made the file larger: busy, and then all is well again."""
    with opened(memory, store_size=8 * MIB) as store:
        put(store, "a", b"1", keep=EVERYTHING)
        with data_file(memory).open("rb") as other:
            fcntl.flock(other, fcntl.LOCK_EX)
            with pytest.raises(StoreBusy, match="larger"):
                store.append([Entry("hub", "a", bytes(500_000), EVERYTHING)])
        assert store.trouble == ""
        assert store.append([Entry("hub", "a", bytes(500_000), EVERYTHING)])[0].offset == 2


def test_without_address_space_it_is_opened_anew(memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(memory, store_size=8 * MIB) as store:
        put(store, "a", b"1", keep=EVERYTHING)

        def fail(*_: object) -> bool:
            raise lmdb.MemoryError("mdb_env_set_mapsize", -12)

        with monkeypatch.context() as patched:
            patched.setattr(store_map, "grow", fail)
            with pytest.raises(StoreError, match="failed"):
                store.append([Entry("hub", "a", bytes(500_000), EVERYTHING)])
        with pytest.raises(StoreError, match="not mapped"):
            store.top()
        assert put(store, "a", b"2", keep=EVERYTHING)[0].offset == 2
        assert store.top() == 2


def test_a_file_that_was_cut_off_is_put_aside(memory: Path) -> None:
    with opened(memory, store_size=8 * MIB) as store:
        for _ in range(1000):
            put(store, "a", bytes(3000), keep=EVERYTHING)
        epoch = store.epoch
    os.truncate(data_file(memory), 128 << 10)
    with opened(memory) as store:
        assert store.epoch != epoch
        assert store.top() == 0
        assert_allocated(memory)


FORKED = """
import os, signal, sys
from ipc.store import Entry, Retention, Store
store = Store.open(sys.argv[1], store_size=64 << 20)
if not os.fork():
    print("child", os.getpid(), flush=True)
    os.closerange(0, 3)
    signal.pause()
os.posix_fallocate = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)
while True:
    store.append([Entry("hub", "t", bytes(1000), Retention(1000))])
"""


def test_a_forked_child_does_not_keep_the_file_from_growing(memory: Path) -> None:
    """Its parent, killed while it made the file larger, held a lock that it shares."""
    child = 0
    try:
        with process(FORKED, memory) as parent:
            child = int(line(parent).split()[1])
            assert parent.wait(20) == -signal.SIGKILL
        with opened(memory, store_size=64 * MIB) as store:
            for _ in range(1000):
                put(store, "t", bytes(1000))
    finally:
        if child:
            os.kill(child, signal.SIGKILL)
