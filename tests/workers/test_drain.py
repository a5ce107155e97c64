"""A worker that ends (``DrainingServer.drain``): whoever serves a socket, its client gets the code; nothing stays."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect
from websockets.exceptions import ConnectionClosed

from tests.support import until_async
from tests.workers.server_fixture import close_frame, serving, upgrade_request, uvrun
from tests.workers.test_sinks import Wrapped
from workers import limited_protocol
from workers.hub import create_hub
from workers.manager import WebSocketManager


class Scene:
    """An application with endpoints of every kind, what they saw, and a gate before the slow ones."""

    def __init__(self) -> None:
        self.ends: list[str] = []
        self.gate = asyncio.Event()

    def __call__(self, manager: WebSocketManager) -> Any:
        return application(manager, self.ends, self.gate)


def application(manager: WebSocketManager, ends: list[str], gate: asyncio.Event) -> Any:
    """The endpoints."""

    async def plain(websocket: WebSocket) -> None:
        await websocket.accept()
        try:
            await websocket.receive_text()
        except WebSocketDisconnect as exc:
            ends.append(f"plain {exc.code}")

    async def sending(websocket: WebSocket) -> None:
        await websocket.accept()
        while True:
            await websocket.send_text("tick")
            await asyncio.sleep(0.01)

    async def connected(websocket: WebSocket) -> None:
        connection = await manager.new_connection(websocket, "c", "t")
        async for _ in connection:
            pass
        ends.append("connection")

    async def stubborn(websocket: WebSocket) -> None:
        await websocket.accept()
        await asyncio.Event().wait()

    async def slow_to_accept(websocket: WebSocket) -> None:
        await gate.wait()
        await websocket.accept()
        await websocket.send_text("accepted")
        await websocket.receive_text()

    async def slow_answer(request: Request) -> PlainTextResponse:
        await gate.wait()
        return PlainTextResponse("answered")

    endpoints = {
        "plain": plain,
        "sending": sending,
        "connected": connected,
        "stubborn": stubborn,
        "slow": slow_to_accept,
    }
    app = Starlette(
        routes=[
            *(WebSocketRoute(f"/{name}", endpoint) for name, endpoint in endpoints.items()),
            WebSocketRoute("/wrapped", Wrapped(WebSocketRoute("/wrapped", connected).app)),
            Route("/answer", slow_answer),
            Mount("/hub", create_hub(manager)),
        ]
    )
    return app


async def code_of(client: Any) -> int:
    """How a client is closed."""
    try:
        while True:
            await client.recv()
    except ConnectionClosed as exc:
        return exc.rcvd.code if exc.rcvd is not None else 1006


@pytest.mark.parametrize("code", [1001, 1012])
def test_every_client_gets_the_code(code: int, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        scene = Scene()
        async with serving(scene) as live:
            paths = [
                "/plain",
                "/sending",
                "/connected",
                "/wrapped",
                "/stubborn",
                "/hub/ws",
                "/hub/ws/x?topic=t",
            ]
            clients = [await live.client(path) for path in paths * 3]
            closed = asyncio.gather(*[code_of(client) for client in clients])
            begun = asyncio.create_task(live.client("/slow"))
            request = await live.socket()
            await request.write(b"GET /answer HTTP/1.1\r\nHost: x\r\n\r\n")
            await until_async(lambda: len(live.server.server_state.tasks) >= 17, 3.0)
            draining = asyncio.create_task(live.server.drain(code, 1.5))
            # What was under way when the drain began is still served.
            await until_async(lambda: not live.server.servers[0].is_serving(), 3.0)
            scene.gate.set()
            late = await begun
            assert await late.recv() == "accepted"
            assert b"answered" in await request.reader.read()
            assert await closed == [code] * len(clients)
            assert await code_of(late) == code
            await draining
            assert not live.server.server_state.connections and not live.server.server_state.tasks
            await request.end()
        assert sorted(scene.ends) == ["connection"] * 6 + [f"plain {code}"] * 3

    with caplog.at_level(logging.INFO, "workers"):
        uvrun(main())
    assert "Traceback" not in caplog.text


def test_clients_that_do_not_answer_or_read_are_cut_within_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limited_protocol, "CLOSE_TIMEOUT", 60.0)

    async def main() -> None:
        async with serving(Scene(), max_backlog=1 << 30) as live:
            silent = await live.raw("/hub/ws/silent")
            full = await live.raw("/hub/ws/full?topic=t", receive_buffer=4096)
            full.writer.transport.pause_reading()  # type: ignore[attr-defined]
            half = await live.socket()
            await half.write(upgrade_request("/hub/ws")[:-2])
            for _ in range(8000):
                await live.manager.send("t", {"pad": "x" * 1000})
            start = asyncio.get_running_loop().time()
            await live.server.drain(1001, 1.0)
            assert 0.4 < asyncio.get_running_loop().time() - start < 2.5
            assert not live.server.server_state.connections
            assert await silent.read() == (8, b"\x03\xe9server is going away")
            for client in (silent, full, half):
                await client.end()

    uvrun(main())


def test_a_client_that_closes_as_it_is_closed() -> None:
    async def main() -> None:
        async with serving(Scene()) as live:
            clients = [await live.raw("/hub/ws/x") for _ in range(20)]
            for client in clients:
                client.writer.write(close_frame(1000))
            await live.server.drain(1012, 2.0)
            for client in clients:
                assert await client.close_code() in (1000, 1012)
                await client.end()

    uvrun(main())
