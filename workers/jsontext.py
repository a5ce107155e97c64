"""JSON text for clients: one encoder, one decoder, and what may go wrong with either."""

from __future__ import annotations

from typing import Any, Final

import msgspec


def _encode_other(value: Any) -> Any:
    """Types msgspec does not know: pydantic models by their own dump."""
    dump = getattr(value, "model_dump", None)
    if callable(dump):
        return dump(mode="json")
    raise TypeError(f"cannot be sent as JSON: {type(value).__name__}")


_encoder = msgspec.json.Encoder(enc_hook=_encode_other)
_decoder = msgspec.json.Decoder()
_object_decoder = msgspec.json.Decoder(dict[str, msgspec.Raw])


#: The C functions beneath :func:`decode_object` and :func:`encode`, for the way of every message; see :func:`not_json`.
decode_members = _object_decoder.decode
encode_members = _encoder.encode
UNREADABLE = (msgspec.DecodeError, RecursionError, UnicodeError)
_TRUNCATED: Final = "Input data was truncated"  # msgspec also says so of a text like "\ud83d"


class NotJson(ValueError):
    """What came in is not the JSON that was asked for; the text says what is wrong with it."""


def encode(value: Any) -> bytes:
    """``value`` as JSON in UTF-8: everything msgspec knows, and pydantic models.

    Raises:
        TypeError: it holds something that has no JSON form.
        ValueError: it holds text that is no Unicode (lone surrogates), or nests too deep.
    """
    try:
        return _encoder.encode(value)
    except RecursionError:
        raise ValueError("cannot be sent as JSON: nested too deep") from None


def decode(text: bytes | str | msgspec.Raw) -> Any:
    """The value of a JSON text.

    Raises:
        NotJson: it is malformed, nested too deep, or not UTF-8.
    """
    try:
        return _decoder.decode(text)
    except UNREADABLE as exc:
        raise not_json(exc) from None


def decode_object(text: bytes | str) -> dict[str, msgspec.Raw]:
    """The members of a JSON object with their values as they were written, so that they can be passed on unchanged.

    Raises:
        NotJson: it is malformed, nested too deep, or not an object.
    """
    try:
        return decode_members(text)
    except UNREADABLE as exc:
        raise not_json(exc) from None


def not_json(exc: Exception) -> NotJson:
    """What a decoder raised, in words for people."""
    if isinstance(exc, msgspec.ValidationError):
        return NotJson("expected a JSON object")
    if isinstance(exc, RecursionError):
        return NotJson("JSON is nested too deep")
    words = str(exc)
    if words == _TRUNCATED:
        words = "JSON is malformed: it ends too early, or holds half of a surrogate pair"
    return NotJson(words)
