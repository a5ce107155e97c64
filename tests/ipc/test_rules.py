"""Topic rules: precedence, the arithmetic of patterns against a naive model, reading, writing, comparing."""

from __future__ import annotations

import itertools
from typing import Any, get_args

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ipc.rules import (
    MAX_CACHED,
    Access,
    Rules,
    SlowPolicy,
    TopicRule,
    check_rule_key,
    parse_topics,
)
from ipc.topics import matches

ACCESS: tuple[Access, ...] = get_args(Access)


def rules(publish: dict[str, Access], **values: Any) -> Rules:
    """Rules that set publish and subscribe alike."""
    topics = {key: TopicRule(publish=access, subscribe=access) for key, access in publish.items()}
    return Rules(topics=topics, **values)


# --- precedence ---


def test_without_rules_anyone_may_where_anonymous_clients_are_let_in() -> None:
    for topic in ("a", "a/b", "$x"):
        assert Rules().may_publish(topic, False)
        assert Rules().may_publish(topic, True)
        assert Rules().slow_consumer(topic) == "close"
        assert not Rules(anonymous=False).may_publish(topic, False)
        assert Rules(anonymous=False).may_publish(topic, True)
    assert Rules().may_subscribe("#", False)
    assert not Rules(anonymous=False).may_subscribe("#", False)
    assert Rules(anonymous=False).may_subscribe("#", True)


@pytest.mark.parametrize(
    ("topic", "access"),
    [
        ("chat", "authenticated"),  # chat/# matches its parent
        ("chat/1", "nobody"),  # exact
        ("chat/1/x", "authenticated"),
        ("chat/2", "anyone"),  # an exact topic wins over the prefix of the same depth
        ("chat/2/x", "nobody"),
        ("chat/2/x/y", "nobody"),
        ("chatter", "nobody"),
        ("other/chat", "nobody"),
        ("/", "authenticated"),
        ("/a", "authenticated"),
        ("$chat", "anyone"),  # # does not reach $
        ("$chat/1", "anyone"),
        ("$sys", "nobody"),
        ("$sys/x", "nobody"),
    ],
)
def test_the_longest_key_wins(topic: str, access: Access) -> None:
    table = rules(
        {
            "#": "nobody",
            "chat/#": "authenticated",
            "chat/1": "nobody",
            "chat/2": "anyone",
            "chat/2/#": "nobody",
            "/#": "authenticated",
            "$sys/#": "nobody",
        }
    )
    assert (table.may_publish(topic, False), table.may_publish(topic, True)) == allowed(access)
    assert (table.may_subscribe(topic, False), table.may_subscribe(topic, True)) == allowed(access)


def allowed(access: Access) -> tuple[bool, bool]:
    return access == "anyone", access != "nobody"


def test_what_a_rule_does_not_set_comes_from_the_next_shorter_one() -> None:
    table = Rules(
        topics={
            "#": TopicRule(slow_consumer="latest"),
            "a/#": TopicRule(publish="nobody"),
            "a/b/#": TopicRule(subscribe="nobody", slow_consumer="drop_oldest"),
            "a/b/c": TopicRule(publish="anyone"),
            "a/b": TopicRule(),
        }
    )
    assert [table.slow_consumer(t) for t in ("x", "a", "a/b", "a/b/c", "$x")] == [
        "latest",
        "latest",
        "drop_oldest",
        "drop_oldest",
        "close",
    ]
    assert [table.may_publish(t, True) for t in ("x", "a", "a/b", "a/b/c", "a/b/c/d")] == [
        True,
        False,
        False,
        True,
        False,
    ]
    assert [table.may_subscribe(t, True) for t in ("x", "a", "a/b", "a/b/c")] == [True, True, False, False]


@pytest.mark.parametrize("access", [None, *ACCESS])
@pytest.mark.parametrize("anonymous", [True, False])
def test_who_may_broadcast_and_send_directly(access: Access | None, anonymous: bool) -> None:
    expected = allowed(access or ("anyone" if anonymous else "authenticated"))
    broadcast = Rules(client_broadcast=access, anonymous=anonymous)
    assert (broadcast.may_broadcast(False), broadcast.may_broadcast(True)) == expected
    assert broadcast.may_direct(True)
    direct = Rules(client_direct=access, anonymous=anonymous)
    assert (direct.may_direct(False), direct.may_direct(True)) == expected
    assert direct.may_broadcast(True)


# --- patterns (S12) ---


@pytest.mark.parametrize(
    ("keys", "pattern", "expected"),
    [
        ({"#": "nobody", "chat/#": "anyone"}, "chat/+", True),
        ({"#": "nobody", "chat/#": "anyone"}, "chat/#", True),
        ({"#": "nobody", "chat/#": "anyone"}, "chat", True),
        ({"#": "nobody", "chat/#": "anyone"}, "+", False),
        ({"#": "nobody", "chat/#": "anyone"}, "#", False),
        ({"#": "nobody", "chat/#": "anyone"}, "+/x", False),
        ({"#": "nobody", "chat/#": "anyone"}, "$SYS/#", True),
        ({"secret/#": "nobody"}, "#", False),
        ({"secret/#": "nobody"}, "+", False),  # secret/# applies to secret
        ({"secret/#": "nobody"}, "+/a/b", False),
        ({"secret/#": "nobody"}, "public/#", True),
        ({"secret/#": "nobody"}, "secrets/#", True),
        ({"secret/#": "nobody"}, "secret/+", False),
        ({"a/secret": "nobody"}, "+", True),
        ({"a/secret": "nobody"}, "+/+", False),
        ({"a/secret": "nobody"}, "+/public", True),
        ({"a/secret": "nobody"}, "a/+/+", True),
        ({"a/secret": "nobody"}, "a/#", False),
        # exact rules that shadow a prefix one do so only for themselves
        ({"a/#": "nobody", "a": "anyone"}, "a", True),
        ({"a/#": "nobody", "a": "anyone"}, "a/#", False),
        ({"a/#": "nobody", "a": "anyone"}, "+", True),
        ({"a/#": "nobody", "a": "anyone"}, "+/b", False),
        # deeper prefixes that shadow a shorter one
        ({"a/#": "nobody", "a/b/#": "anyone"}, "a/b/#", True),
        ({"a/#": "nobody", "a/b/#": "anyone"}, "+/b/+", True),
        ({"a/#": "nobody", "a/b/#": "anyone"}, "+/+/c", False),
        ({"#": "nobody", "a/#": "anyone", "a/b/#": "nobody"}, "a/c/#", True),
        ({"#": "nobody", "a/#": "anyone", "a/b/#": "nobody"}, "a/+/d", False),
        # $ and empty levels
        ({"$SYS/#": "nobody"}, "#", True),
        ({"$SYS/#": "nobody"}, "+/x", True),
        ({"$SYS/#": "nobody"}, "$SYS/+", False),
        ({"$SYS/x": "nobody"}, "$SYS/+", False),
        ({"a/$SYS": "nobody"}, "a/+", False),
        ({"/#": "nobody"}, "+", True),  # the only topic of one level that /# could match is the empty one
        ({"/#": "nobody"}, "+/+", False),
        ({"/#": "nobody"}, "/", False),
        ({"/#": "nobody"}, "+/#", False),
        ({"//#": "nobody"}, "/+", False),
        ({"/": "nobody"}, "+/+", False),
        ({"/": "nobody"}, "+", True),
    ],
)
def test_a_pattern_needs_every_rule_that_could_apply(
    keys: dict[str, Access], pattern: str, expected: bool
) -> None:
    assert rules(keys).may_subscribe(pattern, False) is expected


def test_a_rule_that_sets_only_publish_has_no_say_about_subscribing() -> None:
    table = Rules(topics={"a/#": TopicRule(publish="nobody"), "#": TopicRule(slow_consumer="latest")})
    assert table.may_subscribe("#", False)


@pytest.mark.parametrize("pattern", ["", "a/#/b", "a+", "#/#", "##"])
def test_an_invalid_pattern_may_not_be_subscribed(pattern: str) -> None:
    assert not Rules().may_subscribe(pattern, True)


# A finite universe is enough if it holds, for each level, a name that no rule and no pattern mentions, and is
# deeper than all of them: z is never a level of a key or pattern below.
NAMES = ("", "a", "b", "$a", "z")
KEY_LEVELS = st.sampled_from(["", "a", "b", "$a"])
DEPTH = 3
UNIVERSE = [
    "/".join(levels)
    for depth in range(1, DEPTH + 2)
    for levels in itertools.product(NAMES, repeat=depth)
    if levels != ("",)
]


def text(levels: list[str], ending: list[str]) -> str:
    return "/".join(levels + ending)


KEYS = st.builds(text, st.lists(KEY_LEVELS, max_size=DEPTH - 1), st.sampled_from([["#"], ["a"], ["b"], [""]]))
PATTERNS = st.builds(
    text,
    st.lists(st.sampled_from(["", "a", "b", "$a", "+"]), max_size=DEPTH - 1),
    st.sampled_from([["#"], ["+"], ["a"], ["$a"]]),
)
TABLES = st.dictionaries(KEYS.filter(bool), st.sampled_from([None, *ACCESS]), max_size=6)


def naive_effective(topic: str, table: dict[str, Access | None], default: Access) -> Access:
    """The contract's sentence, word by word."""
    keys = [key for key, access in table.items() if access is not None and matches(topic, key)]

    def length(key: str) -> tuple[int, bool]:
        return (len(key.split("/")) - key.endswith("#"), not key.endswith("#"))

    return table[max(keys, key=length)] or default if keys else default


@settings(max_examples=300, deadline=None)
@given(TABLES, st.lists(PATTERNS, min_size=1, max_size=10), st.booleans())
def test_agrees_with_a_naive_model(
    table: dict[str, Access | None], patterns: list[str], anonymous: bool
) -> None:
    tested = Rules(
        topics={key: TopicRule(publish=access, subscribe=access) for key, access in table.items()},
        anonymous=anonymous,
    )
    default: Access = "anyone" if anonymous else "authenticated"
    effective = {topic: naive_effective(topic, table, default) for topic in UNIVERSE}
    for topic, access in effective.items():
        assert (tested.may_publish(topic, False), tested.may_publish(topic, True)) == allowed(access), topic
    for pattern in patterns:
        strictest = min((effective[t] for t in UNIVERSE if matches(t, pattern)), key=ACCESS.index)
        answer = tested.may_subscribe(pattern, False), tested.may_subscribe(pattern, True)
        assert answer == allowed(strictest), pattern


def test_many_rules_and_plus_chains_cost_no_more_than_the_rules() -> None:
    # Every node of the tree of 2^13 keys is on the way of this pattern, and is visited once.
    keys = ["/".join(levels) for levels in itertools.product("ab", repeat=12)]
    table = rules({f"{key}/#": "anyone" for key in keys})
    assert table.may_subscribe("/".join("+" * 12) + "/#", False)
    assert not rules({**dict.fromkeys(keys, "anyone"), keys[-1]: "nobody"}).may_subscribe("#", False)


# --- the caches ---


def test_the_caches_are_bounded() -> None:
    table = Rules(topics={"a/#": TopicRule(publish="nobody", subscribe="nobody", slow_consumer="latest")})
    for number in range(MAX_CACHED * 2 + 10):
        assert not table.may_publish(f"a/{number}", True)
        assert not table.may_subscribe(f"a/{number}/+", True)
        assert table.slow_consumer(f"a/{number}") == "latest"
    table.may_publish("x" * 65536, True)
    caches = (table._publish, table._subscribe, table._slow_consumer)
    for cache in caches:
        assert 0 < len(cache) <= MAX_CACHED
        assert max(map(len, cache)) <= 255


# --- keys, reading and writing ---


@pytest.mark.parametrize("key", ["#", "/#", "a", "a/b", "a/#", "$SYS/#", "/", "a//b"])
def test_fine_keys(key: str) -> None:
    check_rule_key(key)


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("", "empty"),
        ("+", r"holds \+"),
        ("a/+/#", r"holds \+"),
        ("a/#/b", "goes on after #"),
        ("a#", "inside the level"),
        ("x" * 300, "300 characters"),
        ("a\0", "NUL"),
    ],
)
def test_wrong_keys_are_refused_in_words(key: str, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        check_rule_key(key)
    assert "key" in str(caught.value)
    with pytest.raises(ValueError, match=words):
        Rules(topics={key: TopicRule()})
    with pytest.raises(ValueError, match=words):
        parse_topics({key: {}})


@pytest.mark.parametrize(
    "table",
    [
        Rules(),
        Rules(anonymous=False, client_broadcast="nobody", client_direct="authenticated"),
        Rules(
            topics={
                "chat/#": TopicRule(publish="nobody", subscribe="anyone", slow_consumer="latest"),
                "räume/1": TopicRule(),
            }
        ),
    ],
)
def test_decode_reads_what_encode_wrote(table: Rules) -> None:
    assert Rules.decode(table.encode()) == table
    assert table.difference(Rules.decode(table.encode())) is None


def test_equal_rules_give_equal_bytes() -> None:
    one, two = TopicRule(publish="nobody"), TopicRule(subscribe="nobody")
    table = Rules(topics={"a": one, "b": two})
    assert table.may_publish("x", True)  # what was asked before does not count
    assert table == Rules(topics={"b": two, "a": one})
    assert table.encode() == Rules(topics={"b": two, "a": one}).encode()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "JSON"),
        (b"\xff", "JSON"),
        (b'{"topics"', "JSON"),
        (b"[]", "JSON object"),
        (b'{"topics": []}', "topics"),
        (b'{"topics": {"a": 1}}', 'topics."a" = 1'),
        (b'{"topics": {"+": {}}}', r"\+"),
        (
            b'{"topics": {"a/#": {"publish": "all"}}}',
            "topics.\"a/#\".publish = 'all'.*nobody, authen.*anyone",
        ),
        (b'{"topics": {"a": {"subscribe": 1}}}', 'topics."a".subscribe = 1'),
        (b'{"topics": {"a": {"slow_consumer": "anyone"}}}', "'anyone'.*close, drop_oldest, latest"),
        (b'{"topics": {"a": {"history_sizes": 5}}}', 'topics."a".history_sizes = 5: there is no such'),
        (b'{"client_direct": "me"}', "client_direct = 'me'"),
        (b'{"client_broadcast": ["anyone"]}', "client_broadcast = "),
        (b'{"anonymous": 1}', "anonymous = 1: must be one of true, false"),
        (b'{"anonymous": null}', "anonymous = None"),
        (b'{"colour": "red"}', "colour = 'red': there is no such"),
    ],
)
def test_decode_refuses_in_words(data: bytes, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Rules.decode(data)


@settings(deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=3) | st.sampled_from(ACCESS),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["topics", "a/#", "publish", "client_direct", "anonymous"])
                | st.text(max_size=3),
                inner,
                max_size=4,
            )
        ),
        max_leaves=8,
    )
)
def test_decode_reads_or_raises_value_error(value: object) -> None:
    try:
        table = Rules.decode(msgspec.json.encode(value))
    except ValueError:
        return
    assert Rules.decode(table.encode()) == table


@pytest.mark.parametrize("policy", get_args(SlowPolicy))
def test_parse_topics(policy: SlowPolicy) -> None:
    table = {"a/#": {"publish": "nobody", "slow_consumer": policy}, "b": {}}
    assert parse_topics(table) == {
        "a/#": TopicRule(publish="nobody", slow_consumer=policy),
        "b": TopicRule(),
    }


# --- comparing ---


@pytest.mark.parametrize(
    ("here", "running", "words"),
    [
        (
            rules({"chat/#": "anyone"}),
            rules({"chat/#": "nobody"}),
            "topics.\"chat/#\".publish is 'anyone' here, 'nobody' in the running hub",
        ),
        (
            Rules(topics={"a": TopicRule(slow_consumer="latest")}),
            Rules(),
            "topics.\"a\".slow_consumer is 'latest' here, not set in the running hub",
        ),
        (
            Rules(),
            Rules(topics={"a": TopicRule(subscribe="anyone")}),
            "topics.\"a\".subscribe is not set here, 'anyone' in the running hub",
        ),
        (
            Rules(client_direct="nobody"),
            Rules(client_direct="anyone"),
            "client_direct is 'nobody' here, 'anyone' in the running hub",
        ),
        (Rules(anonymous=False), Rules(), "anonymous is False here, True in the running hub"),
        (Rules(topics={"a": TopicRule()}), Rules(), None),
    ],
)
def test_difference(here: Rules, running: Rules, words: str | None) -> None:
    assert here.difference(running) == words


def history_rules() -> Rules:
    return Rules(
        topics=parse_topics(
            {
                "chat/#": {"history_size": 10, "history_ttl": 60, "presence": True},
                "chat/off": {"history_size": 0},
                "chat/long/#": {"history_size": 100},
                "last": {"history_size": 1},
                "all/#": {"history_size": 5},
                "all/quiet/#": {"presence": False},
            }
        )
    )


def test_retention_comes_from_the_longest_key_that_sets_each_part() -> None:
    rules = history_rules()
    for topic, size, ttl in (
        ("chat", 10, 60_000),
        ("chat/x/y", 10, 60_000),
        ("chat/long/z", 100, 60_000),
        ("last", 1, 0),
    ):
        retention = rules.retention(topic)
        assert retention is not None
        assert (retention.size, retention.ttl_ms) == (size, ttl)
        assert rules.retention(topic) is retention
    assert rules.retention("chat/off") is None
    assert rules.retention("other") is None
    assert rules.any_history and rules.any_presence
    assert not Rules().any_history and not Rules().any_presence


@pytest.mark.parametrize(
    ("pattern", "recoverable"),
    [
        ("chat/1", True),
        ("chat/off", False),
        ("chat/#", False),  # it matches chat/off
        ("chat/+", False),
        ("chat/long/#", True),
        ("chat/+/x", True),
        ("all/#", True),
        ("all/+/b", True),
        ("+/x", False),
        ("#", False),
        ("last", True),
        ("last/#", False),
        ("other", False),
        ("a#", False),
    ],
)
def test_a_pattern_is_recoverable_when_all_it_could_match_has_history(
    pattern: str, recoverable: bool
) -> None:
    assert history_rules().recoverable(pattern) is recoverable


def test_presence_of_patterns() -> None:
    rules = history_rules()
    assert rules.has_presence("chat/1") and rules.has_presence("chat/#")
    assert not rules.has_presence("all/1") and not rules.has_presence("#")


def test_history_rules_travel_and_differ() -> None:
    rules = history_rules()
    assert Rules.decode(rules.encode()) == rules
    other = Rules(topics=parse_topics({"chat/#": {"history_size": 11}}))
    assert "history_size" in (
        Rules(topics=parse_topics({"chat/#": {"history_size": 10}})).difference(other) or ""
    )
    assert "data_dir" in (Rules(data_dir="/a").difference(Rules(data_dir="/b")) or "")
    assert Rules.decode(Rules(data_dir="/a", store_size=1 << 20).encode()).data_dir == "/a"
