"""The grammar of topics and patterns: what is valid, and which pattern matches which topic.

Every message passes here when it comes in (`check_topic`), and when the bus asks who might want it
(`prefix_runs`). Everything is pure, and the checks and `matches` are linear in the length of their arguments.

The rules are those of MQTT 5, section 4.7. A topic is a list of levels separated by `/`, and empty levels
count. In a pattern (MQTT: topic filter) a level `+` stands for exactly one level, and a last level `#` for
any number of levels, none included: `a/#` matches `a`. A pattern that begins with a wildcard does not match
topics that begin with `$`.
"""

from __future__ import annotations

from collections.abc import Iterable

MAX_TOPIC_BYTES = 255
"""The longest topic or pattern that may be published or subscribed to, in bytes of UTF-8."""

MAX_TOPIC_LEVELS = 32
"""The most levels a topic or pattern may have that is published or subscribed to."""

_SHOWN_CHARACTERS = 80


class InvalidTopic(ValueError):
    """A topic or pattern cannot be used; the text says which one, why, and what is allowed."""


def check_topic(topic: str) -> None:
    """Check a topic that somebody wants to publish to (MQTT 5, sections 4.7.1 and 4.7.3).

    Raises:
        InvalidTopic: it is empty, holds a wildcard or NUL, is no valid UTF-8, or exceeds `MAX_TOPIC_BYTES` or
            `MAX_TOPIC_LEVELS`.
    """
    if _is_plain(topic):
        return
    _check_limits("topic", topic)
    if "+" in topic or "#" in topic:
        raise InvalidTopic(
            f"topic {shown(topic)} holds a wildcard: + and # are for subscribing, a message goes to one topic"
        )


def check_pattern(pattern: str) -> None:
    """Check a pattern, or a plain topic, that somebody wants to subscribe to (MQTT 5, sections 4.7.1, 4.7.3).

    Raises:
        InvalidTopic: it is empty, has a misplaced wildcard, holds NUL, is no valid UTF-8, or exceeds
            `MAX_TOPIC_BYTES` or `MAX_TOPIC_LEVELS`.
    """
    if _is_plain(pattern):
        return
    _check_limits("pattern", pattern)
    check_wildcards(pattern)


def check_wildcards(pattern: str) -> None:
    """Check the grammar of a pattern alone: not its length, depth or characters.

    Raises:
        InvalidTopic: it is empty or has a misplaced wildcard.
    """
    if not pattern:
        raise InvalidTopic("pattern '' is empty: at least one character is needed")
    if "+" not in pattern and "#" not in pattern:
        return
    levels = pattern.split("/")
    if _well_formed(pattern, levels):
        return
    for level in levels[:-1]:
        if level == "#":
            raise InvalidTopic(f"pattern {shown(pattern)} goes on after #: # may only be the last level")
    level = next(level for level in levels if len(level) > 1 and ("+" in level or "#" in level))
    raise InvalidTopic(
        f"pattern {shown(pattern)} has a wildcard inside the level {shown(level)}: "
        "+ and # must be a whole level, as in a/+/b or a/#"
    )


def is_pattern(text: str) -> bool:
    """Tell whether a valid pattern has a wildcard level; otherwise it names exactly one topic."""
    return ("+" in text or "#" in text) and not _WILDCARDS.isdisjoint(text.split("/"))


def matches(topic: str, patterns: Iterable[str] | str) -> bool:
    """Tell whether at least one of the patterns matches the topic (MQTT 5, section 4.7).

    Never raises for strings and knows no limit of length or depth: an invalid pattern matches nothing, and
    nothing matches an empty topic or one that holds a wildcard. A single string counts as one pattern.
    """
    if not topic or "+" in topic or "#" in topic:
        return False
    if isinstance(patterns, str):
        patterns = (patterns,)
    levels = topic.split("/")
    return any(pattern == topic or _wildcards_match(levels, pattern) for pattern in patterns)


def prefix_run(pattern: str) -> str:
    """Return the whole levels before a pattern's first wildcard, each followed by `/`.

    `#` and `+/x` give the empty string, `a/b/#` gives `a/b/`, `/#` gives `/`. If a pattern matches a topic,
    its prefix run is among the topic's `prefix_runs`: so the bus finds out who may want a message.
    """
    length = 0
    for level in pattern.split("/"):
        if level in _WILDCARDS:
            return pattern[:length]
        length += len(level) + 1
    return pattern + "/"


def prefix_runs(topic: str) -> tuple[str, ...]:
    """Return the prefix runs of all patterns that could match a topic: `a/b` gives `""`, `a/` and `a/b/`.

    A topic that begins with `$` leaves out the empty one, since patterns that begin with a wildcard do not
    match it.
    """
    runs = [] if topic.startswith("$") else [""]
    run = ""
    for level in topic.split("/"):
        run += level + "/"
        runs.append(run)
    return tuple(runs)


def shown(text: object) -> str:
    """Return a value as it may be shown to people and in logs: escaped, and cut to 80 characters."""
    # repr of a huge string would cost as much as the string; what is shown never needs more than its start.
    quoted = repr(text[:_SHOWN_CHARACTERS]) if isinstance(text, str) else repr(text)
    if len(quoted) <= _SHOWN_CHARACTERS and not (isinstance(text, str) and len(text) > _SHOWN_CHARACTERS):
        return quoted
    return quoted[: _SHOWN_CHARACTERS - 3] + "..."


_WILDCARDS = frozenset("+#")


def _is_plain(text: str) -> bool:
    """Whether it is short ASCII without wildcards, as nearly all topics are: then nothing more need be looked at."""
    return (
        type(text) is str
        and text.isascii()
        and 0 < len(text) <= MAX_TOPIC_BYTES
        and "+" not in text
        and "#" not in text
        and "\0" not in text
        and text.count("/") < MAX_TOPIC_LEVELS
    )


def _check_limits(kind: str, text: str) -> None:
    """Check what topics and patterns have in common: characters, length and depth."""
    if not isinstance(text, str):
        raise InvalidTopic(f"{kind} {shown(text)} is not a string")
    if not text:
        raise InvalidTopic(f"{kind} '' is empty: 1 to {MAX_TOPIC_BYTES} bytes are allowed")
    if len(text) > MAX_TOPIC_BYTES:  # before anything that costs time in proportion to the length
        raise InvalidTopic(
            f"{kind} {shown(text)} has {len(text)} characters: at most {MAX_TOPIC_BYTES} bytes are allowed"
        )
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise InvalidTopic(
            f"{kind} {shown(text)} holds half of a surrogate pair, which is no valid Unicode text"
        ) from None
    if size > MAX_TOPIC_BYTES:
        raise InvalidTopic(
            f"{kind} {shown(text)} is {size} bytes long in UTF-8: at most {MAX_TOPIC_BYTES} are allowed"
        )
    if "\0" in text:
        raise InvalidTopic(f"{kind} {shown(text)} holds the character NUL, which is not allowed")
    depth = text.count("/") + 1
    if depth > MAX_TOPIC_LEVELS:
        raise InvalidTopic(f"{kind} {shown(text)} has {depth} levels: at most {MAX_TOPIC_LEVELS} are allowed")


def _well_formed(pattern: str, levels: list[str]) -> bool:
    """Tell whether each wildcard is a whole level and `#` is the last one; `levels` is the split pattern."""
    hashes = pattern.count("#")
    return pattern.count("+") == levels.count("+") and (hashes == 0 or (hashes == 1 and levels[-1] == "#"))


def _wildcards_match(topic_levels: list[str], pattern: str) -> bool:
    """Tell whether a pattern with wildcards matches a topic; one without, or an invalid one, does not."""
    if "+" not in pattern and "#" not in pattern:
        return False
    levels = pattern.split("/")
    if not _well_formed(pattern, levels):
        return False
    if levels[0] in _WILDCARDS and topic_levels[0].startswith("$"):
        return False
    if levels[-1] == "#":
        levels.pop()  # what is left must match the topic's beginning, which may be all of it
        if len(levels) > len(topic_levels):
            return False
    elif len(levels) != len(topic_levels):
        return False
    for level, given in zip(levels, topic_levels, strict=False):
        if level != given and level != "+":
            return False
    return True
