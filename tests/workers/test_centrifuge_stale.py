"""A client of the Centrifuge protocol that opens a connection and says nothing."""

from __future__ import annotations

import msgspec
import pytest

from tests.workers.server_fixture import CLOSE, TEXT, serving, uvrun
from workers.centrifuge_effects import Config
from workers.centrifuge_hub import CentrifugeHub

PATH = "/connection/websocket"


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    made = CentrifugeHub.config

    def config(hub: CentrifugeHub, frame_pings: bool) -> Config:
        return msgspec.structs.replace(made(hub, frame_pings), stale_timeout=0.3)

    monkeypatch.setattr(CentrifugeHub, "config", config)


def test_who_does_not_connect_in_time_is_closed_and_who_does_is_not() -> None:
    async def main() -> None:
        async with serving() as live:
            silent = await live.raw(PATH)
            known = await live.raw(PATH)
            await known.send(TEXT, b'{"id":1,"connect":{}}')
            assert b'"id":1' in (await known.read())[1]
            opcode, payload = await silent.read()
            assert (opcode, payload[:2]) == (CLOSE, (3502).to_bytes(2, "big"))
            await known.send(TEXT, b'{"id":2,"subscribe":{"channel":"a"}}')
            assert b'"id":2' in (await known.read())[1]
            await silent.end()
            await known.end()

    uvrun(main())
