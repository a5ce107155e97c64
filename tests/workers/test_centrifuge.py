"""The Centrifuge state machine without a socket: connecting, frames, commands and their answers, errors."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import pytest

from workers import centrifuge_effects as effects
from workers.centrifuge import BUSY, Session, State
from workers.centrifuge_effects import (
    Accepted,
    Connect,
    History,
    Message,
    Presence,
    PresenceStats,
    Publication,
    Publish,
    Refresh,
    Refusal,
    Rpc,
    Send,
    SubRefresh,
    Subscribe,
    Subscribed,
)
from workers.centrifuge_messages import (
    BadFrame,
    Position,
    decode_commands,
    encode_error,
    encode_join,
    encode_leave,
    encode_publication,
)
from workers.codes import (
    BAD_REQUEST,
    STALE,
    TOO_MANY_REQUESTS,
    Close,
)

from .centrifuge_support import (
    command,
    connected,
    error_of,
    frame,
    only,
    opened,
    said,
    subscribed,
    wanted,
)

# The transcript of the protocol notes, byte by byte.


def test_the_transcript_of_a_first_connection() -> None:
    session = opened(version="x")
    first = (
        b'{"connect":{"token":"T","name":"js"},"id":1}\n'
        b'{"subscribe":{"channel":"chat","recoverable":true,"positioned":true,"join_leave":true,"flag":1},"id":2}'
    )
    assert only(session.receive(first, 0.0), Connect) == Connect("T", b"", "js", "", {})
    reply, subscribe = session.connected(Accepted(user="42"), 0.0)
    assert reply == Send(b'{"id":1,"connect":{"client":"u-1","version":"x","ping":25,"pong":true}}')
    assert subscribe == Subscribe("chat", positioned=True, recoverable=True, join_leave=True)
    assert session.subscribed("chat", Subscribed(recoverable=True, epoch="e720"), 0.1) == [
        Send(b'{"id":2,"subscribe":{"recoverable":true,"positioned":true,"epoch":"e720","offset":0}}')
    ]
    publish = only(session.receive(b'{"publish":{"channel":"chat","data":{"a":1}},"id":3}', 1.0), Publish)
    assert publish == Publish(3, "chat", b'{"a":1}', b'{"client":"u-1","user":"42"}')
    assert session.published(3) == [Send(b'{"id":3,"publish":{}}')]
    push = encode_publication("chat", publish.data, 1, publish.info, "chat")
    assert push == (
        b'{"push":{"channel":"chat","pub":{"data":{"a":1},"offset":1,"info":{"client":"u-1","user":"42"}}}}'
    )
    assert session.admits("chat", 1, push)
    assert session.timer(session.next_deadline) == [Send(b"{}")]
    assert session.receive(b"{}", 20.0) == []
    assert session.disconnect(3001, "shutdown") == [Close(3001, "shutdown")]


def test_the_transcript_of_coming_back() -> None:
    session = opened()
    session.receive(
        b'{"connect":{},"id":12}\n'
        b'{"subscribe":{"channel":"chat","recoverable":true,"positioned":true,"recover":true,"offset":1,'
        b'"epoch":"e720"},"id":13}',
        0.0,
    )
    _, subscribe = session.connected(Accepted(), 0.0)
    assert isinstance(subscribe, Subscribe)
    assert subscribe.recover and subscribe.since == Position(1, "e720")
    missed = [Publication(b'{"b":2}', 2, "chat")]
    found = Subscribed(recoverable=True, epoch="e720", offset=2, recovered=True, publications=missed)
    assert session.subscribed("chat", found, 0.0) == [
        Send(
            b'{"id":13,"subscribe":{"recoverable":true,"positioned":true,"epoch":"e720","offset":1,'
            b'"was_recovering":true,"recovered":true,"publications":[{"data":{"b":2},"offset":2}]}}',
            recovery=True,
        )
    ]


# Before and during connect.


@pytest.mark.parametrize(
    "first",
    [
        command(1, "subscribe", channel="a"),
        command(1, "publish", channel="a", data=1),
        command(1, "rpc"),
        b'{"send":{"data":1}}',
        b"{}",
        frame(command(1, "subscribe", channel="a"), command(2, "connect")),
    ],
)
def test_a_command_before_connect_ends_the_connection(first: bytes) -> None:
    session = opened()
    assert session.receive(first, 0.0) == [BAD_REQUEST]
    assert session.closed and session.receive(command(1, "connect"), 0.0) == []


def test_a_second_connect_ends_the_connection_also_while_the_first_is_decided() -> None:
    assert connected().receive(command(2, "connect"), 0.0) == [BAD_REQUEST]
    session = opened()
    session.receive(command(1, "connect"), 0.0)
    assert session.receive(command(2, "connect"), 0.0) == []
    answers = session.connected(Accepted(), 0.0)
    assert said(answers)[0]["id"] == 1 and answers[-1] == BAD_REQUEST


def test_the_connect_reply_comes_before_what_was_sent_behind_it() -> None:
    session = opened()
    commands = [command(n, "subscribe", channel=f"c/{n}") for n in range(2, 130)]
    assert only(session.receive(frame(command(1, "connect"), *commands), 0.0), Connect)
    assert session.receive(command(130, "rpc"), 0.0) == []
    answers = session.connected(Accepted(), 0.0)
    assert said(answers[:1])[0]["id"] == 1
    assert [effect.channel for effect in wanted(answers, Subscribe)] == [f"c/{n}" for n in range(2, 130)]
    assert said(answers)[1]["id"] == 130


def test_after_a_refused_connect_nothing_is_answered_and_the_connection_goes_stale() -> None:
    session = opened()
    session.receive(frame(command(1, "connect"), command(2, "subscribe", channel="a")), 0.0)
    assert error_of(session.connect_failed(109)) == (109, False)
    assert session.receive(command(3, "rpc"), 1.0) == []
    assert session.receive(b"garbage", 1.0) == []
    assert session.timer(9.9) == []
    assert session.next_deadline == 10.0
    assert session.timer(10.0) == [STALE]


def test_a_connect_can_be_refused_with_words_or_with_a_close() -> None:
    session = opened()
    session.receive(command(5, "connect"), 0.0)
    (reply,) = said(session.connect_failed(Refusal(1234, "not on Sundays", True)))
    assert reply == {"id": 5, "error": {"code": 1234, "message": "not on Sundays", "temporary": True}}
    session = opened()
    session.receive(command(5, "connect"), 0.0)
    assert session.disconnect(3500, "invalid token") == [Close(3500, "invalid token")]
    assert session.connected(Accepted(), 1.0) == []


def test_without_connect_the_connection_goes_stale() -> None:
    session = opened(stale_timeout=3.0)
    assert session.next_deadline == 3.0
    assert session.timer(2.0) == []
    assert session.timer(3.0) == [STALE]
    assert session.next_deadline == math.inf
    assert session.timer(4.0) == []


def test_the_connect_reply_tells_what_it_should() -> None:
    session = opened(ping_interval=0.4)
    session.receive(command(1, "connect", name="n", version="v", headers={"X": "y"}, data=[1]), 0.0)
    accepted = Accepted(user="u", data=b'{"hello":\n"you"}', ttl=60.9, session="secret", node="3")
    (reply,) = said(session.connected(accepted, 0.0))
    assert reply["connect"] == {
        "client": "u-1",
        "version": "flockwire",
        "data": {"hello": "you"},
        "expires": True,
        "ttl": 60,
        "ping": 1,
        "pong": True,
        "session": "secret",
        "node": "3",
    }
    assert session.user == "u"
    session = opened(ping_interval=0)
    session.receive(command(1, "connect"), 0.0)
    (reply,) = said(session.connected(Accepted(), 0.0))
    assert reply["connect"] == {"client": "u-1", "version": "flockwire"}
    assert session.next_deadline == math.inf


def test_what_is_held_before_the_connect_reply_is_bounded() -> None:
    session = opened(max_in_flight=10)
    session.receive(command(1, "connect"), 0.0)
    for number in range(10):
        assert session.receive(command(number + 2, "rpc"), 0.0) == []
    assert session.receive(command(99, "rpc"), 0.0) == [TOO_MANY_REQUESTS]


# Frames.


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b" ",
        b"\n",
        b"\n \n",
        b"x",
        b"[]",
        b"1",
        b"null",
        b'{"id":7}',
        b'{"foo":{}}',
        b'{"id":7,"foo":{}}',
        b'{"subscribe":{"channel":"a"}}',
        b'{"id":7,"rpc":{},"publish":{"channel":"a","data":1}}',
        b'{"id":7,"rpc":null}',
        b'{"id":-1,"rpc":{}}',
        b'{"id":4294967296,"rpc":{}}',
        b'{"id":1.5,"rpc":{}}',
        b'{"id":"7","rpc":{}}',
        b'{"id":7,"subscribe":{"channel":1}}',
        b'{"id":7,"subscribe":{"channel":"a","offset":-1}}',
        b'{"id":7,"subscribe":{"channel":"a","offset":9007199254740993}}',
        b'{"id":7,"history":{"channel":"a","limit":2147483648}}',
        b'{"id":7,"history":{"channel":"a","since":{"offset":-1}}}',
        b'{"id":7,"publish":{"channel":"a","data":{"a":}}}',
        b'{"id":7,"publish":{"channel":"a","data":"\xff"}}',
        b'{"id":7,"publish":{"channel":"a","data":"\xed\xa0\x80"}}',
        b'{"id":7,"publish":{"channel":"\\ud800","data":1}}',
        b'{"id":7,"publish":{"channel":"a","data":NaN}}',
        b'{"id":7,"publish":{"channel":"a","data":' + b"[" * 60000,
        b'{"id":7,"publish":{"channel":"a","data":' + b"[" * 30000 + b"]" * 30000 + b"}}",
        b'{"id":7,"rpc":{}}\nnonsense',
        b'{"id":7,"rpc":{}} {"id":8,"rpc":{}}',
        b'{"id":7,"subscribe":{"channel":""}}',
        b'{"id":7,"subscribe":{}}',
        b'{"id":7,"unsubscribe":{}}',
        b'{"id":7,"publish":{"data":1}}',
        b'{"id":7,"presence":{}}',
        b'{"id":7,"presence_stats":{}}',
        b'{"id":7,"history":{}}',
        b'{"id":7,"connect":{}}',
    ],
)
def test_what_breaks_the_protocol_ends_the_connection_with_3501(text: bytes) -> None:
    assert connected().receive(text, 0.0) == [BAD_REQUEST]


@pytest.mark.parametrize("text", [b"{}", b" { } ", b"{}\n", b"\n{}\n{}\n"])
def test_pongs_are_welcome_at_any_time(text: bytes) -> None:
    assert connected().receive(text, 0.0) == []


def test_a_trailing_line_end_and_unknown_fields_are_harmless() -> None:
    session = connected()
    text = b'{"id":7,"new":1,"publish":{"channel":"a","data":1,"new":2}}\n\n'
    assert only(session.receive(text, 0.0), Publish).data == b"1"


def test_replies_of_a_frame_leave_together_and_in_order() -> None:
    answers = connected().receive(frame(*(command(n, "rpc") for n in range(2, 6))), 0.0)
    assert [reply["id"] for reply in said([only(answers, Send)])] == [2, 3, 4, 5]


def test_what_was_said_before_an_offence_still_leaves() -> None:
    answers = connected().receive(
        frame(command(2, "rpc"), command(3, "publish", channel="a", data=1), command(4, "connect")), 0.0
    )
    assert [type(effect) for effect in answers] == [Send, Publish, Close]


def test_line_ends_of_the_application_never_part_a_message() -> None:
    push = encode_publication("a/#", b'{"x":\r\n1}', 3, b"", "a/b")
    assert b"\n" not in push and b"\r" not in push
    assert json.loads(push) == {
        "push": {"channel": "a/#", "pub": {"data": {"x": 1}, "offset": 3, "tags": {"topic": "a/b"}}}
    }


def test_decode_of_what_the_clients_send() -> None:
    ((number, request),) = decode_commands(
        b'{"id": 2, "history": {"channel": "a", "limit": 0, "reverse": false, "since": {"offset": 3, "epoch": ""}}}'
    )
    assert number == 2 and getattr(request, "since", None) == Position(3, "")
    with pytest.raises(BadFrame, match="no command"):
        decode_commands(b"\n")


# Errors.


@pytest.mark.parametrize(
    ("text", "code"),
    [
        (command(2, "rpc", method="f", data={}), 104),
        (command(2, "ping"), 108),
        (command(2, "refresh", token="t"), 108),
        (command(2, "sub_refresh", channel="a", token="t"), 108),
        (command(2, "subscribe", channel="a/#/b"), 107),
        (command(2, "subscribe", channel="a+"), 107),
        (command(2, "subscribe", channel="ä" * 128), 107),
        (command(2, "subscribe", channel="/" * 32), 107),
        (command(2, "subscribe", channel="a", tf={"key": "k", "cmp": "eq", "val": "v"}), 107),
        (command(2, "subscribe", channel="a", type=1), 108),
        (command(2, "publish", channel="a/+", data=1), 107),
        (command(2, "publish", channel="#", data=1), 107),
        (command(2, "publish", channel="a" * 256, data=1), 107),
        (command(2, "publish", channel="a"), 107),
        (command(2, "presence", channel="a#"), 107),
        (command(2, "presence_stats", channel="a#"), 107),
        (command(2, "history", channel="a#"), 107),
        (command(2, "history", channel="a", reverse=True, since={"offset": 0, "epoch": ""}), 107),
    ],
)
def test_a_bad_command_is_answered_with_an_error_and_nothing_else_happens(text: bytes, code: int) -> None:
    session = connected()
    assert error_of(session.receive(text, 0.0)) == (code, False)
    assert session.state is State.CONNECTED and session.subscriptions() == []
    assert only(session.receive(command(3, "subscribe", channel="a"), 0.0), Subscribe)


def test_every_error_has_words_and_the_right_ones_are_temporary() -> None:
    for code in range(100, 114):
        error = json.loads(encode_error(1, code))["error"]
        assert error["message"]
        assert error.get("temporary", False) is (code in (100, 111, 113))
    assert json.loads(encode_error(1, 1000))["error"] == {"code": 1000, "message": "error"}


def test_subscribing_twice_is_105_also_while_the_first_is_decided() -> None:
    session = connected()
    session.receive(command(2, "subscribe", channel="a"), 0.0)
    assert error_of(session.receive(command(3, "subscribe", channel="a"), 0.0)) == (105, False)
    session.subscribed("a", Subscribed(), 0.0)
    assert error_of(session.receive(command(4, "subscribe", channel="a"), 0.0)) == (105, False)


def test_more_subscriptions_than_allowed_are_106() -> None:
    session = connected(max_subscriptions=2)
    session.receive(frame(command(2, "subscribe", channel="a"), command(3, "subscribe", channel="b")), 0.0)
    session.subscribed("a", Subscribed(), 0.0)
    assert error_of(session.receive(command(4, "subscribe", channel="c"), 0.0)) == (106, False)
    session.subscribe_failed("b", 103, 0.0)
    assert only(session.receive(command(5, "subscribe", channel="c"), 0.0), Subscribe)


def test_a_refused_subscription_leaves_nothing_behind() -> None:
    session = connected()
    session.receive(command(2, "subscribe", channel="a"), 0.0)
    assert error_of(session.subscribe_failed("a", 103, 0.0)) == (103, False)
    assert not session.admits("a", 0, b"push")
    assert session.end() == []


def test_too_much_at_once_is_answered_with_a_temporary_error() -> None:
    session = connected(max_in_flight=BUSY)
    for number in range(BUSY):
        assert session.busy is False
        session.receive(command(number + 2, "presence", channel="a"), 0.0)
    assert session.busy
    assert error_of(session.receive(command(9999, "presence", channel="a"), 0.0)) == (111, True)
    session.presence(2, {})
    assert not session.busy
    assert only(session.receive(command(9999, "presence", channel="a"), 0.0), Presence)


# Commands and their answers.


def test_answers_may_come_in_any_order() -> None:
    session = connected(rpc=True)
    asked = session.receive(
        frame(
            command(2, "publish", channel="a", data=None),
            command(3, "presence", channel="a/+"),
            command(4, "presence_stats", channel="a"),
            command(5, "history", channel="a", limit=-1),
            command(6, "rpc", method="m"),
            command(7, "rpc"),
        ),
        0.0,
    )
    info = session.client_info()
    assert asked == [
        Publish(2, "a", b"null", info),
        Presence(3, "a/+"),
        PresenceStats(4, "a"),
        History(5, "a", 300, None, False),
        Rpc(6, "m", b"null"),
        Rpc(7, "", b"null"),
    ]
    assert session.in_flight == 6
    assert said(session.rpc_result(6, b'{"r":1}')) == [{"id": 6, "rpc": {"data": {"r": 1}}}]
    assert said(session.rpc_result(7)) == [{"id": 7, "rpc": {}}]
    assert said(session.presence(3, {"u-1": info})) == [
        {"id": 3, "presence": {"presence": {"u-1": {"client": "u-1", "user": "42"}}}}
    ]
    assert said(session.presence_stats(4, 3, 2)) == [
        {"id": 4, "presence_stats": {"num_clients": 3, "num_users": 2}}
    ]
    found = [Publication(b"1", 4, "a", info), Publication(b"2", 6, "a")]
    assert said(session.history(5, "a", found, 6, "e")) == [
        {
            "id": 5,
            "history": {
                "publications": [
                    {"data": 1, "offset": 4, "info": {"client": "u-1", "user": "42"}},
                    {"data": 2, "offset": 6},
                ],
                "offset": 6,
                "epoch": "e",
            },
        }
    ]
    assert error_of(session.failed(2, 100)) == (100, True)
    assert session.in_flight == 0


@pytest.mark.parametrize(("asked", "limit"), [(0, 0), (5, 5), (-1, 300), (-2, 300), (301, 300)])
def test_history_limits(asked: int, limit: int) -> None:
    text = command(2, "history", channel="a", limit=asked, since={"offset": 3, "epoch": "e"}, reverse=True)
    history = only(connected().receive(text, 0.0), History)
    assert history == History(2, "a", limit, Position(3, "e"), True)


def test_messages_reach_the_application_only_if_it_wants_them() -> None:
    text = b'{"send":{"data":{"x":1}}}'
    assert connected().receive(text, 0.0) == []
    assert connected(messages=True).receive(text, 0.0) == [Message(b'{"x":1}')]


def test_the_application_sends_to_one_client() -> None:
    assert said(connected().send(b'{"x":1}')) == [{"push": {"message": {"data": {"x": 1}}}}]
    assert opened().send(b"1") == []


def test_client_info_tells_what_the_application_said() -> None:
    session = connected(Accepted(user="ü", info=b'{"name":"U"}'))
    session.receive(command(2, "subscribe", channel="a"), 0.0)
    session.subscribed("a", Subscribed(info=b'{"color":"red"}'), 0.0)
    publish = only(session.receive(command(3, "publish", channel="a", data=1), 0.0), Publish)
    assert json.loads(publish.info) == {
        "client": "u-1",
        "user": "ü",
        "conn_info": {"name": "U"},
        "chan_info": {"color": "red"},
    }
    publish = only(session.receive(command(4, "publish", channel="b", data=1), 0.0), Publish)
    assert json.loads(publish.info) == {"client": "u-1", "user": "ü", "conn_info": {"name": "U"}}


def test_joins_and_leaves_reach_those_who_asked() -> None:
    session = subscribed("a", join_leave=True)
    assert session.wants_join_leave("a") and not session.wants_join_leave("b")
    assert not subscribed("a").wants_join_leave("a")
    info = session.client_info("a")
    assert json.loads(encode_join("a", info)) == {
        "push": {"channel": "a", "join": {"info": {"client": "u-1", "user": "42"}}}
    }
    assert json.loads(encode_leave("a", info))["push"]["leave"] == {"info": json.loads(info)}
    assert session.admits("a", 0, encode_join("a", info))


def test_the_interface_of_effects_is_complete() -> None:
    """Each effect that wants an answer names a method there is."""
    answers: list[Callable[..., object]] = [
        Session.connected,
        Session.subscribed,
        Session.published,
        Session.presence,
        Session.presence_stats,
        Session.history,
        Session.rpc_result,
        Session.refreshed,
        Session.sub_refreshed,
    ]
    for kind in (Connect, Subscribe, Publish, Presence, PresenceStats, History, Rpc, Refresh, SubRefresh):
        assert any(f"`{answer.__name__}`" in (kind.__doc__ or "") for answer in answers), kind
    assert effects.Config().max_recovery == 32 * 1024 * 1024
