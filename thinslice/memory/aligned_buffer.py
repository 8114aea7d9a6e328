"""Memory at an aligned address that counts from the moment it is asked for."""

import mmap
from contextlib import suppress

import torch

from thinslice.units import MIB

_HUGE_PAGE_BYTES = 2 * MIB


def aligned_buffer(num_bytes: int) -> torch.Tensor:
    """A uint8 tensor [num_bytes] of zeros at a multiple of 2 MiB, all of its pages in place.

    The memory goes back to the system with the last tensor that looks at it.

    Memory: num_bytes; of address space 2 MiB more, for the alignment.
    """
    # Private: shared anonymous memory, Python's default, would be counted as a shared file.
    mapping = mmap.mmap(
        -1, num_bytes + _HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    )
    whole = torch.frombuffer(mapping, dtype=torch.uint8)
    start = -whole.data_ptr() % _HUGE_PAGE_BYTES
    _ask_for_huge_pages(mapping, start, num_bytes // _HUGE_PAGE_BYTES * _HUGE_PAGE_BYTES)
    buffer = whole[start : start + num_bytes]
    return buffer.zero_()


def _ask_for_huge_pages(mapping: mmap.mmap, start: int, num_bytes: int) -> None:
    """Only for whole huge pages: a last one in part would hold more than was asked for."""
    if num_bytes and hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel built without them refuses; small pages do as well
            mapping.madvise(mmap.MADV_HUGEPAGE, start, num_bytes)
