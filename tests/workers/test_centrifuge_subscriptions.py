"""Subscriptions in the Centrifuge state machine: positions, recovery, order, unsubscribing, the server's own."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from ipc.topics import InvalidTopic
from workers.centrifuge import State
from workers.centrifuge_effects import (
    Accepted,
    Publication,
    Send,
    ServerSubscription,
    Subscribe,
    Subscribed,
    Unsubscribe,
)
from workers.centrifuge_messages import (
    Position,
    encode_disconnect,
    encode_publication,
)
from workers.codes import (
    CHANNEL_LIMIT,
    INSUFFICIENT_STATE,
    Close,
)

from .centrifuge_support import (
    HISTORY,
    command,
    connected,
    error_of,
    frame,
    only,
    opened,
    reply_of,
    said,
    subscribed,
    wanted,
)

# Subscriptions and positions.


def subscribe_result(result: Subscribed, **fields: Any) -> dict[str, Any]:
    session = connected()
    session.receive(command(2, "subscribe", channel="a", **fields), 0.0)
    return reply_of(session.subscribed("a", result, 0.0))


def test_a_position_is_told_to_those_who_asked_where_there_is_history() -> None:
    position = {"positioned": True, "epoch": "e720", "offset": 7}
    assert subscribe_result(HISTORY) == {}
    assert subscribe_result(HISTORY, positioned=True) == position
    assert subscribe_result(HISTORY, recoverable=True) == {"recoverable": True, **position}
    assert subscribe_result(Subscribed(), positioned=True, recoverable=True) == {}


def test_what_is_recovered_starts_at_the_clients_position() -> None:
    result = Subscribed(
        recoverable=True,
        epoch="e",
        offset=9,
        recovered=True,
        publications=[Publication(b"1", 6, "a"), Publication(b"2", 9, "a")],
    )
    body = subscribe_result(result, recover=True, offset=5, epoch="e")
    assert body == {
        "recoverable": True,
        "positioned": True,
        "epoch": "e",
        "offset": 5,
        "was_recovering": True,
        "recovered": True,
        "publications": [{"data": 1, "offset": 6}, {"data": 2, "offset": 9}],
    }


def test_nothing_missed_is_recovered_too() -> None:
    result = Subscribed(recoverable=True, epoch="e", offset=7, recovered=True)
    body = subscribe_result(result, recover=True, offset=7, epoch="e")
    assert body["recovered"] is True and body["publications"] == [] and body["offset"] == 7


def test_recover_without_an_offset_means_from_the_beginning() -> None:
    session = connected()
    subscribe = only(session.receive(command(2, "subscribe", channel="a", recover=True), 0.0), Subscribe)
    assert subscribe.recover and subscribe.recoverable and subscribe.since == Position(0, "")


def test_an_incomplete_recovery_has_no_publications_and_the_top() -> None:
    result = Subscribed(recoverable=True, epoch="e2", offset=9, publications=[Publication(b"2", 9, "a")])
    body = subscribe_result(result, recover=True, offset=5, epoch="e")
    assert body["was_recovering"] is True and body["recovered"] is False
    assert "publications" not in body and body["offset"] == 9 and body["epoch"] == "e2"


def test_the_sentinel_of_invalidated_state_never_matches() -> None:
    result = Subscribed(recoverable=True, epoch="_", offset=9, recovered=True)
    assert subscribe_result(result, recover=True, offset=0, epoch="_")["recovered"] is False


def test_where_nothing_can_be_recovered_the_client_is_told_so() -> None:
    body = subscribe_result(Subscribed(recovered=True), recover=True, recoverable=True, offset=5, epoch="e")
    assert body == {"was_recovering": True}


def test_a_client_may_want_an_error_instead_of_an_incomplete_recovery() -> None:
    session = connected()
    text = command(2, "subscribe", channel="a", recoverable=True, recover=True, offset=5, epoch="e", flag=3)
    session.receive(text, 0.0)
    answers = session.subscribed("a", HISTORY, 0.0)
    assert error_of(answers) == (112, False)
    assert [effect.channel for effect in wanted(answers, Unsubscribe)] == ["a"]
    session.receive(text.replace(b'"recover": true', b'"recover": false'), 0.0)
    assert reply_of(session.subscribed("a", HISTORY, 0.0))["offset"] == 7
    session = connected()
    session.receive(text, 0.0)
    assert reply_of(session.subscribed("a", Subscribed(), 0.0)) == {"was_recovering": True}


def test_a_recovery_has_a_bound_of_its_own() -> None:
    session = connected(max_recovery=1000)
    session.receive(command(2, "subscribe", channel="a", recover=True, epoch="e"), 0.0)
    missed = [Publication(b'"' + b"x" * 300 + b'"', offset, "a") for offset in range(1, 5)]
    result = Subscribed(recoverable=True, epoch="e", offset=4, recovered=True, publications=missed)
    body = reply_of(session.subscribed("a", result, 0.0))
    assert body["recovered"] is False and body["offset"] == 4 and "publications" not in body


def test_duplicates_are_dropped_and_offsets_may_skip() -> None:
    session = subscribed("a", HISTORY, positioned=True)
    admitted = [offset for offset in (5, 7, 8, 8, 20, 9, 21) if session.admits("a", offset, b"x")]
    assert admitted == [8, 20, 21]
    assert session.admits("a", 0, b"x"), "what has no offset is no duplicate"
    assert not session.admits("b", 30, b"x")
    subscription = session.subscription("a")
    assert subscription is not None and subscription.live and subscription.position == 21
    assert not subscription.admits(21, b"x") and subscription.admits(22, b"x")


def test_a_pattern_without_a_position_takes_what_comes_in_any_order() -> None:
    session = subscribed("a/#", Subscribed())
    assert [offset for offset in (9, 8, 0) if session.admits("a/#", offset, b"x")] == [9, 8, 0]


def test_nothing_is_pushed_before_the_reply_and_nothing_is_lost() -> None:
    session = connected()
    session.receive(command(2, "subscribe", channel="a/+", recoverable=True), 0.0)
    pushes = {
        offset: encode_publication("a/+", b"%d" % offset, offset, b"", "a/b") for offset in range(5, 11)
    }
    for offset in (5, 8, 7, 10, 9, 9):
        assert not session.admits("a/+", offset, pushes[offset])
    answers = said(session.subscribed("a/+", HISTORY, 0.0))
    assert answers[0]["subscribe"]["offset"] == 7
    assert [push["push"]["pub"]["offset"] for push in answers[1:]] == [8, 9, 10]
    assert {push["push"]["channel"] for push in answers[1:]} == {"a/+"}
    assert answers[1]["push"]["pub"]["tags"] == {"topic": "a/b"}
    assert not session.admits("a/+", 10, b"x") and session.admits("a/+", 11, b"x")


def test_recovered_and_live_publications_are_merged_without_a_duplicate() -> None:
    session = connected()
    session.receive(command(2, "subscribe", channel="a", recover=True, epoch="e", offset=3), 0.0)
    for offset in (6, 7):
        session.admits("a", offset, encode_publication("a", b"0", offset))
    missed = [Publication(b"0", offset, "a") for offset in (4, 6)]
    result = Subscribed(recoverable=True, epoch="e", offset=6, recovered=True, publications=missed)
    reply, push = session.subscribed("a", result, 0.0)
    assert isinstance(reply, Send) and reply.recovery
    assert [item["offset"] for item in said([reply])[0]["subscribe"]["publications"]] == [4, 6]
    assert said([push])[0]["push"]["pub"]["offset"] == 7


def test_what_waits_for_a_reply_is_bounded() -> None:
    session = connected(max_buffered=100)
    session.receive(command(2, "subscribe", channel="a"), 0.0)
    for _ in range(5):
        assert not session.admits("a", 0, b"x" * 30)
    answers = session.subscribed("a", Subscribed(), 0.0)
    assert error_of(answers) == (100, True)
    assert len(wanted(answers, Unsubscribe)) == 1 and session.subscriptions() == []


def test_an_exact_and_a_wildcard_subscription_are_two() -> None:
    session = connected()
    session.receive(
        frame(command(2, "subscribe", channel="a/b"), command(3, "subscribe", channel="a/#")), 0.0
    )
    session.subscribed("a/b", Subscribed(), 0.0)
    session.subscribed("a/#", Subscribed(), 0.0)
    assert session.admits("a/b", 1, b"x") and session.admits("a/#", 1, b"x")
    assert b"tags" not in encode_publication("a/b", b"1", 1, b"", "a/b")


# Unsubscribing.


def test_unsubscribe_is_idempotent_and_ends_the_pushes() -> None:
    session = subscribed("a")
    answers = session.receive(command(3, "unsubscribe", channel="a"), 0.0)
    assert wanted(answers, Unsubscribe) == [Unsubscribe("a", 0, session.client_info())]
    assert said(answers) == [{"id": 3, "unsubscribe": {}}]
    assert not session.admits("a", 0, b"x")
    assert said(session.receive(command(4, "unsubscribe", channel="a"), 0.0)) == [
        {"id": 4, "unsubscribe": {}}
    ]
    assert said(session.receive(command(5, "unsubscribe", channel="a#"), 0.0)) == [
        {"id": 5, "unsubscribe": {}}
    ]


def test_a_quick_unsubscribe_and_subscribe_wait_for_the_first_answer() -> None:
    session = connected()
    session.receive(command(2, "subscribe", channel="a"), 0.0)
    later = [command(3, "unsubscribe", channel="a"), command(4, "subscribe", channel="a", positioned=True)]
    assert session.receive(frame(*later, command(5, "unsubscribe", channel="a")), 0.0) == []
    answers = session.subscribed("a", Subscribed(), 0.0)
    assert [type(effect) for effect in answers] == [Send, Unsubscribe, Send, Subscribe]
    assert [reply["id"] for reply in said(answers)] == [2, 3]
    assert only(answers[-1:], Subscribe).positioned
    answers = session.subscribed("a", Subscribed(), 0.0)
    assert [reply["id"] for reply in said(answers)] == [4, 5]
    assert session.in_flight == 0 and session.subscriptions() == []


def test_what_waits_goes_on_after_a_refusal_too() -> None:
    session = connected()
    session.receive(frame(command(2, "subscribe", channel="a"), command(3, "unsubscribe", channel="a")), 0.0)
    answers = session.subscribe_failed("a", 103, 0.0)
    assert [reply["id"] for reply in said(answers)] == [2, 3]
    assert wanted(answers, Unsubscribe) == []


@pytest.mark.parametrize(
    ("code", "reason"),
    [(2000, "server unsubscribe"), (2500, "insufficient state"), (2777, "unsubscribed by the server")],
)
def test_the_server_unsubscribes_with_a_code_and_words(code: int, reason: str) -> None:
    session = subscribed("a")
    answers = session.unsubscribe("a", code)
    assert said(answers) == [{"push": {"channel": "a", "unsubscribe": {"code": code, "reason": reason}}}]
    assert wanted(answers, Unsubscribe) == [Unsubscribe("a", code, session.client_info())]
    assert session.unsubscribe("a", code) == []
    assert only(session.receive(command(9, "subscribe", channel="a"), 0.0), Subscribe)


def test_the_server_unsubscribes_what_is_being_made_when_it_is_made() -> None:
    session = connected()
    session.receive(command(2, "subscribe", channel="a"), 0.0)
    assert session.unsubscribe("a", 2500) == []
    answers = said(session.subscribed("a", Subscribed(), 0.0))
    assert answers[0]["id"] == 2 and answers[1]["push"]["unsubscribe"]["code"] == 2500


def test_codes_out_of_range_are_refused() -> None:
    session = subscribed("a")
    for code in (1999, 3000):
        with pytest.raises(ValueError, match=str(code)):
            session.unsubscribe("a", code)
    for code in (1000, 2999, 5000):
        with pytest.raises(ValueError, match=str(code)):
            session.disconnect(code)
    with pytest.raises(ValueError, match="123 bytes|at most 123"):
        session.disconnect(4000, "x" * 124)
    assert session.subscriptions() == ["a"]


def test_a_lost_position_brings_the_client_back() -> None:
    session = subscribed("a", HISTORY, positioned=True)
    (push,) = said(session.insufficient("a"))
    assert push["push"]["unsubscribe"]["code"] == 2500
    session = connected()
    session.subscribe("s", ServerSubscription())
    session.subscribed("s", HISTORY, 0.0)
    assert session.insufficient("s") == [INSUFFICIENT_STATE]


# Server-side subscriptions.


def test_server_side_subscriptions_come_with_the_connect_reply() -> None:
    session = opened()
    subs = {"s/1": {"recover": True, "offset": 3, "epoch": "e"}, "gone": {"recover": True, "epoch": "e"}}
    session.receive(frame(command(1, "connect", subs=subs), command(2, "subscribe", channel="s/1")), 0.0)
    asked = session.connected(
        Accepted(subscriptions={"s/1": ServerSubscription(), "s/2": ServerSubscription(join_leave=True)}), 0.0
    )
    assert asked == [
        Subscribe(
            "s/1",
            recover=True,
            since=Position(3, "e"),
            positioned=True,
            recoverable=True,
            server_side=True,
        ),
        Subscribe("s/2", positioned=True, recoverable=True, join_leave=True, server_side=True),
    ]
    assert session.subscribed("s/2", Subscribed(data=b"[1]"), 0.0) == []
    assert not session.admits("s/2", 0, encode_publication("s/2", b'"live"'))
    missed = [Publication(b'"missed"', 5, "s/1")]
    found = Subscribed(recoverable=True, epoch="e", offset=5, recovered=True, publications=missed)
    answers = session.subscribed("s/1", found, 0.0)
    reply, push, error = said(answers)
    assert reply["connect"]["subs"] == {
        "s/1": {
            "recoverable": True,
            "positioned": True,
            "epoch": "e",
            "offset": 3,
            "was_recovering": True,
            "recovered": True,
            "publications": [{"data": "missed", "offset": 5}],
        },
        "s/2": {"data": [1]},
    }
    assert push["push"]["pub"]["data"] == "live"
    assert error["error"]["code"] == 105, "it is subscribed already"
    assert session.subscriptions() == ["s/1", "s/2"]
    assert not session.admits("s/1", 5, b"x") and session.admits("s/1", 6, b"x")


def test_a_refused_server_side_subscription_refuses_the_connection() -> None:
    session = opened()
    session.receive(command(1, "connect"), 0.0)
    session.connected(Accepted(subscriptions={c: ServerSubscription() for c in "abc"}), 0.0)
    session.subscribed("a", Subscribed(), 0.0)
    answers = session.subscribe_failed("b", 100, 0.0)
    assert error_of(answers) == (100, True)
    assert [effect.channel for effect in wanted(answers, Unsubscribe)] == ["a"]
    assert session.state is State.FAILED
    assert [e.channel for e in wanted(session.subscribed("c", Subscribed(), 0.0), Unsubscribe)] == ["c"]


def test_too_many_or_bad_server_side_subscriptions() -> None:
    session = opened(max_subscriptions=1)
    session.receive(command(1, "connect"), 0.0)
    with pytest.raises(InvalidTopic):
        session.connected(Accepted(subscriptions={"a#": ServerSubscription()}), 0.0)
    subscriptions = {"a": ServerSubscription(), "b": ServerSubscription()}
    assert session.connected(Accepted(subscriptions=subscriptions), 0.0) == [CHANNEL_LIMIT]


def test_the_application_subscribes_a_connected_client() -> None:
    session = connected(max_subscriptions=1)
    subscribe = only(session.subscribe("s", ServerSubscription(recoverable=False)), Subscribe)
    assert subscribe == Subscribe("s", positioned=True, server_side=True)
    session.admits("s", 8, encode_publication("s", b"8", 8))
    session.admits("s", 7, encode_publication("s", b"7", 7))
    begun, push = said(session.subscribed("s", HISTORY, 0.0))
    assert begun == {
        "push": {"channel": "s", "subscribe": {"positioned": True, "epoch": "e720", "offset": 7}}
    }
    assert push["push"]["pub"]["offset"] == 8
    assert session.subscribe("s", ServerSubscription()) == []
    with pytest.raises(ValueError, match="1 subscriptions"):
        session.subscribe("t", ServerSubscription())
    answers = session.unsubscribe("s")
    assert wanted(answers, Unsubscribe)[0].server_side
    assert session.subscribe("s", ServerSubscription())
    assert session.subscribe_failed("s", 103, 0.0) == []


# The end.


def test_at_the_end_each_subscription_is_undone_once() -> None:
    session = subscribed("a")
    session.receive(command(3, "subscribe", channel="b"), 0.0)
    session.receive(command(4, "presence", channel="a"), 0.0)
    assert session.disconnect(3001, "shutdown") == [Close(3001, "shutdown")]
    assert not session.admits("a", 0, b"x")
    assert session.end() == [Unsubscribe("a", 3001, session.client_info())]
    assert session.end() == []
    assert session.presence(4, {}) == [] and session.published(9) == [] and session.failed(9, 100) == []
    assert wanted(session.subscribed("b", Subscribed(), 0.0), Unsubscribe) == [
        Unsubscribe("b", 3001, session.client_info())
    ]
    assert session.disconnect(3001) == [] and session.timer(99.0) == [] and session.next_deadline == math.inf


def test_a_subscription_answered_between_close_and_end_is_undone_at_once() -> None:
    session = connected()
    session.receive(command(2, "subscribe", channel="a"), 0.0)
    session.disconnect(3000)
    assert len(session.subscribed("a", Subscribed(), 0.0)) == 1
    assert session.end() == []


def test_the_transport_can_be_lost_at_any_time() -> None:
    assert opened().end() == []
    session = opened()
    session.receive(command(1, "connect"), 0.0)
    assert (
        session.end() == [] and session.connected(Accepted(), 0.0) == [] and session.connect_failed(100) == []
    )


def test_a_disconnect_push_stands_for_the_close_frame_elsewhere() -> None:
    assert json.loads(encode_disconnect(3001, "shutdown")) == {
        "push": {"disconnect": {"code": 3001, "reason": "shutdown"}}
    }
