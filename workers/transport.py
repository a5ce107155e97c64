"""How a manager's messages leave it: at once through a direct broker, or by a task through any other.

Between :class:`~workers.manager.WebSocketManager` and a broker. Both transports have the same face.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Generator, Sequence
from typing import Any, Final

from ipc.envelope import BROADCAST, DIRECT, Envelope
from ipc.peer import BusFull, InterestKind
from workers import jsontext
from workers.broker_interface import BrokerInterface, BrokerUnavailable
from workers.brokers import Deliver, DirectBroker, running_loop, to_envelope
from workers.message import Message

logger = logging.getLogger("workers")

#: Messages that may wait for a broker that is driven by a task.
MAX_OUTBOX: Final = 1000
#: Seconds before a broker whose ``get_message`` failed is asked again; doubles up to the second figure.
RETRY: Final = (0.1, 5.0)
#: Seconds to wait when ``get_message`` returns None at once, so that a polling broker does not burn a core.
IDLE: Final = 0.005


class Accepted:
    """What publishing returns: may be awaited (done when the bus has accepted the message) or ignored."""

    __slots__ = ("_wait",)

    def __init__(self, wait: Callable[[], Any] | None = None) -> None:
        self._wait = wait

    def __await__(self) -> Generator[Any, None, Any]:
        if self._wait is not None:
            yield from self._wait().__await__()


class Taking(Accepted):
    """A message on its way to a broker that is driven by a task.

    Awaiting raises what the broker raised when it refused the message, which then is lost.
    """

    __slots__ = ("_callbacks", "_done", "_failure", "wire")

    def __init__(self, wire: dict[str, Any]) -> None:
        super().__init__()
        self.wire = wire
        self._done = False
        self._failure: Exception | None = None
        self._callbacks: list[Callable[[Exception | None], object]] = []

    def finish(self, failure: Exception | None = None) -> None:
        """The broker has taken it, or has refused it."""
        self._done, self._failure = True, failure
        callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback(failure)

    def when_done(self, callback: Callable[[Exception | None], object]) -> None:
        """Call back with the broker's failure or None, from the loop, or at once if it is known."""
        if self._done:
            callback(self._failure)
        else:
            self._callbacks.append(callback)

    def __await__(self) -> Generator[Any, None, None]:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def told(failure: Exception | None) -> None:
            if future.done():
                return
            if failure is None:
                future.set_result(None)
            else:
                future.set_exception(failure)

        self.when_done(told)
        yield from future.__await__()


DONE: Final = Accepted()
LET_THE_LOOP_TURN: Final = Accepted(lambda: asyncio.sleep(0))


class DirectTransport:
    """Messages of one manager through a direct broker."""

    def __init__(self, broker: DirectBroker, channel: str) -> None:
        self.broker = broker
        self.channel = channel
        self._to_others = broker.to_others
        self._deliver: Deliver | None = None
        self._members: Sequence[object] = ()

    async def start(self, deliver: Deliver) -> None:
        """Connect; envelopes of the channel go to ``deliver`` from now on, our own too."""
        await self.broker.connect()
        self._deliver = deliver
        self._members = self.broker.join(self.channel, deliver, anywhere=True)

    async def stop(self) -> None:
        """The end of :meth:`start`."""
        if self._deliver is not None:
            self.broker.leave(self.channel, self._deliver)
            self._deliver = None
        await self.broker.disconnect()

    def publish(self, envelope: Envelope, local: bool) -> Accepted:
        """To everybody on the channel, or to this process alone."""
        if not local:
            return self.post(envelope)
        self.broker.hand_here(self.channel, (envelope,))
        return DONE

    def post(self, envelope: Envelope) -> Accepted:
        """To everybody on the channel: the way of nearly every message."""
        congested = self._to_others(envelope)
        deliver = self._deliver
        if deliver is not None and len(self._members) == 1:
            deliver((envelope,))
        else:
            self.broker.hand_here(self.channel, (envelope,))
        return Accepted(self.broker.accepted) if congested else DONE

    @property
    def congested(self) -> bool:
        """True while whoever publishes should pause."""
        return self.broker.congested

    def on_clear(self, callback: Callable[[], None]) -> None:
        """Call back once when no longer congested."""
        self.broker.on_clear(callback)

    async def accepted(self) -> None:
        """Wait until not congested."""
        await self.broker.accepted()

    def interest_add(self, kind: InterestKind, text: str) -> None:
        """This process wants such envelopes of the channel from now on."""
        self.broker.interest_add(kind, self.channel, text)

    def interest_discard(self, kind: InterestKind, text: str) -> None:
        """It no longer does, for one of those who did."""
        self.broker.interest_discard(kind, self.channel, text)


class BrokerTransport:
    """Messages of one manager through a broker that has only :class:`BrokerInterface` (Redis, or the user's).

    What is published comes back from the broker, to this process too: nobody gets it twice.
    """

    def __init__(self, broker: BrokerInterface, channel: str) -> None:
        self.broker = broker
        self.channel = channel
        self._deliver: Deliver | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._outbox: deque[Taking] = deque()
        self._more = asyncio.Event()
        self._room = asyncio.Event()
        self._callbacks: list[Callable[[], None]] = []
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self, deliver: Deliver) -> None:
        """Connect, subscribe, and start the two tasks that publish and listen."""
        self._more = asyncio.Event()
        self._room = asyncio.Event()
        await self.broker.connect()
        try:
            await self.broker.subscribe(self.channel)
        except BaseException:
            await self.broker.disconnect()
            raise
        self._deliver = deliver
        self._loop = asyncio.get_running_loop()
        self._tasks = [self._loop.create_task(self._pump()), self._loop.create_task(self._listen())]

    async def stop(self) -> None:
        """Publish what waits (for a second at most), end the tasks, disconnect."""
        if self._tasks and self._outbox:
            try:
                async with asyncio.timeout(1.0):
                    await self._outbox[-1]
            except TimeoutError:
                logger.warning("%d messages to the broker were not published at shutdown", len(self._outbox))
            except Exception as exc:
                logger.debug("the last message was not published: %r", exc)  # as the log has told already
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for left in self._outbox:
            left.finish(BrokerUnavailable("the manager was shut down before the broker took the message"))
        self._outbox.clear()
        self._took()
        self._deliver = None
        try:
            await self.broker.unsubscribe(self.channel)
        finally:
            await self.broker.disconnect()

    def publish(self, envelope: Envelope, local: bool) -> Accepted:
        """Queue for the broker; ``local`` delivers to this process without it.

        What it returns is done when the broker has taken the message. A refusal is logged, and raised when awaited.

        Raises:
            BusFull: so many messages wait that nobody awaited.
            ValueError: the data is no object, or has keys that this wire format has taken.
        """
        if local:
            if self._deliver is not None:
                self._deliver([envelope])
            return DONE
        if not self._tasks or self._loop is None:
            raise RuntimeError("this manager is not started; call await manager.startup() first")
        if len(self._outbox) >= 2 * MAX_OUTBOX:
            raise BusFull(f"{len(self._outbox)} messages wait for the broker; await what send() returns")
        taking = Taking(_to_wire(envelope))
        self._outbox.append(taking)
        if running_loop() is self._loop:
            self._more.set()
        else:
            self._loop.call_soon_threadsafe(self._more.set)
        return taking

    @property
    def congested(self) -> bool:
        """True while whoever publishes should pause."""
        return len(self._outbox) >= MAX_OUTBOX

    def on_clear(self, callback: Callable[[], None]) -> None:
        """Call back once when no longer congested."""
        if self.congested:
            self._callbacks.append(callback)
        else:
            callback()

    async def accepted(self) -> None:
        """Wait until there is room in front of the broker."""
        while self.congested:
            self._room.clear()
            await self._room.wait()

    def _took(self) -> None:
        self._room.set()
        if not self.congested:
            callbacks, self._callbacks = self._callbacks, []
            for callback in callbacks:
                callback()

    def interest_add(self, kind: InterestKind, text: str) -> None:
        """Such a broker brings everything."""

    def interest_discard(self, kind: InterestKind, text: str) -> None:
        """Such a broker brings everything."""

    async def _pump(self) -> None:
        while True:
            while self._outbox:
                taking, failure = self._outbox[0], None
                try:
                    await self.broker.publish(self.channel, taking.wire)
                except Exception as exc:
                    failure = exc
                    logger.warning(
                        "the broker did not take a message on channel %r; it is lost: %r", self.channel, exc
                    )
                self._outbox.popleft()
                self._took()
                taking.finish(failure)
            self._more.clear()
            await self._more.wait()

    async def _listen(self) -> None:
        loop = asyncio.get_running_loop()
        delay = RETRY[0]
        while True:
            asked = loop.time()
            try:
                message = await self.broker.get_message()
            except Exception as exc:
                # A listener that dies is a hub that looks healthy and delivers nothing.
                logger.warning("the broker's get_message failed on channel %r: %r", self.channel, exc)
                await asyncio.sleep(delay)
                delay = min(delay * 2, RETRY[1])
                continue
            delay = RETRY[0]
            if message is not None:
                self._deliver_one(message)
            if loop.time() - asked < IDLE:
                # One that never waits would leave the loop to nobody else, and an idle one would burn a core.
                await asyncio.sleep(IDLE if message is None else 0)

    def _deliver_one(self, message: Any) -> None:
        try:
            envelope = to_envelope(self.channel, message)
            if self._deliver is not None:
                self._deliver([envelope])
        except Exception as exc:
            # Foreign or old processes may say what we do not know (the original publishes "connect", say).
            logger.debug("left out a message of the broker on channel %r: %r", self.channel, exc)


class Unpublishable(ValueError):
    """Data that the wire format of a broker cannot carry."""


_WIRE_KEYS: Final = frozenset({"type", "topic", "conn_id"})


def _to_wire(envelope: Envelope) -> dict[str, Any]:
    data = jsontext.decode(envelope.data)
    if not isinstance(data, dict):
        raise Unpublishable(f"through this broker only objects can be published, not {type(data).__name__}")
    taken = sorted(data.keys() & _WIRE_KEYS)
    if taken:
        raise Unpublishable(
            f"through this broker data may not have the keys {', '.join(taken)}: its wire format has them"
        )
    if envelope.kind == BROADCAST:
        message = Message(type="broadcast", data=data)
    elif envelope.kind == DIRECT:
        ids = list(envelope.conn_ids)
        message = Message(type="send_by_conn_id", data=data, conn_id=ids[0] if len(ids) == 1 else ids)
    else:
        message = Message(type="send", data=data, topic=envelope.topic)
    return message.__serialize__()


Transport = DirectTransport | BrokerTransport


def transport_for(broker: BrokerInterface, channel: str) -> Transport:
    """The right transport for ``broker``."""
    return (
        DirectTransport(broker, channel)
        if isinstance(broker, DirectBroker)
        else BrokerTransport(broker, channel)
    )
