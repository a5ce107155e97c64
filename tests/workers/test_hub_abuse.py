"""What clients of ``/ws`` should not send (S10, S11, S12): each gets an answer, and the connection stays."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import uvloop
from hypothesis import given, settings
from hypothesis import strategies as st
from websockets.exceptions import InvalidStatus

from tests.workers.server_fixture import (
    BINARY,
    TEXT,
    Complaints,
    Live,
    RawClient,
    runtime_dir,
    serving,
    uvrun,
)

Hub = tuple[asyncio.Runner, Live]


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    """One hub for all examples; nothing of them may be left in it, or in the log."""
    heard = Complaints()
    logging.getLogger().addHandler(heard)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        stack = contextlib.AsyncExitStack()
        live = runner.run(stack.enter_async_context(serving(max_subscriptions=5)))
        yield runner, live
        runner.run(stack.aclose())
    logging.getLogger().removeHandler(heard)
    assert heard.found == []


topics = st.sampled_from(
    ("a", "a/b", "a/#", "+", "#", "", "a//b", "$SYS/x", "a\0", "x" * 300, "/".join("a" * 50))
)
words = topics | st.sampled_from(
    ("send", "subscribe", "unsubscribe", "broadcast", "send_by_conn_id", "connect", "x")
)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | words
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3)
)
keys = st.sampled_from(("type", "topic", "conn_id", "data", "x")) | st.text(max_size=3)
kinds = st.sampled_from(("send", "subscribe", "unsubscribe", "broadcast", "send_by_conn_id", "connect"))
messages = (
    st.dictionaries(keys, values, max_size=4)
    | st.fixed_dictionaries({"type": kinds, "topic": topics, "conn_id": values}, optional={"x": values})
    | values
)
texts = messages.map(lambda value: json.dumps(value).encode()) | st.text(max_size=20).map(
    lambda text: text.encode(errors="ignore")
)


async def answers_until_ack(client: RawClient, number: int) -> None:
    """Whatever comes is an object of the protocol or data; nothing is malformed."""
    while True:
        answer = json.loads(await client.text())
        if isinstance(answer, dict) and answer.get("type") == "error":
            assert isinstance(answer["error"], str) and answer["code"] in (100, 103, 106, 107)
            assert "\n" not in answer["error"] and len(answer["error"]) < 1000
        if answer == {"type": "ack", "ack": number}:
            return


@given(sent=st.lists(texts, max_size=20))
@settings(max_examples=60)
def test_no_message_ends_a_connection(hub: Hub, sent: list[bytes]) -> None:
    runner, live = hub

    async def main() -> None:
        client = await live.raw("/ws/fuzz?topic=a/%2B")
        async with asyncio.timeout(5.0):
            for number, text in enumerate(sent):
                await client.send(TEXT, text)
                await client.send(TEXT, b'{"type":"connect","ack":%d}' % number)
                await answers_until_ack(client, number)
        await client.end()

    runner.run(main())


CASES: dict[str, tuple[bytes, int | None]] = {
    "deep": (b'{"type":"send","topic":"t","x":' + b"[" * 10_000 + b"]" * 10_000 + b"}", 107),
    "deep and wrong": (b"[" * 60_000, 107),
    "huge number": (b'{"type":"send","topic":"t","x":' + b"9" * 30_000 + b"}", None),
    "not a number": (b'{"type":"send","topic":"t","x":NaN}', 107),
    "infinity": (b'{"type":"send","topic":"t","x":Infinity}', 107),
    "control character": (b'{"type":"send","topic":"t","x":"\x01"}', 107),
    "lone surrogate in the topic": (b'{"type":"send","topic":"\\ud800"}', 107),
    "lone surrogate in the id": (b'{"type":"send_by_conn_id","conn_id":"\\ud800"}', 107),
    "wildcard topic": (b'{"type":"send","topic":"a/+"}', 107),
    "long topic": (json.dumps({"type": "send", "topic": "x" * 60_000}).encode(), 107),
    "long pattern": (json.dumps({"type": "subscribe", "topic": "/".join("+" * 1000)}).encode(), 107),
    "many levels": (json.dumps({"type": "subscribe", "topic": "/".join("a" * 10_000)}).encode(), 107),
    "nul": (b'{"type":"subscribe","topic":"a\\u0000"}', 107),
    "many ids": (json.dumps({"type": "send_by_conn_id", "conn_id": ["x"] * 12_000}).encode(), None),
    "a type that is a method": (b'{"type":"shutdown"}', 107),
    "a type that is private": (b'{"type":"__class__"}', 107),
    "two values": (b'{"type":"connect"}{"type":"connect"}', 107),
    "byte order mark": (b'\xef\xbb\xbf{"type":"connect"}', 107),
    "empty": (b"", 107),
    "spaces": (b' \n\t{"type":"connect"} \n', None),
    "duplicate keys": (b'{"type":"nonsense","type":"connect"}', None),
    "comment": (b'{"type":"connect"} // now', 107),
    "single quotes": (b"{'type':'connect'}", 107),
}


@pytest.mark.parametrize("what", CASES)
def test_a_case(hub: Hub, what: str) -> None:
    runner, live = hub
    text, code = CASES[what]

    async def main() -> None:
        client = await live.raw("/ws/case")
        await client.send(TEXT, text)
        await client.send(TEXT, b'{"type":"connect","ack":"end"}')
        async with asyncio.timeout(5.0):
            if code is not None:
                assert json.loads(await client.text())["code"] == code
            assert json.loads(await client.text()) == {"type": "ack", "ack": "end"}
        await client.end()

    runner.run(main())


def test_an_ack_is_any_value_as_it_was_written(hub: Hub) -> None:
    runner, live = hub

    async def main() -> None:
        client = await live.raw("/ws/acks")
        for ack in (
            b"null",
            b"1.10",
            b"1e400",
            b'{"a": [1 ,2]}',
            b'"\\u00e4"',
            b"123456789012345678901234567890",
        ):
            for message in (b'{"type":"connect","ack":%b}', b'{"ack":%b,"type":"send","topic":"nobody"}'):
                await client.send(TEXT, message % ack)
                assert (await client.text()).encode() == b'{"type":"ack","ack":%b}' % ack
            await client.send(TEXT, b'{"type":"send","ack":%b}' % ack)
            assert ack in (await client.text()).encode()
        await client.end()

    runner.run(main())


def test_ten_errors_in_a_row_and_no_fewer(hub: Hub) -> None:
    runner, live = hub

    async def main() -> None:
        client = await live.raw("/ws/errors")
        for _ in range(3):
            for _ in range(9):
                await client.send(TEXT, b"wrong")
                await client.text()
            await client.send(TEXT, b'{"type":"send","topic":"nobody"}')
        for _ in range(10):
            await client.send(TEXT, b"wrong")
        assert await client.close_code() == 3509
        await client.end()
        client = await live.raw("/ws/binary")
        await client.send(BINARY, b'{"type":"connect"}')
        assert await client.close_code() == 1003
        await client.end()

    runner.run(main())


def test_ids_that_clients_choose() -> None:
    async def main() -> None:
        async with serving() as live:
            for path, conn_id in (
                ("/ws/a%20b", "a b"),
                ("/ws/%F0%9F%98%80", "😀"),
                ("/ws/" + "x" * 255, "x" * 255),
                ("/ws/..%5C", "..\\"),
                ("/ws/%00", "\0"),
                ("/ws/%22%0d%0a", '"\r\n'),
            ):
                client = await live.client(path)
                await client.send(json.dumps({"type": "send_by_conn_id", "conn_id": conn_id, "n": 1}))
                assert await client.recv() == '{"n":1}', path
                await client.close()
            for path in ("/ws/" + "x" * 256, "/ws/%F0%9F%98%80" * 70, "/ws/a%2Fb", "/ws/", "/nowhere", "/"):
                with pytest.raises(InvalidStatus) as refused:
                    await live.client(path)
                assert refused.value.response.status_code in (400, 403, 404), path

    uvrun(main())


def test_subscriptions_are_limited_and_their_number_does_not_slow_others() -> None:
    async def main() -> None:
        async with serving(max_subscriptions=100) as live:
            clients: list[Any] = [await live.raw(f"/ws/c{n}") for n in range(20)]
            for number, client in enumerate(clients):
                for topic in range(99):
                    pattern = "/".join(["+"] * (topic % 20) + [str(number), "#"])
                    await client.send(TEXT, json.dumps({"type": "subscribe", "topic": pattern}).encode())
                await client.send(TEXT, b'{"type":"connect","ack":1}')
                assert await client.text() == '{"type":"ack","ack":1}'
            assert len(live.manager._index) <= 20 * 99
            await clients[0].send(TEXT, b'{"type":"subscribe","topic":"mine"}')
            async with asyncio.timeout(5.0):
                for n in range(500):
                    await clients[1].send(TEXT, b'{"type":"send","topic":"mine","n":%d}' % n)
                    assert json.loads(await clients[0].text()) == {"n": n}
            for client in clients:
                await client.end()

    uvrun(main())


@pytest.mark.parametrize("ack", [False, True])
def test_a_message_that_is_too_large_for_the_bus_is_refused_in_words(ack: bool) -> None:
    async def main(path: str) -> None:
        async with serving(broker=f"ipc://{path}", max_message_size=20 << 20) as live:
            client = await live.client("/ws?topic=t", max_size=None)
            await client.recv()
            asked = {"type": "send", "topic": "t", "text": "x" * (17 << 20)} | ({"ack": 1} if ack else {})
            await client.send(json.dumps(asked))
            answer = json.loads(await client.recv())
            assert (answer["type"], answer["code"], answer.get("ack")) == ("error", 107, 1 if ack else None)
            assert "too large" in answer["error"]
            await client.send('{"type":"send","topic":"t","n":1}')
            assert await client.recv() == '{"n":1}'
            await client.close()

    with runtime_dir() as path:
        uvrun(main(path))


@pytest.mark.parametrize("text", [b"", b"{", b'{"type":"send","topic":"a","x":"\\ud83d"}'])
def test_what_ends_too_early_is_told_in_words(text: bytes) -> None:
    async def main() -> None:
        async with serving() as live:
            client = await live.raw("/ws/x")
            await client.send(TEXT, text)
            answer = json.loads(await client.text())
            assert answer["code"] == 107 and "ends too early, or holds half of a surrogate" in answer["error"]
            await client.end()

    uvrun(main())
