"""Packed matrices of given codes, scales and minimums, byte by byte as the layout is described."""

import numpy as np
from numpy.typing import NDArray

from thinslice.kernels import native_pack
from thinslice.kernels.packed import PackedWeight, empty
from thinslice.plan.packed_format import (
    GROUP,
    PANEL_ROWS,
    PackedFormat,
    num_panels,
    packed_format_of,
)

LINE = 64


def largest_code(fmt: PackedFormat) -> int:
    """Codes go from 0 to this."""
    return 255 if fmt is PackedFormat.INT8 else 15


def pack(
    fmt: PackedFormat,
    codes: NDArray[np.uint8],
    scales: NDArray[np.floating],
    mins: NDArray[np.floating] | None = None,
) -> PackedWeight:
    """Codes [N, K], scales and (int4m) minimums [N, K / 32]; the latter are rounded to fp16."""
    assert codes.max() <= largest_code(fmt)
    assert (mins is not None) == (fmt is PackedFormat.INT4M)
    rows, columns = codes.shape
    weight = empty(fmt, rows, columns)
    panels, groups = num_panels(rows), columns // GROUP
    padded = np.zeros((panels * PANEL_ROWS, columns), np.uint8)
    padded[:rows] = codes
    halves = np.zeros((2, panels * PANEL_ROWS, groups), np.float16)
    halves[0, :rows] = scales
    if mins is not None:
        halves[1, :rows] = mins
    out = weight.data.reshape(panels, -1)
    out[:] = 0
    for group in range(groups):
        code_at, scale_at = places(fmt, group)
        part = padded[:, group * GROUP : (group + 1) * GROUP].reshape(panels, PANEL_ROWS, -1, 4)
        lines = part.transpose(0, 2, 1, 3)
        if fmt is not PackedFormat.INT8:
            lines = lines[:, 0::2] | lines[:, 1::2] << 4
        out[:, code_at : code_at + fmt.code_bytes] = lines.reshape(panels, -1)
        for half in range(2 if fmt is PackedFormat.INT4M else 1):
            of_group = np.ascontiguousarray(halves[half, :, group]).reshape(panels, PANEL_ROWS)
            at = scale_at + half * LINE // 2
            out[:, at : at + LINE // 2] = of_group.view(np.uint8)
    return weight


def places(fmt: PackedFormat, group: int) -> tuple[int, int]:
    """Where in a panel a group's codes and its scales start."""
    if fmt is PackedFormat.INT4M:
        start = group * (fmt.code_bytes + LINE)
        return start, start + fmt.code_bytes
    pair = group // 2 * (2 * fmt.code_bytes + LINE)
    of_codes = pair + group % 2 * fmt.code_bytes
    return of_codes, pair + 2 * fmt.code_bytes + group % 2 * LINE // 2


def repacked(blocks: NDArray[np.uint8], kind: str, columns: int) -> PackedWeight:
    """Blocks of a GGUF, [N, bytes of a row], in the format that keeps their codes."""
    fmt = packed_format_of(kind)
    assert fmt is not None
    target = empty(fmt, len(blocks), columns)
    native_pack.repack(blocks, kind, target)
    return target
