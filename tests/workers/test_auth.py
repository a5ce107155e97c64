"""The bearer token of a handshake: found, or the client refused and the endpoint's body not run."""

from __future__ import annotations

import logging
import subprocess
import sys
from typing import Annotated, Any

import httpx
import pytest
from fastapi import Depends, FastAPI
from fastapi import WebSocket as FastAPIWebSocket
from fastapi.security import OAuth2PasswordBearer
from starlette.applications import Starlette
from starlette.endpoints import WebSocketEndpoint
from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocket
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosedError, InvalidStatus

from tests.servers import serve
from tests.support import run
from workers.auth import WebSocketOAuth2PasswordBearer, bearer_token

bearer = WebSocketOAuth2PasswordBearer("token")
lenient = WebSocketOAuth2PasswordBearer(tokenUrl="token", auto_error=False)

BAD: list[list[tuple[str, str]]] = [
    [],
    [("Authorization", "")],
    [("Authorization", "Bearer")],
    [("Authorization", "Bearer ")],
    [("Authorization", "Basic Zm9v")],
    [("Authorization", "Bearer a b")],
    [("Authorization", "Bearera")],
    [("Authorization", "token")],
    [("Authorization", "Bearer a"), ("Authorization", "Bearer b")],
]
GOOD = ["Bearer s3cret", "bearer s3cret", "BEARER  s3cret", "Bearer s3cret "]


class Apps:
    """The same endpoints in FastAPI and in plain Starlette, and which of their bodies ran."""

    def __init__(self) -> None:
        self.ran: list[str | None] = []

    async def before_accept(self, websocket: WebSocket, token: str | None) -> None:
        self.ran.append(token)
        await websocket.accept()
        await websocket.send_json(token)
        await websocket.close()

    def fastapi(self) -> FastAPI:
        app = FastAPI()

        @app.websocket("/strict")
        async def strict(websocket: FastAPIWebSocket, token: Annotated[str, Depends(bearer)]) -> None:
            await self.before_accept(websocket, token)

        @app.websocket("/lenient")
        async def lenient_(
            websocket: FastAPIWebSocket, token: Annotated[str | None, Depends(lenient)]
        ) -> None:
            await self.before_accept(websocket, token)

        @app.websocket("/accepted")
        async def accepted(websocket: FastAPIWebSocket) -> None:
            await websocket.accept()
            token = await bearer(websocket)
            self.ran.append(token)
            await websocket.send_json(token)

        @app.get("/page")
        async def page(token: Annotated[str, Depends(bearer)]) -> str:
            return token

        return app

    def starlette(self) -> Starlette:
        async def strict(websocket: WebSocket) -> None:
            await self.before_accept(websocket, await bearer(websocket))

        async def lenient_(websocket: WebSocket) -> None:
            await self.before_accept(websocket, await lenient(websocket))

        ran = self.ran

        class Accepted(WebSocketEndpoint):
            async def on_connect(self, websocket: WebSocket) -> None:
                await websocket.accept()
                token = await bearer(websocket)
                ran.append(token)
                await websocket.send_json(token)

        return Starlette(
            routes=[
                WebSocketRoute("/strict", strict),
                WebSocketRoute("/lenient", lenient_),
                WebSocketRoute("/accepted", Accepted),
            ]
        )


@pytest.fixture(params=["fastapi", "starlette"])
def kind(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def assert_nothing_went_wrong(caplog: pytest.LogCaptureFixture) -> None:
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_without_a_token_the_handshake_is_refused_and_the_body_does_not_run(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    apps = Apps()

    async def main() -> None:
        async with serve(getattr(apps, kind)()) as address:
            for headers in BAD:
                with pytest.raises(InvalidStatus) as caught:
                    await connect(f"ws://{address}/strict", additional_headers=headers)
                assert caught.value.response.status_code in (401, 403), headers

    run(main())
    assert apps.ran == []
    assert_nothing_went_wrong(caplog)


def test_without_a_token_an_accepted_client_is_closed_with_1008(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    apps = Apps()

    async def main() -> None:
        async with serve(getattr(apps, kind)()) as address:
            for headers in BAD:
                async with connect(f"ws://{address}/accepted", additional_headers=headers) as client:
                    with pytest.raises(ConnectionClosedError) as caught:
                        await client.recv()
                    assert caught.value.rcvd is not None
                    assert caught.value.rcvd.code == 1008

    run(main())
    assert apps.ran == []
    assert_nothing_went_wrong(caplog)


@pytest.mark.parametrize("path", ["strict", "lenient", "accepted"])
def test_the_endpoint_gets_the_token_alone(kind: str, path: str, caplog: pytest.LogCaptureFixture) -> None:
    apps = Apps()

    async def main() -> None:
        async with serve(getattr(apps, kind)()) as address:
            for value in GOOD:
                async with connect(
                    f"ws://{address}/{path}", additional_headers={"Authorization": value}
                ) as client:
                    assert await client.recv() == '"s3cret"'

    run(main())
    assert apps.ran == ["s3cret"] * len(GOOD)
    assert_nothing_went_wrong(caplog)


def test_without_auto_error_the_token_is_none(kind: str) -> None:
    apps = Apps()

    async def main() -> None:
        async with serve(getattr(apps, kind)()) as address:
            for headers in BAD:
                async with connect(f"ws://{address}/lenient", additional_headers=headers) as client:
                    assert await client.recv() == "null"

    run(main())
    assert apps.ran == [None] * len(BAD)


def test_it_serves_http_endpoints_and_the_documentation_too() -> None:
    async def main() -> None:
        app = Apps().fastapi()
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://hub") as client:
            refused = await client.get("/page")
            assert refused.status_code == 401
            assert refused.headers["www-authenticate"] == "Bearer"
            assert (await client.get("/page", headers={"Authorization": "Bearer x"})).json() == "x"
        schemes: dict[str, Any] = app.openapi()["components"]["securitySchemes"]
        flows = {"password": {"scopes": {}, "tokenUrl": "token"}}
        assert schemes == {"WebSocketOAuth2PasswordBearer": {"type": "oauth2", "flows": flows}}

    run(main())


def test_it_is_one_of_fastapis_bearers() -> None:
    full = WebSocketOAuth2PasswordBearer("token", "name", {"read": "may read"}, "words", False)
    assert isinstance(full, OAuth2PasswordBearer)
    assert (full.scheme_name, full.auto_error) == ("name", False)
    assert full.model.description == "words"
    assert full.model.model_dump(exclude_none=True)["flows"]["password"]["scopes"] == {"read": "may read"}


def test_the_address_has_two_names_and_is_needed_once() -> None:
    for one in (WebSocketOAuth2PasswordBearer(token_url="/t"), WebSocketOAuth2PasswordBearer(tokenUrl="/t")):
        assert one.model.model_dump()["flows"]["password"]["tokenUrl"] == "/t"
    with pytest.raises(TypeError, match="either token_url or tokenUrl"):
        WebSocketOAuth2PasswordBearer()
    with pytest.raises(TypeError, match="either token_url or tokenUrl"):
        WebSocketOAuth2PasswordBearer("/t", tokenUrl="/t")


def test_without_fastapi_it_has_the_same_attributes() -> None:
    program = """
import sys
sys.modules["fastapi"] = sys.modules["fastapi.security"] = None
import asyncio
from starlette.websockets import WebSocket
from workers.auth import WebSocketOAuth2PasswordBearer
bearer = WebSocketOAuth2PasswordBearer("token", scopes={"read": "may read"}, description="words")
assert bearer.scheme_name == "WebSocketOAuth2PasswordBearer"
assert bearer.auto_error is True
assert bearer.model.type_ == "oauth2"
assert bearer.model.description == "words"
assert bearer.model.flows.password.tokenUrl == "token"
assert bearer.model.flows.password.scopes == {"read": "may read"}
scope = {"type": "websocket", "headers": [(b"authorization", b"Bearer x")]}
assert asyncio.run(bearer(WebSocket(scope, None, None))) == "x"
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=30)


@pytest.mark.parametrize(
    ("value", "token"), [("Bearer a.b-c_d~e+f/g==", "a.b-c_d~e+f/g=="), ("bEaReR x", "x")]
)
def test_tokens_are_found(value: str, token: str) -> None:
    assert bearer_token([value]) == token
