"""Anything at all for the Centrifuge state machine: any bytes, any JSON, any order of commands and answers."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from workers.centrifuge import Session, State
from workers.centrifuge_effects import (
    Accepted,
    Config,
    Connect,
    Effect,
    History,
    Message,
    Presence,
    PresenceStats,
    Publication,
    Publish,
    Rpc,
    Send,
    Subscribe,
    Subscribed,
    Unsubscribe,
)
from workers.centrifuge_messages import (
    encode_publication,
)
from workers.codes import (
    Close,
)

from .centrifuge_support import (
    command,
    connected,
    opened,
    said,
)

# Anything at all.

CHANNELS = ["a", "a/b", "a/#", "+", "", "a#", "x" * 300]
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 2**54) | st.text(max_size=3) | st.sampled_from(CHANNELS),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["channel", "offset", "since", "data", "recover", "x"]), inner)
    ),
    max_leaves=6,
)
METHODS = [
    "connect",
    "subscribe",
    "unsubscribe",
    "publish",
    "presence",
    "presence_stats",
    "history",
    "rpc",
    "send",
    "refresh",
    "sub_refresh",
    "ping",
    "bogus",
]


def _line(number: int, method: str, body: object) -> bytes:
    return json.dumps({"id": number, method: body}).encode()


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=80), st.booleans())
def test_any_bytes_have_a_defined_answer(garbage: bytes, after_connect: bool) -> None:
    session = connected() if after_connect else opened()
    check(session, session.receive(garbage, 0.0))


@settings(max_examples=300, deadline=None)
@given(st.builds(_line, st.integers(-1, 2**33), st.sampled_from(METHODS), VALUES))
def test_any_json_has_a_defined_answer(text: bytes) -> None:
    session = connected(tokens=True, rpc=True, messages=True)
    check(session, session.receive(text, 0.0))


def check(session: Session, performed: list[Effect]) -> None:
    """What always holds: well-formed messages, and nothing behind a close."""
    said(performed)
    for effect in performed[:-1]:
        assert not isinstance(effect, Close)
    closing = bool(performed) and isinstance(performed[-1], Close)
    assert session.closed is closing
    if closing:
        assert session.receive(command(1, "rpc"), 0.0) == []


class Shell:
    """Performs effects in an order that the test chooses, and checks the promises of the interface."""

    def __init__(self, data: st.DataObject) -> None:
        self.data = data
        self.session = Session(
            Config(rpc=True, messages=True, max_subscriptions=3, max_buffered=300), client_id="u", now=0.0
        )
        self.now = 0.0
        self.waiting: list[Effect] = []
        self.in_force: dict[str, bool] = {}
        self.asked: set[int] = set()
        self.top = 0
        self.told: dict[str, int] = {}
        self.closed = False

    def perform(self, performed: list[Effect]) -> None:
        for effect in performed:
            assert not self.closed or isinstance(effect, Unsubscribe)
            match effect:
                case Send():
                    for message in said([effect]):
                        self.heard(message)
                case Close():
                    self.closed = True
                case Unsubscribe():
                    assert self.in_force.pop(effect.channel)
                    self.told.pop(effect.channel, None)
                case Subscribe():
                    assert not any(
                        isinstance(w, Subscribe) and w.channel == effect.channel for w in self.waiting
                    )
                    assert effect.channel not in self.in_force
                    self.waiting.append(effect)
                case Message():
                    pass
                case _:
                    self.waiting.append(effect)

    def heard(self, message: dict[str, Any]) -> None:
        """A client would be content with this message."""
        if "id" in message:
            self.asked.remove(message["id"])
            if "subscribe" in message:
                self.told[self.channel_of(message["id"])] = message["subscribe"].get("offset", 0)
                for publication in message["subscribe"].get("publications", ()):
                    self.advance(self.channel_of(message["id"]), publication["offset"])
        elif "push" in message and "pub" in message["push"]:
            assert message["push"]["channel"] in self.told, "pushed before the reply"
            self.advance(message["push"]["channel"], message["push"]["pub"].get("offset", 0))

    def channel_of(self, number: int) -> str:
        return self.channels[number]

    channels: dict[int, str] = {}

    def advance(self, channel: str, offset: int) -> None:
        if offset:
            assert offset > self.told[channel], "a duplicate"
            self.told[channel] = offset

    def answer(self, effect: Effect) -> list[Effect]:
        refuse = self.data.draw(st.integers(0, 4)) == 0
        session = self.session
        match effect:
            case Connect():
                return session.connect_failed(100) if refuse else session.connected(Accepted(), self.now)
            case Subscribe():
                if refuse:
                    return session.subscribe_failed(effect.channel, 103, self.now)
                self.in_force[effect.channel] = True
                missed = range(effect.since.offset + 1, self.top + 1)
                result = Subscribed(
                    recoverable=True,
                    epoch="e",
                    offset=self.top,
                    recovered=effect.recover,
                    publications=[Publication(b"0", offset, effect.channel) for offset in missed],
                )
                return session.subscribed(effect.channel, result, self.now)
            case Publish():
                return session.failed(effect.id, 100) if refuse else session.published(effect.id)
            case Presence():
                return session.presence(effect.id, {})
            case PresenceStats():
                return session.presence_stats(effect.id, 1, 1)
            case History():
                return session.history(effect.id, effect.channel, [], self.top, "e")
            case Rpc():
                return session.rpc_result(effect.id, b"1")
        raise AssertionError(effect)

    def publish(self) -> None:
        self.top += 1
        for channel in ("a", "b", "c/#"):
            push = encode_publication(channel, b"1", self.top)
            if self.session.admits(channel, self.top, push):
                self.heard(json.loads(push))


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_order_of_commands_and_answers_keeps_the_promises(data: st.DataObject) -> None:
    shell = Shell(data)
    shell.channels = {}
    methods = ["subscribe", "unsubscribe", "publish", "presence", "history", "rpc"]
    for number in range(1, data.draw(st.integers(2, 30)) + 1):
        action = data.draw(st.integers(0, 9))
        if number == 1 or action < 5:
            method = "connect" if number == 1 else data.draw(st.sampled_from(methods))
            channel = data.draw(st.sampled_from(["a", "b", "c/#", "c/+"]))
            body: dict[str, Any] = {"channel": channel, "data": 1}
            if method == "subscribe":
                body["recoverable"] = data.draw(st.booleans())
                body["recover"] = data.draw(st.booleans())
                body["offset"] = data.draw(st.integers(0, shell.top))
            if method == "publish":
                body["channel"] = "a"
            if not shell.closed and shell.session.state is not State.FAILED:
                shell.asked.add(number)
                shell.channels[number] = channel
            shell.perform(shell.session.receive(command(number, method, **body), shell.now))
        elif action < 8 and shell.waiting:
            effect = shell.waiting.pop(data.draw(st.integers(0, len(shell.waiting) - 1)))
            shell.perform(shell.answer(effect))
        elif action == 8:
            shell.publish()
        else:
            shell.perform(shell.session.unsubscribe("a", data.draw(st.sampled_from([2000, 2500]))))
    failed = shell.session.state is State.FAILED
    early: bool = data.draw(st.booleans())
    for _ in range(data.draw(st.integers(0, len(shell.waiting)))):
        shell.perform(shell.answer(shell.waiting.pop()))
    if early:
        shell.perform(shell.session.end())
    while shell.waiting:
        shell.perform(shell.answer(shell.waiting.pop()))
    if not early and not failed and shell.session.state is State.CONNECTED:
        assert shell.asked == set(), "a command without an answer"
        assert shell.session.in_flight == 0
    shell.perform(shell.session.end())
    assert shell.in_force == {}, "a subscription that was never undone"
