"""The border to the compiled kernels that fill packed matrices, and that change types of numbers.

As in native.py every argument is checked here before addresses cross. A result's bits depend
neither on the number of threads nor on the instruction set.
"""

import numpy as np
from numpy.typing import NDArray

from thinslice.errors import CheckpointError
from thinslice.kernels import arrays, native
from thinslice.kernels.arrays import BF16, Numbers
from thinslice.kernels.packed import PackedWeight, empty
from thinslice.plan.ggml_types import BY_NAME
from thinslice.plan.packed_format import GROUP, PackedFormat, keeps_codes, packed_format_of

_FLOAT_CODES = {np.dtype(np.float32): 0, BF16: 1, np.dtype(np.float16): 3}
# Of block types whose codes are kept; see packed_format.keeps_codes.
_BLOCK_CODES = {"Q4_0": 0, "Q4_1": 1, "Q8_0": 2, "Q4_K": 3}


def quantize(weight: NDArray[np.generic], target: PackedWeight) -> None:
    """Choose codes and scales for a matrix [N, K] of float32, float16 or bfloat16 (as uint16).

    The squared error of each group of 32 becomes small, for int4 weighed by the size of the
    weights. The rows must be contiguous, and may lie at any address. Peak extra memory: none.
    Errors: TypeError, ValueError for another array; CheckpointError for weights that are not finite
    or exceed the range of fp16 scales, and then ``target`` holds nothing of use.
    Source: the search for scales, in cpu/quantize.cpp, is that of make_qx_quants and
    make_qkx2_quants in llama.cpp.
    """
    _check_floats(weight, "weight")
    shape = (target.out_features, target.in_features)
    if weight.shape != shape:
        raise ValueError(
            f"a packed matrix {list(shape)} takes weights of that shape, got {list(weight.shape)}"
        )
    row_bytes, number_bytes = weight.strides
    if number_bytes != weight.itemsize or row_bytes % number_bytes:
        raise ValueError(f"the rows of weight must be contiguous, strides {weight.strides}")
    status = native.library().quantize(
        weight.ctypes.data,
        _FLOAT_CODES[weight.dtype],
        row_bytes // number_bytes,
        target.out_features,
        target.in_features // GROUP,
        native.FORMAT_CODES[target.format],
        _address_of(target),
    )
    _check_status(status)


def quantized(weight: NDArray[np.generic], fmt: PackedFormat) -> PackedWeight:
    """A new packed matrix of a float matrix; see ``quantize``.

    Errors: as ``quantize``, and ValueError for other than a matrix with K a multiple of 32.
    """
    if weight.ndim != 2:
        raise ValueError(f"quantized takes a matrix, got {list(weight.shape)}")
    target = empty(fmt, weight.shape[0], weight.shape[1])
    quantize(weight, target)
    return target


def repack(blocks: NDArray[np.uint8], kind: str, target: PackedWeight) -> None:
    """Put the blocks [N, bytes of a row] of a GGUF matrix into a packed one, their codes as they
    are.

    Args:
        kind: Q4_0 (into int4), Q4_1 (int4m), Q8_0 (int8) or Q4_K (int4m, its scales and minimums
            rounded to fp16).

    Peak extra memory: none.
    Errors: TypeError, ValueError for blocks or a target that do not fit; CheckpointError for a
    scale of Q4_K beyond the range of fp16.
    """
    block_size = BY_NAME[kind].block_size
    row_bytes = target.in_features // block_size * BY_NAME[kind].block_bytes
    if not keeps_codes(kind, target.format) or target.in_features % block_size:
        raise ValueError(
            f"{kind} goes into {packed_format_of(kind)} with rows of whole blocks of {block_size}, "
            f"not into {target.format} with rows of {target.in_features}"
        )
    if blocks.dtype != np.uint8:
        raise TypeError(f"blocks must be uint8, got {blocks.dtype}")
    if blocks.shape != (target.out_features, row_bytes) or not blocks.flags.c_contiguous:
        raise ValueError(
            f"blocks must be a contiguous {[target.out_features, row_bytes]}, "
            f"got {list(blocks.shape)}"
        )
    groups = target.in_features // GROUP
    status = native.library().repack(
        blocks.ctypes.data, _BLOCK_CODES[kind], target.out_features, groups, _address_of(target)
    )
    _check_status(status)


def convert(source: NDArray[np.generic], target: NDArray[np.generic]) -> None:
    """Fill an array with the numbers of another: float32, float16 or bfloat16 (as uint16) each.

    Both have one shape and are contiguous; ``source`` may lie at any address. Numbers are rounded
    to nearest even, in float16 from 65520 on to infinity. Peak extra memory: none.
    Errors: TypeError, ValueError for other arrays or two that overlap.
    """
    for array, name in ((source, "source"), (target, "target")):
        _check_floats(array, name)
        if array.shape != source.shape or not array.flags.c_contiguous:
            raise ValueError(
                f"{name} must be a contiguous {list(source.shape)}, got {list(array.shape)}"
            )
    if not target.flags.writeable or not target.flags.aligned:
        raise ValueError("target must be aligned, and may be written to")
    if np.may_share_memory(source, target):
        raise ValueError("source and target must not overlap")
    native.library().convert(
        source.ctypes.data,
        _FLOAT_CODES[source.dtype],
        target.ctypes.data,
        _FLOAT_CODES[target.dtype],
        source.size,
    )


def copy_into(source: Numbers, target: Numbers) -> None:
    """Fill an array with the numbers of another of its shape, in the types that ``convert`` takes.

    Extra memory: ``source`` once more where it is not contiguous.
    """
    if source.dtype == target.dtype:
        target[...] = source
    else:
        convert(np.ascontiguousarray(source), target)


def converted(source: Numbers, dtype: np.dtype) -> Numbers:
    """The numbers in a type: the array itself, where they are."""
    if source.dtype == dtype:
        return source
    target = arrays.empty(source.shape, dtype)
    copy_into(source, target)
    return target


def _address_of(target: PackedWeight) -> int:
    if not isinstance(target.data, np.ndarray) or not target.data.flags.writeable:
        raise ValueError("a matrix is packed into an array on the host that may be written to")
    return target.address


def _check_floats(array: NDArray[np.generic], name: str) -> None:
    """Refuse what is of no float type (TypeError); uint16 stands for bfloat16."""
    if array.dtype not in _FLOAT_CODES:
        raise TypeError(f"{name} must be float32, float16 or bfloat16, got {array.dtype}")


def _check_status(status: int) -> None:
    library = native.library()
    if status & library.NOT_FINITE:
        raise CheckpointError("a weight is infinite or not a number; it cannot be quantised")
    if status & library.TOO_LARGE:
        raise CheckpointError("a scale exceeds the range of fp16; the weights are too large")
