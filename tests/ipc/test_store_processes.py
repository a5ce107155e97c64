"""The store between processes: one sequence, no waiting for a stopped one, nothing torn by a killed one."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest

from ipc.store import Store, StoreBusy, StoreError
from tests.ipc.store_support import AppendWord, both_places, data_of, line, opened, process, put  # noqa: F401
from tests.support import until

APPEND = """
import sys
from ipc.store import Entry, Retention, Store, StoreBusy
store = Store.open(sys.argv[1], store_size=64 << 20)
name, count, batch = sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
print("ready", flush=True)
sys.stdin.readline()
number = 0
while number < count:
    entries = [
        Entry("hub", f"{name}/{each % 3}", b"%d" % each, Retention(100_000)) for each in range(number, number + batch)
    ]
    try:
        positions = store.append(entries)
    except StoreBusy:
        continue
    number += batch
    print(positions[-1].offset, flush=True)
"""

STOP_INSIDE = """
import os, signal, sys
from ipc.store import Entry, Retention, Store
store = Store.open(sys.argv[1], store_size=64 << 20)

def work(writer):
    for number in range(50):
        writer.append(Entry("hub", "a", b"never", Retention(1000)))
    print("inside", flush=True)
    os.kill(os.getpid(), signal.SIGSTOP)
    while True:
        signal.pause()

store.transact(work)
"""


OPEN_LATE = """
import sys
from ipc.store import Store, StoreBusy
try:
    Store.open(sys.argv[1], wait=0.1)
except StoreBusy as error:
    print(error, flush=True)
"""


def check_log(store: Store) -> dict[str, list[bytes]]:
    """The log has no gap and no duplicate, its links hold, and recovery gives the same; the data by topic."""
    entries = store.read_since(0, 10**7, 10**10).entries
    assert [entry.offset for entry in entries] == list(range(1, store.top() + 1))
    last: dict[str, int] = {}
    found: dict[str, list[bytes]] = {}
    for entry in entries:
        assert entry.previous == last.get(entry.topic, 0)
        last[entry.topic] = entry.offset
        found.setdefault(entry.topic, []).append(entry.data)
    recovery = store.recover("hub", "#", store.epoch, 0)
    assert recovery.recovered and list(recovery.entries) == list(entries)
    for topic, data in found.items():
        assert data_of(store.recover("hub", topic, store.epoch, 0).entries) == data
    return found


def test_two_processes_make_one_sequence(tmp_path: Path) -> None:
    with process(APPEND, tmp_path, "x", 1500, 1) as one, process(APPEND, tmp_path, "y", 1500, 5) as two:
        children = (one, two)
        for child in children:
            assert line(child) == "ready"
        for child in children:
            assert child.stdin is not None
            child.stdin.write("go\n")
            child.stdin.flush()
        for child in children:
            child.communicate()
            assert child.returncode == 0
    with opened(tmp_path) as store:
        found = check_log(store)
        assert store.top() == 3000
        for name in ("x", "y"):
            for rest in range(3):
                assert found[f"{name}/{rest}"] == [b"%d" % number for number in range(rest, 1500, 3)]


def test_killed_at_random_what_was_acknowledged_is_there(tmp_path: Path) -> None:
    generator = random.Random(5)
    acknowledged = 0
    for _ in range(8):
        with process(APPEND, tmp_path, "x", 10**9, 3) as child:
            assert line(child) == "ready"
            assert child.stdin is not None
            child.stdin.write("go\n")
            child.stdin.flush()
            for _ in range(generator.randrange(1, 60)):
                acknowledged = int(line(child))
            child.kill()
            assert child.stdout is not None
            for rest in child.stdout.read().splitlines(keepends=True):
                if rest.endswith("\n"):
                    acknowledged = int(rest)
        with opened(tmp_path) as store:
            check_log(store)
            assert store.top() >= acknowledged
            assert store.top() % 3 == 0, "a transaction is whole or not at all"


def test_killed_inside_a_transaction_it_never_was(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        put(store, "a", b"before")
        with process(STOP_INSIDE, tmp_path) as child:
            assert line(child) == "inside"
            child.kill()
            child.wait()
        (position,) = put(store, "a", b"after")
        assert (position.offset, position.previous) == (2, 1)
        assert check_log(store) == {"a": [b"before", b"after"]}


def test_stopped_inside_a_transaction_it_holds_up_no_reader_and_no_loop(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        put(store, "a", b"before")
        with process(STOP_INSIDE, tmp_path) as child:
            assert line(child) == "inside"
            until(lambda: "T (stopped)" in Path(f"/proc/{child.pid}/status").read_text(), what="the stop")
            began = time.monotonic()
            for _ in range(100):
                with pytest.raises(StoreBusy):
                    put(store, "a", b"refused")
                assert data_of(store.recover("hub", "#", "", 0).entries) == [b"before"]
                store.maintain()
                assert store.stats().top == 1
            assert time.monotonic() - began < 1
            # A process that comes now waits for a bounded time and says why it does not start.
            with process(
                "import sys; from ipc.store import Store; Store.open(sys.argv[1], wait=0.1)", tmp_path
            ) as late:
                assert late.wait() == 1
            os.kill(child.pid, signal.SIGCONT)
            with pytest.raises(StoreBusy):
                put(store, "a", b"refused")
            child.kill()
            child.wait()
        assert put(store, "a", b"after")[0].offset == 2


def test_begin_and_end_of_an_append_are_told(tmp_path: Path) -> None:
    word = AppendWord()
    with opened(tmp_path) as store:
        store.since = (word, 0)
        put(store, "a", b"1")
        with pytest.raises(ZeroDivisionError):
            store.transact(lambda _: 1 // 0)
        store._lock.acquire()
        with pytest.raises(StoreBusy):
            put(store, "a", b"2")
        store._lock.release()
        assert word.told == ["begin", "end"] * 3


def test_a_store_is_opened_once_per_process(tmp_path: Path) -> None:
    with opened(tmp_path) as first, opened(f"{tmp_path}/../{tmp_path.name}") as second:
        assert first is second
        first.close()
        put(second, "a", b"1")
        first.users += 1
    with opened(tmp_path) as store:
        assert store is not first
        assert store.epoch == first.epoch
        assert data_of(store.history("hub", "a", -1).entries) == [b"1"]


def test_a_directory_may_be_given_by_its_descriptor(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 100) / ("e" * 100)
    deep.mkdir(parents=True)
    fd = os.open(deep, os.O_RDONLY)
    try:
        with opened(f"/proc/self/fd/{fd}") as store:
            put(store, "a", b"1")
    finally:
        os.close(fd)
    assert (deep / "store" / "data.mdb").exists()
    assert (deep / "store" / "data.mdb").stat().st_mode & 0o777 == 0o600
    assert (deep / "store").stat().st_mode & 0o777 == 0o700


def test_a_forked_child_may_not_use_its_parents_store(tmp_path: Path) -> None:
    script = """
import os, sys
from ipc.store import Entry, Retention, Store, StoreError
entry = Entry("hub", "a", b"x", Retention(5))
store = Store.open(sys.argv[1])
store.append([entry])
child = os.fork()
if child == 0:
    try:
        store.append([entry])
    except StoreError as error:
        assert "fork" in str(error)
        store.close()
    try:
        Store.open(sys.argv[1])
    except StoreError as error:
        assert "already open" in str(error)
        os._exit(7)
    os._exit(1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
assert [position.offset for position in store.append([entry])] == [2]
store.close()
print("done", flush=True)
"""
    with process(script, tmp_path) as child:
        assert line(child) == "done"
        assert child.wait() == 0


def test_files_that_were_removed_are_noticed(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        assert store.is_current()
        (tmp_path / "store").rename(tmp_path / "gone")
        assert not store.is_current()
        epoch = store.epoch
    with opened(tmp_path) as store:
        assert store.is_current()
        assert store.epoch != epoch
        assert not store.recover("hub", "a", epoch, 0).recovered


def test_a_directory_that_cannot_be_used_is_an_error_with_words(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be opened"):
        Store.open(str(tmp_path / "file"))
