"""Between torch's tensors, in which tests make and compare numbers, and arrays of NumPy."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from thinslice.kernels.arrays import BF16


def array_of(tensor: torch.Tensor) -> NDArray[Any]:
    """The same numbers as an array; bfloat16 as its bits."""
    tensor = tensor.detach().contiguous()
    if tensor.dtype is torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(BF16)
    return tensor.numpy()


def tensor_of(array: NDArray[Any]) -> torch.Tensor:
    """The same numbers as a tensor; bits of bfloat16 as such."""
    array = np.ascontiguousarray(array)
    if array.dtype == BF16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def log_softmax(logits: NDArray[Any]) -> NDArray[np.float64]:
    """Log-probabilities over the last dimension, by their definition."""
    wide = logits.astype(np.float64)
    total: NDArray[np.float64] = np.logaddexp.reduce(wide, axis=-1, keepdims=True)
    return wide - total


def to_float32(numbers: NDArray[Any]) -> NDArray[np.float32]:
    """The same numbers in float32, by no code of thinslice's."""
    if numbers.dtype == BF16:
        return (numbers.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return numbers.astype(np.float32)
