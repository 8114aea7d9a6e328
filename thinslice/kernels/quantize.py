"""Choosing codes and scales: from float weights, and from the blocks of a GGUF file.

Everything works on pieces of rows, so memory stays bounded whatever the size of a matrix, and is
deterministic. The layout of the result is `packed.py`'s business.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from thinslice.errors import CheckpointError
from thinslice.kernels.packed import PackedWeight, empty, pack_into
from thinslice.kernels.repack import REPACKED, q4_k_scales, repack_into
from thinslice.plan.packed_format import GROUP, PANEL_ROWS, PackedFormat

# Elements worked on at a time: temporaries of half a MiB, which stay in the caches.
_PIECE = 1 << 17
_LARGEST_HALF = 65504.0

# Divisors of the largest magnitude that are tried as scales of int4, as in llama.cpp's
# make_qx_quants (8 +- 0.9 in steps of 0.1). Root mean square error on normal weights: one candidate
# 8.41%, three 8.20%, these seven 8.160%, all nineteen 8.158%; Q4_0 has 8.58%.
_INT4_DIVISORS = (7.1, 7.4, 7.7, 8.0, 8.3, 8.6, 8.9)
# Divisors of the range that are tried as scales of int4m. The same measure: one candidate 7.50%,
# three 7.16%, these seven 7.07%, nineteen 6.98%; Q4_1 has 7.83%.
_INT4M_DIVISORS = (12.5, 13.0, 13.5, 14.0, 14.5, 15.0, 15.5)
# Divisors of the largest magnitude that are tried as scales of int8; none cuts it off. The same
# measure: one candidate (Q8_0) 0.535%, three 0.502%, these seven 0.486%, 25 in finer steps 0.477%.
_INT8_DIVISORS = (127, 126, 125, 124, 123, 122, 121)


@dataclass(frozen=True, eq=False)
class _Groups:
    """Codes [..., 32] and fp16-representable scales and minimums [...] of some groups."""

    codes: torch.Tensor
    scales: torch.Tensor
    mins: torch.Tensor | None = None


def quantize(weight: torch.Tensor, fmt: PackedFormat) -> PackedWeight:
    """Pack a float matrix [N, K] so that the squared error of each group of 32 is small.

    For int4 the error is weighed by the size of the weights, see _quantize_int4.

    Peak extra memory: the packed matrix and about 8 MiB.
    Errors: TypeError, ValueError for other than a float matrix with K a multiple of 32;
    CheckpointError for weights that are not finite or exceed the range of fp16 scales.
    Source: the search for scales is that of make_qx_quants and make_qkx2_quants in llama.cpp.
    """
    if weight.dim() != 2:
        raise ValueError(f"quantize takes a matrix, got {list(weight.shape)}")
    target = empty(fmt, weight.shape[0], weight.shape[1])
    quantize_into(target, weight)
    return target


def quantize_into(target: PackedWeight, weight: torch.Tensor) -> None:
    """Fill a packed matrix [N, K] from a float matrix; see ``quantize``.

    Peak extra memory: about 8 MiB. Errors: those of ``quantize``.
    """
    if not weight.dtype.is_floating_point:
        raise TypeError(f"quantize takes float weights, got {weight.dtype}")
    if tuple(weight.shape) != (target.out_features, target.in_features):
        raise ValueError(
            f"a packed matrix [{target.out_features}, {target.in_features}] takes weights of that "
            f"shape, got {list(weight.shape)}"
        )
    step = _rows_per_piece(weight.shape[1])
    for start in range(0, weight.shape[0], step):
        piece = weight[start : start + step]
        groups = piece.to(torch.float32).unflatten(1, (-1, GROUP))
        if not bool(groups.isfinite().all()):
            raise CheckpointError("a weight is infinite or not a number; it cannot be quantised")
        _write_piece(target, start, _QUANTIZERS[target.format](groups))


def from_gguf(blocks: np.ndarray, kind: GGMLQuantizationType, in_features: int) -> PackedWeight:
    """Pack the blocks of a GGUF matrix: uint8 [N, bytes of a row].

    Q4_0, Q4_1 and Q8_0 keep every bit. Q4_K becomes int4m with scales and minimums rounded to fp16
    (relative error of a weight's parts at most 2**-11). Q5_K and Q6_K are requantised to int8,
    which adds an error of 0.5% of the weights' root mean square, a tenth below Q8_0's own.
    Peak extra memory: the packed matrix and about 8 MiB.
    Errors: CheckpointError for a kind that has no packed format or blocks of another size.
    """
    target = empty(_reader_of(kind)[0], blocks.shape[0], in_features)
    from_gguf_into(target, blocks, kind)
    return target


def from_gguf_into(target: PackedWeight, blocks: np.ndarray, kind: GGMLQuantizationType) -> None:
    """Fill a packed matrix of the kind's own format from blocks; see ``from_gguf``.

    Peak extra memory: about 8 MiB.
    Errors: those of ``from_gguf``; ValueError for a target of another format or number of rows.
    """
    fmt, read = _reader_of(kind)
    in_features = target.in_features
    if target.format is not fmt or len(blocks) != target.out_features:
        raise ValueError(
            f"{len(blocks)} rows of {kind.name} go into as many of {fmt}, "
            f"not into {target.out_features} of {target.format}"
        )
    block_size, block_bytes = GGML_QUANT_SIZES[kind]
    row_bytes = in_features // block_size * block_bytes
    if in_features % block_size or blocks.ndim != 2 or blocks.shape[1] != row_bytes:
        raise CheckpointError(
            f"{kind.name} rows of {in_features} weights have {row_bytes} bytes in blocks of "
            f"{block_size}, got an array {list(blocks.shape)}"
        )
    num_repacked = blocks.shape[0] // PANEL_ROWS * PANEL_ROWS if kind in REPACKED else 0
    if num_repacked:
        repack_into(target.rows(0, num_repacked), blocks[:num_repacked], kind)
    step = _rows_per_piece(in_features)
    for start in range(num_repacked, blocks.shape[0], step):
        piece = np.ascontiguousarray(blocks[start : start + step], dtype=np.uint8)
        groups = read(piece.reshape(piece.shape[0], -1, block_bytes))
        _write_piece(target, start, groups)


def _reader_of(
    kind: GGMLQuantizationType,
) -> tuple[PackedFormat, Callable[[np.ndarray], _Groups]]:
    if kind not in _READERS:
        known = ", ".join(sorted(k.name for k in _READERS))
        raise CheckpointError(f"GGUF type {kind.name} has no packed format; those with: {known}")
    return _READERS[kind]


def _rows_per_piece(in_features: int) -> int:
    return max(1, _PIECE // in_features // PANEL_ROWS) * PANEL_ROWS


def _write_piece(target: PackedWeight, start: int, groups: _Groups) -> None:
    stop = start + groups.codes.shape[0]
    codes = groups.codes.flatten(1)
    pack_into(target.rows(start, stop), codes, groups.scales, groups.mins)


def _to_half(x: torch.Tensor) -> torch.Tensor:
    """The nearest values fp16 holds, as fp32."""
    if x.numel() and float(x.abs().max()) > _LARGEST_HALF:
        raise CheckpointError("a scale exceeds the range of fp16; the weights are too large")
    return x.to(torch.float16).to(torch.float32)


def _ratio(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a / b, zero where b is zero."""
    return torch.where(b == 0, torch.zeros_like(a), a / torch.where(b == 0, torch.ones_like(b), b))


def _levels(x: torch.Tensor, scales: torch.Tensor, low: int, high: int) -> torch.Tensor:
    inverse = _ratio(torch.ones_like(scales), scales)
    return (x * inverse.unsqueeze(-1)).round_().clamp_(low, high)


def _quantize_int4(x: torch.Tensor) -> _Groups:
    """Levels -8..7; the value of largest magnitude, whatever its sign, goes near -8.

    A squared error counts sqrt(mean square of the row + x**2) times, as in llama.cpp's
    quantize_row_q4_0_impl: plain squares, which cut off the largest weights, gave less error in
    the weights and more in the predictions. Source of the search: make_qx_quants.
    """
    importance = x.square()
    importance += importance.mean((-1, -2), keepdim=True)
    importance.sqrt_()
    weighted = importance * x
    largest = x.gather(-1, x.abs().argmax(-1, keepdim=True)).squeeze(-1)
    best_gain = torch.zeros_like(largest)
    best_scales = torch.zeros_like(largest)
    for divisor in _INT4_DIVISORS:
        levels = _levels(x, largest / -divisor, -8, 7)
        product = torch.linalg.vecdot(weighted, levels)
        # The scale of least error, and what it takes off the error that a scale of zero has.
        scales = _ratio(product, torch.linalg.vecdot(importance, levels.square_()))
        gain = product * scales
        is_better = gain > best_gain
        best_gain = torch.where(is_better, gain, best_gain)
        best_scales = torch.where(is_better, scales, best_scales)
    best_scales = _to_half(best_scales)
    codes = _levels(x, best_scales, -8, 7).add_(8).to(torch.uint8)
    return _Groups(codes, best_scales)


def _quantize_int4m(x: torch.Tensor) -> _Groups:
    """Levels 0..15 above a minimum; scale and minimum by least squares for each candidate."""
    low, high = x.amin(-1), x.amax(-1)
    best_error = torch.full_like(low, torch.inf)
    best_scales, best_mins = torch.zeros_like(low), _to_half(low)
    for divisor in _INT4M_DIVISORS:
        levels = _levels(x - low.unsqueeze(-1), (high - low) / divisor, 0, 15)
        scales, mins = _fit_line(levels, x)
        levels = _levels(x - mins.unsqueeze(-1), scales, 0, 15)
        fitted = torch.addcmul(mins.unsqueeze(-1), levels, scales.unsqueeze(-1))
        error = (x - fitted).square_().sum(-1)
        is_better = error < best_error
        best_error = torch.where(is_better, error, best_error)
        best_scales = torch.where(is_better, scales, best_scales)
        best_mins = torch.where(is_better, mins, best_mins)
    codes = _levels(x - best_mins.unsqueeze(-1), best_scales, 0, 15).to(torch.uint8)
    return _Groups(codes, best_scales, best_mins)


def _fit_line(levels: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The scale and minimum that map levels to x with the least squared error, in fp16."""
    mean_level, mean_x = levels.mean(-1, keepdim=True), x.mean(-1, keepdim=True)
    centred = levels - mean_level
    scales = _ratio((centred * (x - mean_x)).sum(-1), centred.square().sum(-1))
    mins = mean_x.squeeze(-1) - scales * mean_level.squeeze(-1)
    return _to_half(scales), _to_half(mins)


def _half_above(x: torch.Tensor) -> torch.Tensor:
    """The smallest values fp16 holds that are not below x >= 0, as fp32."""
    nearest = _to_half(x)
    above = (nearest.to(torch.float16).view(torch.int16) + 1).view(torch.float16)
    return torch.where(nearest < x, above.to(torch.float32), nearest)


def _quantize_int8(x: torch.Tensor) -> _Groups:
    """Levels -127..127; a scale rounded down would cut off the largest value."""
    largest = x.abs().amax(-1)
    best_error = torch.full_like(largest, torch.inf)
    best_scales = torch.zeros_like(largest)
    for divisor in _INT8_DIVISORS:
        scales = _half_above(largest / divisor)
        error = _levels(x, scales, -127, 127).mul_(scales.unsqueeze(-1)).sub_(x).square_().sum(-1)
        is_better = error < best_error
        best_error = torch.where(is_better, error, best_error)
        best_scales = torch.where(is_better, scales, best_scales)
    codes = _levels(x, best_scales, -127, 127).add_(128).to(torch.uint8)
    return _Groups(codes, best_scales)


def _halves(data: np.ndarray) -> torch.Tensor:
    """fp16 bytes [..., 2n] as fp32 [..., n]."""
    return torch.from_numpy(np.ascontiguousarray(data).view(np.float16).astype(np.float32))


def _nibbles(data: np.ndarray) -> torch.Tensor:
    """Bytes [..., 16] as codes [..., 32]: the low nibbles come first."""
    return torch.from_numpy(np.concatenate([data & 15, data >> 4], axis=-1))


def _read_q4_0(blocks: np.ndarray) -> _Groups:
    return _Groups(_nibbles(blocks[..., 2:]), _halves(blocks[..., :2]).squeeze(-1))


def _read_q4_1(blocks: np.ndarray) -> _Groups:
    halves = _halves(blocks[..., :4])
    return _Groups(_nibbles(blocks[..., 4:]), halves[..., 0], halves[..., 1])


def _read_q8_0(blocks: np.ndarray) -> _Groups:
    codes = torch.from_numpy(blocks[..., 2:] ^ 0x80)
    return _Groups(codes, _halves(blocks[..., :2]).squeeze(-1))


def _read_q4_k(blocks: np.ndarray) -> _Groups:
    rows = blocks.shape[0]
    scales, mins = q4_k_scales(blocks)
    # 32 bytes hold one group in their low and the next in their high nibbles.
    pairs = blocks[..., 16:].reshape(rows, -1, 32)
    codes = np.stack([pairs & 15, pairs >> 4], axis=2).reshape(rows, -1, GROUP)
    return _Groups(torch.from_numpy(codes), _to_half(scales), _to_half(mins))


def _requantizer(kind: GGMLQuantizationType) -> Callable[[np.ndarray], _Groups]:
    def read(blocks: np.ndarray) -> _Groups:
        values = torch.from_numpy(dequantize(blocks.reshape(blocks.shape[0], -1), kind))
        return _quantize_int8(values.unflatten(1, (-1, GROUP)))

    return read


_QUANTIZERS = {
    PackedFormat.INT4: _quantize_int4,
    PackedFormat.INT4M: _quantize_int4m,
    PackedFormat.INT8: _quantize_int8,
}

_READERS: dict[GGMLQuantizationType, tuple[PackedFormat, Callable[[np.ndarray], _Groups]]] = {
    GGMLQuantizationType.Q4_0: (PackedFormat.INT4, _read_q4_0),
    GGMLQuantizationType.Q4_1: (PackedFormat.INT4M, _read_q4_1),
    GGMLQuantizationType.Q8_0: (PackedFormat.INT8, _read_q8_0),
    GGMLQuantizationType.Q4_K: (PackedFormat.INT4M, _read_q4_k),
    GGMLQuantizationType.Q5_K: (PackedFormat.INT8, _requantizer(GGMLQuantizationType.Q5_K)),
    GGMLQuantizationType.Q6_K: (PackedFormat.INT8, _requantizer(GGMLQuantizationType.Q6_K)),
}
