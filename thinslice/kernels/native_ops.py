"""The operators of a dense decoder on the processor: compiled code, float32 activations.

Every sum has one order, so a row's bits do not depend on the rows beside it.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from thinslice.kernels import native, native_stack
from thinslice.kernels.arrays import Floats, empty
from thinslice.kernels.native import Matrix
from thinslice.kernels.ops import Ops
from thinslice.kernels.paged_kv import PagedKv, SequenceBatch


def rms_norm(x_TD: Floats, weight_D: Floats, eps: float) -> Floats:
    """Scale each row of the last dimension to unit root mean square, then by ``weight_D``.

    Source: arXiv 1910.07467.
    """
    rows = x_TD.reshape(-1, x_TD.shape[-1])
    return native.rms_norm(rows, weight_D, eps).reshape(x_TD.shape)


def rms_norm_(x_TD: Floats, weight_D: Floats, eps: float) -> Floats:
    """The same of rows, in their place."""
    return native.rms_norm(x_TD, weight_D, eps, out=x_TD)


def apply_rotary(x_TNH: Floats, cos_TR: Floats, sin_TR: Floats) -> Floats:
    """Rotate each head by its position, in place. Source: arXiv 2104.09864, as in GPT-NeoX."""
    return native.rope_(x_TNH, np.arange(len(x_TNH)), cos_TR, sin_TR)


def product(
    x_TD: Floats,
    rows: Matrix,
    bias: Floats | None = None,
    residual: Floats | None = None,
    out: Floats | None = None,
) -> Floats:
    """``x @ rows.T + bias + residual``; ``out`` may be ``residual``."""
    return native.linear(x_TD, rows, bias=bias, residual=residual, out=out)


def swiglu_(gate_TF: Floats, up_TF: Floats) -> Floats:
    """``silu(gate) * up`` in the place of ``gate``. Source: arXiv 2002.05202."""
    return native.silu_mul(gate_TF, up_TF, out=gate_TF)


def attend(
    qkv: tuple[Floats, Floats, Floats],
    cache: PagedKv,
    slots_T: NDArray[np.int64],
    sequences: SequenceBatch,
    window: int | None = None,
) -> Floats:
    """Put a batch's K and V [T, K, H] into the cache, and attend with q [T, N, H] over it."""
    q_TNH, k_TKH, v_TKH = qkv
    native.write_kv(k_TKH, v_TKH, cache, slots_T)
    scale = q_TNH.shape[2] ** -0.5
    return native.attention(q_TNH, cache, sequences, scale=scale, window=window or 0)


def _itself(numbers: NDArray[Any]) -> NDArray[Any]:
    return numbers


def _empty_like(like: Floats, shape: tuple[int, ...]) -> Floats:
    return empty(shape, like.dtype)


def _side_by_side(parts: Sequence[Floats]) -> Floats:
    return np.concatenate(parts, axis=-1)


NATIVE = Ops(
    placed=_itself,
    to_host=_itself,
    empty=_empty_like,
    side_by_side=_side_by_side,
    rms_norm=rms_norm,
    rms_norm_=rms_norm_,
    apply_rotary=apply_rotary,
    product=product,
    swiglu_=swiglu_,
    attend=attend,
    fuse=native_stack.fuse,
    fuse_prediction=native_stack.fuse_prediction,
)
