"""The plain protocol over real sockets, across workers (contract section 3)."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest
import websockets
from websockets.asyncio.client import ClientConnection

from tests.hub import Hub, acked, read_json, say, silent


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with Hub(workers=2) as started:
        yield started


async def spread(hub: Hub, path: str, count: int = 8) -> list[ClientConnection]:
    """So many that both workers have some."""
    return await hub.connect_many([path] * count)


async def close_all(clients: list[ClientConnection]) -> None:
    await asyncio.gather(*[client.close() for client in clients])


def test_without_an_id_the_first_message_tells_it(hub: Hub) -> None:
    async def main() -> None:
        async with await hub.connect("/ws?topic=first/%2B") as client:
            first = await read_json(client)
            assert first["type"] == "set_conn_id" and first["conn_id"]
            await acked(client, type="connect")

    hub.run(main())


def test_with_an_id_nothing_is_sent_unasked(hub: Hub) -> None:
    async def main() -> None:
        async with await hub.connect("/ws/anna") as client:
            await acked(client, type="connect")
            assert await silent(client, 0.05)

    hub.run(main())


def test_send_reaches_all_workers_once_whatever_matches(hub: Hub) -> None:
    async def main() -> None:
        clients = await spread(hub, "/ws/x1?topic=t1/a&topic=t1/%23&topic=%2B/a")
        try:
            await say(clients[0], type="send", topic="t1/a", msg="hi", n=12345678901234567890)
            for client in clients:
                assert await read_json(client) == {"msg": "hi", "n": 12345678901234567890}
            await say(clients[0], type="send", topic="t1/a", msg="second")
            for client in clients:
                assert await read_json(client) == {"msg": "second"}
        finally:
            await close_all(clients)

    hub.run(main())


def test_values_are_passed_on_as_they_were_written(hub: Hub) -> None:
    async def main() -> None:
        async with await hub.connect("/ws/raw?topic=raw") as client:
            await client.send(
                '{"type":"send","topic":"raw","a":1.10,"b":1e400,"c":"\\ud83d\\ude00\\u0000","d":[ 1 ]}'
            )
            assert await client.recv() == '{"a":1.10,"b":1e400,"c":"\\ud83d\\ude00\\u0000","d":[ 1 ]}'

    hub.run(main())


def test_broadcast_and_direct(hub: Hub) -> None:
    async def main() -> None:
        bob = await spread(hub, "/ws/bob", 4)
        eve = await spread(hub, "/ws/eve", 4)
        try:
            await say(eve[0], type="broadcast", hello=1)
            for client in bob + eve:
                assert await read_json(client) == {"hello": 1}
            await say(eve[0], type="send_by_conn_id", conn_id="bob", to="bob")
            for client in bob:
                assert await read_json(client) == {"to": "bob"}
            await say(eve[0], type="send_by_conn_id", conn_id=["bob", "eve", "nobody"], to="both")
            for client in bob + eve:
                assert await read_json(client) == {"to": "both"}
        finally:
            await close_all(bob + eve)

    hub.run(main())


def test_unsubscribe(hub: Hub) -> None:
    async def main() -> None:
        async with await hub.connect("/ws/u?topic=u/1") as client:
            await acked(client, type="unsubscribe", topic="u/1")
            await acked(client, type="unsubscribe", topic="u/1")
            await acked(client, type="send", topic="u/1", x=1)
            assert await silent(client, 0.1)

    hub.run(main())


ERRORS: list[tuple[str, int]] = [
    ("nonsense", 107),
    ("[1,2]", 107),
    ("null", 107),
    ('"text"', 107),
    ("{}", 107),
    ('{"type":5}', 107),
    ('{"type":"nonsense"}', 107),
    ('{"type":"active_connections"}', 107),
    ('{"type":"send"}', 107),
    ('{"type":"send","topic":5}', 107),
    ('{"type":"send","topic":""}', 107),
    ('{"type":"send","topic":"a/+"}', 107),
    ('{"type":"send","topic":"a/#"}', 107),
    ('{"type":"send","topic":"a\\u0000"}', 107),
    ('{"type":"send","topic":"\\ud800"}', 107),
    ('{"type":"subscribe","topic":"a/#/b"}', 107),
    ('{"type":"subscribe","topic":"a+"}', 107),
    ('{"type":"subscribe","topic":"' + "x" * 256 + '"}', 107),
    ('{"type":"subscribe","topic":"' + "/".join("+" * 1000) + '"}', 107),
    ('{"type":"subscribe","topic":"' + "t" * 60000 + '"}', 107),
    ('{"type":"send_by_conn_id"}', 107),
    ('{"type":"send_by_conn_id","conn_id":[1]}', 107),
    ('{"type":"send_by_conn_id","conn_id":{}}', 107),
    ('{"a":' * 10000 + "1" + "}" * 10000, 107),
    ('{"type":"send","topic":"a","x":NaN}', 107),
    ('{"type":"send","topic":"a",}', 107),
]


def test_bad_input_is_answered_and_the_connection_stays(hub: Hub) -> None:
    async def main() -> None:
        async with await hub.connect("/ws/bad") as client:
            for text, code in ERRORS:
                await client.send(text)
                answer = await read_json(client)
                assert answer["type"] == "error" and answer["code"] == code, (text[:100], answer)
                assert isinstance(answer["error"], str) and answer["error"] and len(answer["error"]) < 500
                await acked(client, type="connect")

    hub.run(main())


def test_an_error_echoes_the_ack(hub: Hub) -> None:
    async def main() -> None:
        async with await hub.connect("/ws/ack") as client:
            await say(client, type="subscribe", topic="#/a", ack={"n": [1]})
            answer = await read_json(client)
            assert answer["type"] == "error" and answer["ack"] == {"n": [1]}
            for ack in (None, 0, "", False, [1]):
                assert (await acked(client, ack=ack, type="subscribe", topic="a")) == {
                    "type": "ack",
                    "ack": ack,
                }

    hub.run(main())


async def close_code(client: ClientConnection, timeout: float = 15.0) -> tuple[int, list[Any]]:
    """What arrives until the end, and the code of the end."""
    seen: list[Any] = []
    try:
        async with asyncio.timeout(timeout):
            while True:
                seen.append(json.loads(await client.recv()))
    except websockets.ConnectionClosed as exc:
        return (exc.rcvd.code if exc.rcvd else 1006), seen


def test_ten_errors_in_a_row_close(hub: Hub) -> None:
    async def main() -> None:
        async with await hub.connect("/ws/ten") as client:
            for _ in range(10):
                await client.send("nonsense")
            code, seen = await close_code(client)
            assert code == 3509 and len(seen) == 10

    hub.run(main())


def test_close_codes_for_size_binary_and_text_that_is_none(hub: Hub) -> None:
    async def main() -> None:
        async with await hub.connect("/ws/big") as client:
            await client.send('{"type":"connect","x":"' + "x" * 70000 + '"}')
            assert (await close_code(client))[0] == 1009
        async with await hub.connect("/ws/bin") as client:
            await client.send(b"\x00\x01")
            assert (await close_code(client))[0] == 1003
        async with await hub.connect("/ws/utf") as client:
            await client.send(b'{"type":"\xff"}', text=True)
            assert (await close_code(client))[0] == 1007

    hub.run(main())


def test_subscription_limit(hub: Hub) -> None:
    async def main() -> None:
        async with await hub.connect("/ws/many") as client:
            for number in range(128):
                await acked(client, type="subscribe", topic=f"many/{number}")
            await acked(client, type="subscribe", topic="many/5")
            await say(client, type="subscribe", topic="one/more")
            assert (await read_json(client))["code"] == 106
            await acked(client, type="unsubscribe", topic="many/5")
            await acked(client, type="subscribe", topic="one/more")

    hub.run(main())


def test_bad_topics_of_the_handshake_are_told(hub: Hub) -> None:
    async def main() -> None:
        async with await hub.connect("/ws?topic=a/%23/b&topic=good") as client:
            assert (await read_json(client))["type"] == "set_conn_id"
            assert (await read_json(client))["code"] == 107
            await say(client, type="send", topic="good", ok=1)
            assert await read_json(client) == {"ok": 1}

    hub.run(main())


def test_a_fragmented_message_is_one_message(hub: Hub) -> None:
    async def main() -> None:
        async with await hub.connect("/ws/frag?topic=frag") as client:
            await client.send(iter(['{"type":"send",', '"topic":"frag",', '"x":1}']))
            assert await read_json(client) == {"x": 1}

    hub.run(main())


def test_origin(hub: Hub) -> None:
    async def main() -> None:
        same = f"http://127.0.0.1:{hub.port}"
        async with await hub.connect("/ws/o", origin=same) as client:
            await acked(client, type="connect")
        for foreign in (
            "https://evil.example",
            "null",
            f"http://127.0.0.1:{hub.port + 1}",
            same + ".evil.example",
        ):
            with pytest.raises(websockets.InvalidStatus) as refused:
                await hub.connect("/ws/o", origin=foreign)
            assert refused.value.response.status_code == 403

    hub.run(main())


def test_health(hub: Hub) -> None:
    import httpx

    base = f"http://127.0.0.1:{hub.port}"
    with httpx.Client(trust_env=False) as client:
        assert client.get(f"{base}/healthz").status_code == 200
        ready = client.get(f"{base}/readyz")
        assert ready.status_code == 200 and ready.json()["ready"] is True
        assert client.get(f"{base}/nowhere").status_code == 404
