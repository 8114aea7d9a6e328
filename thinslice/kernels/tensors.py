"""Between arrays on the host and torch's tensors, which a card takes."""

import numpy as np
import torch
from numpy.typing import NDArray

from thinslice.kernels.arrays import BF16


def tensor_of(array: NDArray[np.generic]) -> torch.Tensor:
    """The same memory as a tensor."""
    if array.dtype == BF16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def floats_of(tensor: torch.Tensor) -> NDArray[np.float32]:
    """Numbers in float32 on the host."""
    numbers: NDArray[np.float32] = tensor.detach().float().cpu().numpy()
    return numbers
