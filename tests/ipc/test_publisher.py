"""The publisher: both forms, from outside and from inside a process of the hub, and every way it can fail."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest

import ipc
from ipc.board import Counter, PeerKind
from ipc.envelope import BROADCAST, DIRECT, MAX_ENVELOPE, TOPIC, Envelope
from ipc.interest import InterestKind
from ipc.peer import Peer
from ipc.publisher import AsyncPublisher, BusTimeout, HubNotFound, Publisher
from ipc.runtime import RuntimeDir
from ipc.topics import InvalidTopic
from tests.ipc.actors import Inbox, actors, open_peer, peers, read_sums
from tests.support import run, until, until_async


def hub(path: Path) -> Any:
    """A process of a hub with nobody interested in anything yet."""
    return actors(path, 1)


# -- the asynchronous form, which can share a loop with the hub --------------------------------------------------------


def test_all_three_ways_to_publish(tmp_path: Path) -> None:
    async def main() -> None:
        async with peers(tmp_path / "hub", 2) as (a, b), Publisher(tmp_path / "hub") as publisher:
            assert isinstance(publisher, AsyncPublisher)
            inbox, other = Inbox(a), Inbox(b)
            a.interest_add(InterestKind.EXACT, "hub", "room/1")
            a.interest_add(InterestKind.CONN, "hub", "me")
            a.interest_add(InterestKind.CHANNEL, "hub", "")
            await publisher.publish("room/1", {"x": 1})
            assert inbox.envelopes == [Envelope(TOPIC, "hub", "room/1", b'{"x":1}')], "there when it returns"
            await publisher.send("me", [1, "é"])
            await publisher.send(["me", "you"], None)
            await publisher.broadcast({})
            await publisher.publish("nobody/wants/this", {})
            assert inbox.envelopes[1:] == [
                Envelope(DIRECT, "hub", "", '[1,"é"]'.encode(), ("me",)),
                Envelope(DIRECT, "hub", "", b"null", ("me", "you")),
                Envelope(BROADCAST, "hub", "", b"{}"),
            ]
            assert other.envelopes == []

    run(main())


def test_many_publishes_at_once_are_pipelined_in_order(tmp_path: Path) -> None:
    async def main() -> None:
        async with peers(tmp_path / "hub", 2) as members, Publisher(tmp_path / "hub") as publisher:
            inboxes = [Inbox(peer) for peer in members]
            for peer in members:
                peer.interest_add(InterestKind.PREFIX, "hub", "")
            started = time.monotonic()
            await asyncio.gather(*(publisher.publish(f"t/{number}", number) for number in range(5000)))
            assert time.monotonic() - started < 10
            for inbox in inboxes:
                assert [int(data) for data in inbox.data] == list(range(5000))
            assert len(inboxes[0].runs) < 500, "they travelled together"

    run(main())


def test_another_channel_is_another_hub(tmp_path: Path) -> None:
    async def main() -> None:
        async with peers(tmp_path / "hub", 1) as (a,), Publisher(tmp_path / "hub", "mine") as publisher:
            hub, mine = Inbox(a, "hub"), Inbox(a, "mine")
            for channel in ("hub", "mine"):
                a.interest_add(InterestKind.EXACT, channel, "t")
            await publisher.publish("t", 1)
            assert (hub.data, mine.data) == ([], [b"1"])

    run(main())


def test_a_process_that_stands_still_is_a_time_out_and_the_others_have_it(tmp_path: Path) -> None:
    async def main() -> None:
        path = tmp_path / "hub"
        with hub(path) as (stopped,):
            stopped.want("t")
            async with peers(path, 1) as (a,), Publisher(path) as publisher:
                inbox = Inbox(a)
                a.interest_add(InterestKind.EXACT, "hub", "t")
                await publisher.publish("t", "before")
                stopped.signal(signal.SIGSTOP)
                with pytest.raises(BusTimeout, match=rf"slots {stopped.slot}\) within 0.3 s"):
                    await publisher.publish("t", "during", timeout=0.3)
                assert inbox.data == [b'"before"', b'"during"']
                waiting = asyncio.ensure_future(publisher.publish("t", "more"))
                await asyncio.sleep(0.01)
                assert not waiting.done()
                stopped.kill()
                await waiting  # who is dead is not waited for

    run(main())


def test_a_hub_that_restarts_is_found_again(tmp_path: Path) -> None:
    async def main() -> None:
        path = tmp_path / "hub"
        async with peers(path, 1) as (a,):
            publisher = await Publisher(path).__aenter__()
            a.interest_add(InterestKind.EXACT, "hub", "t")
            await publisher.publish("t", 1)
        with pytest.raises(HubNotFound, match="nobody in it is alive"):
            await publisher.publish("t", 2)
        async with peers(path, 1) as (b,):
            inbox = Inbox(b)
            b.interest_add(InterestKind.EXACT, "hub", "t")
            await publisher.publish("t", 3)
            assert inbox.data == [b"3"]
        await publisher.close()
        with pytest.raises(RuntimeError, match="closed"):
            await publisher.publish("t", 4)

    run(main())


def test_it_waits_for_a_worker_while_the_supervisor_lives(tmp_path: Path) -> None:
    async def main() -> None:
        path = tmp_path / "hub"
        with RuntimeDir.supervise(str(path)) as runtime:
            with pytest.raises(HubNotFound, match="its supervisor runs"):
                await Publisher(path, timeout=0.1).__aenter__()
            opening = asyncio.ensure_future(Publisher(path).__aenter__())
            await asyncio.sleep(0.05)
            assert not opening.done()
            worker = await open_peer(path, kind=PeerKind.WORKER)
            publisher = await opening
            assert len(runtime.living()) == 2
            await publisher.close()
            await worker.close()

    run(main())


def test_a_cancelled_publish_harms_no_other(tmp_path: Path) -> None:
    async def main() -> None:
        async with peers(tmp_path / "hub", 1) as (a,), Publisher(tmp_path / "hub") as publisher:
            inbox = Inbox(a)
            a.interest_add(InterestKind.EXACT, "hub", "t")
            tasks = [asyncio.ensure_future(publisher.publish("t", number)) for number in range(10)]
            await asyncio.sleep(0)
            tasks[3].cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
            assert [type(result) for result in results].count(asyncio.CancelledError) == 1
            assert len(inbox.data) in (9, 10)

    run(main())


def test_called_through_the_object_that_was_opened_it_can_be_awaited_too(tmp_path: Path) -> None:
    async def main() -> None:
        async with peers(tmp_path / "hub", 1) as (a,):
            publisher: Any = Publisher(tmp_path / "hub")
            inbox = Inbox(a)
            a.interest_add(InterestKind.EXACT, "hub", "t")
            async with publisher:
                await publisher.publish("t", 1)
                with pytest.raises(RuntimeError, match="open already"):
                    await publisher.__aenter__()
            assert inbox.data == [b"1"]

    run(main())


# -- the blocking form -------------------------------------------------------------------------------------------------


def test_it_returns_when_it_has_been_processed(tmp_path: Path) -> None:
    with hub(tmp_path / "hub") as (worker,):
        worker.want("t")
        with Publisher(tmp_path / "hub") as publisher:
            for number in range(50):
                publisher.publish("t", number)
        totals = read_sums(tmp_path / "hub")
        assert totals[Counter.BUS_SENT] == totals[Counter.BUS_RECEIVED] == 50
        assert totals[Counter.BUS_DROPPED] == 0


def test_many_threads_may_share_it(tmp_path: Path) -> None:
    with hub(tmp_path / "hub") as (worker,), Publisher(tmp_path / "hub") as publisher:
        worker.want("t")

        def work() -> None:
            for number in range(20):
                publisher.publish("t", number)

        threads = [threading.Thread(target=work) for _ in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert read_sums(tmp_path / "hub")[Counter.BUS_RECEIVED] == 100


def test_it_needs_no_with_and_can_be_closed_and_used_again(tmp_path: Path) -> None:
    with hub(tmp_path / "hub") as (worker,):
        worker.want("t")
        publisher = Publisher(tmp_path / "hub")
        for _ in range(3):
            publisher.publish("t", 1)
            publisher.close()
            publisher.close()
        assert read_sums(tmp_path / "hub")[Counter.BUS_RECEIVED] == 3


def test_a_blocking_call_on_the_hubs_own_loop_says_what_is_wrong(tmp_path: Path) -> None:
    async def main() -> None:
        async with peers(tmp_path / "hub", 1) as (a,):
            a.interest_add(InterestKind.EXACT, "hub", "t")
            with (
                Publisher(tmp_path / "hub") as publisher,
                pytest.raises(BusTimeout, match="use `async with`"),
            ):
                publisher.publish("t", 1, timeout=0.1)

    run(main())


def test_a_killed_worker_is_not_waited_for_even_if_nobody_else_is_left_to_notice(tmp_path: Path) -> None:
    path = tmp_path / "hub"
    with hub(path) as (worker,), Publisher(path) as publisher:
        worker.want("t")
        worker.signal(signal.SIGSTOP)
        timer = threading.Timer(0.2, worker.process.kill)
        timer.start()
        publisher.publish("t", 1)
        timer.join()
        with pytest.raises(HubNotFound):
            publisher.publish("t", 2)


def test_the_hub_of_a_killed_machine_is_not_taken_for_its_successor(tmp_path: Path) -> None:
    """Everybody dies but the publisher, which sleeps; a new hub takes the directory and the same slot."""
    path = tmp_path / "hub"
    publisher = Publisher(path)
    with hub(path) as (first,):
        first.want("t")
        publisher.publish("t", 1)
    with hub(path) as (second,):
        assert second.slot == first.slot
        second.want("t")
        publisher.publish("t", 2)
        assert read_sums(path)[Counter.BUS_RECEIVED] == 1
    publisher.close()


def test_it_is_fit_for_a_fork(tmp_path: Path) -> None:
    """As in a Celery worker: opened before the fork, used after it, in both."""
    code = """
import os, sys
from ipc import Publisher
with Publisher(sys.argv[1]) as publisher:
    publisher.publish("t", "parent")
    pid = os.fork()
    if pid == 0:
        for number in range(3):
            publisher.publish("t", "child")
        publisher.close()
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    publisher.publish("t", "parent")
"""
    with hub(tmp_path / "hub") as (worker,):
        worker.want("t")
        subprocess.run([sys.executable, "-c", code, str(tmp_path / "hub")], timeout=30, check=True)
        totals = read_sums(tmp_path / "hub")
        assert totals[Counter.BUS_RECEIVED] == 5
        assert totals[Counter.BUS_GAPS] == totals[Counter.BUS_INVALID] == 0


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_no_hub_is_said_in_words(tmp_path: Path) -> None:
    with pytest.raises(HubNotFound, match="no such runtime directory"):
        Publisher(tmp_path / "hub").publish("t", 1)
    assert not (tmp_path / "hub").exists()
    (tmp_path / "empty").mkdir(0o700)
    with pytest.raises(HubNotFound, match="no hub runs in"):
        Publisher(tmp_path / "empty").open()
    assert list((tmp_path / "empty").iterdir()) == []
    RuntimeDir.supervise(str(tmp_path / "dead")).close()
    with pytest.raises(HubNotFound, match="nobody in it is alive"), Publisher(tmp_path / "dead"):
        pass


def test_what_cannot_be_published_is_refused(tmp_path: Path) -> None:
    with hub(tmp_path / "hub"), Publisher(tmp_path / "hub") as publisher:
        for topic in ("a/+", "#", "", "x" * 256, "a/" * 40, "nul\0"):
            with pytest.raises(InvalidTopic):
                publisher.publish(topic, {})
        with pytest.raises(TypeError):
            publisher.publish("t", object())
        with pytest.raises(ValueError, match="too large"):
            publisher.broadcast("x" * MAX_ENVELOPE)
        publisher.send([], {"to": "nobody"})
        publisher.publish("t", msgspec.Raw(b'{"already":"encoded"}'))


def test_a_full_process_does_not_fill_the_publishers_memory(tmp_path: Path) -> None:
    with hub(tmp_path / "hub") as (stopped,), Publisher(tmp_path / "hub") as publisher:
        stopped.want("t")
        publisher.publish("t", 1)
        stopped.signal(signal.SIGSTOP)
        for _ in range(12):
            with pytest.raises(BusTimeout):
                publisher.publish("t", "x" * (4 << 20), timeout=0.02)
        sender: Any = publisher._sender
        assert sender._outbound.fullest <= 24 << 20
        stopped.signal(signal.SIGCONT)
        until(lambda: _idle(sender))
        publisher.publish("t", 2)


def _idle(sender: Any) -> bool:
    sender.poll(time.monotonic())
    return all(link.idle for link in sender._outbound.links.values())


def test_it_finds_its_directory_by_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FLOCKWIRE_RUNTIME_DIR", str(tmp_path / "named"))
    assert Publisher().runtime_dir == str(tmp_path / "named")
    monkeypatch.delenv("FLOCKWIRE_RUNTIME_DIR")
    assert Publisher().runtime_dir.endswith(f"flockwire-{os.geteuid()}/default")


def test_the_package_offers_it_lazily() -> None:
    assert ipc.Publisher is Publisher
    assert ipc.BusTimeout is BusTimeout
    assert "matches" in dir(ipc)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = ipc.nonsense


def test_no_slot_descriptor_or_file_is_left(tmp_path: Path) -> None:
    path = tmp_path / "hub"

    async def both() -> None:
        async with peers(path, 1) as (a,):
            a.interest_add(InterestKind.EXACT, "hub", "t")
            async with Publisher(path) as publisher:
                await publisher.publish("t", 1)
            with Publisher(path) as blocking:
                blocking.publish("unwanted", 1)
            assert a.runtime.living() == [a.slot]

    def descriptors() -> int:
        run(both())
        gc.collect()
        return len(os.listdir("/proc/self/fd"))

    first = descriptors()
    assert max(descriptors() for _ in range(4)) <= first
    assert sorted(os.listdir(path)) == ["board", "lock"]


def test_a_process_of_the_hub_can_publish_to_itself(tmp_path: Path) -> None:
    """A web application that is a peer and uses a publisher as well."""

    async def main() -> None:
        path = str(tmp_path / "hub")
        peer = await Peer.open(path, kind=PeerKind.APPLICATION)
        inbox = Inbox(peer)
        peer.interest_add(InterestKind.EXACT, "hub", "t")
        async with Publisher(path) as publisher:
            await publisher.publish("t", {"n": 1})
        assert [json.loads(data) for data in inbox.data] == [{"n": 1}]
        threaded = Publisher(path)
        await asyncio.to_thread(threaded.publish, "t", {"n": 2})
        await asyncio.to_thread(threaded.close)
        await until_async(lambda: len(inbox.data) == 2)
        await peer.close()

    run(main())
