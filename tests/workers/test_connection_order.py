"""Order for a client that is served in two ways: topics in envelopes, broadcasts and direct messages as they are."""

from __future__ import annotations

import json

from ipc.envelope import BROADCAST, DIRECT, TOPIC, Envelope
from tests.workers.server_fixture import serving, uvrun


def test_what_comes_in_one_batch_is_read_in_its_order_with_envelopes_too() -> None:
    async def main() -> None:
        async with serving() as live:
            client = await live.raw("/ws/anna?topic=t&envelope=1")
            batch = []
            for number in range(30):
                data = b'{"n":%d}' % number
                if number % 3 == 0:
                    batch.append(Envelope(TOPIC, "hub", "t", data))
                elif number % 3 == 1:
                    batch.append(Envelope(BROADCAST, "hub", "", data))
                else:
                    batch.append(Envelope(DIRECT, "hub", "", data, ("anna",)))
            live.manager._deliver(batch)
            seen: list[int] = []
            while len(seen) < len(batch):
                message = json.loads(await client.text())
                seen.append(message.get("data", message)["n"])
            assert seen == list(range(30))
            await client.end()

    uvrun(main())
