"""Coming back with a position, by Server-Sent Events and the plain protocol: nothing missed, nothing twice, or told."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from typing import Any

import pytest

from tests.hub import Hub, acked, read_json, say
from tests.support import until_async

RULES = """
[topics."chat/#"]
history_size = 100
[topics."short/#"]
history_size = 3
"""


class Events:
    """A stream of Server-Sent Events, read as a browser would."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, head: str) -> None:
        self.head = head
        self.last = ""
        self._reader, self._writer = reader, writer
        self._text = b""

    @classmethod
    async def open(cls, hub: Hub, query: str, last: str = "") -> Events:
        reader, writer = await asyncio.open_connection("127.0.0.1", hub.port)
        header = f"Last-Event-ID: {last}\r\n" if last else ""
        writer.write(f"GET /events?{query} HTTP/1.1\r\nHost: x\r\n{header}\r\n".encode())
        head = (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10)).decode()
        return cls(reader, writer, head)

    async def _chunk(self) -> bytes:
        size = int(await self._reader.readline(), 16)
        chunk = await self._reader.readexactly(size)
        await self._reader.readline()
        if not size:
            raise EOFError
        return chunk

    async def _block(self) -> dict[str, str]:
        while b"\n\n" not in self._text:
            self._text += await self._chunk()
        block, _, self._text = self._text.partition(b"\n\n")
        return dict(line.split(": ", 1) for line in block.decode().split("\n") if not line.startswith(":"))

    async def next(self, timeout: float = 10.0) -> tuple[str, Any]:
        """The next event that is dispatched: its name and data."""
        async with asyncio.timeout(timeout):
            while True:
                fields = await self._block()
                self.last = fields.get("id", self.last)
                if "data" in fields:
                    return fields.get("event", "message"), json.loads(fields["data"])

    async def started(self) -> None:
        """The first id has come."""
        async with asyncio.timeout(10):
            while not self.last:
                self.last = (await self._block()).get("id", "")

    async def close(self) -> None:
        self._writer.transport.abort()
        try:
            await self._writer.wait_closed()
        except OSError:
            pass


@pytest.fixture
def hub() -> Any:
    with Hub(workers=2, config=RULES) as running:
        yield running


def test_events_recover_from_any_worker(hub: Hub) -> None:
    async def main() -> None:
        writer = await hub.connect("/ws/w")
        stream = await Events.open(hub, "topic=chat/%2B/x&topic=chat/2")
        assert "200 OK" in stream.head and "text/event-stream" in stream.head
        await stream.started()
        await acked(writer, type="send", topic="chat/1/x", n=1)
        await acked(writer, type="send", topic="chat/other", n=-1)
        await acked(writer, type="send", topic="chat/2", n=2)
        assert [await stream.next() for _ in range(2)] == [("message", {"n": 1}), ("message", {"n": 2})]
        last = stream.last
        await stream.close()
        for number in range(3, 7):
            await acked(writer, type="send", topic="chat/2", n=number)
            await acked(writer, type="send", topic="chat/other", n=-1)
        for _ in range(6):
            again = await Events.open(hub, "topic=chat/%2B/x&topic=chat/2", last)
            assert [(await again.next())[1]["n"] for _ in range(4)] == [3, 4, 5, 6]
            await again.close()
        again = await Events.open(hub, f"topic=chat/2&last_event_id={last}&envelope=1")
        name, message = await again.next()
        epoch, offset = last.split(":")
        assert name == "message"
        assert message == {
            "type": "message",
            "topic": "chat/2",
            "offset": int(offset) + 1,
            "epoch": epoch,
            "data": {"n": 3},
        }
        await again.close()

    hub.run(main())


def test_events_say_when_something_was_lost(hub: Hub) -> None:
    async def main() -> None:
        writer = await hub.connect("/ws/w")
        stream = await Events.open(hub, "topic=short/1")
        await stream.started()
        last = stream.last
        await stream.close()
        for number in range(5):
            await acked(writer, type="send", topic="short/1", n=number)
        for position in (last, "otherepoch:1", "nonsense"):
            stream = await Events.open(hub, "topic=short/1", position)
            name, where = await stream.next()
            assert (name, where) == ("reset", {"offset": 5})
            await stream.close()
        stream = await Events.open(hub, "topic=plain")
        await acked(writer, type="send", topic="plain", n=1)
        assert await stream.next() == ("message", {"n": 1})
        assert stream.last == ""
        await stream.close()
        for query, status in (("", "400"), ("topic=a%23", "400")):
            stream = await Events.open(hub, query)
            assert f" {status} " in stream.head
            await stream.close()

    hub.run(main())


def test_a_drain_ends_event_streams_at_once(hub: Hub) -> None:
    async def main() -> None:
        streams = [await Events.open(hub, "topic=chat/1") for _ in range(6)]
        for stream in streams:
            await stream.started()
        loop = asyncio.get_running_loop()
        began = loop.time()
        assert (await asyncio.to_thread(hub.command, "reload")).returncode == 0
        for stream in streams:
            with pytest.raises((EOFError, asyncio.IncompleteReadError, ValueError, ConnectionError)):
                await stream.next()
            await stream.close()
        assert loop.time() - began < 12

    hub.run(main())


def test_envelopes_with_positions_and_recovery(hub: Hub) -> None:
    async def main() -> None:
        writer = await hub.connect("/ws/w")
        reader = await hub.connect("/ws/r?topic=chat/%23&topic=chat/1&topic=plain&envelope=1")
        await acked(writer, type="send", topic="chat/1", n=1)
        first = await read_json(reader)
        assert (first["type"], first["topic"], first["data"]) == ("message", "chat/1", {"n": 1})
        await acked(writer, type="send", topic="plain", n=2)
        assert await read_json(reader) == {"type": "message", "topic": "plain", "data": {"n": 2}}
        await acked(reader, type="subscribe", topic="late")
        await acked(writer, type="send", topic="late", n=3)
        assert (await read_json(reader))["data"] == {"n": 3}
        await reader.close()
        for number in range(4, 8):
            await acked(writer, type="send", topic=f"chat/{number}", n=number)
        since = f"{first['epoch']}:{first['offset']}"
        for _ in range(4):
            again = await hub.connect(f"/ws/r?topic=chat/%23&envelope=1&since={since}")
            assert [(await read_json(again))["data"]["n"] for _ in range(4)] == [4, 5, 6, 7]
            await again.close()
        lost = await hub.connect("/ws/r?topic=chat/%23&envelope=1&since=other:1")
        assert await read_json(lost) == {"type": "reset", "offset": 5, "epoch": first["epoch"]}
        bad = await hub.connect("/ws/r?topic=chat/%23&envelope=1&since=x")
        assert (await read_json(bad))["code"] == 107
        assert (await read_json(bad))["type"] == "reset"

    hub.run(main())


def test_nothing_is_missed_or_doubled_while_coming_back_again_and_again(hub: Hub) -> None:
    async def main() -> None:
        writer = await hub.connect("/ws/w")
        stop = asyncio.Event()
        sent = 0

        async def publish() -> None:
            nonlocal sent
            while not stop.is_set():
                await say(writer, type="send", topic=f"chat/{sent % 3}", n=sent)
                sent += 1
                await asyncio.sleep(0.002)

        reader = await hub.connect("/ws/r?topic=chat/%23&envelope=1")
        task = asyncio.create_task(publish())
        got: list[int] = []
        position = ""
        for _ in range(25):
            for _ in range(10):
                message = await read_json(reader)
                got.append(message["data"]["n"])
                position = f"{message['epoch']}:{message['offset']}"
            reader.transport.abort()
            reader = await hub.connect(f"/ws/r?topic=chat/%23&envelope=1&since={position}")
        stop.set()
        await task
        while len(got) < sent:
            got.append((await read_json(reader))["data"]["n"])
        assert got == list(range(sent))

    hub.run(main())


def test_what_a_killed_worker_had_stored_reaches_everybody(hub: Hub) -> None:
    async def main() -> None:
        readers = await hub.connect_many(["/ws/r?topic=chat/1&envelope=1"] * 8)
        pids = {hub.worker_of(reader) for reader in readers}
        victim = hub.worker_pids()[0]
        writer = await hub.connect_to(victim, "/ws/w")
        acknowledged: list[int] = []

        async def listen() -> None:
            async for text in writer:
                answer = json.loads(text)
                if answer["type"] == "ack":
                    acknowledged.append(answer["ack"])

        listening = asyncio.create_task(listen())
        for number in range(400):
            await say(writer, type="send", topic="chat/1", n=number, ack=number)
        await until_async(lambda: len(acknowledged) > 50)
        os.kill(victim, signal.SIGKILL)
        with pytest.raises(Exception):  # noqa: B017
            await listening
        survivors = [reader for reader in readers if hub.worker_of(reader) not in (victim, None)]
        assert survivors or pids == {victim}
        for reader in survivors:
            got = [(await read_json(reader))["data"]["n"] for _ in acknowledged]
            assert got == acknowledged[: len(got)] == list(range(len(got)))

    hub.run(main())
