"""Blocks of a GGUF whose codes a packed format keeps: four bytes at a time to their new places.

A line of a packed panel holds a word of four bytes for each of 16 rows, and both layouts have the
codes of a word side by side. So codes are never taken apart: words are split into low and high
nibbles, joined in pairs, and transposed. Streamed GGUFs pass through here at every use.
"""

from dataclasses import dataclass

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from thinslice.errors import CheckpointError
from thinslice.kernels.packed import PackedWeight, half_bytes, write_lines
from thinslice.plan.packed_format import GROUP, PANEL_ROWS

# Weights worked on at a time: temporaries of 256 KiB; with a quarter of that, calls cost more than
# work.
_PIECE = 1 << 19
_LOW_NIBBLES = 0x0F0F0F0F
_SIGN_BITS = -0x7F7F7F80  # 0x80 in each byte


@dataclass(frozen=True, eq=False)
class _Lines:
    """Words [panels, groups, lines, 16] int32, fp16 scales and minimums [rows, groups]."""

    words: torch.Tensor
    scales: torch.Tensor
    mins: torch.Tensor | None = None


def repack_into(target: PackedWeight, blocks: np.ndarray, kind: GGMLQuantizationType) -> None:
    """Fill whole panels from blocks, uint8 [rows, bytes of a row], of a kind in ``REPACKED``.

    Peak extra memory: about 3 MiB.
    Errors: CheckpointError for a scale of Q4_K beyond the range of fp16.
    """
    block_bytes = GGML_QUANT_SIZES[kind][1]
    groups = target.in_features // GROUP
    step = max(_PIECE // target.in_features // PANEL_ROWS, 1) * PANEL_ROWS
    for start in range(0, target.out_features, step):
        stop = min(start + step, target.out_features)
        piece = torch.from_numpy(np.ascontiguousarray(blocks[start:stop]))
        lines = REPACKED[kind](piece.view(stop - start, -1, block_bytes))
        words = lines.words.contiguous().view(torch.uint8)
        mins = None if lines.mins is None else half_bytes(lines.mins)
        write_lines(
            target.rows(start, stop),
            words.view(-1, groups, target.format.code_bytes),
            half_bytes(lines.scales),
            mins,
        )


def _words(codes: torch.Tensor) -> torch.Tensor:
    """Bytes [rows, blocks, n] as int32 [panels, blocks, n / 4, 16]."""
    # Copied two bytes at a time: blocks of 18 and 34 bytes allow no more.
    words = codes.view(torch.int16).contiguous().view(torch.int32)
    return words.unflatten(0, (-1, PANEL_ROWS)).permute(0, 2, 3, 1).contiguous()


def _nibble_lines(codes: torch.Tensor) -> torch.Tensor:
    """Bytes [rows, blocks, 8n] to int32 [panels, blocks, 2n, 16]: low nibbles' lines come first."""
    words = _words(codes)
    panels, blocks, count, rows = words.shape
    lines = torch.empty(panels, blocks, 2, count // 2, rows, dtype=torch.int32)
    for half, shift in enumerate((0, 4)):
        nibbles = ((words >> shift) & _LOW_NIBBLES).unflatten(2, (-1, 2))
        torch.bitwise_or(nibbles[:, :, :, 0], nibbles[:, :, :, 1] << 4, out=lines[:, :, half])
    return lines


def _halves(data: torch.Tensor) -> torch.Tensor:
    """fp16 bytes [rows, blocks, 2] as fp16 [rows, blocks]."""
    return data.view(torch.float16).squeeze(-1)


def _read_q4_0(blocks: torch.Tensor) -> _Lines:
    return _Lines(_nibble_lines(blocks[..., 2:]), _halves(blocks[..., :2]))


def _read_q4_1(blocks: torch.Tensor) -> _Lines:
    lines = _nibble_lines(blocks[..., 4:])
    return _Lines(lines, _halves(blocks[..., :2]), _halves(blocks[..., 2:4]))


def _read_q8_0(blocks: torch.Tensor) -> _Lines:
    return _Lines(_words(blocks[..., 2:]) ^ _SIGN_BITS, _halves(blocks[..., :2]))


def _read_q4_k(blocks: torch.Tensor) -> _Lines:
    """32 bytes hold one group in their low and the next in their high nibbles."""
    scales, mins = q4_k_scales(blocks.numpy())
    lines = _nibble_lines(blocks[..., 16:].unflatten(2, (4, 32)).flatten(1, 2))
    return _Lines(lines, _to_half(scales), _to_half(mins))


def q4_k_scales(blocks: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and minimums, fp32 [rows, groups], of Q4_K blocks [rows, blocks, 144].

    A block: fp16 d and dmin, eight 6-bit scales and minimums in 12 bytes, 128 bytes of nibbles.
    Source: block_q4_K and get_scale_min_k4 in llama.cpp's ggml-quants.c.
    """
    halves = torch.from_numpy(np.ascontiguousarray(blocks[..., :4]).view(np.float16)).float()
    packed = blocks[..., 4:16]
    first, second, third = packed[..., :4], packed[..., 4:8], packed[..., 8:]
    scales = np.concatenate([first & 63, (third & 15) | ((first >> 6) << 4)], axis=-1)
    mins = np.concatenate([second & 63, (third >> 4) | ((second >> 6) << 4)], axis=-1)
    group_scales = halves[..., :1] * torch.from_numpy(scales.astype(np.float32))
    group_mins = halves[..., 1:] * torch.from_numpy(mins.astype(np.float32))
    return group_scales.flatten(1), -group_mins.flatten(1)


def _to_half(x: torch.Tensor) -> torch.Tensor:
    half = x.to(torch.float16)
    if bool(half.isinf().any()):
        raise CheckpointError("a scale exceeds the range of fp16; the weights are too large")
    return half


REPACKED = {
    GGMLQuantizationType.Q4_0: _read_q4_0,
    GGMLQuantizationType.Q4_1: _read_q4_1,
    GGMLQuantizationType.Q8_0: _read_q8_0,
    GGMLQuantizationType.Q4_K: _read_q4_k,
}
