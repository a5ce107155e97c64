"""The table of options: name, kind, default, range, help; for the command line, the environment and TOML.

Read once at the start; no message passes here. To add an option: a line here, a field in
:class:`workers.settings.Settings`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB

UNITS = {"": 1, "b": 1, "kib": KIB, "mib": MIB, "gib": GIB}
SIZE = re.compile(r"(\d+)\s*([a-z]*)", re.ASCII | re.IGNORECASE)
INTEGER = re.compile(r"[+-]?\d+", re.ASCII)
WORDS = {
    "true": True,
    "1": True,
    "yes": True,
    "on": True,
    "false": False,
    "0": False,
    "no": False,
    "off": False,
}

MAX_WORKERS = 64
"""Worker processes of one hub: the board has slots for so many and their successors."""

DAY = 86400.0


@dataclass(frozen=True)
class Option:
    """One setting: how it is called, what it may be, and what it means.

    Attributes:
        name: with underscores, as in TOML.
        kind: turns a value into the setting's type or raises ValueError.
        default: its value, None where the default depends on something (``default_words`` says on what).
        help: one sentence.
        low, high: the range of a number.
        choices: the allowed words, empty if any.
    """

    name: str
    kind: Callable[[Option, object], Any]
    default: Any
    help: str
    low: float = 0
    high: float = math.inf
    choices: tuple[str, ...] = ()
    default_words: str = ""
    metavar: str = "TEXT"

    @property
    def flag(self) -> str:
        """As on the command line."""
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        """As in the environment."""
        return "FLOCKWIRE_" + self.name.upper()

    @property
    def is_switch(self) -> bool:
        """Whether it takes no value on the command line."""
        return self.kind is boolean

    @property
    def is_number(self) -> bool:
        """Whether TOML must give a number (a size may be a text with a unit)."""
        return self.kind in (integer, seconds)

    @property
    def is_list(self) -> bool:
        """Whether it may be repeated, and is an array in TOML."""
        return self.kind is strings

    @property
    def shown_default(self) -> str:
        """The default in words, for ``--help``."""
        if self.default_words:
            return self.default_words
        if self.kind is boolean:
            return "on" if self.default else "off"
        if self.kind is size:
            return show_size(self.default)
        return f"{self.default:g}" if isinstance(self.default, float) else str(self.default)

    @property
    def shown_bounds(self) -> str:
        """The range of a number in words, for ``--help``; empty where there is none."""
        if self.high == math.inf:
            return ""
        return f"{self._bound(self.low)} to {self._bound(self.high)}"

    @property
    def allowed(self) -> str:
        """What it may be, in words, for errors."""
        words = ALLOWED[self.kind]
        return words.format(
            low=self._bound(self.low), high=self._bound(self.high), choices=", ".join(self.choices)
        )

    def _bound(self, bound: float) -> str:
        return show_size(int(bound)) if self.kind is size and bound < math.inf else f"{bound:.10g}"

    def parse(self, value: object) -> Any:
        """Turn a value into the setting's type.

        Args:
            value: a string, as on the command line and in the environment, or the type itself, as in TOML.

        Raises:
            ValueError: wrong type or out of range; :attr:`allowed` says what would be right.
        """
        return self.kind(self, value)


def integer(option: Option, value: object) -> int:
    if isinstance(value, str) and INTEGER.fullmatch(value.strip()):
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError
    return int(_in_range(option, value))


def seconds(option: Option, value: object) -> float:
    if isinstance(value, str):
        value = float(value)  # "nan" and "inf" pass here and fail in the range
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise ValueError
    return float(_in_range(option, value))


def size(option: Option, value: object) -> int:
    if isinstance(value, str):
        match = SIZE.fullmatch(value.strip())
        if not match or match[2].lower() not in UNITS:
            raise ValueError
        value = int(match[1]) * UNITS[match[2].lower()]
    return integer(option, value)


def boolean(option: Option, value: object) -> bool:
    if isinstance(value, str):
        value = WORDS.get(value.strip().lower())
    if not isinstance(value, bool):
        raise ValueError
    return value


def string(option: Option, value: object) -> str:
    if not isinstance(value, str) or not value or "\0" in value:
        raise ValueError
    return value


def choice(option: Option, value: object) -> str:
    if value not in option.choices:
        raise ValueError
    return str(value)


def strings(option: Option, value: object) -> tuple[str, ...]:
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, (list, tuple)) or not all(isinstance(item, str) for item in value):
        raise ValueError
    items = [part.strip() for item in value for part in item.split(",")]
    return tuple(dict.fromkeys(item for item in items if item))


ALLOWED: dict[Callable[[Option, object], Any], str] = {
    integer: "an integer from {low} to {high}",
    seconds: "seconds, a number from {low} to {high}",
    size: "bytes, an integer or like 64KiB or 1MiB, from {low} to {high}",
    boolean: "true or false",
    string: "a text that is not empty",
    choice: "one of {choices}",
    strings: "a list of texts",
}
"""What each kind may be, in words."""


def show_size(number: int) -> str:
    """1048576 -> ``1MiB``."""
    for unit, factor in (("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if number >= factor and number % factor == 0:
            return f"{number // factor}{unit}"
    return str(number)


def _in_range(option: Option, value: float) -> float:
    if not option.low <= value <= option.high:  # False for NaN too
        raise ValueError
    return value


LOG_LEVELS = ("debug", "info", "warning", "error", "critical")

OPTIONS: tuple[Option, ...] = (
    Option("host", string, "127.0.0.1", "Address to listen on.", metavar="HOST"),
    Option(
        "port",
        integer,
        8000,
        "Port to listen on; 0 picks a free one and says which.",
        high=65535,
        metavar="PORT",
    ),
    Option(
        "workers",
        integer,
        None,
        "Worker processes.",
        low=1,
        high=MAX_WORKERS,
        default_words="number of cores",
        metavar="N",
    ),
    Option(
        "app",
        string,
        None,
        "ASGI application to serve: Starlette, FastAPI, any other.",
        default_words="the built-in hub",
        metavar="MODULE:ATTRIBUTE",
    ),
    Option("preload", boolean, False, "Import the application before the fork; workers share its memory."),
    Option(
        "reload",
        boolean,
        False,
        "Restart the workers when a source file below the working directory changes.",
    ),
    Option(
        "runtime_dir",
        string,
        None,
        "Directory of the state that workers share; made when missing, private.",
        default_words="/dev/shm/flockwire-<uid>/<port>",  # noqa: S108 -- words, not a path
        metavar="DIR",
    ),
    Option(
        "allow_origin",
        strings,
        (),
        "Web origin whose pages may connect, like https://example.com; * and"
        " https://*.example.com allowed; repeat, or separate with commas.",
        default_words="the same host",
        metavar="ORIGIN",
    ),
    Option(
        "allow_anonymous",
        boolean,
        None,
        "Let clients in that have no token.",
        default_words="allowed on a loopback host only",
    ),
    Option(
        "max_message_size",
        size,
        64 * KIB,
        "Largest message that a client may send; what is published is at most 16MiB.",
        1,
        64 * MIB,
        metavar="SIZE",
    ),
    Option(
        "max_subscriptions",
        integer,
        128,
        "Subscriptions that one connection may hold.",
        1,
        1_000_000,
        metavar="N",
    ),
    Option(
        "max_backlog",
        size,
        1 * MIB,
        "A client is slow when more than so many bytes wait for it.",
        1,
        4 * GIB,
        metavar="SIZE",
    ),
    Option(
        "write_timeout",
        seconds,
        10.0,
        "A client is slow when bytes have waited so many seconds for it without any leaving.",
        0.1,
        DAY,
        metavar="SECONDS",
    ),
    Option(
        "bus_backlog", size, 16 * MIB, "Bytes that may wait for one other worker.", 1, 4 * GIB, metavar="SIZE"
    ),
    Option("ping_interval", seconds, 25.0, "Seconds between pings to a client.", 0.1, DAY, metavar="SECONDS"),
    Option(
        "ping_timeout", seconds, 10.0, "Seconds a client has to answer a ping.", 0.1, DAY, metavar="SECONDS"
    ),
    Option(
        "drain_timeout",
        seconds,
        30.0,
        "Seconds over which a worker that stops says goodbye to its clients.",
        0,
        DAY,
        metavar="SECONDS",
    ),
    Option(
        "worker_timeout",
        seconds,
        10.0,
        "A worker whose event loop stands still for so many seconds is replaced.",
        1,
        DAY,
        metavar="SECONDS",
    ),
    Option(
        "boot_timeout", seconds, 60.0, "Seconds a worker has to become ready.", 0.1, DAY, metavar="SECONDS"
    ),
    Option(
        "data_dir",
        string,
        None,
        "Directory on disk for history that survives the hub; made when missing, private.",
        default_words="none: history lives as long as the hub",
        metavar="DIR",
    ),
    Option(
        "store_size",
        size,
        None,
        "Bytes that history may take; the oldest go first.",
        1 * MIB,
        1024 * GIB,
        default_words="256MiB, or half of what is free",
        metavar="SIZE",
    ),
    Option(
        "ssl_certfile",
        string,
        None,
        "Certificate (PEM) for wss and https.",
        default_words="none",
        metavar="FILE",
    ),
    Option("ssl_keyfile", string, None, "Its private key (PEM).", default_words="none", metavar="FILE"),
    Option(
        "log_level", choice, "info", "Least level to log.", choices=LOG_LEVELS, metavar="|".join(LOG_LEVELS)
    ),
    Option(
        "log_format",
        choice,
        "text",
        "Lines for people or JSON lines.",
        choices=("text", "json"),
        metavar="text|json",
    ),
    Option(
        "redis_url",
        string,
        None,
        "Redis (redis://, rediss://, unix://) through which several hosts share their messages.",
        default_words="none",
        metavar="URL",
    ),
    Option("redis_prefix", string, "flockwire", "What the names of its keys begin with.", metavar="TEXT"),
    Option(
        "federate",
        strings,
        ("#",),
        "Topics whose messages go to the other hosts; repeat, or separate with commas.",
        default_words="#",
        metavar="PATTERN",
    ),
    Option("access_log", boolean, False, "Log every request and connection."),
)
"""Every option that exists, in the order of ``--help``."""

BY_NAME = {option.name: option for option in OPTIONS}
