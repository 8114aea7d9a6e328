"""Numbers on the processor: arrays of NumPy; bfloat16, for which it has no type, as 16 bits."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

BF16 = np.dtype(np.uint16)
"""The upper half of a float32. No other array of this package is of this type."""

FLOAT_DTYPES: dict[str, np.dtype[Any]] = {"float32": np.dtype(np.float32), "bfloat16": BF16}
"""The float types that models are computed in, by the name they have in settings and plans."""


def to_float32(numbers: NDArray[np.generic]) -> NDArray[np.float32]:
    """The same numbers in float32: themselves, where they are."""
    if numbers.dtype == BF16:
        return (numbers.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return numbers.astype(np.float32, copy=False)
