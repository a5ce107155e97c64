"""The query of a handshake, read in few steps."""

from __future__ import annotations

from urllib.parse import parse_qsl

from hypothesis import given
from hypothesis import strategies as st

from workers.hub import _parse_query


@given(st.text(alphabet=st.sampled_from("ab/#=&;%+?2Fé "), max_size=40))
def test_it_is_read_as_the_standard_library_reads_it(query: str) -> None:
    assert _parse_query(query) == parse_qsl(query, True)
