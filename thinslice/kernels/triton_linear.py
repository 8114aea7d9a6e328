"""Products with packed matrices on a GPU: two Triton kernels over the layout that packed.py tells.

The layout is that of the disk and of the CPU's kernels: a line of 64 bytes is 16 words of 32 bits,
one for each row of a panel, and the lines of a panel follow each other, so that neighbouring
threads load neighbouring words. Nothing is put into another order on the way to the device.
"""

import torch
import triton
import triton.language as tl

from thinslice.kernels.packed import PackedWeight
from thinslice.kernels.triton_numbers import dot, rounded
from thinslice.plan.kernel_limits import MOST_SINGLE_ROWS
from thinslice.plan.packed_format import GROUP, PANEL_ROWS, PackedFormat, num_panels

# Lines of 64 bytes that a program has in flight: 8 KiB at a time, two programs on a multiprocessor.
_LINES_AT_ONCE = 128
_ROWS_WARPS = 8
# Rows of one program: code for sixteen is 300 KB, more than a multiprocessor keeps at hand.
_ROWS_AT_ONCE = 4
_TILE_ROWS, _TILE_COLUMNS, _TILE_WARPS = 64, 64, 4


@triton.jit
def _line_offsets(line, GROUP_LINES: tl.constexpr, BLOCK_GROUPS: tl.constexpr):
    """Where in a panel a line of codes begins, in words, and its group's scales, in halves.

    A block is the codes of BLOCK_GROUPS groups and one line of scales (and minimums) after them.
    """
    BLOCK_LINES: tl.constexpr = GROUP_LINES * BLOCK_GROUPS
    block = line // BLOCK_LINES * (BLOCK_LINES + 1)
    inside = line % BLOCK_LINES
    scales = (block + BLOCK_LINES) * 32 + inside // GROUP_LINES * 16
    return (block + inside) * 16, scales


@triton.jit
def _finish(result, columns, mask, bias_ptr, residual_ptr, out_ptr):
    """Store ``result + bias + residual``; the pointers but the bias's are those of each number."""
    if bias_ptr is not None:
        result += tl.load(bias_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        result += tl.load(residual_ptr, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr, rounded(result, out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def linear_rows(
    x_ptr,
    words_ptr,
    halves_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    num_rows,
    num_out,
    num_in,
    residual_stride,
    out_stride,
    panel_words,
    ROWS: tl.constexpr,
    GROUP_LINES: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    ZERO: tl.constexpr,
    LINES: tl.constexpr,
):
    """One program for each panel of 16 output rows and up to ROWS rows of x. Those of one panel are
    launched side by side: all but the first find the weights in the card's cache.

    Every row of x has sums of its own of the same shape whatever ROWS is: a row's bits do not
    depend on the rows beside it.
    """
    INPUTS: tl.constexpr = 32 // GROUP_LINES  # of a word
    BITS: tl.constexpr = 32 // INPUTS
    first, panel = tl.program_id(0) * ROWS, tl.program_id(1)
    lanes = tl.arange(0, 16)[None, :]
    num_lines = num_in // INPUTS
    sums = (tl.zeros((LINES, 16), tl.float32),) * ROWS
    for start in range(0, num_lines, LINES):
        line = start + tl.arange(0, LINES)
        is_line = line < num_lines
        mask = is_line[:, None]
        word_at, scale_at = _line_offsets(line, GROUP_LINES, BLOCK_GROUPS)
        word_at += panel.to(tl.int64) * panel_words
        scale_at += panel.to(tl.int64) * panel_words * 2
        words = tl.load(words_ptr + word_at[:, None] + lanes, mask=mask, other=0)
        halves = halves_ptr + scale_at[:, None] + lanes
        scales = tl.load(halves, mask=mask, other=0.0).to(tl.float32)
        for row in tl.static_range(ROWS):
            x_at = x_ptr + (first + row) * num_in + line * INPUTS
            is_x = is_line & (first + row < num_rows)
            part = tl.zeros((LINES, 16), tl.float32)
            total = tl.zeros((LINES,), tl.float32)
            for idx in tl.static_range(INPUTS):
                # Four bits: inputs 0 to 3 are the low halves of the four bytes, 4 to 7 the high.
                codes = (words >> (idx % 4 * 8 + idx // 4 * 4)) & ((1 << BITS) - 1)
                x = tl.load(x_at + idx, mask=is_x, other=0.0).to(tl.float32)
                part += x[:, None] * (codes.to(tl.float32) - ZERO)
                total += x
            part *= scales
            if BLOCK_GROUPS == 1:
                minimums = tl.load(halves + 16, mask=mask, other=0.0).to(tl.float32)
                part += total[:, None] * minimums
            sums = sums[:row] + (sums[row] + part,) + sums[row + 1 :]  # noqa: RUF005
    columns = panel * 16 + tl.arange(0, 16)
    for row in tl.static_range(ROWS):
        residual = residual_ptr
        if residual_ptr is not None:
            residual = residual_ptr + (first + row) * residual_stride + columns
        mask = (columns < num_out) & (first + row < num_rows)
        out = out_ptr + (first + row) * out_stride + columns
        _finish(tl.sum(sums[row], axis=0), columns, mask, bias_ptr, residual, out)


@triton.jit
def linear_tiles(
    x_ptr,
    words_ptr,
    halves_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    num_rows,
    num_out,
    num_in,
    residual_stride,
    out_stride,
    panel_words,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUP_LINES: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    ZERO: tl.constexpr,
):
    """One program for each tile of the result, group after group of 32 inputs.

    x is rounded to bfloat16 and codes are exact in it; scales meet the sums, which are fp32.
    """
    INPUTS: tl.constexpr = 32 // GROUP_LINES
    BITS: tl.constexpr = 32 // INPUTS
    rows = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    is_row = (rows < num_rows)[:, None]
    is_column = (columns < (num_out + 15) // 16 * 16)[None, :]
    panel_at = (columns // 16).to(tl.int64)[None, :] * panel_words
    lanes = (columns % 16)[None, :]
    idx = tl.arange(0, INPUTS)
    shifts = idx % 4 * 8 + idx // 4 * 4
    inputs = tl.arange(0, 32)[None, :]
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for group in range(num_in // 32):
        line = group * GROUP_LINES + tl.arange(0, GROUP_LINES)
        word_at, _ = _line_offsets(line, GROUP_LINES, BLOCK_GROUPS)
        words = tl.load(words_ptr + panel_at + word_at[:, None] + lanes, mask=is_column, other=0)
        codes = (words[:, None, :] >> shifts[None, :, None]) & ((1 << BITS) - 1)
        codes = tl.reshape(codes - ZERO, (32, COLUMNS)).to(tl.float32).to(tl.bfloat16)
        x_at = x_ptr + rows[:, None] * num_in + group * 32 + inputs
        x = tl.load(x_at, mask=is_row, other=0.0).to(tl.float32)
        x = rounded(x, tl.bfloat16)
        _, scale_at = _line_offsets(group * GROUP_LINES, GROUP_LINES, BLOCK_GROUPS)
        halves = halves_ptr + panel_at * 2 + scale_at + lanes
        sums += dot(x, codes) * tl.load(halves, mask=is_column, other=0.0).to(tl.float32)
        if BLOCK_GROUPS == 1:
            minimums = tl.load(halves + 16, mask=is_column, other=0.0).to(tl.float32)
            sums += tl.sum(x.to(tl.float32), axis=1)[:, None] * minimums
    columns = columns[None, :]
    residual = residual_ptr
    if residual_ptr is not None:
        residual = residual_ptr + rows[:, None] * residual_stride + columns
    out = out_ptr + rows[:, None] * out_stride + columns
    mask = is_row & (columns < num_out)
    _finish(sums, columns, mask, bias_ptr, residual, out)


def constants_of(fmt: PackedFormat) -> dict[str, int]:
    """What the kernels are compiled for, of a format."""
    return {
        "GROUP_LINES": fmt.code_bytes // 64,
        "BLOCK_GROUPS": 1 if fmt is PackedFormat.INT4M else 2,
        "ZERO": fmt.zero_point,
    }


def rows_constants(num_rows: int) -> dict[str, int]:
    """Return the constants of a kernel for a number of rows."""
    return {"ROWS": min(triton.next_power_of_2(num_rows), _ROWS_AT_ONCE), "LINES": _LINES_AT_ONCE}


def linear(
    x_TD: torch.Tensor,
    weight: PackedWeight,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """``x @ weight.T + bias + residual``, [T, rows]; x is float32 or bfloat16, sums are fp32.

    ``out`` may be ``residual``; both have contiguous rows. Up to 16 rows: x enters as it is, and a
    row's bits are the same whatever stands beside it. More: x is rounded to bfloat16.
    Extra memory: the output.
    """
    num_rows = x_TD.shape[0]
    x_TD = x_TD.contiguous()
    if out is None:
        out = x_TD.new_empty(num_rows, weight.out_features)
    words = weight.data.view(torch.int32)
    arguments = (
        x_TD,
        words,
        weight.data.view(torch.float16),
        bias,
        residual,
        out,
        num_rows,
        weight.out_features,
        weight.in_features,
        0 if residual is None else residual.stride(0),
        out.stride(0),
        weight.panel_bytes // words.itemsize,
    )
    formats = constants_of(weight.format)
    if num_rows <= MOST_SINGLE_ROWS:
        rows = rows_constants(num_rows)
        grid = (triton.cdiv(num_rows, rows["ROWS"]), num_panels(weight.out_features))
        linear_rows[grid](*arguments, **rows, **formats, num_warps=_ROWS_WARPS)
        return out
    tiles = (triton.cdiv(weight.out_features, _TILE_COLUMNS), triton.cdiv(num_rows, _TILE_ROWS))
    sizes = {"ROWS": _TILE_ROWS, "COLUMNS": _TILE_COLUMNS}
    linear_tiles[tiles](*arguments, **sizes, **formats, num_warps=_TILE_WARPS)
    return out


assert (GROUP, PANEL_ROWS) == (32, 16), "the kernels are written for these"
