"""A store on disk: it survives what it can survive, and says so by its epoch when it has not."""

from __future__ import annotations

import logging
from pathlib import Path

import lmdb
import msgspec
import pytest

from ipc import store_files
from ipc.store import Retention, StoreError
from ipc.store_records import STATE_KEY
from tests.ipc.store_support import data_of, line, opened, process, put
from tests.support import until

SIZE = 4 << 20


def test_it_outlives_kill_9(tmp_path: Path) -> None:
    script = """
import sys
from ipc.store import Entry, Retention, Store
store = Store.open(sys.argv[1], durable=True)
for number in range(100):
    store.append([Entry("hub", "a", b"%d" % number, Retention(1000))])
print(store.epoch, flush=True)
sys.stdin.read()
"""
    with process(script, tmp_path / "made" / "for it") as child:
        epoch = line(child)
        child.kill()
        child.wait()
    with opened(tmp_path / "made" / "for it", durable=True) as store:
        assert store.epoch == epoch
        recovery = store.recover("hub", "a", epoch, 40)
        assert data_of(recovery.entries) == [b"%d" % number for number in range(40, 100)]
        assert put(store, "a", b"next")[0].offset == 101


def test_it_is_written_through_once_a_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    syncs: list[int] = []
    sync = store_files.Files.sync

    def counted(self: store_files.Files) -> None:
        sync(self)
        syncs.append(1)

    monkeypatch.setattr(store_files.Files, "sync", counted)
    with opened(tmp_path, durable=True, store_size=SIZE) as store:
        until(lambda: len(syncs) == 1, what="the first sync")
        put(store, "a", b"1")
        until(lambda: len(syncs) == 2, what="the second sync")
        put(store, "a", b"2")
    assert len(syncs) == 3, "and at the end"


def test_a_disk_that_fails_is_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_: store_files.Files) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(store_files.Files, "sync", fail)
    with caplog.at_level(logging.INFO, "ipc"), opened(tmp_path, durable=True, store_size=SIZE) as store:
        put(store, "a", b"1")
    assert "could not be written through" in caplog.text


def test_a_reboot_keeps_the_epoch_of_a_store_that_was_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(tmp_path, durable=True, store_size=SIZE) as store:
        put(store, "a", b"1", b"2")
        epoch = store.epoch
    monkeypatch.setattr(store_files, "_boot_id", lambda: "another boot")
    with opened(tmp_path, durable=True) as store:
        assert store.epoch == epoch
        assert data_of(store.recover("hub", "a", epoch, 1).entries) == [b"2"]


def test_a_crash_of_the_machine_gives_what_is_left_a_new_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last transactions may be undone and their offsets given again: nobody may recover across that."""
    with opened(tmp_path, durable=True, store_size=SIZE) as store:
        put(store, "a", b"1", b"2")
        epoch = store.epoch
    with opened(tmp_path, durable=True, store_size=SIZE) as store:
        put(store, "a", b"3")
        monkeypatch.setattr(store, "_sign", lambda: None)
    monkeypatch.setattr(store_files, "_boot_id", lambda: "another boot")
    with opened(tmp_path, durable=True) as store:
        assert store.epoch != epoch
        assert not store.recover("hub", "a", epoch, 1).recovered
        assert data_of(store.history("hub", "a", -1).entries) == [b"1", b"2", b"3"], (
            "what is left may be read"
        )
        second = store.epoch
    with opened(tmp_path, durable=True) as store:
        assert store.epoch == second


def damage_garbage(store: Path) -> None:
    (store / "data.mdb").write_bytes(b"garbage" * 10_000)


def damage_short(store: Path) -> None:
    with (store / "data.mdb").open("r+b") as file:
        file.truncate(20_000)


def damage_foreign(store: Path) -> None:
    (store / "data.mdb").unlink()
    with lmdb.open(str(store)) as env, env.begin(write=True) as txn:
        txn.put(b"somebody", b"else's")


def damage_layout(store: Path) -> None:
    with lmdb.open(str(store)) as env, env.begin(write=True) as txn:
        state = msgspec.msgpack.decode(txn.get(STATE_KEY) or b"")
        txn.put(
            STATE_KEY, msgspec.msgpack.encode({"layout": 99, "of a": "later version", "size": state["size"]})
        )


def damage_state(store: Path) -> None:
    with lmdb.open(str(store)) as env, env.begin(write=True) as txn:
        txn.put(STATE_KEY, b"\xc1")


@pytest.mark.parametrize("durable", [False, True])
@pytest.mark.parametrize(
    "damage", [damage_garbage, damage_short, damage_foreign, damage_layout, damage_state]
)
def test_an_unreadable_store_is_moved_aside(
    tmp_path: Path, damage: object, durable: bool, caplog: pytest.LogCaptureFixture
) -> None:
    assert callable(damage)
    for _ in range(2):
        with opened(tmp_path, durable=durable, store_size=SIZE) as store:
            put(store, "a", *[bytes(500)] * 1000, keep=Retention(10_000))
            epoch = store.epoch
        damage(tmp_path / "store")
        caplog.clear()
        with (
            caplog.at_level(logging.INFO, "ipc"),
            opened(tmp_path, durable=durable, store_size=SIZE) as store,
        ):
            assert store.epoch != epoch
            assert store.top() == 0
            assert put(store, "a", b"1")[0].offset == 1
            assert not store.recover("hub", "a", epoch, 1).recovered
        (record,) = caplog.records
        assert "unreadable" in record.getMessage() and "store.unreadable" in record.getMessage()
        assert (tmp_path / "store.unreadable" / "data.mdb").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["store", "store.lock", "store.unreadable"]


def test_a_few_pages_that_were_never_written_are_no_damage(tmp_path: Path) -> None:
    with opened(tmp_path, store_size=SIZE) as store:
        put(store, "a", *[bytes(500)] * 100)
        epoch = store.epoch
    data = tmp_path / "store" / "data.mdb"
    size = data.stat().st_size
    with data.open("r+b") as file:
        file.truncate(size + 8192)
    with opened(tmp_path) as store:
        assert store.epoch == epoch
        assert len(store.recover("hub", "a", epoch, 0).entries) == 100


def test_damage_inside_is_an_error_and_not_the_end_of_the_process(tmp_path: Path) -> None:
    with opened(tmp_path, store_size=SIZE) as store:
        put(store, "a", b"1")
        nonsense = bytes(17) + b"\x02\x00\x02" + bytes(8) + b"\xff\xfe\xff\xfe"
        store.transact(lambda writer: writer.txn.put(b"z" + bytes(8), nonsense))
        with pytest.raises(StoreError, match="cannot be read"):
            store.get(0)
        with pytest.raises(StoreError, match="damaged"):
            store.transact(lambda writer: writer.evict(10**6, 10))
        assert "damaged" in store.trouble
