"""What travels between processes: envelopes, and the frames that carry a batch of them.

Stands at both ends of the bus. Pure: bytes in, values out, no socket.

A frame is one ZeroMQ message::

    destination   8 bytes: slot, epoch of the receiver (what its inbox subscribes to)
    version       1 byte
    kind          1 byte: DATA, or a control message of the mesh
    sender        2 + 4 bytes: slot, epoch
    number        8 bytes: how many envelopes this sender has sent to this receiver before
    count         4 bytes: envelopes in this batch
    position      8 bytes: bytes this sender has sent to this receiver, this batch included
    checksum      4 bytes: CRC-32 of all before it; a damaged header must not mislead the numbering
    body          a msgpack array of envelopes (nothing in a control message)

All integers are big-endian. New fields of an envelope go to its end, with a default: an older process leaves out what
it does not know, a newer one fills in what is missing.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from enum import IntEnum
from typing import Annotated, NamedTuple
from zlib import crc32

import msgspec

from ipc.origins import Origin

TOPIC = 0
BROADCAST = 1
DIRECT = 2
JOIN = 3
LEAVE = 4

MAX_ENVELOPE = 16 * 1024 * 1024
"""Bytes of one envelope on the wire."""
BATCH_TARGET = 256 * 1024
"""Bytes after which a batch is closed and the next one begun; one larger envelope goes alone."""
MAX_FRAME = MAX_ENVELOPE + BATCH_TARGET
"""A frame that is larger is not ours."""

VERSION = 1

_DESTINATION = struct.Struct(">II")
_HEAD = struct.Struct(">8sBBHIQIQ")
_CHECKSUM = struct.Struct(">I")
_CHECKSUM_ARRAY = struct.Struct(">IBI")
_ARRAY32 = 0xDD
_ARRAY32_HEAD = struct.Struct(">BI")
DESTINATION_BYTES = _DESTINATION.size
HEADER_BYTES = _HEAD.size + _CHECKSUM.size
_SANE = 1 << 48
OVERHEAD = _HEAD.size + _CHECKSUM_ARRAY.size
"""Bytes of a DATA frame that are not envelopes."""


class Envelope(msgspec.Struct, array_like=True, gc=False):
    """One message on its way between processes."""

    kind: Annotated[int, msgspec.Meta(ge=0, le=255)]
    """TOPIC, BROADCAST, DIRECT, or JOIN or LEAVE for those who subscribed to exactly ``topic``, a topic or pattern."""
    channel: str
    """The manager's ``broker_channel``; the built-in hub's is ``hub``."""
    topic: str
    """Empty for the kinds BROADCAST and DIRECT."""
    data: bytes
    """The JSON text (UTF-8) that clients will read; never decoded on the way."""
    conn_ids: tuple[str, ...] = ()
    """Whom a DIRECT message is for."""
    offset: int = 0
    """Where it stands in the host's log; 0 on a topic without history. The text is in the log too."""
    info: bytes = b""
    """The JSON that tells who published it, where that is known."""
    origin: Origin | None = None
    """Its key when it is federated, see :mod:`ipc.origins`."""


class FrameKind(IntEnum):
    """What a frame is for."""

    DATA = 0
    HELLO = 1
    """I can reach you: answer when you can reach me."""
    HELLO_ACK = 2
    TAIL = 3
    """Nothing new: ``number`` and ``position`` say how far I am, so that a lost last batch shows."""
    BYE = 4
    """I want nothing any more: answer when all you had for me has been sent."""
    BYE_ACK = 5


class Header(NamedTuple):
    """A frame without its body."""

    to: bytes
    version: int
    kind: int
    slot: int
    """The sender's, as the epoch."""
    epoch: int
    number: int
    envelopes: int
    position: int


class EnvelopeTooBig(ValueError):
    """An envelope is larger than :data:`MAX_ENVELOPE`."""


class BadFrame(ValueError):
    """A frame that is not ours: too short, too long, or of another version."""


_encoder = msgspec.msgpack.Encoder()
_batch_decoder = msgspec.msgpack.Decoder(list[Envelope])
_raw_decoder = msgspec.msgpack.Decoder(list[msgspec.Raw])
_one_decoder = msgspec.msgpack.Decoder(Envelope)

# What the decoders raise for bytes that are no envelopes: UnicodeDecodeError, a ValueError, comes from str fields.
_UNDECODABLE = (msgspec.MsgspecError, ValueError, RecursionError)


def encode(envelope: Envelope) -> bytes:
    """An envelope as it will stand in a batch.

    Raises:
        EnvelopeTooBig: it has more than 16 MiB.
        ValueError: a text in it cannot be UTF-8 (lone surrogates).
    """
    encoded = _encoder.encode(envelope)
    if len(encoded) > MAX_ENVELOPE:
        raise EnvelopeTooBig(
            f"a message of {len(encoded)} bytes is too large for the bus; at most {MAX_ENVELOPE}"
        )
    return encoded


def destination(slot: int, epoch: int) -> bytes:
    """What the inbox of (slot, epoch) subscribes to; the first bytes of every frame for it."""
    return _DESTINATION.pack(slot, epoch & 0xFFFFFFFF)


def parse_destination(prefix: bytes) -> tuple[int, int]:
    """(slot, epoch) of the 8 bytes of a destination."""
    slot, epoch = _DESTINATION.unpack(prefix)
    return slot, epoch


def data_frame(
    to: bytes, slot: int, epoch: int, number: int, envelopes: int, position: int, body: bytes
) -> bytes:
    """A DATA frame; ``body`` is encoded envelopes joined, the rest as in the module's table."""
    head = _HEAD.pack(to, VERSION, 0, slot, epoch, number, envelopes, position)
    return b"".join((head, _CHECKSUM_ARRAY.pack(crc32(head), _ARRAY32, envelopes), body))


def control_frame(to: bytes, kind: FrameKind, slot: int, epoch: int, number: int, position: int) -> bytes:
    """A frame without envelopes."""
    head = _HEAD.pack(to, VERSION, kind, slot, epoch, number, 0, position)
    return head + _CHECKSUM.pack(crc32(head))


def parse_header(message: bytes) -> Header:
    """The header of a frame.

    Raises:
        BadFrame: too short, too long, of another version, or damaged; the text says which.
    """
    if len(message) < HEADER_BYTES:
        raise BadFrame(f"a frame of {len(message)} bytes, where a header has {HEADER_BYTES}")
    header = Header._make(_HEAD.unpack_from(message))
    if header.version != VERSION:
        raise BadFrame(f"a frame of version {header.version}, where this is {VERSION}")
    if len(message) > MAX_FRAME:
        raise BadFrame(f"a frame of {len(message)} bytes, where at most {MAX_FRAME} are allowed")
    if _CHECKSUM.unpack_from(message, _HEAD.size)[0] != crc32(message[: _HEAD.size]):
        raise BadFrame("a frame whose header is damaged")
    if header.envelopes > len(message) or header.number > _SANE or header.position > _SANE:
        raise BadFrame("a frame with impossible numbers")
    return header


def decode_batch(message: bytes) -> tuple[list[Envelope], int]:
    """The envelopes of a DATA frame whose header is good, and how many could not be understood.

    A body that is no array at all counts as one. Never raises for bytes.
    """
    return decode_array(memoryview(message)[HEADER_BYTES:])


def decode_array(body: bytes | memoryview) -> tuple[list[Envelope], int]:
    """The same of a msgpack array of envelopes, wherever it comes from."""
    try:
        return _batch_decoder.decode(body), 0
    except _UNDECODABLE:
        pass
    try:
        parts = _raw_decoder.decode(body)
    except _UNDECODABLE:
        return [], 1
    return _decode_each(parts)


def encode_array(encoded: list[bytes]) -> bytes:
    """A msgpack array of envelopes that are encoded already."""
    return b"".join((_ARRAY32_HEAD.pack(_ARRAY32, len(encoded)), *encoded))


def _decode_each(parts: Iterable[msgspec.Raw]) -> tuple[list[Envelope], int]:
    good, bad = [], 0
    for part in parts:
        try:
            good.append(_one_decoder.decode(part))
        except _UNDECODABLE:
            bad += 1
    return good, bad
