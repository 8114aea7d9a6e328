"""Group-wise quantised matrices in the one layout that every kernel reads.

A matrix [out_features, in_features] is cut into panels of 16 output rows. A panel is one contiguous
range of bytes, so a range of panels is one contiguous slice to stream from disk. Inside, every
group of 32 inputs is 4 (int4, int4m) or 8 (int8) lines of 64 bytes: line i holds inputs 8i..8i+3 in
its low and 8i+4..8i+7 in its high nibbles (int8: inputs 4i..4i+3) of the 16 rows. Two groups share
one line of fp16 scales; int4m has one line of scales and minimums per group. No 64-byte load
crosses a cache line when the data start at a multiple of 64.

This module knows the layout; choosing codes and scales is native_pack.quantize's work.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from thinslice.kernels.arrays import empty_bytes
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

    `data` is an array on the host or a tensor on a device. `makes_kv` marks the projections to K
    and V; see `is_wide`.
    """

    data: Any
    format: PackedFormat
    out_features: int
    in_features: int
    makes_kv: bool = False

    def __post_init__(self) -> None:
        expected = packed_bytes(self.format, self.out_features, self.in_features)
        is_bytes = str(self.data.dtype).removeprefix("torch.") == "uint8"
        if not is_bytes or len(self.data.shape) != 1:
            raise TypeError("packed data must be flat and of uint8")
        if self.data.nbytes != expected:
            raise ValueError(
                f"a packed {self.format} matrix [{self.out_features}, {self.in_features}] has "
                f"{expected} bytes, got {self.data.nbytes}"
            )
        if not self._is_contiguous or self.address % ALIGNMENT:
            raise ValueError(f"packed data must be contiguous and {ALIGNMENT}-byte aligned")

    @property
    def address(self) -> int:
        """Where `data` starts, on the host or on its device."""
        if isinstance(self.data, np.ndarray):
            return self.data.ctypes.data
        return int(self.data.data_ptr())

    @property
    def _is_contiguous(self) -> bool:
        if isinstance(self.data, np.ndarray):
            return self.data.flags.c_contiguous
        return bool(self.data.is_contiguous())

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


@dataclass(frozen=True, eq=False)
class UnpackedWeight:
    """Codes [N, K] uint8, scales and (int4m) minimums [N, K / 32] as fp32."""

    codes: NDArray[np.uint8]
    scales: NDArray[np.float32]
    mins: NDArray[np.float32] | None


def unpack_parts(weight: PackedWeight) -> UnpackedWeight:
    """The codes, scales and minimums of a packed matrix on the host, in the order of its rows.

    Peak extra memory: about 3 bytes per code.
    """
    fmt, groups = weight.format, weight.in_features // GROUP
    panels, rows = num_panels(weight.out_features), weight.out_features
    mins = None
    if fmt is PackedFormat.INT4M:
        body = weight.data.reshape(panels, groups, -1)
        lines = body[:, :, : fmt.code_bytes]
        scales = _from_half_bytes(body[:, :, -64:-32], rows)
        mins = _from_half_bytes(body[:, :, -32:], rows)
    else:
        body = weight.data.reshape(panels, (groups + 1) // 2, -1)
        lines = body[:, :, : 2 * fmt.code_bytes].reshape(panels, -1, fmt.code_bytes)[:, :groups]
        halves = body[:, :, 2 * fmt.code_bytes :].reshape(panels, -1, 2 * PANEL_ROWS)
        scales = _from_half_bytes(halves[:, :groups], rows)
    return UnpackedWeight(_codes_from_lines(lines, fmt)[:rows], scales, mins)


def unpack(weight: PackedWeight) -> NDArray[np.float32]:
    """The matrix on the host as fp32 [N, K]: exact for int4 and int8, one rounding for int4m.

    Peak extra memory: about 8 bytes per weight.
    """
    parts = unpack_parts(weight)
    out = parts.codes.astype(np.float32)
    groups = out.reshape(*parts.scales.shape, GROUP)
    groups -= np.float32(weight.format.zero_point)
    groups *= parts.scales[..., None]
    if parts.mins is not None:
        groups += parts.mins[..., None]
    return out


def unpack_rows(weight: PackedWeight, row_ids_T: NDArray[np.int64]) -> NDArray[np.float32]:
    """Some rows of a packed matrix on the host, in any order, as fp32 [T, K]; the numbers
    ``unpack`` gives.

    Peak extra memory: about 8 bytes per number returned.
    """
    fmt, panel_ids, lanes = weight.format, row_ids_T // PANEL_ROWS, row_ids_T % PANEL_ROWS
    has_mins = fmt is PackedFormat.INT4M
    num_lines = fmt.code_bytes * (1 if has_mins else 2) // 64
    count, groups = len(row_ids_T), weight.in_features // GROUP
    body = weight.data.reshape(num_panels(weight.out_features), -1, num_lines + 1, PANEL_ROWS, 4)
    # The four inputs of a line that belong to a row, and the halves of its groups.
    quads = body[panel_ids, :, :num_lines, lanes]
    ends = body[:, :, num_lines].reshape(*body.shape[:2], 2, PANEL_ROWS, 2)
    halves = ends[panel_ids, :, :, lanes].view(np.float16)[..., 0].astype(np.float32)
    if fmt is not PackedFormat.INT8:
        quads = np.stack((quads & 15, quads >> 4), axis=3)
    out = quads.reshape(count, -1)[:, : weight.in_features].astype(np.float32)
    numbers = out.reshape(count, groups, GROUP)
    numbers -= np.float32(fmt.zero_point)
    scales = halves[..., 0] if has_mins else halves.reshape(count, -1)[:, :groups]
    numbers *= scales[..., None]
    if has_mins:
        numbers += halves[..., 1, None]
    return out


def _codes_from_lines(lines: NDArray[np.uint8], fmt: PackedFormat) -> NDArray[np.uint8]:
    panels, groups = lines.shape[:2]
    if fmt is PackedFormat.INT8:
        split = lines.reshape(panels, groups, 8, PANEL_ROWS, 4).transpose(0, 3, 1, 2, 4)
    else:
        both = lines.reshape(panels, groups, 4, PANEL_ROWS, 4)
        split = np.stack((both & 15, both >> 4), axis=3).transpose(0, 4, 1, 2, 3, 5)
    return split.reshape(panels * PANEL_ROWS, groups * GROUP)


def _from_half_bytes(halves: NDArray[np.uint8], rows: int) -> NDArray[np.float32]:
    """fp16 bytes [panels, groups, 32] as fp32 [rows, groups]."""
    by_group = np.ascontiguousarray(halves).view(np.float16).transpose(0, 2, 1)
    return by_group.reshape(-1, halves.shape[1])[:rows].astype(np.float32)
