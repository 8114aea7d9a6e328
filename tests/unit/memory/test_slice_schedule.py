"""Requests cover a slice exactly, aligned, and fit the buffer that was promised."""

from itertools import pairwise
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from thinslice.memory.slice_schedule import Slice, buffer_bytes_for, pieces_of
from thinslice.memory.uncached_file import ALIGNMENT


@given(st.integers(0, 1 << 40), st.integers(1, 200_000), st.integers(1, 9))
def test_pieces_cover_the_slice(offset: int, num_bytes: int, request_pages: int) -> None:
    one = Slice(Path("model.safetensors"), offset, num_bytes)
    pieces = list(pieces_of(one, request_pages * ALIGNMENT))
    assert pieces[0].begin == 0
    assert pieces[0].offset <= offset < pieces[0].offset + ALIGNMENT
    for piece, following in pairwise(pieces):
        assert (following.begin, following.offset) == (
            piece.end,
            piece.offset + piece.end - piece.begin,
        )
        assert piece.num_needed == piece.end - piece.begin == request_pages * ALIGNMENT
    last = pieces[-1]
    assert last.offset + last.num_needed == offset + num_bytes
    assert 0 < last.num_needed <= last.end - last.begin < last.num_needed + ALIGNMENT
    for piece in pieces:
        assert piece.offset % ALIGNMENT == piece.begin % ALIGNMENT == piece.end % ALIGNMENT == 0
    assert last.end == one.aligned_bytes <= buffer_bytes_for(num_bytes)


def test_a_promised_buffer_is_no_larger_than_the_worst_alignment_needs() -> None:
    for num_bytes in (1, 2, ALIGNMENT, ALIGNMENT + 1, ALIGNMENT + 2, 100_000):
        needed = (Slice(Path("f"), offset, num_bytes).aligned_bytes for offset in range(ALIGNMENT))
        assert buffer_bytes_for(num_bytes) == max(needed)
