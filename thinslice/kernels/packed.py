"""Group-wise quantised matrices in the one layout that every kernel reads.

A matrix [out_features, in_features] is cut into panels of 16 output rows. A panel is one contiguous
range of bytes, so a range of panels is one contiguous slice to stream from disk. Inside, every
group of 32 inputs is 4 (int4, int4m) or 8 (int8) lines of 64 bytes: line i holds inputs 8i..8i+3 in
its low and 8i+4..8i+7 in its high nibbles (int8: inputs 4i..4i+3) of the 16 rows. Two groups share
one line of fp16 scales; int4m has one line of scales and minimums per group. No 64-byte load
crosses a cache line when the data start at a multiple of 64.

This module knows the layout; choosing codes and scales is `quantize.py`'s work.
"""

from dataclasses import dataclass

import torch

from thinslice.kernels.buffers import empty_bytes
from thinslice.plan.packed_format import (
    ALIGNMENT,
    GROUP,
    PANEL_ROWS,
    PackedFormat,
    num_panels,
    packed_bytes,
    panel_bytes,
)


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A packed matrix [out_features, in_features]; `data` is flat uint8, 64-byte aligned.

    `makes_kv` marks the projections to K and V; see `is_wide`.
    """

    data: torch.Tensor
    format: PackedFormat
    out_features: int
    in_features: int
    makes_kv: bool = False

    def __post_init__(self) -> None:
        expected = packed_bytes(self.format, self.out_features, self.in_features)
        if self.data.dtype != torch.uint8 or self.data.dim() != 1:
            raise TypeError("packed data must be a flat uint8 tensor")
        if self.data.numel() != expected:
            raise ValueError(
                f"a packed {self.format} matrix [{self.out_features}, {self.in_features}] has "
                f"{expected} bytes, got {self.data.numel()}"
            )
        if not self.data.is_contiguous() or self.data.data_ptr() % ALIGNMENT:
            raise ValueError(f"packed data must be contiguous and {ALIGNMENT}-byte aligned")

    @property
    def is_wide(self) -> bool:
        """Whether the compiled kernels round what it is multiplied with to 16 bits, not to 8.

        int8 is the format chosen for quality. K and V are read by every later token and cost
        little to make where query heads share them; SmolLM2 in int4, activations of all layers
        rounded to 8 bits: 0.0021 nats a token, K exact 0.0020, V exact 0.0016, Q, K and V 0.0011,
        down_proj (a quarter of all products) 0.0018.
        """
        return self.format is PackedFormat.INT8 or self.makes_kv

    @property
    def panel_bytes(self) -> int:
        return panel_bytes(self.format, self.in_features)

    def rows(self, start: int, stop: int) -> "PackedWeight":
        """A view of output rows start..stop-1; start must be a multiple of 16.

        `stop` must be one too, unless it is the last row.
        """
        stops_inside = stop % PANEL_ROWS and stop != self.out_features
        if start % PANEL_ROWS or stops_inside or not 0 <= start < stop <= self.out_features:
            raise ValueError(
                f"rows {start}..{stop} of {self.out_features} do not fall on panels of {PANEL_ROWS}"
            )
        size = self.panel_bytes
        first = start // PANEL_ROWS * size
        data = self.data[first : first + num_panels(stop - start) * size]
        return PackedWeight(data, self.format, stop - start, self.in_features, self.makes_kv)


def empty(fmt: PackedFormat, out_features: int, in_features: int) -> PackedWeight:
    """A packed matrix whose bytes are not set."""
    data = empty_bytes(packed_bytes(fmt, out_features, in_features))
    return PackedWeight(data, fmt, out_features, in_features)


def pack_into(
    target: PackedWeight, codes: torch.Tensor, scales: torch.Tensor, mins: torch.Tensor | None
) -> None:
    """Write codes [N, K] uint8, scales and (int4m) minimums [N, K / 32] into a packed matrix.

    Scales and minimums are rounded to fp16: pass values fp16 can hold.
    Peak extra memory: about 3 bytes per code.
    Errors: TypeError, ValueError for arguments that do not describe such a matrix.
    """
    fmt = target.format
    _check_parts(target, codes, scales, mins)
    panels, groups = num_panels(target.out_features), target.in_features // GROUP
    lines = _code_lines(_pad_rows(codes, panels), fmt).reshape(panels, groups, fmt.code_bytes)
    scale_bytes = half_bytes(_pad_rows(scales, panels))
    min_bytes = None if mins is None else half_bytes(_pad_rows(mins, panels))
    write_lines(target, lines, scale_bytes, min_bytes)


def write_lines(
    target: PackedWeight,
    lines: torch.Tensor,
    scale_bytes: torch.Tensor,
    min_bytes: torch.Tensor | None,
) -> None:
    """Write the lines of each group of each panel to their places.

    Args:
        lines: codes, uint8 [panels, groups, bytes of a group's codes].
        scale_bytes, min_bytes: fp16 of 16 rows, uint8 [panels, groups, 32]; see ``half_bytes``.
    """
    fmt = target.format
    panels, groups = lines.shape[:2]
    if min_bytes is not None:
        out = target.data.view(panels, groups, fmt.code_bytes + ALIGNMENT)
        out[:, :, : fmt.code_bytes] = lines
        out[:, :, fmt.code_bytes : -2 * PANEL_ROWS] = scale_bytes
        out[:, :, -2 * PANEL_ROWS :] = min_bytes
        return
    out = target.data.view(panels, (groups + 1) // 2, 2 * fmt.code_bytes + ALIGNMENT)
    if groups % 2:
        out[:, -1].zero_()
    for half in range(2):
        part = lines[:, half::2]
        at = half * fmt.code_bytes
        out[:, : part.shape[1], at : at + fmt.code_bytes] = part
        at = 2 * fmt.code_bytes + half * 2 * PANEL_ROWS
        out[:, : part.shape[1], at : at + 2 * PANEL_ROWS] = scale_bytes[:, half::2]


def pack(
    fmt: PackedFormat,
    codes: torch.Tensor,
    scales: torch.Tensor,
    mins: torch.Tensor | None = None,
) -> PackedWeight:
    """Pack codes [N, K] uint8 with scales (and, for int4m, minimums) [N, K / 32]; see pack_into."""
    target = empty(fmt, codes.shape[0], codes.shape[1])
    pack_into(target, codes, scales, mins)
    return target


@dataclass(frozen=True, eq=False)
class UnpackedWeight:
    """Codes [N, K] uint8, scales and (int4m) minimums [N, K / 32] as fp32."""

    codes: torch.Tensor
    scales: torch.Tensor
    mins: torch.Tensor | None


def unpack_parts(weight: PackedWeight) -> UnpackedWeight:
    """The codes, scales and minimums of a packed matrix, in the order of its rows."""
    fmt, groups = weight.format, weight.in_features // GROUP
    panels, rows = num_panels(weight.out_features), weight.out_features
    mins = None
    if fmt is PackedFormat.INT4M:
        body = weight.data.view(panels, groups, -1)
        lines = body[:, :, : fmt.code_bytes]
        scales = _from_half_bytes(body[:, :, -64:-32], rows)
        mins = _from_half_bytes(body[:, :, -32:], rows)
    else:
        body = weight.data.view(panels, (groups + 1) // 2, -1)
        lines = body[:, :, : 2 * fmt.code_bytes].reshape(panels, -1, fmt.code_bytes)[:, :groups]
        halves = body[:, :, 2 * fmt.code_bytes :].reshape(panels, -1, 2 * PANEL_ROWS)
        scales = _from_half_bytes(halves[:, :groups], rows)
    return UnpackedWeight(_codes_from_lines(lines, fmt)[:rows], scales, mins)


def unpack(weight: PackedWeight) -> torch.Tensor:
    """The matrix as fp32 [N, K]: exact for int4 and int8, one rounding for int4m.

    Peak extra memory: about 14 bytes per weight.
    """
    parts = unpack_parts(weight)
    centred = parts.codes.to(torch.float32) - weight.format.zero_point
    out = centred.unflatten(1, (-1, GROUP)) * parts.scales.unsqueeze(2)
    if parts.mins is not None:
        out = out + parts.mins.unsqueeze(2)
    return out.flatten(1)


def unpack_rows(weight: PackedWeight, row_ids_T: torch.Tensor) -> torch.Tensor:
    """Some rows of a packed matrix, in any order, as fp32 [T, K]; the numbers ``unpack`` gives.

    Peak extra memory: about 14 bytes per number returned.
    """
    fmt, panel_ids, lanes = weight.format, row_ids_T // PANEL_ROWS, row_ids_T % PANEL_ROWS
    has_mins = fmt is PackedFormat.INT4M
    num_lines = fmt.code_bytes * (1 if has_mins else 2) // 64
    body = weight.data.view(num_panels(weight.out_features), -1, num_lines + 1, 64)
    # The four inputs of a line that belong to a row, and the halves of its groups.
    quads = body[:, :, :num_lines].unflatten(3, (PANEL_ROWS, 4))[panel_ids, :, :, lanes]
    halves = body[:, :, num_lines].unflatten(2, (2, PANEL_ROWS, 2))[panel_ids, :, :, lanes]
    halves = halves.contiguous().view(torch.float16).squeeze(-1).float()
    if fmt is not PackedFormat.INT8:
        quads = torch.stack((quads & 15, quads >> 4), dim=3)
    groups = weight.in_features // GROUP
    codes = quads.flatten(1)[:, : weight.in_features].float() - fmt.zero_point
    scales = halves[..., 0] if has_mins else halves.flatten(1)[:, :groups]
    rows = codes.unflatten(1, (-1, GROUP)) * scales.unsqueeze(2)
    if has_mins:
        rows = rows + halves[..., 1].unsqueeze(2)
    return rows.flatten(1)


def _check_parts(
    target: PackedWeight, codes: torch.Tensor, scales: torch.Tensor, mins: torch.Tensor | None
) -> None:
    shape = (target.out_features, target.in_features)
    group_shape = (target.out_features, target.in_features // GROUP)
    if codes.dtype != torch.uint8:
        raise TypeError(f"codes must be uint8, got {codes.dtype}")
    if tuple(codes.shape) != shape or tuple(scales.shape) != group_shape:
        raise ValueError(
            f"a matrix {shape} takes codes {shape} and scales {group_shape}, "
            f"got {tuple(codes.shape)} and {tuple(scales.shape)}"
        )
    if (mins is None) != (target.format is not PackedFormat.INT4M):
        raise ValueError("minimums belong to int4m and to no other format")
    if mins is not None and mins.shape != scales.shape:
        raise ValueError(f"minimums must have the shape of the scales, {tuple(scales.shape)}")
    if codes.numel() and int(codes.max()) > target.format.largest_code:
        raise ValueError(f"{target.format} codes end at {target.format.largest_code}")


def _pad_rows(x: torch.Tensor, panels: int) -> torch.Tensor:
    missing = panels * PANEL_ROWS - x.shape[0]
    return torch.nn.functional.pad(x, (0, 0, 0, missing)) if missing else x


def _code_lines(codes: torch.Tensor, fmt: PackedFormat) -> torch.Tensor:
    panels, groups = codes.shape[0] // PANEL_ROWS, codes.shape[1] // GROUP
    if fmt is PackedFormat.INT8:
        return codes.view(panels, PANEL_ROWS, groups, 8, 4).permute(0, 2, 3, 1, 4).contiguous()
    halves = codes.view(panels, PANEL_ROWS, groups, 4, 2, 4).permute(4, 0, 2, 3, 1, 5)
    return halves[0] | (halves[1] << 4)


def _codes_from_lines(lines: torch.Tensor, fmt: PackedFormat) -> torch.Tensor:
    panels, groups = lines.shape[0], lines.shape[1]
    if fmt is PackedFormat.INT8:
        split = lines.reshape(panels, groups, 8, PANEL_ROWS, 4).permute(0, 3, 1, 2, 4)
    else:
        both = lines.reshape(panels, groups, 4, PANEL_ROWS, 4)
        split = torch.stack([both & 15, both >> 4], dim=3).permute(0, 4, 1, 2, 3, 5)
    return split.reshape(panels * PANEL_ROWS, groups * GROUP)


def half_bytes(x: torch.Tensor) -> torch.Tensor:
    """Scales or minimums [rows, groups] of whole panels as fp16, uint8 [panels, groups, 32]."""
    by_group = x.to(torch.float16).unflatten(0, (-1, PANEL_ROWS)).transpose(1, 2).contiguous()
    return by_group.view(torch.uint8)


def _from_half_bytes(halves: torch.Tensor, rows: int) -> torch.Tensor:
    by_group = halves.contiguous().view(torch.float16).transpose(1, 2)
    return by_group.reshape(-1, halves.shape[1])[:rows].to(torch.float32)
