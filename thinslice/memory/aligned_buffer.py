"""Memory at an aligned address that counts from the moment it is asked for."""

import numpy as np
from numpy.typing import NDArray

from thinslice.kernels.buffers import HUGE_PAGE, empty_bytes


def aligned_buffer(num_bytes: int) -> NDArray[np.uint8]:
    """A uint8 array [num_bytes] of zeros at a multiple of 2 MiB, all of its pages in place.

    The memory goes back to the system with the last array that looks at it.

    Memory: num_bytes, and of address space up to 2 MiB more, for the alignment.
    """
    buffer = empty_bytes(max(num_bytes, HUGE_PAGE))[:num_bytes]
    buffer.fill(0)
    return buffer
