"""What goes into the store, what comes out of it, and how both look as bytes.

Stands under the other ``store_*`` modules, on the way of a message whose topic has history: the worker that received
it makes an :class:`Entry`, the store answers with a :class:`Position`, and whoever missed it reads a
:class:`StoredEntry`. Nothing here does I/O or knows LMDB.

Everything lies in one LMDB tree, because a transaction writes each page it has touched and one tree shares the upper
ones. The first byte of a key tells what it is; the log comes last, so that appending to it fills its pages::

    a                           state: layout, epoch, floor, counters (StoreState)
    b                           up to which offset the topics' records are written (store_fold.py), and their generation
    c <ident> <offset>          64 offsets of a long window that are not kept in the topic's record
    d <deadline> <ident>        when the oldest entry of a topic expires  -> key of the topic's record
    e <trimmed>                 an empty topic, by its highest offset     -> time it became empty, key of its record
    g <ident>                   a cleared long window, still to be deleted piece by piece
    i <digest>                  idempotency key                           -> offset, previous, time
    j <offset>                  the same in the order in which they expire -> digest
    k <offset>                  what was pushed out of its window by then  -> time, bytes so far, offsets to delete
    p <channel> 0 <filter> 0 .. presence
    q <slot> <epoch> <digest>   presence by the peer it belongs to        -> key of the presence record
    t <channel> 0 <topic>       a topic's record: rule, window (store_window.py)
    z <offset>                  the log: every entry that is still kept, in the one order of this host

Integers in keys and in the log are big-endian, so that bytes and numbers have one order.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from hashlib import blake2b
from typing import NamedTuple

import msgspec

LAYOUT = 2
"""Version of everything written below; a store with another one is moved aside at the start."""

STATE_KEY, FOLD_KEY = b"a", b"b"
CHUNK, DUE, EMPTY, GARBAGE, IDEMPOTENT, IDEMPOTENT_ORDER, GRACE, PRESENCE, PRESENCE_SLOT, TOPIC, LOG = (
    bytes((letter,)) for letter in b"cdegijkpqtz"
)
ZERO = bytes(8)

IDEMPOTENCY_MS = 300_000
"""How long an idempotency key is remembered, in milliseconds."""

MAX_CHANNEL_KEY = 64
MAX_KEY = 511  # LMDB's limit, compiled in


class StoreError(Exception):
    """The store could not do what was asked; the text is for people."""


class StoreBusy(StoreError):
    """Another process holds the append lock, or too much waits for it: temporary, worth trying again."""


class StoreFull(StoreError):
    """No room: ``--store-size`` is used up and nothing old may go, or the file system is full."""


class EntryTooLarge(StoreError):
    """One message is larger than an eighth of the store: it would push out too much of the others."""


class UnrecoverablePosition(ValueError):
    """A position of another epoch: the store it came from is gone."""


class Retention:
    """How much of a topic is kept: at most ``size`` entries, none older than ``ttl`` seconds (0: no limit of age)."""

    __slots__ = ("rule", "size", "ttl_ms")

    def __init__(self, size: int, ttl: float = 0.0) -> None:
        if not 1 <= size <= 0xFFFFFFFF:
            raise ValueError(f"history_size is {size}: 1 to 4294967295 entries can be kept")
        if not 0 <= ttl <= 1e11:
            raise ValueError(f"history_ttl is {ttl} seconds: 0 (no limit) to 100000000000 is allowed")
        self.size = size
        self.ttl_ms = int(ttl * 1000)
        self.rule = RULE.pack(size, self.ttl_ms)
        """The beginning of a topic's record with this rule."""


class Entry(msgspec.Struct, gc=False):
    """One message to be kept. ``data`` is what clients will read; ``info`` and ``tags`` are the caller's, opaque."""

    channel: str
    topic: str
    data: bytes
    retention: Retention
    idempotency_key: str = ""
    info: bytes = b""
    tags: bytes = b""


class Position(msgspec.Struct, gc=False):
    """Where an entry was stored: its offset on this host, and that of the entry before it on the same topic.

    ``previous`` is 0 for the first entry of a topic (or the first after all memory of the topic was dropped).
    ``duplicate``: the idempotency key was known, nothing was stored, the position is that of the first time.
    """

    offset: int
    previous: int
    duplicate: bool = False


class StoredEntry(msgspec.Struct, gc=False):
    """One entry as it is read from the store. ``time`` is when it was stored, in milliseconds since 1970."""

    offset: int
    previous: int
    time: int
    channel: str
    topic: str
    data: bytes
    info: bytes = b""
    tags: bytes = b""


class Recovery(NamedTuple):
    """The answer to "what have I missed?".

    ``recovered`` means complete: ``entries`` are all that came after the position, in order. Otherwise ``entries`` is
    empty. ``top`` is the offset up to which the answer holds: live delivery goes on after it.
    """

    recovered: bool
    entries: Sequence[StoredEntry]
    top: int
    epoch: str


class History(NamedTuple):
    """A page of a topic's history. ``top`` is the host's last offset, ``topic_top`` the topic's own (0: none)."""

    entries: Sequence[StoredEntry]
    top: int
    topic_top: int
    epoch: str


class LogSlice(NamedTuple):
    """A piece of the host's log, all channels and topics. ``scanned``: everything up to here was looked at."""

    entries: Sequence[StoredEntry]
    scanned: int
    top: int


class StoreState(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What the store knows about itself; written rarely, never on the path of an ordinary append."""

    layout: int = LAYOUT
    epoch: str
    size: int
    """``--store-size`` in bytes."""
    floor: int = 0
    """No position below it can be recovered: the memory of some topic was dropped."""
    evicted: int = 0
    """Entries that went before their time because the store was full."""
    boot: str = ""
    """The boot of the machine in which a store on disk was last written, and the top it was closed with in order."""
    closed_at: int = -1


# The log --------------------------------------------------------------------------------------------------------

_LENGTHS = struct.Struct(">BBHII")  # flags, topic, channel, info, tags
_LOG = struct.Struct(">QQBBHII")  # previous, time, and the above
LOG_HEADER = _LOG.size
LOG_TIME = slice(8, 16)
_DEAD = 1

RULE = struct.Struct(">IQ")  # size, ttl in ms


def lengths(channel: bytes, topic: bytes, info: bytes, tags: bytes) -> bytes:
    """The part of a log entry's header that tells its pieces apart."""
    return _LENGTHS.pack(0, len(topic), len(channel), len(info), len(tags))


def tombstone(value: bytes) -> bytes:
    """What stays of the log's last entry when it is deleted: it still says how far the sequence and the clock are."""
    previous, time, *_ = _LOG.unpack_from(value)
    return _LOG.pack(previous, time, _DEAD, 0, 0, 0, 0)


def is_tombstone(value: bytes | memoryview) -> bool:
    """Tell whether an entry of the log is a :func:`tombstone`."""
    return bool(value[16] & _DEAD)


def topic_name(value: bytes | memoryview) -> bytes:
    """Channel and topic of a log entry, as a token that is equal for entries of the same topic."""
    end = LOG_HEADER + value[17] + int.from_bytes(value[18:20], "big")
    return bytes(value[17:20]) + bytes(value[LOG_HEADER:end])


def join_name(channel: str, topic: str) -> bytes:
    """The token of :func:`topic_name`, from channel and topic."""
    first, second = channel.encode(), topic.encode()
    return _LENGTHS.pack(0, len(second), len(first), 0, 0)[1:4] + first + second


def split_name(token: bytes) -> tuple[str, str]:
    """Channel and topic from a token of :func:`topic_name`."""
    end = 3 + int.from_bytes(token[1:3], "big")
    return token[3:end].decode(), token[end:].decode()


def stored_entry(offset: int, value: bytes) -> StoredEntry:
    """Take a log entry apart."""
    previous, time, _, topic_size, channel_size, info_size, tags_size = _LOG.unpack_from(value)
    topic = LOG_HEADER + channel_size
    info = topic + topic_size
    if not info_size and not tags_size:
        return StoredEntry(
            offset, previous, time, value[LOG_HEADER:topic].decode(), value[topic:info].decode(), value[info:]
        )
    tags = info + info_size
    data = tags + tags_size
    return StoredEntry(
        offset,
        previous,
        time,
        value[LOG_HEADER:topic].decode(),
        value[topic:info].decode(),
        value[data:],
        value[info:tags],
        value[tags:data],
    )


# Keys -----------------------------------------------------------------------------------------------------------


def channel_key(channel: str) -> bytes:
    """A channel's name within keys: itself, or a digest when it is too long or holds NUL."""
    name = channel.encode("utf-8", "surrogatepass")
    if len(name) <= MAX_CHANNEL_KEY and b"\0" not in name:
        return name
    return b"\x01" + blake2b(name, digest_size=16).hexdigest().encode()


def topic_key(channel: str, topic: str) -> bytes:
    """The key of a topic's record."""
    return TOPIC + channel_key(channel) + b"\0" + topic.encode()


def log_key(offset: int) -> bytes:
    """The key of a log entry."""
    return LOG + offset.to_bytes(8, "big")


def number(key: bytes) -> int:
    """The eight-byte number behind a key's first byte."""
    return int.from_bytes(key[1:9], "big")


def idempotency_key(key: bytes, client_key: str) -> bytes:
    """The key under which an idempotency key of a topic (``key``: of its record) is remembered."""
    digest = blake2b(key, digest_size=16)
    digest.update(b"\0")
    digest.update(client_key.encode("utf-8", "surrogatepass"))
    return IDEMPOTENT + digest.digest()
