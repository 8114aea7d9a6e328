"""Give memory back to the system that was let go of and that the allocator still keeps."""

import ctypes
import gc
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

from thinslice.memory.meter import anonymous_bytes
from thinslice.units import MIB

# What steps may come to keep from one to the next, in bytes that are resident. Between pieces of
# many sizes, 70 MiB came to be kept (SmolLM2 in bfloat16, prompts of ever new lengths).
_KEPT_BYTES = 4 * MIB
# A return takes about a millisecond, and 70 ms where a program's own heap is in hundreds of
# thousands of pieces: so seldom that it takes a hundredth of the time, until much is kept.
_SECONDS_APART, _MOST_SHARE = 0.02, 0.01
_KEPT_WHATEVER_IT_COSTS_BYTES = 16 * MIB


class KeptMemory:
    """The bound on what the allocator keeps between steps.

    Pieces of a step are taken from what the last one left, so they cost no page faults; what steps
    come to leave beyond the bound goes back to the system when one ends. The measure is resident
    memory of the process: what the C library counts as free holds pages or has none, and a step
    that fills pages where there were none leaves no more of it. Where the system does not tell, as
    macOS, the allocator returns pages by itself or keeps them.

    What MKL keeps for a thread, where torch has it, goes once another one runs a step: a MiB for
    each of those that take turns.
    """

    def __init__(self) -> None:
        self._next_s = 0.0
        self._least_bytes = 0
        self._was_of_use = True
        self._thread = threading.get_ident()
        self._free_buffers = _buffers_of_products()

    def bound(self) -> None:
        """Give back what is kept beyond the bound; to be called when a step ends, by its thread."""
        thread = threading.get_ident()
        if thread != self._thread:
            self._thread = thread
            self._free_buffers()
        held = anonymous_bytes()
        self._least_bytes = min(self._least_bytes, held)
        kept = held - self._least_bytes
        start = time.perf_counter()
        is_much = kept > _KEPT_WHATEVER_IT_COSTS_BYTES and self._was_of_use
        if kept <= _KEPT_BYTES or (start < self._next_s and not is_much):
            return
        _trim()
        is_first, self._least_bytes = kept == held, anonymous_bytes()
        # What other threads hold and let go of by themselves is no reason to try again at once.
        self._was_of_use = is_first or held - self._least_bytes > _KEPT_BYTES
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
