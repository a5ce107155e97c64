"""Time in the Centrifuge state machine: pings and pongs, stale connections, tokens that expire."""

from __future__ import annotations

import json
import math

import pytest

from workers.centrifuge import Session
from workers.centrifuge_effects import (
    Accepted,
    Config,
    Refresh,
    Send,
    ServerSubscription,
    SubRefresh,
    Subscribed,
    Unsubscribe,
)
from workers.codes import (
    BAD_REQUEST,
    CONNECTION_EXPIRED,
    NO_PONG,
    STALE,
    SUBSCRIPTION_EXPIRED,
)

from .centrifuge_support import (
    command,
    connected,
    error_of,
    opened,
    reply_of,
    said,
    wanted,
)

# Time.


@pytest.mark.parametrize(("jitter", "first"), [(0.0, 12.5), (0.5, 18.75), (0.99, 24.875)])
def test_the_first_ping_comes_after_half_to_a_whole_interval(jitter: float, first: float) -> None:
    session = Session(Config(), client_id="u", now=0.0, jitter=jitter)
    session.receive(command(1, "connect"), 0.0)
    session.connected(Accepted(), 0.0)
    assert session.next_deadline == first
    assert session.timer(first - 0.1) == []
    assert session.timer(first) == [Send(b"{}")]


def test_pings_keep_their_schedule_on_a_busy_connection() -> None:
    session = connected()
    at = session.next_deadline
    for _ in range(5):
        session.receive(command(2, "rpc"), at - 0.1)
        assert session.timer(at) == [Send(b"{}")]
        session.receive(b"{}", at)
        assert session.timer(at + 24.9) == []
        at += 25


def test_a_missing_pong_ends_the_connection() -> None:
    session = connected(ping_timeout=4.0)
    at = session.next_deadline
    session.timer(at)
    session.receive(command(2, "rpc"), at + 3.0)
    assert session.next_deadline == at + 4.0
    assert session.timer(at + 3.9) == []
    assert session.timer(at + 4.0) == [NO_PONG]


def test_a_pong_in_time_keeps_the_connection() -> None:
    session = connected()
    at = session.next_deadline
    session.timer(at)
    session.receive(b"{}", at + 9.9)
    assert session.timer(at + 10.0) == []
    assert session.next_deadline == at + 25.0


def test_a_pong_timeout_beyond_the_interval_counts_from_the_oldest_ping() -> None:
    session = connected(ping_interval=4.0, ping_timeout=10.0)
    at = session.next_deadline
    for n in range(3):
        assert session.timer(at + 4.0 * n) == [Send(b"{}")]
    assert session.timer(at + 10.0) == [NO_PONG]


def test_while_we_do_not_read_the_pong_deadline_stands_still() -> None:
    session = connected()
    at = session.next_deadline
    session.timer(at)
    session.reading_paused(at + 4.0)
    session.reading_paused(at + 5.0)
    assert session.timer(at + 24.0) == []
    assert session.timer(at + 25.0) == [Send(b"{}")], "pings go on: the client wants them"
    session.reading_resumed(at + 30.0)
    assert session.next_deadline == at + 36.0
    assert session.timer(at + 36.0) == [NO_PONG]


def test_a_ping_sent_while_we_do_not_read_waits_for_its_pong_from_then_on() -> None:
    session = connected()
    at = session.next_deadline
    session.reading_paused(at - 1.0)
    session.timer(at)
    session.reading_resumed(at + 20.0)
    assert session.timer(at + 29.9) == [Send(b"{}")]
    session.receive(b"{}", at + 29.9)
    assert session.timer(at + 31.0) == []
    session.reading_paused(at + 32.0)
    session.reading_resumed(at + 33.0)
    assert session.next_deadline == at + 29.9 + 25.0


def test_a_worker_that_stood_still_does_not_blame_its_clients() -> None:
    session = connected()
    at = session.next_deadline
    session.timer(at)
    assert session.timer(at + 20.0) == []
    assert session.next_deadline == at + 21.0
    session.receive(b"{}", at + 20.1)
    assert session.timer(at + 21.0) == []
    fresh = opened()
    assert fresh.timer(60.0) == []
    assert fresh.timer(61.0) == [STALE]


# Tokens: what the state machine is ready for.


def test_an_expired_connection_is_closed_after_its_grace_unless_refreshed() -> None:
    session = connected(Accepted(user="u", ttl=60), tokens=True, ping_interval=0, expired_grace=25.0)
    assert session.next_deadline == 85.0
    assert session.receive(command(2, "refresh", token="t"), 60.0) == [Refresh(2, "t")]
    assert said(session.refreshed(2, 60, 61.0, b'{"n":2}')) == [
        {"id": 2, "refresh": {"client": "u-1", "version": "flockwire", "expires": True, "ttl": 60}}
    ]
    assert json.loads(session.client_info())["conn_info"] == {"n": 2}
    assert session.timer(85.0) == [] and session.next_deadline == 146.0
    assert session.timer(146.0) == [CONNECTION_EXPIRED]
    session = connected(Accepted(ttl=60), tokens=True, ping_interval=0)
    session.receive(command(2, "refresh", token="t"), 60.0)
    assert "expires" not in said(session.refreshed(2, None, 60.0))[0]["refresh"]
    assert session.next_deadline == math.inf
    assert session.receive(command(3, "refresh"), 60.0) == [BAD_REQUEST]


def test_an_expired_subscription_is_ended_after_its_grace_unless_refreshed() -> None:
    session = connected(tokens=True, ping_interval=0)
    session.receive(command(2, "subscribe", channel="a", token="t"), 0.0)
    assert reply_of(session.subscribed("a", Subscribed(ttl=0.5), 0.0)) == {"expires": True, "ttl": 1}
    assert session.next_deadline == 25.5
    assert session.receive(command(3, "sub_refresh", channel="a", token="t2"), 20.0) == [
        SubRefresh(3, "a", "t2")
    ]
    assert said(session.sub_refreshed(3, "a", 10, 20.0, b"7")) == [
        {"id": 3, "sub_refresh": {"expires": True, "ttl": 10}}
    ]
    assert json.loads(session.client_info("a"))["chan_info"] == 7
    assert session.timer(25.5) == [] and session.next_deadline == 55.0
    answers = session.timer(55.0)
    assert said(answers)[0]["push"]["unsubscribe"]["code"] == 2501
    assert len(wanted(answers, Unsubscribe)) == 1
    assert error_of(session.receive(command(4, "sub_refresh", channel="a", token="t"), 60.0)) == (103, False)


def test_sub_refresh_needs_channel_and_token_and_an_expired_server_side_one_closes() -> None:
    session = connected(tokens=True, ping_interval=0)
    session.subscribe("s", ServerSubscription())
    session.subscribed("s", Subscribed(ttl=5), 0.0)
    assert error_of(session.receive(command(4, "sub_refresh", channel="s"), 1.0)) == (107, False)
    assert session.timer(30.0) == [SUBSCRIPTION_EXPIRED]
    assert connected(tokens=True).receive(command(4, "sub_refresh", token="t"), 0.0) == [BAD_REQUEST]
