"""A client of the Centrifuge protocol that does not read: sent away with 3008, and nothing missed when it is back."""

from __future__ import annotations

import asyncio
import json
import socket
from typing import Any

from websockets.exceptions import ConnectionClosed

from tests.hub import Hub, acked

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
