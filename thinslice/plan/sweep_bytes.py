"""SweepBytes: what the slices of one pass over all weights take, on disk and in memory."""

from dataclasses import dataclass
from itertools import islice

from thinslice.forks import cached_property


@dataclass(frozen=True)
class SweepBytes:
    """Bytes of the slices of one sweep, in order.

    Attributes:
        kept: of each slice in memory.
        stored: of each slice on disk.
        largest_stored: the most that one slice takes on disk.
        converting: the most that is held while one slice is converted; 0 where none is.
        layer_counts: slices of each layer; the head's come after all of these.
    """

    kept: list[int]
    stored: list[int]
    largest_stored: int
    converting: int
    layer_counts: list[int]

    @cached_property
    def kept_bytes(self) -> int:
        """Bytes of all slices in memory."""
        return sum(self.kept)

    @cached_property
    def stored_bytes(self) -> int:
        """Bytes of all slices on disk."""
        return sum(self.stored)

    @cached_property
    def largest_layer_bytes(self) -> int:
        """The most bytes that the slices of one layer take in memory."""
        return largest_layer(self.kept, self.layer_counts)


def largest_layer(slice_bytes: list[int], layer_counts: list[int]) -> int:
    """The largest sum over the slices of one layer."""
    rest = iter(slice_bytes)
    return max(sum(islice(rest, count)) for count in layer_counts)
