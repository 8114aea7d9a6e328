"""What a slice reader is to read: ranges of files, and the aligned requests that cover them."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from thinslice.memory.uncached_file import ALIGNMENT


@dataclass(frozen=True)
class Slice:
    """A range of bytes of a file, at any offset."""

    path: Path
    offset: int
    num_bytes: int

    @property
    def aligned_start(self) -> int:
        """The last multiple of ALIGNMENT that is not after the range."""
        return self.offset // ALIGNMENT * ALIGNMENT

    @property
    def aligned_bytes(self) -> int:
        """Bytes from ``aligned_start`` to the first multiple of ALIGNMENT not before the end."""
        return _round_up(self.offset + self.num_bytes) - self.aligned_start


@dataclass(frozen=True)
class Piece:
    """The part of a slice that one request reads.

    Attributes:
        offset: in the file.
        begin: in the slice's buffer, as is ``end``.
        num_needed: bytes up to the end of the slice; what follows only aligns the request.
    """

    offset: int
    begin: int
    end: int
    num_needed: int


def pieces_of(one: Slice, request_bytes: int) -> Iterator[Piece]:
    """Cover a slice with aligned requests of ``request_bytes``, the last of what is left."""
    start, num_bytes = one.aligned_start, one.aligned_bytes
    for begin in range(0, num_bytes, request_bytes):
        end = min(begin + request_bytes, num_bytes)
        num_needed = min(end, one.offset + one.num_bytes - start) - begin
        yield Piece(start + begin, begin, end, num_needed)


def buffer_bytes_for(num_bytes: int) -> int:
    """Bytes of a buffer that holds any slice of up to ``num_bytes``, wherever it starts."""
    return _round_up(num_bytes + ALIGNMENT - 1)


def _round_up(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT
