"""Memory for weights: 64-byte aligned, in 2 MiB pages where the system has them.

A kernel that streams weights from 4 KiB pages waits for address translation: int4, 11008 x 4096,
one row, two threads read 21 GB/s from 4 KiB and 26 GB/s from 2 MiB pages.
"""

import mmap

import torch

from thinslice.units import MIB

HUGE_PAGE = 2 * MIB


def empty_bytes(num_bytes: int) -> torch.Tensor:
    """A flat uint8 tensor whose bytes are not set; from 2 MiB on aligned to 2 MiB.

    Memory is taken page by page when it is first written; the 2 MiB asked for beyond num_bytes to
    align the start are address space only.
    """
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if advice is None or num_bytes < HUGE_PAGE:
        return torch.empty(num_bytes, dtype=torch.uint8)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    region = mmap.mmap(-1, num_bytes + HUGE_PAGE, flags=flags)
    region.madvise(advice)
    whole = torch.frombuffer(region, dtype=torch.uint8)
    start = -whole.data_ptr() % HUGE_PAGE
    return whole[start : start + num_bytes]
