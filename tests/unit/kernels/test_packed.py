"""The packed layout: sizes, round trips, views, refusals."""

import pytest
import torch

from thinslice.kernels import native
from thinslice.kernels.packed import PackedWeight, pack, unpack, unpack_parts, unpack_rows
from thinslice.kernels.quantize import quantize
from thinslice.plan.packed_format import GROUP, PackedFormat, packed_bytes, panel_bytes

FORMATS = list(PackedFormat)


def parts(
    fmt: PackedFormat, n: int, k: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    rng = torch.Generator().manual_seed(n + k)
    codes = torch.randint(0, fmt.largest_code + 1, (n, k), dtype=torch.uint8, generator=rng)
    scales = torch.rand(n, k // GROUP, generator=rng).half().float()
    mins = torch.randn(n, k // GROUP, generator=rng).half().float()
    return codes, scales, mins if fmt is PackedFormat.INT4M else None


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize(("n", "k"), [(16, 32), (17, 96), (192, 576), (50, 1536)])
def test_round_trip(fmt: PackedFormat, n: int, k: int) -> None:
    codes, scales, mins = parts(fmt, n, k)
    weight = pack(fmt, codes, scales, mins)
    back = unpack_parts(weight)
    assert torch.equal(back.codes, codes)
    assert torch.equal(back.scales, scales)
    assert mins is None or (back.mins is not None and torch.equal(back.mins, mins))
    dense = (codes.double() - fmt.zero_point).unflatten(1, (-1, GROUP)) * scales.double()[..., None]
    if mins is not None:
        dense = dense + mins.double()[..., None]
    assert torch.equal(unpack(weight), dense.flatten(1).float())


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
    if not native.is_available():
        pytest.skip(native.describe())
    assert native.panel_bytes(fmt, k) == panel_bytes(fmt, k)


@pytest.mark.parametrize("fmt", FORMATS)
def test_rows_are_a_view(fmt: PackedFormat) -> None:
    weight = pack(fmt, *parts(fmt, 50, 96))
    part = weight.rows(16, 50)
    assert part.data.data_ptr() == weight.data.data_ptr() + weight.panel_bytes
    assert torch.equal(unpack(part), unpack(weight)[16:50])
    for start, stop in [(8, 32), (16, 40), (32, 32), (48, 51)]:
        with pytest.raises(ValueError, match="panels of 16"):
            weight.rows(start, stop)


def test_refusals() -> None:
    codes, scales, _ = parts(PackedFormat.INT4, 16, 64)
    with pytest.raises(ValueError, match="multiple of 32"):
        packed_bytes(PackedFormat.INT4, 16, 40)
    with pytest.raises(ValueError, match="minimums"):
        pack(PackedFormat.INT4M, codes, scales)
    with pytest.raises(ValueError, match="codes end at 15"):
        pack(PackedFormat.INT4, codes + 16, scales)
    with pytest.raises(TypeError, match="uint8"):
        pack(PackedFormat.INT4, codes.int(), scales)
    data = torch.zeros(packed_bytes(PackedFormat.INT4, 16, 64) + 64, dtype=torch.uint8)
    with pytest.raises(ValueError, match="aligned"):
        PackedWeight(data[32:-32], PackedFormat.INT4, 16, 64)
    with pytest.raises(ValueError, match="has 576 bytes, got 640"):
        PackedWeight(data, PackedFormat.INT4, 16, 64)


@pytest.mark.parametrize("fmt", PackedFormat)
@pytest.mark.parametrize("size", [(40, 96), (16, 64), (7, 32)])
def test_rows_taken_out_are_those_of_the_whole(fmt: PackedFormat, size: tuple[int, int]) -> None:
    weight = quantize(torch.randn(size), fmt)
    row_ids = torch.tensor([size[0] - 1, 0, 3, 3])
    assert torch.equal(unpack_rows(weight, row_ids), unpack(weight)[row_ids])
