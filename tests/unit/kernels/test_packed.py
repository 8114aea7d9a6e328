"""The packed layout: sizes, round trips, views, refusals."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.packer import largest_code, pack
from thinslice.kernels import native
from thinslice.kernels.arrays import empty_bytes
from thinslice.kernels.packed import PackedWeight, unpack, unpack_parts, unpack_rows
from thinslice.plan.packed_format import GROUP, PackedFormat, packed_bytes, panel_bytes

FORMATS = list(PackedFormat)
Parts = tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.float32] | None]


def parts(fmt: PackedFormat, n: int, k: int) -> Parts:
    rng = np.random.default_rng(n + k)
    codes = rng.integers(0, largest_code(fmt) + 1, (n, k), dtype=np.uint8)
    scales = rng.random((n, k // GROUP)).astype(np.float16).astype(np.float32)
    mins = rng.standard_normal((n, k // GROUP)).astype(np.float16).astype(np.float32)
    return codes, scales, mins if fmt is PackedFormat.INT4M else None


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize(("n", "k"), [(16, 32), (17, 96), (192, 576), (50, 1536)])
def test_round_trip(fmt: PackedFormat, n: int, k: int) -> None:
    codes, scales, mins = parts(fmt, n, k)
    weight = pack(fmt, codes, scales, mins)
    back = unpack_parts(weight)
    assert np.array_equal(back.codes, codes)
    assert np.array_equal(back.scales, scales)
    assert (back.mins is None) == (mins is None)
    dense = (codes.astype(np.float64) - fmt.zero_point).reshape(n, -1, GROUP) * scales[..., None]
    if mins is not None and back.mins is not None:
        assert np.array_equal(back.mins, mins)
        dense = dense + mins[..., None]
    assert np.array_equal(unpack(weight), dense.reshape(n, k).astype(np.float32))


@pytest.mark.parametrize(
    ("fmt", "bits"), [(PackedFormat.INT4, 4.5), (PackedFormat.INT4M, 5), (PackedFormat.INT8, 8.5)]
)
@pytest.mark.parametrize(
    ("n", "k"),
    [(576, 576), (192, 576), (1536, 576), (576, 1536), (49152, 576), (4096, 4096), (1024, 4096),
     (11008, 4096), (4096, 11008), (151680, 4096)],
)  # fmt: skip
def test_bits_per_weight_of_real_shapes(fmt: PackedFormat, bits: float, n: int, k: int) -> None:
    assert packed_bytes(fmt, n, k) * 8 == n * k * bits
    assert panel_bytes(fmt, k) % 64 == 0


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("k", [32, 64, 96, 4096])
def test_library_and_python_agree_on_sizes(fmt: PackedFormat, k: int) -> None:
    assert native.panel_bytes(fmt, k) == panel_bytes(fmt, k)


@pytest.mark.parametrize("fmt", FORMATS)
def test_rows_are_a_view(fmt: PackedFormat) -> None:
    weight = pack(fmt, *parts(fmt, 50, 96))
    part = weight.rows(16, 50)
    assert part.address == weight.address + weight.panel_bytes
    assert np.array_equal(unpack(part), unpack(weight)[16:50])
    for start, stop in [(8, 32), (16, 40), (32, 32), (48, 51)]:
        with pytest.raises(ValueError, match="panels of 16"):
            weight.rows(start, stop)


def test_a_tensor_may_hold_the_bytes() -> None:
    """As one on a device does: nothing is asked of it but its address, and rows are views."""
    fmt = PackedFormat.INT8
    weight = pack(fmt, *parts(fmt, 50, 96))
    held = PackedWeight(torch.from_numpy(weight.data), fmt, 50, 96)
    assert held.address == weight.address
    assert held.rows(16, 32).address == weight.rows(16, 32).address
    with pytest.raises(TypeError, match="uint8"):
        PackedWeight(held.data.view(torch.int8), fmt, 50, 96)
    with pytest.raises(ValueError, match="contiguous"):
        PackedWeight(torch.zeros(2 * len(weight.data)).byte()[::2], fmt, 50, 96)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="multiple of 32"):
        packed_bytes(PackedFormat.INT4, 16, 40)
    data = empty_bytes(packed_bytes(PackedFormat.INT4, 16, 64) + 64)
    with pytest.raises(ValueError, match="aligned"):
        PackedWeight(data[32:-32], PackedFormat.INT4, 16, 64)
    with pytest.raises(ValueError, match="has 576 bytes, got 640"):
        PackedWeight(data, PackedFormat.INT4, 16, 64)
    with pytest.raises(TypeError, match="uint8"):
        PackedWeight(data.view(np.int8), PackedFormat.INT4, 16, 64)
    with pytest.raises(TypeError, match="flat"):
        PackedWeight(data.reshape(-1, 64), PackedFormat.INT4, 16, 64)


@pytest.mark.parametrize("fmt", PackedFormat)
@pytest.mark.parametrize("size", [(40, 96), (16, 64), (7, 32)])
def test_rows_taken_out_are_those_of_the_whole(fmt: PackedFormat, size: tuple[int, int]) -> None:
    weight = pack(fmt, *parts(fmt, *size))
    row_ids = np.array([size[0] - 1, 0, 3, 3])
    assert np.array_equal(unpack_rows(weight, row_ids), unpack(weight)[row_ids])
