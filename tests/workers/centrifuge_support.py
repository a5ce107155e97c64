"""What the tests of the Centrifuge state machine share: sessions in a state, and reading what they say."""

from __future__ import annotations

import json
from typing import Any, TypeVar

from workers.centrifuge import Session, State
from workers.centrifuge_effects import (
    Accepted,
    Config,
    Effect,
    Send,
    Subscribed,
)

E = TypeVar("E")
HISTORY = Subscribed(recoverable=True, epoch="e720", offset=7)


def said(performed: list[Effect]) -> list[Any]:
    """All JSON objects of the Sends, in order; also checks that they are framed as clients need it."""
    objects = []
    for effect in performed:
        if isinstance(effect, Send):
            for line in effect.data.decode().split("\n"):
                assert line.strip(), "an empty line ends the Python client"
                objects.append(json.loads(line))
    return objects


def wanted(performed: list[Effect], kind: type[E]) -> list[E]:
    """The effects of one kind."""
    return [effect for effect in performed if isinstance(effect, kind)]


def only(performed: list[Effect], kind: type[E]) -> E:
    """The one effect there is, of this kind."""
    assert len(performed) == 1, performed
    (effect,) = performed
    assert isinstance(effect, kind)
    return effect


def command(number: int, method: str, /, **fields: Any) -> bytes:
    return json.dumps({"id": number, method: fields}).encode()


def frame(*commands: bytes) -> bytes:
    return b"\n".join(commands)


def opened(**config: Any) -> Session:
    return Session(Config(**config), client_id="u-1", now=0.0)


def connected(accepted: Accepted | None = None, **config: Any) -> Session:
    session = opened(**config)
    session.receive(command(1, "connect"), 0.0)
    session.connected(accepted or Accepted(user="42"), 0.0)
    assert session.state is State.CONNECTED
    return session


def subscribed(channel: str, result: Subscribed | None = None, **fields: Any) -> Session:
    session = connected()
    session.receive(command(2, "subscribe", channel=channel, **fields), 0.0)
    session.subscribed(channel, result or Subscribed(), 0.0)
    return session


def error_of(performed: list[Effect]) -> tuple[int, bool]:
    """The code of the one error reply, and whether it is temporary."""
    (reply,) = said(performed)
    assert set(reply) == {"id", "error"}
    assert reply["error"]["message"], "the Python client reads it unasked"
    return reply["error"]["code"], reply["error"].get("temporary", False)


def reply_of(performed: list[Effect], method: str = "subscribe") -> dict[str, Any]:
    body: dict[str, Any] = said(performed)[0][method]
    return body
