"""Numbers on the processor: arrays of NumPy; bfloat16, for which it has no type, as 16 bits."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

BF16 = np.dtype(np.uint16)
"""The upper half of a float32. No other array of this package is of this type."""

FLOAT_DTYPES: dict[str, np.dtype[Any]] = {"float32": np.dtype(np.float32), "bfloat16": BF16}
"""The float types that models are computed in, by the name they have in settings and plans."""


# An array of NumPy on the processor, a tensor of torch on a card: what they have in common.
Array = Any
# Numbers on the host, of any type; and float32.
Numbers = NDArray[np.generic]
Floats = NDArray[np.float32]
