"""Presence: who has subscribed to a topic, for the whole host, and to which process each one belongs.

Stands below ``store.py``, beside the way of a message. A subscriber is filed under the exact filter it subscribed to,
so one who came through a wildcard counts there and nowhere else. Two records each: by filter, to list them, and by
peer (slot and epoch), to take out all whom a dead one had.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import TYPE_CHECKING

import msgspec

from ipc.store_records import MAX_KEY, PRESENCE, PRESENCE_SLOT, channel_key

if TYPE_CHECKING:
    from lmdb import Transaction


class Present(msgspec.Struct, gc=False, frozen=True, array_like=True):
    """A subscriber. ``info`` is the caller's, opaque; ``slot`` and ``epoch`` are its peer's."""

    client: str
    user: str
    info: bytes
    slot: int
    epoch: int


class _Record(msgspec.Struct, gc=False, array_like=True):
    """What is stored under a filter; the names are needed when a key holds only their digest."""

    channel: str
    topic: str
    who: Present


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(_Record).decode


def add(txn: Transaction[bytes], channel: str, topic: str, who: Present) -> bool:
    """Enter a subscriber; False when it was there already (what is known of it is replaced)."""
    key = _key(channel, topic, who.slot, who.epoch, who.client)
    known = txn.get(key) is not None
    txn.put(key, _encode(_Record(channel, topic, who)))
    if not known:
        txn.put(_slot_key(who.slot, who.epoch, key), key)
    return not known


def remove(
    txn: Transaction[bytes], channel: str, topic: str, slot: int, epoch: int, client: str
) -> Present | None:
    """Take a subscriber out and return it; None when it was not there."""
    key = _key(channel, topic, slot, epoch, client)
    value = txn.pop(key)
    if value is None:
        return None
    txn.delete(_slot_key(slot, epoch, key))
    return _decode(value).who


def reap(txn: Transaction[bytes], slot: int, epoch: int, limit: int) -> list[tuple[str, str, Present]]:
    """Take out at most ``limit`` subscribers of one peer: (channel, filter, subscriber)."""
    prefix = _slot_prefix(slot, epoch)
    cursor = txn.cursor()
    found: list[tuple[bytes, bytes]] = []
    if cursor.set_range(prefix):
        for slot_key, key in cursor.iternext():
            if len(found) == limit or not slot_key.startswith(prefix):
                break
            found.append((slot_key, key))
    removed = []
    for slot_key, key in found:
        txn.delete(slot_key)
        value = txn.pop(key)
        if value is not None:
            record = _decode(value)
            removed.append((record.channel, record.topic, record.who))
    return removed


def read(txn: Transaction[bytes], channel: str, topic: str) -> list[Present]:
    """Everybody who subscribed to exactly this filter."""
    prefix = _filter_prefix(channel, topic)
    cursor = txn.cursor()
    found: list[Present] = []
    if cursor.set_range(prefix):
        for key, value in cursor.iternext():
            if not key.startswith(prefix):
                break
            found.append(_decode(value).who)
    return found


def owners(txn: Transaction[bytes]) -> list[tuple[int, int]]:
    """The peers (slot, epoch) that have any subscriber here; jumps from one to the next."""
    cursor = txn.cursor()
    found: list[tuple[int, int]] = []
    at = PRESENCE_SLOT
    while cursor.set_range(at) and (key := cursor.key())[:1] == PRESENCE_SLOT:
        slot, epoch = int.from_bytes(key[1:3], "big"), int.from_bytes(key[3:11], "big")
        found.append((slot, epoch))
        at = _slot_prefix(slot, epoch + 1)
    return found


def _filter_prefix(channel: str, topic: str) -> bytes:
    return PRESENCE + channel_key(channel) + b"\0" + topic.encode() + b"\0"


def _key(channel: str, topic: str, slot: int, epoch: int, client: str) -> bytes:
    prefix = _filter_prefix(channel, topic) + slot.to_bytes(2, "big") + epoch.to_bytes(8, "big")
    name = client.encode("utf-8", "surrogatepass")
    if len(prefix) + len(name) <= MAX_KEY:
        return prefix + name
    return prefix + blake2b(name, digest_size=32).digest()


def _slot_prefix(slot: int, epoch: int) -> bytes:
    return PRESENCE_SLOT + slot.to_bytes(2, "big") + epoch.to_bytes(8, "big")


def _slot_key(slot: int, epoch: int, key: bytes) -> bytes:
    return _slot_prefix(slot, epoch) + blake2b(key, digest_size=16).digest()
