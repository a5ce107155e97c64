"""Envelopes and frames: what goes out comes in, and no bytes at all do harm."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipc import envelope as wire
from ipc.envelope import BadFrame, Envelope, EnvelopeTooBig, FrameKind

TO = wire.destination(7, 3)

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
envelopes = st.builds(
    Envelope,
    kind=st.integers(0, 2),
    channel=texts,
    topic=texts,
    data=st.binary(max_size=50),
    conn_ids=st.lists(texts, max_size=3).map(tuple),
)


def data_frame(*parts: bytes, number: int = 5, count: int | None = None) -> bytes:
    return wire.data_frame(TO, 1, 2, number, len(parts) if count is None else count, 1000, b"".join(parts))


@given(st.lists(envelopes, max_size=20))
def test_a_batch_comes_in_as_it_went_out(batch: list[Envelope]) -> None:
    message = data_frame(*map(wire.encode, batch))
    header = wire.parse_header(message)
    assert header == (TO, wire.VERSION, FrameKind.DATA, 1, 2, 5, len(batch), 1000)
    assert wire.decode_batch(message) == (batch, 0)
    assert len(message) == wire.OVERHEAD + sum(len(wire.encode(envelope)) for envelope in batch)


def test_a_control_frame_has_a_header_and_nothing_else() -> None:
    message = wire.control_frame(TO, FrameKind.TAIL, 9, 4, 77, 99)
    assert len(message) == wire.HEADER_BYTES
    assert wire.parse_header(message) == (TO, wire.VERSION, FrameKind.TAIL, 9, 4, 77, 0, 99)
    assert wire.parse_destination(message[:8]) == (7, 3)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_frame_or_the_documented_error(message: bytes) -> None:
    try:
        wire.parse_header(message)
    except BadFrame:
        return
    wire.decode_batch(message)


@given(st.lists(envelopes, min_size=1, max_size=5), st.data())
def test_a_damaged_header_is_noticed_and_a_damaged_body_harmless(
    batch: list[Envelope], data: st.DataObject
) -> None:
    message = bytearray(data_frame(*map(wire.encode, batch)))
    place = data.draw(st.integers(0, len(message) - 1))
    message[place] ^= data.draw(st.integers(1, 255))
    if place < wire.HEADER_BYTES:
        with pytest.raises(BadFrame):
            wire.parse_header(bytes(message))
    else:
        good, bad = wire.decode_batch(bytes(message))
        assert all(type(envelope) is Envelope for envelope in good)
        assert bad >= 0


@given(st.binary(max_size=100))
def test_any_body_gives_envelopes_and_a_count(body: bytes) -> None:
    good, bad = wire.decode_batch(data_frame(body, count=1))
    assert all(type(envelope) is Envelope for envelope in good)
    assert good or bad


@given(st.lists(envelopes, max_size=5), st.lists(envelopes, max_size=5))
def test_one_bad_envelope_costs_only_itself(before: list[Envelope], after: list[Envelope]) -> None:
    bad_ones = [
        msgspec.msgpack.encode("no envelope"),
        msgspec.msgpack.encode([0, "hub", 5, b""]),
        msgspec.msgpack.encode([-1, "hub", "a", b""]),
        b"\x94\x00\xa3hub\xa1\xff\xc4\x00",  # a topic that is no UTF-8
    ]
    parts = [*map(wire.encode, before), *bad_ones, *map(wire.encode, after)]
    assert wire.decode_batch(data_frame(*parts)) == ([*before, *after], len(bad_ones))


def test_an_older_peers_short_envelope_and_a_newer_ones_long_one_are_understood() -> None:
    short = msgspec.msgpack.encode([0, "hub", "a/b", b"1"])
    long = msgspec.msgpack.encode([0, "hub", "a/b", b"1", ["x"], 7, b"{}", None, "of a later version", 5])
    assert wire.decode_batch(data_frame(short, long)) == (
        [Envelope(0, "hub", "a/b", b"1"), Envelope(0, "hub", "a/b", b"1", ("x",), 7, b"{}")],
        0,
    )


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (b"", "0 bytes"),
        (data_frame()[: wire.HEADER_BYTES - 1], "bytes, where a header"),
        (data_frame()[:8] + b"\x02" + data_frame()[9:], "version 2"),
        (data_frame(bytes(wire.MAX_FRAME)), "at most"),
        (data_frame(count=2_000_000_000), "impossible"),
        (data_frame(number=1 << 60), "impossible"),
    ],
)
def test_a_bad_frame_says_what_is_wrong(message: bytes, words: str) -> None:
    with pytest.raises(BadFrame, match=words):
        wire.parse_header(message)


def test_what_cannot_travel_is_refused_where_it_is_published() -> None:
    with pytest.raises(EnvelopeTooBig, match="16777216"):
        wire.encode(Envelope(0, "hub", "a", bytes(wire.MAX_ENVELOPE)))
    with pytest.raises(ValueError, match="surrogates"):
        wire.encode(Envelope(0, "hub", "\ud800", b""))


def test_deep_nesting_does_not_recurse_out() -> None:
    good, bad = wire.decode_batch(data_frame(b"\x91" * 100_000, count=1))
    assert (good, bad) == ([], 1)
