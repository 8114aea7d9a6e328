"""What the plan relies on in the process that a model is loaded into, whoever loads it.

Each setting keeps memory within a bound that does not depend on how long the process runs, or keeps
threads from slowing each other down. Variables of the environment that the user has set are left as
they are.
"""

import ctypes
import os
import sys
import warnings
from functools import cache

from thinslice.units import KIB, MIB

# oneDNN keeps the compiled kernels of 1,024 products by default. Those of a model's matrices, at
# the numbers of rows that kernels.torch_ops asks it for, are fewer than these.
_ONEDNN_KERNELS = 64
# From mallopt(3). Larger pieces are mapped by themselves and go back to the system when they are
# freed, at the price of a page fault for each 4 KiB of the next. By default the bound grows to
# 32 MiB with what is freed. In torch's steps most pieces have less than a MiB, and with the lower
# bound a prompt took a third longer. Packed models allocate little; with the higher bound 10 MiB
# more came to be kept between pieces of many sizes, where forty threads take turns.
_M_MMAP_THRESHOLD, _MAPPED_BYTES, _MAPPED_FLOAT_BYTES = -3, 128 * KIB, MIB
# What is free at the heap's end: in torch's steps it stays until memory.give_back.KeptMemory bounds
# it at the end of each.
_M_TRIM_THRESHOLD, _TRIMMED_BYTES, _TRIMMED_FLOAT_BYTES = -1, MIB, 64 * MIB
# Threads that take turns at an engine would each have a heap of their own: 8 for each core.
_M_ARENA_MAX, _HEAPS = -8, 1


def set_environment() -> None:
    """Set what libraries read when they are loaded; to be called before torch is imported.

    torch's threads spin for milliseconds at each operation's end by default, which on busy cores
    slows a token down tenfold and more. Measured on two cores, SmolLM2: 17 against 3 tokens/s
    beside other work, 14 against 25 alone.
    """
    # Read at oneDNN's first product, so it is not too late where torch is imported already.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(_ONEDNN_KERNELS))
    if "OMP_WAIT_POLICY" in os.environ:
        return
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    if "torch" in sys.modules:
        warnings.warn(
            "torch was imported before thinslice: its threads spin while they wait, which is slow "
            "beside other work; import thinslice first, or set OMP_WAIT_POLICY=PASSIVE",
            stacklevel=3,
        )


@cache
def bound_allocator_at_first() -> None:
    """Before the first model of this process is planned, or packed."""
    bound_allocator(computes_floats=False)


def bound_allocator(*, computes_floats: bool) -> None:
    """Keep the C library's allocator from holding on to much that nobody uses.

    The bounds are the process's: with several models, those of the last one that was loaded, beside
    which floats may be slower than alone. Nothing is done where the C library has no ``mallopt``,
    as musl and macOS.

    Args:
        computes_floats: torch makes the products of the model that is loaded now.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is None:
        return
    mallopt(_M_MMAP_THRESHOLD, _MAPPED_FLOAT_BYTES if computes_floats else _MAPPED_BYTES)
    mallopt(_M_TRIM_THRESHOLD, _TRIMMED_FLOAT_BYTES if computes_floats else _TRIMMED_BYTES)
    mallopt(_M_ARENA_MAX, _HEAPS)
