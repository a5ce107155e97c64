"""Pages of listed origins may read what the hub's HTTP endpoints answer; others may not (CORS)."""

from __future__ import annotations

import asyncio

import pytest

from tests.workers.server_fixture import Live, serving, uvrun

LISTED = ("https://good.example", "https://*.wild.example")


async def ask(live: Live, request: str, **headers: str) -> str:
    """The head of an answer, as sent."""
    reader, writer = await asyncio.open_connection("127.0.0.1", live.port)
    lines = [f"{request} HTTP/1.1", "Host: hub.example", *(f"{name}: {headers[name]}" for name in headers)]
    writer.write(("\r\n".join(lines) + "\r\n\r\n").encode())
    try:
        return (await reader.readuntil(b"\r\n\r\n")).decode().lower()
    finally:
        writer.close()


@pytest.mark.parametrize("target", ["/events?topic=a", "/healthz", "/readyz", "/events", "/nothing"])
def test_a_listed_origin_reads_every_answer_and_no_other_does(target: str) -> None:
    async def main() -> None:
        async with serving(allow_origin=LISTED) as live:
            for origin in ("https://good.example", "https://a.wild.example"):
                head = await ask(live, f"GET {target}", Origin=origin)
                assert f"access-control-allow-origin: {origin}\r\n" in head
                assert "vary: origin\r\n" in head  # or a cache would hand it to others
            for origin in ("https://evil.example", "https://wild.example", "null"):
                assert "access-control-allow-origin" not in await ask(live, f"GET {target}", Origin=origin)
            assert "access-control-allow-origin" not in await ask(live, f"GET {target}")

    uvrun(main())


def test_preflights_are_answered() -> None:
    async def main() -> None:
        async with serving(allow_origin=LISTED) as live:
            wish = {"Access-Control-Request-Method": "GET", "Access-Control-Request-Headers": "last-event-id"}
            head = await ask(live, "OPTIONS /events?topic=a", Origin="https://good.example", **wish)
            assert head.startswith("http/1.1 200 ")
            assert "access-control-allow-origin: https://good.example\r\n" in head
            assert "last-event-id" in head
            refused = await ask(live, "OPTIONS /events?topic=a", Origin="https://evil.example", **wish)
            assert refused.startswith("http/1.1 400 ") and "access-control-allow-origin" not in refused

    uvrun(main())


def test_a_star_lists_everybody_and_nothing_listed_nobody() -> None:
    async def main(allowed: tuple[str, ...]) -> bool:
        async with serving(allow_origin=allowed) as live:
            return "access-control-allow-origin" in await ask(
                live, "GET /healthz", Origin="https://any.example"
            )

    assert uvrun(main(("*",))) is True
    assert uvrun(main(())) is False
