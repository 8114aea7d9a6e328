"""Choosing codes and scales: from float weights, and from the blocks of a GGUF file.

The work is that of compiled kernels, cpu/quantize.cpp and cpu/repack.cpp; results are
deterministic. The layout of the result is told in `packed.py`.
"""

import numpy as np
from numpy.typing import NDArray

from thinslice.errors import CheckpointError
from thinslice.kernels import native_pack
from thinslice.kernels.dequantize import dequantized
from thinslice.kernels.packed import PackedWeight, empty
from thinslice.plan.ggml_types import BY_NAME
from thinslice.plan.packed_format import PANEL_ROWS, PackedFormat

# Weights dequantised at a time: temporaries of half a MiB, which stay in the caches.
_PIECE = 1 << 17

_FORMATS = {
    "Q4_0": PackedFormat.INT4,
    "Q4_1": PackedFormat.INT4M,
    "Q8_0": PackedFormat.INT8,
    "Q4_K": PackedFormat.INT4M,
    "Q5_K": PackedFormat.INT8,
    "Q6_K": PackedFormat.INT8,
}


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
    quantize_into(target, weight)
    return target


def quantize_into(target: PackedWeight, weight: NDArray[np.generic]) -> None:
    """Fill a packed matrix [N, K] from a float matrix; see ``quantize``.

    Peak extra memory: none. Errors: those of ``quantize``.
    """
    native_pack.quantize(weight, target)


def from_gguf(blocks: NDArray[np.uint8], kind: str, in_features: int) -> PackedWeight:
    """Pack the blocks of a GGUF matrix: uint8 [N, bytes of a row].

    Q4_0, Q4_1 and Q8_0 keep every bit. Q4_K becomes int4m with scales and minimums rounded to fp16
    (relative error of a weight's parts at most 2**-11). Q5_K and Q6_K are requantised to int8,
    which adds an error of 0.5% of the weights' root mean square, a tenth below Q8_0's own.
    Peak extra memory: the packed matrix; for Q5_K and Q6_K about 4 MiB more.
    Errors: CheckpointError for a kind that has no packed format, blocks of another size, or scales
    that exceed the range of fp16.
    """
    target = empty(_format_of(kind), blocks.shape[0], in_features)
    from_gguf_into(target, blocks, kind)
    return target


def from_gguf_into(target: PackedWeight, blocks: NDArray[np.uint8], kind: str) -> None:
    """Fill a packed matrix of the kind's own format from blocks; see ``from_gguf``.

    Peak extra memory: none; for Q5_K and Q6_K about 4 MiB.
    Errors: those of ``from_gguf``; ValueError for a target of another format or number of rows.
    """
    fmt = _format_of(kind)
    if target.format is not fmt or len(blocks) != target.out_features:
        raise ValueError(
            f"{len(blocks)} rows of {kind} go into as many of {fmt}, "
            f"not into {target.out_features} of {target.format}"
        )
    block_size = BY_NAME[kind].block_size
    row_bytes = target.in_features // block_size * BY_NAME[kind].block_bytes
    if target.in_features % block_size or blocks.ndim != 2 or blocks.shape[1] != row_bytes:
        raise CheckpointError(
            f"{kind} rows of {target.in_features} weights have {row_bytes} bytes in blocks of "
            f"{block_size}, got an array {list(blocks.shape)}"
        )
    if kind in native_pack.REPACKED_TYPES:
        native_pack.repack(blocks, kind, target)
    else:
        _requantize(target, blocks, kind)


def _format_of(kind: str) -> PackedFormat:
    if kind not in _FORMATS:
        known = ", ".join(sorted(_FORMATS))
        raise CheckpointError(f"GGUF type {kind} has no packed format; those with: {known}")
    return _FORMATS[kind]


def _requantize(target: PackedWeight, blocks: NDArray[np.uint8], kind: str) -> None:
    step = max(1, _PIECE // target.in_features // PANEL_ROWS) * PANEL_ROWS
    for start in range(0, target.out_features, step):
        stop = min(start + step, target.out_features)
        native_pack.quantize(dequantized(blocks[start:stop], kind), target.rows(start, stop))
