"""Messages between processes through Redis pub/sub, in the wire format of fastapi-distributed-websocket.

What `WebSocketManager("channel", "redis://…")` uses instead of the bus: old and new processes can share a
channel while a service moves. A channel of Redis is a `broker_channel`; a message is one flat JSON object
with the keys `type`, `topic` and `conn_id`, and the data as its other keys.

Pub/sub keeps nothing: what is published while the connection is broken does not come. It is made again, and
every break is logged and counted.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any, NoReturn

import msgspec

from ipc.redis_link import LONGEST_DELAY, connections, is_stale, redacted, redis_errors, retry_delays
from workers.broker_interface import BrokerError, BrokerInterface, BrokerUnavailable
from workers.message import InvalidMessage, Message, validate_client_message

logger = logging.getLogger("workers")

MAX_WAITING = 1024
"""Messages that may wait for `get_message`; then reading pauses, and more wait in Redis."""


def encode_message(message: Mapping[str, Any] | Message) -> bytes:
    """A message as the bytes published to Redis: flat JSON, `type`, `topic` and `conn_id` always present.

    Raises:
        ValueError: it has no type.
        TypeError: JSON cannot say what it holds.
    """
    flat = message.__serialize__() if isinstance(message, Message) else dict(message)
    if not isinstance(flat.get("type"), str):
        raise ValueError(f"a message to publish needs a type, this has {flat.get('type')!r}")
    flat.setdefault("topic", None)
    flat.setdefault("conn_id", None)
    return msgspec.json.encode(flat)


def decode_message(payload: bytes) -> Message:
    """The message in what came from Redis, which anybody may have published.

    Raises:
        InvalidMessage: it is not JSON, or no message.
    """
    try:
        return validate_client_message(msgspec.json.decode(payload))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidMessage(f"not JSON: {error}") from error


class RedisBroker(BrokerInterface):
    """A broker over Redis pub/sub.

    It connects again by itself, with jittered delays of at most 5 s, and subscribes again. Foreign messages
    on a channel are counted and left out. Messages come at most once; those published while it was not
    connected are lost, which a log line tells.

    Attributes:
        ignored: How many payloads were no messages.
        breaks: How often the connection that listens was lost.
        reads: How often it was waited for Redis; grows with the messages, and slowly when there are none.

    Args:
        redis_url: `redis://`, `rediss://` (TLS) or `unix://`, with user, password and database as redis-py
            takes them.
        publish_timeout: Seconds that publishing and subscribing try to reach Redis before they raise.
        health_check_interval: Seconds without a message after which the connection is tested; it is given up
            when no answer comes for as long again.
        **options: Options of `redis.asyncio.Connection`, such as `password`, `client_name`, `ssl_ca_certs`.

    Raises:
        ValueError: `redis_url` has another scheme.
        ModuleNotFoundError: the package `redis` is not installed.
    """

    def __init__(
        self,
        redis_url: str,
        *,
        publish_timeout: float = 5.0,
        health_check_interval: float = 10.0,
        **options: Any,
    ) -> None:
        self.ignored = 0
        self.breaks = 0
        self.reads = 0
        self._address = redacted(redis_url)
        self._publish_timeout = publish_timeout
        self._interval = health_check_interval
        self._pool = connections(redis_url, options)
        self._inbox: asyncio.Queue[Message | None] | None = None
        self._subscribed: dict[str, asyncio.Event] = {}
        self._listener: asyncio.Task[None] | None = None
        self._listening: Any = None
        self._publishing: Any = None
        self._broken = False
        self._last_error: Exception | None = None

    @property
    def listening(self) -> bool:
        """Whether Redis has confirmed every subscription on the connection there is now."""
        return all(confirmed.is_set() for confirmed in self._subscribed.values())

    async def connect(self) -> None:
        """Get ready, and see that Redis answers.

        Raises:
            BrokerUnavailable: Redis could not be reached within `publish_timeout`, or refused the password.
        """
        if self._inbox is not None:
            return
        self._inbox = asyncio.Queue(MAX_WAITING)
        self._command_lock = asyncio.Lock()
        self._publish_lock = asyncio.Lock()
        try:
            async with self._deadline("it is not connected"):
                self._publishing = await self._connected()
        except BaseException:
            self._inbox = None
            raise

    async def disconnect(self) -> None:
        """Close the connections; a waiting `get_message` raises."""
        inbox, self._inbox = self._inbox, None
        if inbox is None:
            return
        await self._stop_listening()
        self._subscribed.clear()
        if self._publishing is not None:
            connection, self._publishing = self._publishing, None
            await connection.disconnect(nowait=True)
        while not inbox.empty():
            inbox.get_nowait()
        inbox.put_nowait(None)

    async def subscribe(self, channel: str) -> None:
        """Receive what is published on a channel; Redis has confirmed it on return.

        Raises:
            BrokerUnavailable: Redis did not confirm within `publish_timeout`; the channel is not subscribed.
        """
        self._require_connected()
        confirmed = self._subscribed.setdefault(channel, asyncio.Event())
        if self._listener is None:
            self._listener = asyncio.create_task(self._listen(), name="redis listener")
        try:
            async with self._deadline(f"channel {channel!r} is not subscribed"):
                await self._tell_redis("SUBSCRIBE", channel)
                await confirmed.wait()
        except BaseException:
            if not confirmed.is_set():
                await self._forget(channel)
            raise

    async def unsubscribe(self, channel: str) -> None:
        """Stop receiving from a channel."""
        self._require_connected()
        await self._forget(channel)

    async def publish(self, channel: str, message: Mapping[str, Any] | Message) -> None:
        """Publish a message; Redis has taken it on return. Concurrent calls are served in their order.

        Raises:
            BrokerUnavailable: Redis could not be reached within `publish_timeout`, or the connection broke
                before it answered: then the message may have been published, and is not sent twice.
        """
        self._require_connected()
        payload = encode_message(message)
        async with self._deadline("the message is not published"):
            await self._publish_lock.acquire()
        try:
            async with self._deadline("the message is not published"):
                connection = await self._publishing_connection()
            await self._send_publish(connection, channel, payload)
        finally:
            self._publish_lock.release()

    async def get_message(self, *, timeout: float | None = None, **_: Any) -> Message | None:
        """Wait for the next message of the subscribed channels.

        Args:
            timeout: Seconds to wait at most; None waits as long as it takes.

        Returns:
            The message, or None when none came in time.

        Raises:
            BrokerError: the broker is not connected, or was disconnected meanwhile.
        """
        inbox = self._require_connected()
        try:
            async with asyncio.timeout(timeout):
                message = await inbox.get()
        except TimeoutError:
            return None
        if message is None:
            inbox.put_nowait(None)  # for whoever else is waiting
            raise BrokerError("the broker was disconnected")
        return message

    # Listening

    async def _forget(self, channel: str) -> None:
        if self._subscribed.pop(channel, None) is None:
            return
        if self._subscribed:
            await self._tell_redis("UNSUBSCRIBE", channel)
        else:
            await self._stop_listening()

    async def _listen(self) -> NoReturn:
        """Read from Redis until cancelled, over as many connections as it takes; nothing else ends it."""
        delays = retry_delays()
        while True:
            started = time.monotonic()
            try:
                await self._listen_once()
            except Exception as error:
                if not isinstance(error, redis_errors()):
                    logger.exception("redis: listening failed in an unforeseen way")
                if any(event.is_set() for event in self._subscribed.values()):
                    self._note_break(error)
                if time.monotonic() - started > LONGEST_DELAY:
                    delays = retry_delays()
                self._last_error = error
            await asyncio.sleep(next(delays))

    def _note_break(self, error: Exception) -> None:
        self.breaks += 1
        self._broken = True
        for event in self._subscribed.values():
            event.clear()
        words = "messages published until it is back are missed"
        logger.warning("redis: lost the connection to %s (%s): %s", self._address, error, words)

    async def _listen_once(self) -> NoReturn:
        connection = self._pool.make_connection()
        try:
            await connection.connect()
            async with self._command_lock:
                self._listening = connection
                await connection.send_command("SUBSCRIBE", *self._subscribed, check_health=False)
            await self._read(connection)
        finally:
            self._listening = None
            await connection.disconnect(nowait=True)

    async def _read(self, connection: Any) -> NoReturn:
        """Take what comes; ask for a sign of life when nothing does."""
        asked = False
        while True:
            self.reads += 1
            reply = await connection.read_response(timeout=self._interval, disconnect_on_error=False)
            if reply is not None:
                asked = False
                await self._take(reply)
            elif asked:
                raise ConnectionError(f"no answer for {2 * self._interval:g} s")
            else:
                asked = True
                await connection.send_command("PING", check_health=False)

    async def _take(self, reply: list[Any]) -> None:
        kind, channel = reply[0], reply[1].decode(errors="replace")
        confirmed = self._subscribed.get(channel)
        if confirmed is None or self._inbox is None:
            return  # a pong, or a channel given up meanwhile
        if kind == b"subscribe":
            confirmed.set()
            self._last_error = None
            if self._broken:
                self._broken = False
                logger.info("redis: subscribed again at %s", self._address)
        elif kind == b"message":
            try:
                message = decode_message(reply[2])
            except InvalidMessage as error:
                self._ignore(channel, error)
            else:
                await self._inbox.put(message)

    def _ignore(self, channel: str, error: InvalidMessage) -> None:
        self.ignored += 1
        if self.ignored == 1:
            logger.warning("redis: ignored a foreign payload on %r, and will in silence: %s", channel, error)

    async def _tell_redis(self, command: str, channel: str) -> None:
        """Change the subscriptions of the connection that listens; without one, the next has them all."""
        async with self._command_lock:
            if self._listening is None or not self._listening.is_connected:
                return
            try:
                await self._listening.send_command(command, channel, check_health=False)
            except redis_errors():
                pass  # the listener sees it too, and makes another connection

    async def _stop_listening(self) -> None:
        listener, self._listener = self._listener, None
        if listener is not None:
            listener.cancel()
            await asyncio.gather(listener, return_exceptions=True)

    # Connecting

    async def _connected(self) -> Any:
        """A new connection; tries until it has one or its caller's deadline ends it."""
        from redis.exceptions import AuthenticationError

        delays = retry_delays()
        while True:
            connection = self._pool.make_connection()
            try:
                await connection.connect()
                self._last_error = None
                return connection
            except AuthenticationError as error:
                raise BrokerUnavailable(f"Redis at {self._address} refuses the login: {error}") from error
            except redis_errors() as error:
                self._last_error = error
            except BaseException:
                await connection.disconnect(nowait=True)
                raise
            await asyncio.sleep(next(delays))

    async def _publishing_connection(self) -> Any:
        if self._publishing is None or await is_stale(self._publishing):
            await self._drop_publishing()
            self._publishing = await self._connected()
        return self._publishing

    async def _send_publish(self, connection: Any, channel: str, payload: bytes) -> None:
        from redis.exceptions import ResponseError

        try:
            await connection.send_command("PUBLISH", channel, payload, check_health=False)
            await connection.read_response()
        except ResponseError as error:
            raise BrokerError(
                f"Redis at {self._address} refuses to publish on {channel!r}: {error}"
            ) from error
        except redis_errors() as error:
            await self._drop_publishing()
            words = "whether the message was published is not known"
            raise BrokerUnavailable(f"Redis at {self._address} did not answer ({error}): {words}") from error

    async def _drop_publishing(self) -> None:
        connection, self._publishing = self._publishing, None
        if connection is not None:
            await connection.disconnect(nowait=True)

    @contextlib.asynccontextmanager
    async def _deadline(self, consequence: str) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(self._publish_timeout):
                yield
        except TimeoutError as error:
            why = "" if self._last_error is None else f" ({self._last_error})"
            words = f"did not answer within {self._publish_timeout:g} s{why}: {consequence}"
            raise BrokerUnavailable(f"Redis at {self._address} {words}") from error

    def _require_connected(self) -> asyncio.Queue[Message | None]:
        if self._inbox is None:
            raise BrokerError("the broker is not connected: await its connect() first")
        return self._inbox
