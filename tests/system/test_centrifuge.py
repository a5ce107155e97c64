"""The Centrifuge protocol by hand: slow readers, lost logs, limits, and what plain clients and it have in common."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus

from tests.hub import Hub, acked, read_json, say

RULES = """
[topics."chat/#"]
history_size = 1000
"""
PATH = "/connection/websocket"
SUBSCRIBE = {"channel": "chat/1", "recoverable": True, "positioned": True}


async def begin(client: Any, subscribe: dict[str, Any]) -> dict[str, Any]:
    await client.send('{"id":1,"connect":{}}\n' + json.dumps({"id": 2, "subscribe": subscribe}))
    while True:
        for line in str(await client.recv()).split("\n"):
            message = json.loads(line)
            if message.get("id") == 2:
                found: dict[str, Any] = message["subscribe"]
                return found


def test_a_slow_reader_is_sent_away_and_recovers_more_than_may_wait_for_it() -> None:
    options = ["--max-backlog", "256KiB", "--max-message-size", "128KiB"]
    with Hub(workers=2, config=RULES, options=options) as hub:

        async def main() -> None:
            narrow = socket.socket()
            narrow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            narrow.connect(("127.0.0.1", hub.port))
            narrow.setblocking(False)
            slow = await hub.connect(PATH, sock=narrow, max_queue=1)
            position = await begin(slow, SUBSCRIBE)
            writer = await hub.connect("/ws/w")
            for number in range(100):
                await acked(writer, type="send", topic="chat/1", n=number, text="x" * 60_000)
            got = []
            try:
                while True:
                    for line in str(await slow.recv()).split("\n"):
                        push = json.loads(line).get("push")
                        if push:
                            got.append((push["pub"]["data"]["n"], push["pub"]["offset"]))
            except ConnectionClosed:
                pass
            assert (slow.close_code, slow.close_reason) == (3008, "slow")
            assert [n for n, _ in got] == list(range(len(got)))
            assert len(got) < 100
            offset = got[-1][1] if got else position["offset"]
            back = await hub.connect(PATH, max_size=None)
            wish = {**SUBSCRIBE, "recover": True, "offset": offset, "epoch": position["epoch"]}
            recovered = await begin(back, wish)
            assert recovered["recovered"] and recovered["was_recovering"]
            missed = [publication["data"]["n"] for publication in recovered["publications"]]
            assert missed == list(range(len(got), 100))
            await acked(writer, type="send", topic="chat/1", n=100)
            async with asyncio.timeout(10):
                live = json.loads(await back.recv())
            assert live["push"]["pub"]["data"]["n"] == 100

        hub.run(main())
        assert "closed as slow (3008)" in hub.log()


def test_a_position_of_a_lost_log_is_not_recovered_and_nothing_partial_is_sent() -> None:
    with Hub(workers=2, config=RULES) as hub:

        async def main() -> None:
            writer = await hub.connect("/ws/w")
            for number in range(5):
                await acked(writer, type="send", topic="chat/1", n=number)
            for since in ({"epoch": "gone", "offset": 2}, {"epoch": "_", "offset": 0}):
                client = await hub.connect(PATH)
                reply = await begin(client, {**SUBSCRIBE, "recover": True, **since})
                assert reply["was_recovering"] and not reply["recovered"]
                assert not reply.get("publications")
                assert reply["offset"] == 5 and reply["epoch"] not in ("gone", "_")
            client = await hub.connect(PATH)
            reply = await begin(client, {**SUBSCRIBE, "recover": True, "epoch": "", "offset": 3})
            assert reply["recovered"] and [item["data"]["n"] for item in reply["publications"]] == [3, 4]
            assert reply["offset"] == 3
            plain = await begin(await hub.connect(PATH), {"channel": "other", "recover": True})
            assert not plain.get("recoverable") and not plain.get("recovered")

        hub.run(main())


def test_plain_and_centrifuge_clients_share_topics() -> None:
    with Hub(workers=2, config=RULES) as hub:

        async def main() -> None:
            for topic in ("chat/1", "other"):
                plain = await hub.connect(f"/ws/p?topic={topic}")
                client = await hub.connect(PATH)
                await begin(client, {"channel": topic})
                await acked(await hub.connect("/ws/w"), type="send", topic=topic, n=1)
                assert json.loads(await plain.recv()) == {"n": 1}
                pub = json.loads(await client.recv())["push"]["pub"]
                assert pub["data"] == {"n": 1} and ("offset" in pub) == (topic == "chat/1")
                await client.send(json.dumps({"id": 3, "publish": {"channel": topic, "data": [1, "x"]}}))
                assert json.loads(await plain.recv()) == [1, "x"]

        hub.run(main())


def test_the_protobuf_variant_is_refused_and_the_json_one_echoed() -> None:
    with Hub(workers=1) as hub:

        async def main() -> None:
            client = await hub.connect(PATH, subprotocols=["centrifuge-json"])
            assert client.subprotocol == "centrifuge-json"
            for path, options in (
                (PATH, {"subprotocols": ["centrifuge-protobuf"]}),
                (f"{PATH}?format=protobuf", {}),
            ):
                with pytest.raises(InvalidStatus) as refused:
                    await hub.connect(path, **options)
                assert refused.value.response.status_code == 400

        hub.run(main())


def test_a_full_file_system_is_an_error_and_passes(tmp_path: Path) -> None:
    place = tmp_path / "shm"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64m,mode=0700", "tmpfs", str(place)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting takes root")
    config = '[topics."chat/#"]\nhistory_size = 1000000\n'
    try:
        with Hub(workers=2, config=config, runtime_dir=str(place / "run")) as hub:

            async def main() -> None:
                reader = await hub.connect("/ws/r?topic=plain&topic=chat/1")
                writer = await hub.connect("/ws/w")
                await acked(writer, type="send", topic="chat/1", n=0)
                assert json.loads(await reader.recv()) == {"n": 0}
                with (place / "filler").open("wb") as filler:
                    with contextlib.suppress(OSError):
                        while True:
                            filler.write(bytes(65536))
                            filler.flush()
                errors = 0
                for number in range(300):
                    await say(writer, type="send", topic="chat/1", n=number, text="x" * 20_000, ack=1)
                    answer = await read_json(writer)
                    if answer["type"] == "error":
                        assert answer["code"] == 100 and "no room" in answer["error"]
                        errors += 1
                    else:
                        await reader.recv()
                assert errors
                await acked(writer, type="send", topic="plain", n=1)
                assert json.loads(await reader.recv()) == {"n": 1}
                (place / "filler").unlink()
                await acked(writer, type="send", topic="chat/1", n=2)
                assert json.loads(await reader.recv()) == {"n": 2}

            hub.run(main())
    finally:
        subprocess.run(["umount", str(place)], check=True)
