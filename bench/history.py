"""What history costs: appending alone and in batches, on top of nothing; and recovering from a long log.

``python -m bench.history`` prints the figures in microseconds of CPU; the targets are 12 alone, 5 in batches, and a
millisecond for a recovery of 100 messages out of a million.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import time
from collections.abc import Callable

from ipc.envelope import TOPIC, Envelope
from ipc.history import HostLog
from ipc.store import Entry, Retention, Store

DIRECTORY = "/dev/shm"
PAYLOAD = b'{"n":123456,"text":"' + b"x" * 80 + b'"}'
ROUNDS = 20_000


class Case:
    """A store of its own, gone afterwards."""

    def __init__(self, size: int = 1 << 30) -> None:
        self.directory = tempfile.mkdtemp(prefix="fw-bench-", dir=DIRECTORY)
        self.store = Store.open(self.directory, store_size=size)

    def __enter__(self) -> Store:
        return self.store

    def __exit__(self, *_: object) -> None:
        self.store.close()
        shutil.rmtree(self.directory)


def cpu(work: Callable[[], object], times: int) -> float:
    """Microseconds of CPU for each of so many calls."""
    began = time.process_time()
    for _ in range(times):
        work()
    return (time.process_time() - began) / times * 1e6


def append_alone() -> float:
    """One message a transaction."""
    keep = Retention(1000, 300)
    with Case() as store:
        entry = Entry("hub", "chat/1", PAYLOAD, keep)
        cpu(lambda: store.append([entry]), 2000)
        return cpu(lambda: store.append([entry]), ROUNDS)


def append_batched(batch: int = 10) -> float:
    """Ten messages a transaction, of ten topics."""
    keep = Retention(1000, 300)
    with Case() as store:
        entries = [Entry("hub", f"chat/{number}", PAYLOAD, keep) for number in range(batch)]
        cpu(lambda: store.append(entries), 200)
        return cpu(lambda: store.append(entries), ROUNDS // batch) / batch


async def publish(batch: int, turns: int) -> float:
    """The whole way within a process: queued, stored, delivered, acknowledged."""
    keep = Retention(1000, 300)
    with Case() as store:
        store.users += 1
        log = HostLog(store, lambda envelope: None)
        log.attach("hub", lambda envelopes: None)
        loop = asyncio.get_running_loop()
        began = time.process_time()
        for _ in range(turns):
            done = loop.create_future()
            left = [batch]

            def stored(result: object, left: list[int] = left, done: asyncio.Future[None] = done) -> None:
                left[0] -= 1
                if not left[0]:
                    done.set_result(None)

            for number in range(batch):
                log.publish(Envelope(TOPIC, "hub", f"chat/{number}", PAYLOAD), keep, stored)
            await done
        spent = time.process_time() - began
        log.close()
        return spent / (turns * batch) * 1e6


def recovery(messages: int) -> tuple[float, float]:
    """Milliseconds to recover 100 messages of a topic, and of a pattern, at the end of a long log."""
    keep = Retention(messages, 0)
    with Case(4 << 30) as store:
        for first in range(0, messages, 1000):
            store.append([Entry("hub", f"chat/{(first + n) % 50}", b'{"n":1}', keep) for n in range(1000)])
        top = store.top()
        best = [1e9, 1e9]
        for _ in range(20):
            for place, (wish, since) in enumerate((("chat/7", top - 5000), ("chat/#", top - 100))):
                began = time.perf_counter()
                found = store.recover("hub", wish, store.epoch, since)
                best[place] = min(best[place], (time.perf_counter() - began) * 1000)
                assert found.recovered and len(found.entries) == 100, len(found.entries)
        return best[0], best[1]


def main() -> None:
    """Print all figures."""
    print(f"append alone:            {append_alone():6.2f} us")
    print(f"append in tens:          {append_batched():6.2f} us")
    print(f"publish with history, 1: {asyncio.run(publish(1, ROUNDS)):6.2f} us")
    print(f"publish in tens:         {asyncio.run(publish(10, ROUNDS // 10)):6.2f} us")
    topic, pattern = recovery(1_000_000)
    print(f"recovery of 100 out of a million: {topic:.3f} ms by topic, {pattern:.3f} ms by pattern")


if __name__ == "__main__":
    main()
