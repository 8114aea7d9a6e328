"""A packed matrix from a float matrix; what chooses codes and scales is cpu/quantize.cpp."""

import numpy as np
from numpy.typing import NDArray

from thinslice.kernels import native_pack
from thinslice.kernels.packed import PackedWeight, empty
from thinslice.plan.packed_format import PackedFormat


def quantize(weight: NDArray[np.generic], fmt: PackedFormat) -> PackedWeight:
    """Pack a float matrix [N, K] so that the squared error of each group of 32 is small.

    For int4 the error is weighed by the size of the weights, see cpu/quantize.cpp.

    Args:
        weight: float32, float16 or bfloat16 (as uint16), its rows contiguous.

    Peak extra memory: the packed matrix.
    Errors: TypeError, ValueError for other than a float matrix with K a multiple of 32;
    CheckpointError for weights that are not finite or exceed the range of fp16 scales.
    Source: the search for scales is that of make_qx_quants and make_qkx2_quants in llama.cpp.
    """
    if weight.ndim != 2:
        raise ValueError(f"quantize takes a matrix, got {list(weight.shape)}")
    target = empty(fmt, weight.shape[0], weight.shape[1])
    native_pack.quantize(weight, target)
    return target
