"""Memory at an aligned address that counts from the moment it is asked for."""

import torch

from thinslice.kernels.buffers import HUGE_PAGE, empty_bytes


def aligned_buffer(num_bytes: int) -> torch.Tensor:
    """A uint8 tensor [num_bytes] of zeros at a multiple of 2 MiB, all of its pages in place.

    The memory goes back to the system with the last tensor that looks at it.

    Memory: num_bytes, and of address space up to 2 MiB more, for the alignment.
    """
    return empty_bytes(max(num_bytes, HUGE_PAGE))[:num_bytes].zero_()
