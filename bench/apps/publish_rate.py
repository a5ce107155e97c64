"""Another program of the host: publish through ``ipc.Publisher`` and say what it cost.

python -m bench.apps.publish_rate RUNTIME_DIR MESSAGES SIZE sync|async
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Iterator
from typing import Any

from ipc import Publisher

TOPIC = "bench/0"


def messages(count: int, size: int) -> Iterator[dict[str, Any]]:
    """Messages with the load generator's stamp: publisher 0, sequence from 1, send time."""
    pad = "x" * max(0, size - 52)
    for seq in range(1, count + 1):
        yield {"m": f"{0:08x}-{seq:010x}-{time.monotonic_ns():016x}", "p": pad}


def publish(runtime_dir: str, count: int, size: int) -> None:
    """The synchronous form."""
    with Publisher(runtime_dir) as publisher:
        for message in messages(count, size):
            publisher.publish(TOPIC, message)


async def publish_async(runtime_dir: str, count: int, size: int) -> None:
    """The asynchronous form."""
    async with Publisher(runtime_dir) as publisher:
        for message in messages(count, size):
            await publisher.publish(TOPIC, message)


def main() -> None:
    """Publish and print one JSON line."""
    runtime_dir, count, size, form = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    started, cpu = time.perf_counter(), time.process_time()
    if form == "async":
        asyncio.run(publish_async(runtime_dir, count, size))
    else:
        publish(runtime_dir, count, size)
    seconds, used = time.perf_counter() - started, time.process_time() - cpu
    print(json.dumps({"messages": count, "seconds": seconds, "cpu_us_per_message": used / count * 1e6}))


if __name__ == "__main__":
    main()
