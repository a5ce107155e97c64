"""The origin check: cross-site hijacking is refused before accept (S1), and nothing else is."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.websockets import WebSocket
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

from tests.servers import serve
from tests.support import run
from workers.origin import OriginMiddleware, check_allowed_origin, origin_allowed, origin_listed

LISTED = ("https://good.example", "https://*.wild.example", "http://dev.example:3000", "http://[::1]:8000")


@pytest.mark.parametrize(
    ("origin", "host", "expected"),
    [
        # the same host: default ports are those of the origin's own scheme
        ("http://hub.example", "hub.example", True),
        ("https://hub.example", "hub.example", True),
        ("https://hub.example", "hub.example:443", True),
        ("http://hub.example:80", "hub.example", True),
        ("http://hub.example:8000", "hub.example:8000", True),
        ("HTTP://Hub.Example", "hUB.eXAMPLE", True),
        ("http://[::1]:8000", "[0:0::1]:8000", True),
        ("http://[2001:DB8::1]", "[2001:db8:0::1]", True),
        ("http://127.0.0.1:8000", "127.0.0.1:8000", True),
        ("http://hub.example.", "hub.example.", True),
        # another port, scheme of another default port, or host
        ("http://hub.example:8001", "hub.example:8000", False),
        ("https://hub.example", "hub.example:80", False),
        ("http://hub.example", "hub.example:443", False),
        ("https://hub.example", "hub.example:8000", False),
        ("http://other.example", "hub.example", False),
        ("http://hub.example", "hub.example.", False),
        ("http://127.0.0.1:8000", "localhost:8000", False),
        ("http://[::1]:8000", "[::2]:8000", False),
        ("chrome-extension://hub.example", "hub.example", False),
        ("file://hub.example", "hub.example", False),
        # look-alikes
        ("http://hub.example.evil", "hub.example", False),
        ("http://evilhub.example", "hub.example", False),
        ("http://hub.example@evil.example", "hub.example", False),
        ("http://evil.example#hub.example", "hub.example", False),
        ("http://evil.example/hub.example", "hub.example", False),
        ("http://hub.example\\.evil.example", "hub.example", False),
        ("http://hub.example%2eevil", "hub.example", False),
        # what is no origin
        ("null", "hub.example", False),
        ("null", "null", False),
        ("", "hub.example", False),
        ("", "", False),
        ("hub.example", "hub.example", False),
        ("http://", "hub.example", False),
        ("http:hub.example", "hub.example", False),
        ("http://hub.example/", "hub.example", False),
        ("http://hub.example:", "hub.example", False),
        ("http://hub.example:99999", "hub.example:99999", False),
        ("http://hub.example:0x50", "hub.example", False),
        ("http://hub.example:\u0668\u0660", "hub.example", False),
        ("http://hub.example http://hub.example", "hub.example", False),
        (" http://hub.example", "hub.example", False),
        ("http://hub.example\n", "hub.example", False),
        ("http://hub..example", "hub..example", False),
        ("http://[::1", "[::1", False),
        ("http://[fe80::1%25eth0]", "[fe80::1%25eth0]", False),
        ("http://h\u212aub.example", "hkub.example", False),
        ("http://*.example", "*.example", False),
        ("http://hub.example", None, False),
        ("http://hub.example", "", False),
        ("http://hub.example", "hub.example/path", False),
        (None, "hub.example", True),
        (None, None, True),
    ],
)
def test_the_same_host_and_nothing_else_is_accepted(
    origin: str | None, host: str | None, expected: bool
) -> None:
    assert origin_allowed(origin, host) is expected
    raw_origin, raw_host = (None if text is None else text.encode() for text in (origin, host))
    assert origin_allowed(raw_origin, raw_host) is expected


@pytest.mark.parametrize(
    ("origin", "expected"),
    [
        ("https://good.example", True),
        ("https://good.example:443", True),
        ("https://GOOD.example", True),
        ("http://good.example", False),
        ("https://good.example:8443", False),
        ("https://sub.good.example", False),
        ("https://good.example.evil", False),
        ("https://good.exampl", False),
        ("https://a.wild.example", True),
        ("https://a.b.wild.example", True),
        ("https://wild.example", False),
        ("https://.wild.example", False),
        ("https://evilwild.example", False),
        ("https://*.wild.example", False),
        ("http://a.wild.example", False),
        ("https://a.wild.example:444", False),
        ("https://a.wild.example.evil", False),
        ("https://a.wild.example.", False),
        ("http://dev.example:3000", True),
        ("http://dev.example", False),
        ("http://[0:0:0:0:0:0:0:1]:8000", True),
        ("http://[::1]", False),
        ("null", False),
    ],
)
def test_listed_origins_are_matched_exactly_and_wildcards_by_whole_labels(
    origin: str, expected: bool
) -> None:
    assert origin_allowed(origin, "hub.example", LISTED) is expected
    assert origin_listed(origin.encode(), LISTED) is expected


def test_null_is_accepted_only_if_listed() -> None:
    assert not origin_allowed("null", "hub.example", ["https://good.example"])
    assert origin_allowed("null", "hub.example", ["null"])
    assert not origin_allowed("http://null", "hub.example", ["null"])


def test_a_star_is_no_check_at_all() -> None:
    for origin in ("https://anything.example:9", "null", "chrome-extension://abcdef", "file://"):
        assert origin_allowed(origin, "hub.example", ["*"])


def test_other_schemes_can_be_listed() -> None:
    assert origin_allowed("chrome-extension://abcdef", "hub.example", ["chrome-extension://abcdef"])
    assert not origin_allowed("chrome-extension://abcdeg", "hub.example", ["chrome-extension://abcdef"])


@given(st.text() | st.binary(), st.none() | st.text() | st.binary(), st.lists(st.text(), max_size=3))
def test_it_decides_about_anything(origin: str | bytes, host: str | bytes | None, allowed: list[str]) -> None:
    assert origin_allowed(origin, host, allowed) in (True, False)


@pytest.mark.parametrize(
    "entry", ["*", "null", *LISTED, "chrome-extension://abcdef", "HTTPS://Example.COM:8443"]
)
def test_entries_are_accepted(entry: str) -> None:
    check_allowed_origin(entry)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("", "is not an origin"),
        ("good.example", "the scheme is missing"),
        ("https://good.example/", "no slash at its end"),
        ("https://good.example/path", "no path"),
        ("https://*", "is not an origin"),
        ("https://*example.com", "is not an origin"),
        ("https://a.*.example.com", "is not an origin"),
        ("https://*.[::1]", "is not an origin"),
        ("https://good.example:*", "is not an origin"),
        ("https://bücher.example", "xn--"),
    ],
)
def test_other_entries_are_refused_in_words(entry: str, words: str) -> None:
    with pytest.raises(ValueError, match="write") as caught:
        check_allowed_origin(entry)
    assert words in str(caught.value)
    with pytest.raises(ValueError, match="write"):
        OriginMiddleware(lambda *_: None, [entry])  # type: ignore[arg-type]


# The middleware


class Spy:
    """An ASGI application that notes what it is called with."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, Any, Any]] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.calls.append((scope, receive, send))


def websocket_scope(*headers: tuple[bytes, bytes]) -> dict[str, Any]:
    return {"type": "websocket", "path": "/", "headers": list(headers)}


async def refused_with(scope: dict[str, Any]) -> list[dict[str, Any]]:
    spy, sent = Spy(), []

    async def receive() -> dict[str, Any]:
        return {"type": "websocket.connect"}

    async def send(message: Any) -> None:
        sent.append(message)

    await OriginMiddleware(spy, LISTED)(scope, receive, send)
    assert spy.calls == []
    return sent


def test_what_passes_is_handed_on_untouched() -> None:
    spy = Spy()
    arguments: Any = (websocket_scope((b"origin", b"http://a"), (b"host", b"a")), object(), object())
    http: Any = ({"type": "http", "headers": [(b"origin", b"http://evil")]}, object(), object())
    lifespan: Any = ({"type": "lifespan"}, object(), object())
    for each in (arguments, http, lifespan):
        run(OriginMiddleware(spy)(*each))
    assert all(
        one is other
        for call, each in zip(spy.calls, (arguments, http, lifespan), strict=True)
        for one, other in zip(call, each, strict=True)
    )


def test_a_refusal_is_a_close_before_accept() -> None:
    foreign = [(b"host", b"hub.example"), (b"origin", b"http://evil.example")]
    (sent,) = run(refused_with(websocket_scope(*foreign)))
    assert sent["type"] == "websocket.close"


@pytest.mark.parametrize("name", [b"origin", b"host"])
def test_a_repeated_header_is_refused(name: bytes) -> None:
    headers = [(b"host", b"hub.example"), (b"origin", b"http://hub.example")]
    repeated = next(header for header in headers if header[0] == name)
    assert run(refused_with(websocket_scope(*headers, repeated)))


def test_all_endpoints_of_an_application_are_covered_on_a_real_server(
    caplog: pytest.LogCaptureFixture,
) -> None:
    accepted: list[str] = []

    async def endpoint(websocket: WebSocket) -> None:
        accepted.append(websocket.url.path)
        await websocket.accept()
        await websocket.send_text("hello")
        await websocket.close()

    app = Starlette(
        routes=[
            WebSocketRoute("/ws", endpoint),
            Mount("/deep", routes=[WebSocketRoute("/ws", endpoint)]),
            Route("/page", lambda request: PlainTextResponse("page")),
        ]
    )

    async def main() -> None:
        async with serve(OriginMiddleware(app, LISTED)) as address:
            for path in ("/ws", "/deep/ws"):
                for origin in ("http://evil.example", "null", f"http://{address}.evil", "http://127.0.0.1:1"):
                    with pytest.raises(InvalidStatus) as caught:
                        await connect(
                            f"ws://{address}{path}", additional_headers={"Origin": origin, "Cookie": "s=1"}
                        )
                    assert caught.value.response.status_code == 403
            assert accepted == []
            for headers in ({}, {"Origin": f"http://{address}"}, {"Origin": "https://a.wild.example"}):
                async with connect(f"ws://{address}/ws", additional_headers=headers) as client:
                    assert await client.recv() == "hello"
            assert accepted == ["/ws"] * 3

    run(main())
    assert not [record for record in caplog.records if record.levelname == "ERROR"]
