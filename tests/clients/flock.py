"""As flock.mjs with the official Python client: subscribers alone. Run by the Python that has `centrifuge`."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

from centrifuge import (
    Client,
    PublicationContext,
    SubscribedContext,
    SubscriptionEventHandler,
)

WISH = json.loads(sys.argv[1])
RECOVERIES: list[bool] = []


class Counting(SubscriptionEventHandler):  # type: ignore[misc, unused-ignore]
    def __init__(self) -> None:
        self.got: list[list[Any]] = []

    async def on_publication(self, ctx: PublicationContext) -> None:
        self.got.append([ctx.pub.offset, ctx.pub.data["id"]])

    async def on_subscribed(self, ctx: SubscribedContext) -> None:
        if ctx.was_recovering:
            RECOVERIES.append(ctx.recovered)


async def main() -> None:
    handlers = [Counting() for _ in range(WISH["subscribers"])]
    clients = []
    for number, handler in enumerate(handlers):
        client = Client(WISH["url"], min_reconnect_delay=0.1, max_reconnect_delay=1.0)
        channel = WISH["pattern"] if number % 2 else WISH["topic"]
        subscription = client.new_subscription(channel, events=handler, recoverable=True, positioned=True)
        await subscription.subscribe()
        await client.connect()
        await subscription.ready(20)
        clients.append(client)
    print("ready", flush=True)  # noqa: T201
    await asyncio.to_thread(sys.stdin.readline)
    quiet, seen = 0, -1
    while quiet < 30:
        await asyncio.sleep(0.1)
        count = sum(len(handler.got) for handler in handlers)
        quiet, seen = (quiet + 1 if count == seen else 0), count
    report = {
        "got": [handler.got for handler in handlers],
        "recoveries": len(RECOVERIES),
        "unrecovered": [number for number, recovered in enumerate(RECOVERIES) if not recovered],
    }
    print(json.dumps(report), flush=True)  # noqa: T201
    for client in clients:
        await client.disconnect()


asyncio.run(main())
