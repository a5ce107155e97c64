"""What several tests share: free ports, waiting for a condition, running a coroutine with a deadline."""

from __future__ import annotations

import asyncio
import os
import random
import socket
import tempfile
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar, overload

T = TypeVar("T")


def free_port() -> int:
    """A TCP port on 127.0.0.1 that nobody listens on now, and that no outgoing connection will be given.

    The kernel's own choice would be from its range for outgoing connections, where another test's client may take it
    before it is bound, or between a server's stop and its restart.
    """
    while True:
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", random.randint(10_240, 32_000)))
            except OSError:
                continue
            port: int = probe.getsockname()[1]
            return port


def scratch_directory() -> str:
    """A directory in shared memory, marked as this session's (see ``conftest.py``); whoever makes it removes it."""
    shared = "/dev/shm" if os.path.isdir("/dev/shm") else None
    return tempfile.mkdtemp(prefix=f"fw-test-{os.environ.get('FW_TEST_RUN', '')}-", dir=shared)


def until(predicate: Callable[[], T], timeout: float = 10.0, what: str = "the condition") -> T:
    """Poll ``predicate`` until it is true and return its value; fail loudly after ``timeout`` seconds."""
    deadline = time.monotonic() + timeout
    while True:
        value = predicate()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"{what} did not come true within {timeout} s")
        time.sleep(0.01)


@overload
async def until_async(
    predicate: Callable[[], Coroutine[Any, Any, T]], timeout: float = 10.0, what: str = "the condition"
) -> T: ...


@overload
async def until_async(
    predicate: Callable[[], T], timeout: float = 10.0, what: str = "the condition"
) -> T: ...


async def until_async(
    predicate: Callable[[], Any], timeout: float = 10.0, what: str = "the condition"
) -> Any:
    """As :func:`until`, without blocking the loop; the predicate may be a coroutine function."""
    deadline = time.monotonic() + timeout
    while True:
        value = predicate()
        if asyncio.iscoroutine(value):
            value = await value
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"{what} did not come true within {timeout} s")
        await asyncio.sleep(0.01)


def run(main: Coroutine[Any, Any, T], timeout: float = 50.0) -> T:
    """Run a coroutine to its end on a fresh loop, with a deadline."""

    async def bounded() -> T:
        async with asyncio.timeout(timeout):
            return await main

    return asyncio.run(bounded())
