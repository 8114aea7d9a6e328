"""What the plan relies on in the process that a model is loaded into, whoever loads it."""

import ctypes
import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
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
def c_library() -> ctypes.CDLL:
    """The C library, looked up once: each CDLL makes classes of its own, which stay until a
    collection and keep a MiB of Python's heap that nothing else is left in."""
    return ctypes.CDLL(None)


@cache
def bound_allocator() -> None:
    """Keep the C library's allocator from holding on to much that nobody uses, from now on; before
    the first model of this process is planned, or packed.

    Nothing is done where the C library has no ``mallopt``, as musl and macOS.
    """
    mallopt = getattr(c_library(), "mallopt", None) if os.name == "posix" else None
    if mallopt is None:
        return
    mallopt(_M_MMAP_THRESHOLD, _MAPPED_BYTES)
    mallopt(_M_TRIM_THRESHOLD, _TRIMMED_BYTES)
    mallopt(_M_ARENA_MAX, _HEAPS)


def give_back() -> None:
    """Collect what only cycles hold, and return free pages of the heap to the system.

    The next model in this process then plans for what is really held. Collecting takes about 12
    milliseconds in a process that has only loaded our modules.
    """
    gc.collect()
    return_free_pages()


def return_free_pages() -> None:
    """Return free pages of the heap to the system; it takes 0.1 to 4 milliseconds.

    Where the C library has no malloc_trim, as musl and macOS, its allocator returns pages by
    itself.
    """
    trim = getattr(c_library(), "malloc_trim", None)
    if trim is not None:
        trim(ctypes.c_size_t(0))


@contextmanager
def without_collections(*, stays: bool = False) -> Iterator[None]:
    """Make many objects without a search for garbage among them after each few hundred.

    Such searches take an eighth of the time from a command's start to its first word. Other threads
    go without them for so long: put nothing in here that lasts.

    Args:
        stays: all that the process holds at the end is there until it ends, and is never searched:
            for the imports of a process that is ours.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if stays:
            gc.freeze()
        if was_enabled:
            gc.enable()
