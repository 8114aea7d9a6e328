"""Give memory back to the system that was let go of and that the allocator still keeps."""

import ctypes
import gc
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

from thinslice.units import MIB

# What may stay free in the heap from one step to the next. Between pieces of many sizes 70 MiB came
# to be kept that nobody used (SmolLM2 in bfloat16, prompts of ever new lengths).
_KEPT_BYTES = 4 * MIB
# To ask how much is free takes 0.02 to 0.1 ms, and 70 ms where a program's own heap is in hundreds
# of thousands of pieces: so often that it takes a hundredth of the time.
_SECONDS_APART, _MOST_SHARE = 0.02, 0.01


class _HeapState(ctypes.Structure):
    """``struct mallinfo2`` of malloc.h; ``fordblks`` is what is free in all heaps, in bytes."""

    _fields_ = [
        ("others", ctypes.c_size_t * 8),
        ("fordblks", ctypes.c_size_t),
        ("keepcost", ctypes.c_size_t),
    ]


class KeptMemory:
    """The bound on what the allocator keeps between steps.

    Pieces of a step are taken from what the last one left, so they cost no page faults; what steps
    come to leave beyond the bound goes back to the system when one ends. Free room counts from the
    least since it last did: the program's own freed pieces stay counted, their pages gone. Where
    the C library is not glibc 2.33 or newer, its allocator returns pages by itself or keeps them.

    What MKL keeps for a thread, where torch has it, goes once another one runs a step: a MiB for
    each of those that take turns.
    """

    def __init__(self) -> None:
        library = ctypes.CDLL(None)
        self._heap_state = getattr(library, "mallinfo2", None)
        if self._heap_state is not None:
            self._heap_state.restype = _HeapState
        self._next_s = 0.0
        self._least_free = 0
        self._thread = threading.get_ident()
        self._free_buffers = _buffers_of_products()

    def bound(self) -> None:
        """Give back what is free beyond the bound; to be called when a step ends, by its thread."""
        thread = threading.get_ident()
        if thread != self._thread:
            self._thread = thread
            self._free_buffers()
        start = time.perf_counter()
        if self._heap_state is None or start < self._next_s:
            return
        free = self._heap_state().fordblks
        if free > self._least_free + _KEPT_BYTES:
            _trim()
            free = self._least_free = self._heap_state().fordblks
        self._least_free = min(self._least_free, free)
        end = time.perf_counter()
        self._next_s = end + max(_SECONDS_APART, (end - start) / _MOST_SHARE)


def give_back() -> None:
    """Collect what only cycles hold, and return free pages of the heap to the system.

    The next model in this process then plans for what is really held. Where the C library has no
    malloc_trim, as musl and macOS, its allocator returns pages by itself.
    """
    gc.collect()
    _trim()


def _buffers_of_products() -> Callable[[], object]:
    """What frees the buffers that MKL, where torch has it, keeps for each thread."""
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        free: Callable[[], object] = ctypes.CDLL(str(library)).mkl_serv_free_buffers
    except (OSError, AttributeError):
        return lambda: None
    return free


def _trim() -> None:
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(ctypes.c_size_t(0))
