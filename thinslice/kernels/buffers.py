"""Memory for weights: 64-byte aligned, in 2 MiB pages where the system has them.

A kernel that streams weights from 4 KiB pages waits for address translation: int4, 11008 x 4096,
one row, two threads read 21 GB/s from 4 KiB and 26 GB/s from 2 MiB pages.
"""

import mmap
from contextlib import suppress

import torch

from thinslice.units import MIB

HUGE_PAGE = 2 * MIB


def empty_bytes(num_bytes: int) -> torch.Tensor:
    """A flat uint8 tensor whose bytes are not set; from 2 MiB on aligned to 2 MiB.

    Memory is taken page by page when it is first written; the 2 MiB asked for beyond num_bytes to
    align the start are address space only.
    """
    if not hasattr(mmap, "MADV_HUGEPAGE") or num_bytes < HUGE_PAGE:
        return torch.empty(num_bytes, dtype=torch.uint8, device="cpu")
    # Private: shared anonymous memory, Python's default, would be counted as a shared file.
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    region = mmap.mmap(-1, num_bytes + HUGE_PAGE, flags=flags)
    whole = torch.frombuffer(region, dtype=torch.uint8)
    start = -whole.data_ptr() % HUGE_PAGE
    # Whole large pages only: a last one in part would hold more than was asked for.
    with suppress(OSError):  # a kernel built without them refuses; small pages do as well
        region.madvise(mmap.MADV_HUGEPAGE, start, num_bytes // HUGE_PAGE * HUGE_PAGE)
    return whole[start : start + num_bytes]
