"""The topic grammar against MQTT 5, section 4.7, row by row, and against a naive matcher."""

from __future__ import annotations

import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ipc.topics import (
    MAX_TOPIC_BYTES,
    MAX_TOPIC_LEVELS,
    InvalidTopic,
    check_pattern,
    check_topic,
    check_wildcards,
    is_pattern,
    matches,
    prefix_run,
    prefix_runs,
    shown,
)

# --- matches: the rows of the standard ---

MATCHING = [
    # 4.7.1.2: # is any number of levels, the parent included
    ("sport/tennis/player1", "sport/tennis/player1/#"),
    ("sport/tennis/player1/ranking", "sport/tennis/player1/#"),
    ("sport/tennis/player1/score/wimbledon", "sport/tennis/player1/#"),
    ("sport", "sport/#"),
    ("sport/", "sport/#"),
    ("sport", "#"),
    ("/", "#"),
    ("sport/tennis/player1", "#"),
    ("sport/tennis", "sport/tennis/#"),
    # 4.7.1.3: + is exactly one level
    ("sport/tennis/player1", "sport/tennis/+"),
    ("sport/", "sport/+"),
    ("finance", "+"),
    ("sport/tennis/player1", "+/tennis/#"),
    ("tennis", "+/#"),
    ("tennis/a/b", "+/#"),
    ("sport/x/player1", "sport/+/player1"),
    ("/finance", "+/+"),
    ("/finance", "/+"),
    ("sport/tennis", "sport/+/#"),
    # 4.7.2: topics with $ are matched by patterns that name it
    ("$SYS/monitor/Clients", "$SYS/#"),
    ("$SYS/monitor/Clients", "$SYS/monitor/+"),
    ("$SYS", "$SYS/#"),
    ("$SYS", "$SYS"),
    ("a/$SYS", "a/+"),
    ("a/$SYS", "+/$SYS"),
    # 4.7.3: exact, with case, empty levels and spaces
    ("news", "news"),
    ("Accounts payable", "Accounts payable"),
    ("a//b", "a//b"),
    ("a//b", "a/+/b"),
    ("/", "/"),
    ("/", "+/+"),
    ("/", "/+"),
    ("/", "/#"),
    ("/x", "/#"),
    ("//", "+/+/+"),
    ("a/", "a/"),
    ("räume/42", "räume/+"),
]

NOT_MATCHING = [
    ("sport/tennis/player1/ranking", "sport/tennis/+"),
    ("sport", "sport/+"),
    ("/finance", "+"),
    ("finance", "/+"),
    ("finance", "/#"),
    ("sports", "sport/#"),
    ("sport", "sport/tennis/#"),
    ("sport/tennis/player1", "sport/+"),
    ("a/b", "+/+/+"),
    ("a/b/c", "+/+"),
    # 4.7.2-1: leading wildcards do not match a leading $
    ("$SYS/x", "#"),
    ("$SYS/x", "+/x"),
    ("$SYS", "+"),
    ("$SYS", "#"),
    ("$SYS/x", "+/#"),
    ("$", "#"),
    # 4.7.3-4: nothing is normalised
    ("ACCOUNTS", "Accounts"),
    ("/finance", "finance"),
    ("a/", "a"),
    ("a", "a/"),
    ("a//b", "a/b"),
    # 4.7.1-1 and 4.7.1-2: invalid patterns
    ("sport/tennis", "sport/tennis#"),
    ("sport/tennis", "sport/tennis#/ranking"),
    ("sport/tennis/ranking", "sport/tennis/#/ranking"),
    ("x/a", "#/a"),
    ("a/x/b", "a/#/b"),
    ("a/b", "#/#"),
    ("sport", "sport+"),
    ("sportx", "sport+"),
    ("a/b", "a/+b"),
    ("a/test", "a/te+"),
    ("ab", "++"),
    ("a", "##"),
    ("a", ""),
    # 4.7.3-1 and 4.7.1: no topic names
    ("", ""),
    ("", "+"),
    ("", "#"),
    ("a/+", "a/+"),
    ("a/#", "a/#"),
    ("#", "#"),
    ("+", "+"),
    ("a+b", "a+b"),
]


@pytest.mark.parametrize(("topic", "pattern"), MATCHING)
def test_matches(topic: str, pattern: str) -> None:
    assert matches(topic, [pattern])
    assert matches(topic, pattern), "a single string is one pattern"
    assert prefix_run(pattern) in prefix_runs(topic) or not is_pattern(pattern)


@pytest.mark.parametrize(("topic", "pattern"), NOT_MATCHING)
def test_does_not_match(topic: str, pattern: str) -> None:
    assert not matches(topic, [pattern])
    assert not matches(topic, pattern)


def test_one_of_several_patterns_is_enough() -> None:
    assert matches("a/b", ["x", "a/#/b", "a/+"])
    assert matches("a/b", (pattern for pattern in ("x", "a/b")))
    assert not matches("a/b", ["x", "a"])
    assert not matches("a/b", [])
    assert not matches("a/b", {"a/b/c": 1})


def naive(topic: list[str], pattern: list[str]) -> bool:
    """The standard's text as a recursion, for valid patterns and no $."""
    if pattern == ["#"]:
        return True
    if not topic or not pattern:
        return topic == pattern
    return pattern[0] in ("+", topic[0]) and naive(topic[1:], pattern[1:])


LEVELS = st.lists(st.sampled_from(["", "a", "b", "$a", "+", "#", "a+", "#b"]), min_size=1, max_size=5)


@settings(deadline=None)
@given(LEVELS, LEVELS)
def test_agrees_with_a_naive_matcher(topic: list[str], pattern: list[str]) -> None:
    valid_topic = topic != [""] and not any("+" in level or "#" in level for level in topic)
    valid_pattern = (
        pattern != [""]
        and not any(level not in ("+", "#") and ("+" in level or "#" in level) for level in pattern)
        and "#" not in pattern[:-1]
    )
    hidden = topic[0].startswith("$") and pattern[0] in ("+", "#")
    expected = valid_topic and valid_pattern and not hidden and naive(topic, pattern)
    assert matches("/".join(topic), "/".join(pattern)) == expected


@settings(deadline=None)
@given(st.text(), st.lists(st.text()))
@example("\ud800", ["\ud800"])
@example("\0", ["\0", "+"])
def test_never_raises(topic: str, patterns: list[str]) -> None:
    assert matches(topic, patterns) in (True, False)


@pytest.mark.parametrize(
    ("topic", "pattern", "expected"),
    [
        ("x" * 65536, "x" * 65536, True),
        ("x" * 65536, "+", True),
        ("x" * 65536, "x" * 65535 + "y", False),
        ("a/" * 100_000 + "a", "+/" * 100_000 + "+", True),
        ("a/" * 100_000 + "a", "+/" * 100_000 + "b", False),
        ("a/" * 100_000 + "a", "#", True),
        ("/" * 100_000, "+/" * 50_000 + "#", True),
        ("a/" * 100_000 + "a", "#/" * 100_000 + "#", False),
        ("a/" * 1_000 + "a", "/".join(["+"] * 1_001), True),
    ],
)
def test_huge_arguments_cost_linear_time(topic: str, pattern: str, expected: bool) -> None:
    started = time.process_time()
    assert matches(topic, pattern) is expected
    # About 20 ms here; a matcher with back-tracking would need years.
    assert time.process_time() - started < 2


# --- checks where a publish or a subscription comes in ---

FINE_TOPICS = [
    "a",
    "/",
    "a//b",
    "chat/räume/42",
    "$SYS/x",
    " ",
    "a b\n",
    "x" * 255,
    "é" * 127 + "x",
    "/".join("a" * 32),
    "😀",
]
WRONG_TOPICS = [
    ("", "empty"),
    ("x" * 256, "256"),
    ("é" * 128, "256 bytes"),
    ("x" * 65536, "65536"),
    ("/".join("a" * 33), "33 levels"),
    ("/" * 32, "33 levels"),
    ("a\0b", "NUL"),
    ("a\ud800", "surrogate"),
    ("\udfff", "surrogate"),
]


@pytest.mark.parametrize("topic", FINE_TOPICS)
def test_fine_topics(topic: str) -> None:
    check_topic(topic)
    check_pattern(topic)


@pytest.mark.parametrize(("topic", "words"), WRONG_TOPICS)
def test_wrong_topics_are_refused_in_words(topic: str, words: str) -> None:
    for check, kind in ((check_topic, "topic"), (check_pattern, "pattern")):
        with pytest.raises(InvalidTopic, match=words) as caught:
            check(topic)
        text = str(caught.value)
        assert text.startswith(kind)
        assert len(text) < 200
        text.encode()  # can be logged and sent


@pytest.mark.parametrize("topic", ["#", "+", "a/+", "a/#", "a+b", "a/b#", "é/+"])
def test_wildcards_cannot_be_published_to(topic: str) -> None:
    with pytest.raises(InvalidTopic, match="wildcard"):
        check_topic(topic)


@pytest.mark.parametrize(
    "pattern", ["#", "+", "a/+", "a/#", "+/+/#", "/#", "+/", "$SYS/#", "/".join("+" * 32)]
)
def test_fine_patterns(pattern: str) -> None:
    check_pattern(pattern)
    assert is_pattern(pattern)


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("#/a", "goes on after #"),
        ("a/#/b", "goes on after #"),
        ("#/#", "goes on after #"),
        ("a#", "inside the level 'a#'"),
        ("a/te+", r"inside the level 'te\+'"),
        ("a/+b/c", r"inside the level '\+b'"),
        ("++", r"inside the level '\+\+'"),
        ("a/##", "inside the level '##'"),
        ("a/+/#x", "inside the level '#x'"),
    ],
)
def test_misplaced_wildcards_are_refused_in_words(pattern: str, words: str) -> None:
    for check in (check_pattern, check_wildcards):
        with pytest.raises(InvalidTopic, match=words):
            check(pattern)


def test_grammar_alone_knows_no_limits() -> None:
    check_wildcards("+/" * 1000 + "#")
    with pytest.raises(InvalidTopic, match="empty"):
        check_wildcards("")
    with pytest.raises(InvalidTopic, match="2001 characters"):
        check_pattern("+/" * 1000 + "#")


@pytest.mark.parametrize("value", [None, 5, b"a/b", ["a"], {"a": 1}, b"x" * 1000])
def test_what_is_no_string_is_refused_in_words(value: object) -> None:
    for check in (check_topic, check_pattern):
        with pytest.raises(InvalidTopic, match="not a string") as caught:
            check(value)  # type: ignore[arg-type]
        assert len(str(caught.value)) < 200


class Name(str):
    """Some frameworks hand out strings of a class of their own."""

    __slots__ = ()


def test_subclasses_of_str_are_strings() -> None:
    check_topic(Name("a/b"))
    with pytest.raises(InvalidTopic):
        check_topic(Name("a/+"))


@settings(deadline=None)
@given(st.text(st.sampled_from("a/+#\0é\ud800"), max_size=40) | st.text(max_size=300))
@example("é" * 200)
@example("a" * 300)
def test_checks_agree_with_the_contract(text: str) -> None:
    try:
        encoded = text.encode()
    except UnicodeEncodeError:
        encoded = b""
    levels = text.split("/")
    common = 1 <= len(encoded) <= MAX_TOPIC_BYTES and "\0" not in text and len(levels) <= MAX_TOPIC_LEVELS
    assert accepted(check_topic, text) == (common and not {"+", "#"} & set(text))
    well_formed = "#" not in levels[:-1] and all(
        level in ("+", "#") or not {"+", "#"} & set(level) for level in levels
    )
    assert accepted(check_pattern, text) == (common and well_formed)


def accepted(check: object, text: str) -> bool:
    assert callable(check)
    try:
        check(text)
    except InvalidTopic as error:
        str(error).encode()
        return False
    return True


# --- what the bus needs ---


@pytest.mark.parametrize(
    ("pattern", "run"),
    [
        ("#", ""),
        ("+", ""),
        ("+/x", ""),
        ("a/b/#", "a/b/"),
        ("a/+/c", "a/"),
        ("/#", "/"),
        ("/+", "/"),
        ("a//#", "a//"),
        ("$SYS/#", "$SYS/"),
        ("a/b", "a/b/"),
    ],
)
def test_prefix_run(pattern: str, run: str) -> None:
    assert prefix_run(pattern) == run


@pytest.mark.parametrize(
    ("topic", "runs"),
    [
        ("a/b", ("", "a/", "a/b/")),
        ("a", ("", "a/")),
        ("/", ("", "/", "//")),
        ("/a", ("", "/", "/a/")),
        ("$a/b", ("$a/", "$a/b/")),
        ("$", ("$/",)),
    ],
)
def test_prefix_runs(topic: str, runs: tuple[str, ...]) -> None:
    assert prefix_runs(topic) == runs


@settings(deadline=None)
@given(LEVELS, LEVELS)
def test_a_matching_pattern_has_one_of_the_topics_runs(topic: list[str], pattern: list[str]) -> None:
    text, filter_ = "/".join(topic), "/".join(pattern)
    if is_pattern(filter_) and matches(text, filter_):
        assert prefix_run(filter_) in prefix_runs(text)


@pytest.mark.parametrize(("text", "expected"), [("a", False), ("a/b+c", False), ("a/#", True), ("+", True)])
def test_is_pattern(text: str, expected: bool) -> None:
    assert is_pattern(text) is expected


@pytest.mark.parametrize(
    "value", ["", "a\r\n\x1b[31m", "x" * 80, "x" * 81, "\ud800" * 500, "'" * 79, None, b"y" * 500]
)
def test_what_is_shown_is_short_and_printable(value: object) -> None:
    text = shown(value)
    assert len(text) <= 80
    assert text.isprintable()
    assert (text == repr(value)) is (len(repr(value)) <= 80)
