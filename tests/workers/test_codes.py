"""Error and close codes: complete, in words, and as the Centrifuge protocol numbers them."""

from __future__ import annotations

import pytest

from workers import codes
from workers.codes import MAX_REASON_BYTES, Close, ErrorCode

CLOSES = {name: value for name, value in vars(codes).items() if isinstance(value, Close)}


@pytest.mark.parametrize("code", ErrorCode)
def test_each_error_code_has_words(code: ErrorCode) -> None:
    assert code.message.isprintable()
    assert code.message
    assert code.temporary is (code in (100, 111, 113))


def test_the_error_codes_of_the_protocol() -> None:
    assert sorted(ErrorCode) == list(range(100, 114))
    assert ErrorCode(107) is ErrorCode.BAD_REQUEST


@pytest.mark.parametrize("close", CLOSES.values(), ids=CLOSES)
def test_each_reason_is_plain_words_that_fit_into_a_close_frame(close: Close) -> None:
    assert close.reason.isprintable()
    assert len(close.reason.encode()) <= MAX_REASON_BYTES
    assert not close.reason.startswith("{"), "centrifuge-js would take it for JSON"
    assert 1000 <= close.code < 1016 or 3000 <= close.code < 4000
    assert close.code not in (1004, 1005, 1006, 1015), "RFC 6455, section 7.4.1, reserves these"


def test_each_code_has_one_meaning() -> None:
    assert len({close.code for close in CLOSES.values()}) == len(CLOSES)
    expected = {1000, 1001, 1003, 1008, 1009, 1011, 1012, 1013, 1014, 3001, 3008, 3012, *range(3500, 3510)}
    assert expected <= {close.code for close in CLOSES.values()}
