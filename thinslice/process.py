"""What the plan relies on in the process that a model is loaded into, whoever loads it."""

import ctypes
import os
from functools import cache

from thinslice.units import KIB, MIB

# From mallopt(3). Larger pieces are mapped by themselves and go back to the system when they are
# freed, at the price of a page fault for each 4 KiB of the next. By default the bound grows to
# 32 MiB with what is freed; with a higher one 10 MiB more came to be kept between pieces of many
# sizes, where forty threads take turns.
_M_MMAP_THRESHOLD, _MAPPED_BYTES = -3, 128 * KIB
_M_TRIM_THRESHOLD, _TRIMMED_BYTES = -1, MIB
# Threads that take turns at an engine would each have a heap of their own: 8 for each core.
_M_ARENA_MAX, _HEAPS = -8, 1


@cache
def bound_allocator() -> None:
    """Keep the C library's allocator from holding on to much that nobody uses, from now on; before
    the first model of this process is planned, or packed.

    Nothing is done where the C library has no ``mallopt``, as musl and macOS.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is None:
        return
    mallopt(_M_MMAP_THRESHOLD, _MAPPED_BYTES)
    mallopt(_M_TRIM_THRESHOLD, _TRIMMED_BYTES)
    mallopt(_M_ARENA_MAX, _HEAPS)
