"""Connections to Redis: plain, and never mended behind the back of whoever uses them.

Beneath `workers/redis_broker.py` and the bridge; knows how connections are made, told apart and tried again,
and nothing of messages. The package `redis` is imported when the first connection is wanted, as it is optional.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

SCHEMES = ("redis", "rediss", "unix")
FIRST_DELAY, LONGEST_DELAY = 0.1, 5.0
"""Seconds before the first attempt to connect again, and at most."""


def connections(redis_url: str, options: Mapping[str, Any]) -> Any:
    """A pool that only makes connections: which is for what, and when to make one, is the caller's part.

    Raises:
        ValueError: the address has another scheme.
        ModuleNotFoundError: the package `redis` is not installed.
    """
    if urlsplit(redis_url).scheme not in SCHEMES:
        raise ValueError(f"{redacted(redis_url)} is no Redis address: redis://, rediss:// or unix://")
    try:
        from redis.asyncio import ConnectionPool
        from redis.asyncio.retry import Retry
        from redis.backoff import NoBackoff
    except ImportError as error:
        raise ModuleNotFoundError(
            "redis:// needs the package redis: pip install 'redis[hiredis]>=5.1'", name="redis"
        ) from error
    pool = ConnectionPool.from_url(
        redis_url, **{"socket_timeout": 5.0, "socket_connect_timeout": 5.0, **options}
    )
    # Ours even where the address says otherwise: bytes, no pushed extras, no hidden repetition of commands.
    pool.connection_kwargs.update(
        decode_responses=False, protocol=2, health_check_interval=0, retry=Retry(NoBackoff(), 0)
    )
    return pool


def redis_errors() -> tuple[type[Exception], ...]:
    """What says that Redis or the way to it is broken."""
    from redis.exceptions import RedisError

    return (RedisError, OSError)


async def is_stale(connection: Any) -> bool:
    """Whether a connection was closed, or holds an answer nobody took, while it was not used."""
    check = getattr(connection, "can_read", None) or connection.can_read_destructive  # before redis-py 8
    try:
        return bool(await check())
    except redis_errors():
        return True


def redacted(url: str) -> str:
    """An address without user, password and options, for logs and errors."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2] or parts.path}"


def retry_delays(first: float = FIRST_DELAY, longest: float = LONGEST_DELAY) -> Iterator[float]:
    """Seconds to wait between attempts, without end: doubled each time, jittered, never over `longest`."""
    delay = first
    while True:
        yield random.uniform(delay / 2, delay)
        delay = min(delay * 2, longest)
