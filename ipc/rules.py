"""Topic rules: who may publish and subscribe what, what is kept of it, and what happens to slow readers.

Each message and each subscription of a client is judged here before it goes any further. The rules are
plain data: the settings make them, `rules.json` in the runtime directory carries them to every process of a
hub, and `difference` finds out that two processes do not agree.

A rule's key is an exact topic, `prefix/#`, or `#`. Among the keys that match a topic the longest wins, that
is the one with the most levels before `#`; an exact topic wins over a prefix. What a rule does not set comes
from the next shorter one, at last from the defaults. As in patterns, `#` does not reach topics that begin
with `$`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, Final, Generic, Literal, TypeVar, get_args

import msgspec

from ipc.store_records import Retention
from ipc.topics import MAX_TOPIC_BYTES, InvalidTopic, check_pattern, check_wildcards, matches, shown

Access = Literal["nobody", "authenticated", "anyone"]
"""Who may do something: no client at all, clients with a valid token, or every client."""

SlowPolicy = Literal["close", "drop_oldest", "latest"]
"""What happens to a client that reads too slowly: closed, or it loses its oldest or all but the latest."""

MAX_CACHED = 4096
"""How many topics or patterns a cache of answers holds before it is emptied."""

MAX_HISTORY_SIZE = 10_000_000
"""Messages that a topic may keep."""
MAX_HISTORY_TTL = 10 * 365 * 86400
"""Seconds, ten years."""

DEFAULT_SLOW_POLICY: Final[SlowPolicy] = "close"

V = TypeVar("V")


class TopicRule(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """What is set for the topics under one key; None: not set here, a shorter key or the default decides.

    Attributes:
        publish: who may publish.
        subscribe: who may subscribe.
        slow_consumer: what happens to a client that does not read these topics' messages in time.
        history_size: how many messages are kept; 0 for none.
        history_ttl: for how many seconds; 0 for as long as there is room.
        presence: whether it is known who is subscribed.
        federate: whether these topics' messages go to other hosts, if the hub has a bridge.
    """

    publish: Access | None = None
    subscribe: Access | None = None
    slow_consumer: SlowPolicy | None = None
    history_size: int | None = None
    history_ttl: float | None = None
    presence: bool | None = None
    federate: bool | None = None


class Rules(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, dict=True):
    """All rules of a hub.

    Attributes:
        topics: a rule per key; see the module's docstring for keys and precedence.
        client_broadcast: who may send to all clients; None is the default of `publish`.
        client_direct: who may send to one client by its conn_id; None is the default of `publish`.
        anonymous: whether clients without a token are let in. If so, whoever is not restricted by a rule may
            publish and subscribe; otherwise only authenticated clients may.
        data_dir: where history is kept on disk; empty: in the runtime directory, as long as the hub lives.
        store_size: bound of the store in bytes; 0: the default.
        federate: patterns of the topics that a bridge carries to other hosts; None: the hub has no bridge.

    Raises:
        ValueError: a key is no valid one, see `check_rule_key`.
    """

    topics: dict[str, TopicRule] = {}
    client_broadcast: Access | None = None
    client_direct: Access | None = None
    anonymous: bool = True
    data_dir: str = ""
    store_size: int = 0
    federate: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        for key in self.topics:
            check_rule_key(key)

    def may_publish(self, topic: str, authenticated: bool) -> bool:
        """Tell whether a client may publish to a topic, which must be valid (`ipc.topics.check_topic`)."""
        return self._publish[topic][authenticated]

    def may_subscribe(self, pattern: str, authenticated: bool) -> bool:
        """Tell whether a client may subscribe to a pattern: to every topic that it could match.

        An invalid pattern may not be subscribed.
        """
        return self._subscribe[pattern][authenticated]

    def may_broadcast(self, authenticated: bool) -> bool:
        """Tell whether a client may send to all clients."""
        return _ALLOWED[self.client_broadcast or self._default_access][authenticated]

    def may_direct(self, authenticated: bool) -> bool:
        """Tell whether a client may send to another one by its conn_id."""
        return _ALLOWED[self.client_direct or self._default_access][authenticated]

    def slow_consumer(self, topic: str) -> SlowPolicy:
        """Return what happens to a client that does not read this topic's messages in time."""
        return self._slow_consumer[topic]

    def retention(self, topic: str) -> Retention | None:
        """Return how much of a topic's messages is kept; None for nothing."""
        return self.retentions[topic]

    def recoverable(self, pattern: str) -> bool:
        """Tell whether every topic that a pattern could match has history, so that nothing of it can be missed."""
        return self._recoverable[pattern]

    def has_presence(self, pattern: str) -> bool:
        """Tell whether it is known who subscribed to a topic, or to a pattern all of whose topics have presence."""
        return self._has_presence[pattern]

    @cached_property
    def any_history(self) -> bool:
        """Whether any topic has history."""
        return any(rule.history_size for rule in self.topics.values())

    @cached_property
    def any_presence(self) -> bool:
        """Whether any topic has presence."""
        return any(rule.presence for rule in self.topics.values())

    def federates(self, topic: str) -> bool:
        """Tell whether a topic's messages go to other hosts."""
        return self._federates[topic]

    def encode(self) -> bytes:
        """Return the rules as JSON, the content of `rules.json`; equal rules give equal bytes."""
        return msgspec.json.encode(self, order="sorted")

    @classmethod
    def decode(cls, data: bytes) -> Rules:
        """Read what `encode` wrote.

        Raises:
            ValueError: it is no JSON, or a key or value in it is wrong; the text names both.
        """
        try:
            values = msgspec.json.decode(data)
        except msgspec.DecodeError as error:
            raise ValueError(f"rules are no valid JSON: {error}") from None
        if not isinstance(values, dict):
            raise ValueError(f"rules must be a JSON object, not {shown(values)}")
        topics = parse_topics(values.pop("topics", {}))
        federate = _parse_patterns(values.pop("federate", None))
        for name, value in values.items():
            if name == "data_dir" and isinstance(value, str):
                continue
            if name == "store_size" and type(value) is int:
                continue
            _check_value(name, value, _TOP_LEVEL_VALUES.get(name))
        return cls(topics=topics, federate=federate, **values)

    def difference(self, other: Rules) -> str | None:
        """Say in words where these rules ("here") differ from those of the running hub; None: nowhere."""
        for key in sorted({*self.topics, *other.topics}):
            mine, theirs = self.topics.get(key, _NO_RULE), other.topics.get(key, _NO_RULE)
            for name in TopicRule.__struct_fields__:
                words = _difference(f'topics."{key}".{name}', getattr(mine, name), getattr(theirs, name))
                if words:
                    return words
        for name in (*_TOP_LEVEL_VALUES, *_STORE_SETTINGS):
            words = _difference(name, getattr(self, name), getattr(other, name))
            if words:
                return words
        if self.federate is None:
            return None  # whoever joins a hub without saying takes what it federates
        return _difference("federate", self.federate, other.federate)

    @property
    def _default_access(self) -> Access:
        return "anyone" if self.anonymous else "authenticated"

    @cached_property
    def _publish(self) -> _Cache[tuple[bool, bool]]:
        table = _Table(self.topics, "publish", self._default_access)
        return _Cache(lambda topic: _ALLOWED[table.of_topic(topic)])

    @cached_property
    def _subscribe(self) -> _Cache[tuple[bool, bool]]:
        tree = _Tree(self.topics, lambda rule: rule.subscribe, self._default_access, _ACCESS)
        return _Cache(lambda pattern: _ALLOWED[tree.of_pattern(pattern)])

    @cached_property
    def retentions(self) -> Mapping[str, Retention | None]:
        """:meth:`retention` by topic, for the way of every message."""
        size, ttl = _Table(self.topics, "history_size", 0), _Table(self.topics, "history_ttl", 0.0)
        made: dict[tuple[int, float], Retention] = {}

        def compute(topic: str) -> Retention | None:
            rule = (size.of_topic(topic), ttl.of_topic(topic))
            return made.setdefault(rule, Retention(*rule)) if rule[0] else None

        return _Cache(compute)

    @cached_property
    def _recoverable(self) -> _Cache[bool]:
        tree = _Tree(self.topics, lambda rule: _switch(rule.history_size), "off", _SWITCH)
        return _Cache(lambda pattern: tree.of_pattern(pattern) == "on")

    @cached_property
    def _has_presence(self) -> _Cache[bool]:
        tree = _Tree(self.topics, lambda rule: _switch(rule.presence), "off", _SWITCH)
        return _Cache(lambda pattern: tree.of_pattern(pattern) == "on")

    @cached_property
    def _federates(self) -> _Cache[bool]:
        table = _Table(self.topics, "federate", True)
        patterns = self.federate or ()
        return _Cache(lambda topic: table.of_topic(topic) and matches(topic, patterns))

    @cached_property
    def _slow_consumer(self) -> _Cache[SlowPolicy]:
        table = _Table(self.topics, "slow_consumer", DEFAULT_SLOW_POLICY)
        return _Cache(table.of_topic)


def _parse_patterns(value: object) -> tuple[str, ...] | None:
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(pattern, str) for pattern in value):
        raise ValueError(f"federate = {shown(value)}: must be a list of patterns")
    for pattern in value:
        check_pattern(pattern)
    return tuple(value)


def check_rule_key(key: str) -> None:
    """Check the key of a topic rule.

    Raises:
        ValueError: it is neither a topic nor a topic followed by `/#` nor `#`; the text says why.
    """
    try:
        check_pattern(key)
    except InvalidTopic as error:
        raise ValueError(f"the key of a topic rule is wrong: {error}") from None
    if "+" in key:
        raise ValueError(
            f"the key {shown(key)} of a topic rule holds +: a key is a topic, a topic followed by /#, or #"
        )


def parse_topics(table: object) -> dict[str, TopicRule]:
    """Read the table of topic rules, as TOML or JSON gives it: `{"chat/#": {"publish": "nobody"}}`.

    Raises:
        ValueError: something in it is wrong; the text names the key, the value and what is allowed.
    """
    if not isinstance(table, Mapping):
        raise ValueError(f"topics = {shown(table)}: must be a table of rules by topic")
    topics = {}
    for key, values in table.items():
        check_rule_key(key)
        if not isinstance(values, Mapping):
            raise ValueError(f'topics."{key}" = {shown(values)}: must be a table of settings')
        for name, value in values.items():
            _check_topic_value(f'topics."{key}".{name}', name, value)
        numbers = (
            {"history_ttl": float(values["history_ttl"])} if values.get("history_ttl") is not None else {}
        )
        topics[key] = TopicRule(**{**values, **numbers})
    return topics


_ACCESS: Final[tuple[Any, ...]] = get_args(Access)  # from the strictest to the most open
_TOPIC_VALUES: Final[dict[str, tuple[Any, ...]]] = {
    "publish": (*_ACCESS, None),
    "subscribe": (*_ACCESS, None),
    "slow_consumer": (*get_args(SlowPolicy), None),
    "presence": (True, False, None),
    "federate": (True, False, None),
}
_TOPIC_NUMBERS: Final[dict[str, tuple[float, str]]] = {
    "history_size": (MAX_HISTORY_SIZE, f"an integer from 0 to {MAX_HISTORY_SIZE} (0: no history)"),
    "history_ttl": (MAX_HISTORY_TTL, f"seconds, a number from 0 to {MAX_HISTORY_TTL} (0: no limit of age)"),
}
_TOP_LEVEL_VALUES: Final[dict[str, tuple[Any, ...]]] = {
    "client_broadcast": (*_ACCESS, None),
    "client_direct": (*_ACCESS, None),
    "anonymous": (True, False),
}
_STORE_SETTINGS: Final = ("data_dir", "store_size")
_ALLOWED: Final[dict[str, tuple[bool, bool]]] = {  # (without a token, with one), to be indexed with a bool
    "nobody": (False, False),
    "authenticated": (False, True),
    "anyone": (True, True),
}
_NO_RULE: Final = TopicRule()
_SWITCH: Final = ("off", "on")


def _switch(value: int | None) -> str | None:
    return None if value is None else "on" if value else "off"


def _check_topic_value(name: str, setting: str, value: object) -> None:
    if setting not in _TOPIC_NUMBERS:
        _check_value(name, value, _TOPIC_VALUES.get(setting))
        return
    high, words = _TOPIC_NUMBERS[setting]
    kinds = (int,) if setting == "history_size" else (int, float)
    if value is not None and (
        isinstance(value, bool) or not isinstance(value, kinds) or not 0 <= value <= high
    ):
        raise ValueError(f"{name} = {shown(value)}: must be {words}")


def _check_value(name: str, value: object, allowed: tuple[Any, ...] | None) -> None:
    if allowed is None:
        settings = (
            (*_TOPIC_VALUES, *_TOPIC_NUMBERS)
            if name.startswith("topics.")
            else ("topics", *_TOP_LEVEL_VALUES)
        )
        known = ", ".join(settings)
        raise ValueError(f"{name} = {shown(value)}: there is no such setting; there are {known}")
    if not any(value is choice or (isinstance(value, str) and value == choice) for choice in allowed):
        choices = ", ".join(str(choice).lower() for choice in allowed if choice is not None)
        raise ValueError(f"{name} = {shown(value)}: must be one of {choices}")


def _difference(name: str, mine: object, theirs: object) -> str | None:
    if mine == theirs:
        return None
    here, there = ("not set" if value is None else repr(value) for value in (mine, theirs))
    return f"{name} is {here} here, {there} in the running hub"


class _Cache(dict[str, V]):
    """Answers by topic or pattern: a hit is one dict lookup, and the number of entries is bounded."""

    __slots__ = ("_compute",)

    def __init__(self, compute: Callable[[str], V]) -> None:
        super().__init__()
        self._compute = compute

    def __missing__(self, text: str) -> V:
        value = self._compute(text)
        if len(text) <= MAX_TOPIC_BYTES:  # whoever asks about unchecked text shall not fill the memory
            if len(self) >= MAX_CACHED:
                self.clear()
            self[text] = value
        return value


class _Table(Generic[V]):
    """One attribute of the rules, for questions about a single topic."""

    def __init__(self, topics: Mapping[str, TopicRule], attribute: str, default: V) -> None:
        self._default = default
        self._exact: dict[str, V] = {}
        self._prefixes: dict[str, V] = {}
        for key, rule in topics.items():
            value = getattr(rule, attribute)
            if value is None:
                continue
            if key == "#":
                self._default = value
            elif key.endswith("/#"):
                self._prefixes[key.removesuffix("/#")] = value
            else:
                self._exact[key] = value
        self._dollar_default = default

    def of_topic(self, topic: str) -> V:
        """Return the value of the longest key that matches the topic and sets the attribute."""
        if topic in self._exact:
            return self._exact[topic]
        if self._prefixes:
            end = len(topic)
            while end >= 0:
                prefix = topic[:end]
                if prefix in self._prefixes:
                    return self._prefixes[prefix]
                end = topic.rfind("/", 0, end)
        return self._dollar_default if topic.startswith("$") else self._default


class _Node:
    """A place in the tree of rules: the levels on the way to it, and what is set there."""

    __slots__ = ("children", "exact", "prefix")

    def __init__(self) -> None:
        self.children: dict[str, _Node] = {}
        self.exact: str | None = None
        self.prefix: str | None = None


class _Tree:
    """One attribute of the rules, for questions about all topics that a pattern matches: the strictest wins.

    A pattern is walked down the tree of keys. Each level leads to children, where keys go on, or off the
    tree, where no key is that specific and what holds so far holds for good. There are always names of levels
    that no key mentions, so a wildcard leads off the tree as well. Each node is visited at most once.
    """

    def __init__(
        self,
        topics: Mapping[str, TopicRule],
        attribute: Callable[[TopicRule], str | None],
        default: str,
        order: tuple[str, ...],
    ) -> None:
        self._default = default
        self._order = order  # from the strictest to the most open
        self._root = _Node()
        self._keys = 0
        for key, rule in topics.items():
            value = attribute(rule)
            if value is not None:
                self._insert(key, value)
                self._keys += 1

    def _insert(self, key: str, access: str) -> None:
        levels = key.split("/")
        is_prefix = levels[-1] == "#"
        node = self._root
        for level in levels[:-1] if is_prefix else levels:
            node = node.children.setdefault(level, _Node())
        if is_prefix:
            node.prefix = access
        else:
            node.exact = access

    def of_pattern(self, pattern: str) -> str:
        """Return the strictest value that applies to any topic the pattern matches."""
        try:
            check_wildcards(pattern)
        except InvalidTopic:
            return self._order[0]
        if not self._keys:
            return self._default
        return min(self._applying(pattern.split("/")), key=self._order.index)

    def _applying(self, levels: list[str]) -> set[str]:
        """Collect what applies to at least one topic that the pattern of these levels matches."""
        reaches_dollar = levels[0].startswith("$")
        start = self._default if reaches_dollar else self._root.prefix or self._default
        found: set[str] = set()
        places: list[tuple[_Node, str]] = [(self._root, start)]  # with what holds there for lack of better
        for depth, level in enumerate(levels):
            if level == "#":
                self._collect_below(places, depth, found)
                return found
            following = []
            for node, inherited in places:
                if level == "+":
                    found.add(inherited)
                    children = _children(node, depth)
                else:
                    child = node.children.get(level)
                    children = [] if child is None else [child]
                    if child is None:
                        found.add(inherited)
                following += [(child, child.prefix or inherited) for child in children]
            places = following
        self._collect_here(places, len(levels), found)
        return found

    def _collect_here(self, places: list[tuple[_Node, str]], depth: int, found: set[str]) -> None:
        """Collect what applies to the very topics that the places stand for."""
        nameless = self._root.children.get("") if depth == 1 else None
        found.update(node.exact or inherited for node, inherited in places if node is not nameless)

    def _collect_below(self, places: list[tuple[_Node, str]], depth: int, found: set[str]) -> None:
        """Collect what applies to the topics that the places stand for and to all below them."""
        found.update(inherited for _, inherited in places)
        nodes = [node for node, _ in places]
        while nodes:
            found.update(access for node in nodes for access in (node.exact, node.prefix) if access)
            nodes = [child for node in nodes for child in _children(node, depth)]
            depth += 1


def _children(node: _Node, depth: int) -> list[_Node]:
    """Return the children that a wildcard at this depth reaches; the first level's do not reach `$`."""
    if depth:
        return list(node.children.values())
    return [child for level, child in node.children.items() if not level.startswith("$")]
