"""Arrays on the processor: the types of their numbers, and aligned memory for them.

A kernel that streams weights from 4 KiB pages waits for address translation: int4, 11008 x 4096,
one row, two threads read 21 GB/s from 4 KiB and 26 GB/s from 2 MiB pages. So large pieces lie in
pages of 2 MiB where the system has them.
"""

import math
import mmap
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from thinslice.units import MIB

BF16 = np.dtype(np.uint16)
"""bfloat16, for which NumPy has no type: the upper half of a float32. No other array of this
package is of this type."""

FLOAT_DTYPES: dict[str, np.dtype[Any]] = {"float32": np.dtype(np.float32), "bfloat16": BF16}
"""The float types that models are computed in, by the name they have in settings and plans."""

# An array of NumPy on the processor, a tensor of torch on a card: what they have in common.
Array = Any
# Numbers on the host, of any type; and float32.
Numbers = NDArray[np.generic]
Floats = NDArray[np.float32]

HUGE_PAGE = 2 * MIB
_LINE = 64


def empty_bytes(num_bytes: int) -> NDArray[np.uint8]:
    """A flat uint8 array whose bytes are not set, at a multiple of 64 bytes, or, from 2 MiB on, of
    2 MiB.

    Memory is taken page by page when it is first written; the 2 MiB asked for beyond num_bytes to
    align the start are address space only.
    """
    if not hasattr(mmap, "MADV_HUGEPAGE") or num_bytes < HUGE_PAGE:
        aligned = np.empty(num_bytes + _LINE, np.uint8)
        start = -aligned.ctypes.data % _LINE
        return aligned[start : start + num_bytes]
    region, whole = _mapped(num_bytes + HUGE_PAGE)
    start = -whole.ctypes.data % HUGE_PAGE
    # Whole large pages only: a last one in part would hold more than was asked for.
    with suppress(OSError):  # a kernel built without them refuses; small pages do as well
        region.madvise(mmap.MADV_HUGEPAGE, start, num_bytes // HUGE_PAGE * HUGE_PAGE)
    return whole[start : start + num_bytes]


def empty_in_small_pages(shape: tuple[int, ...], dtype: np.dtype | type) -> NDArray[Any]:
    """An array whose numbers are not set, for memory of which only part may ever be written.

    A KV cache is such: K and V of all layers grow together, and in pages of 2 MiB one token may
    wait for the kernel to clear one of them for each (60 for SmolLM2: 0.1 s). Attention over 8,000
    positions takes 2% longer so.
    """
    dtype = np.dtype(dtype)
    num_bytes = math.prod(shape) * dtype.itemsize
    if not hasattr(mmap, "MADV_NOHUGEPAGE"):
        return empty(shape, dtype)
    region, whole = _mapped(max(num_bytes, 1))
    with suppress(OSError):  # a kernel built without large pages refuses
        region.madvise(mmap.MADV_NOHUGEPAGE)
    return whole[:num_bytes].view(dtype).reshape(shape)


def _mapped(num_bytes: int) -> tuple[mmap.mmap, NDArray[np.uint8]]:
    """Memory of our own from the system, and the array of its bytes that keeps it."""
    # Private: shared anonymous memory, Python's default, would be counted as a shared file.
    region = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return region, np.frombuffer(region, np.uint8)


def empty(shape: tuple[int, ...], dtype: np.dtype | type) -> NDArray[Any]:
    """An array whose numbers are not set, at a multiple of 64 bytes; NumPy's are at one of 16.

    From 2 MiB on as ``empty_bytes``: the logits of 16 rows of 49,152 come anew with each step, and
    take 0.6 ms less of it than in pages of 4 KiB.
    """
    dtype = np.dtype(dtype)
    return empty_bytes(math.prod(shape) * dtype.itemsize).view(dtype).reshape(shape)


def aligned_buffer(num_bytes: int) -> NDArray[np.uint8]:
    """A uint8 array [num_bytes] of zeros at a multiple of 2 MiB, all of its pages in place.

    The memory goes back to the system with the last array that looks at it.

    Memory: num_bytes, and of address space up to 2 MiB more, for the alignment.
    """
    buffer = empty_bytes(max(num_bytes, HUGE_PAGE))[:num_bytes]
    buffer.fill(0)
    return buffer
