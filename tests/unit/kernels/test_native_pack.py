"""The border of the packing kernels: numbers of one type to another, and what is refused."""

import gguf
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from thinslice.kernels import native, native_pack
from thinslice.kernels.packed import PackedWeight, empty
from thinslice.plan.packed_format import PackedFormat

BF16 = np.uint16
TYPES = (np.float32, np.float16, BF16)
TORCH = {np.float32: torch.float32, np.float16: torch.float16, BF16: torch.bfloat16}


def every_number(dtype: type) -> NDArray[np.generic]:
    """Every one of 16 bits; of float32 every upper half with lower ones around each tie."""
    halves = np.arange(1 << 16, dtype=np.uint32)
    if dtype is not np.float32:
        return halves.astype(np.uint16).view(dtype)
    lower = [0, 1, 0x0FFF, 0x1000, 0x1001, 0x2FFF, 0x3000, 0x7FFF, 0x8000, 0x8001, 0xE000, 0xFFFF]
    numbers: NDArray[np.float32] = (
        (halves[:, None] << 16 | np.array(lower, np.uint32)).ravel().view(np.float32)
    )
    return numbers


def as_torch(x: NDArray[np.generic], dtype: type) -> torch.Tensor:
    return (
        torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
        if dtype is BF16
        else torch.from_numpy(x)
    )


def bits_of(x: NDArray[np.generic]) -> NDArray[np.generic]:
    return x.view(np.uint32 if x.itemsize == 4 else np.uint16)


def converted(source: NDArray[np.generic], dtype: type) -> NDArray[np.generic]:
    """By each instruction set, the same in every bit."""
    results = []
    isa = native.isa()
    try:
        for name in native.available_isas():
            native.set_isa(name)
            out = np.full(source.shape, 7, dtype)
            native_pack.convert(source, out)
            results.append(out)
    finally:
        native.set_isa(isa)
    for result in results[1:]:
        assert np.array_equal(bits_of(result), bits_of(results[0]))
    return results[0]


@pytest.mark.parametrize("source", TYPES)
@pytest.mark.parametrize("target", TYPES)
def test_every_number_becomes_the_nearest(source: type, target: type) -> None:
    numbers = every_number(source)
    found = converted(numbers, target)
    if source is target:
        assert np.array_equal(bits_of(found), bits_of(numbers))
        return
    wanted = as_torch(numbers, source).float().to(TORCH[target])
    is_nan = wanted.isnan().numpy()
    kept = wanted.view(torch.int32 if target is np.float32 else torch.int16).numpy()
    assert np.array_equal(bits_of(found)[~is_nan], kept.view(bits_of(found).dtype)[~is_nan])
    assert np.array_equal(as_torch(found, target).isnan().numpy(), is_nan)
    if target is BF16:
        assert set(found[is_nan].tolist()) == {0x7FC0}


@pytest.mark.parametrize("source", TYPES)
@pytest.mark.parametrize("count", [0, 1, 15, 16, 33, 200_003])
def test_any_count_at_any_address(source: type, count: int) -> None:
    numbers = np.random.default_rng(count).standard_normal(count, np.float32)
    given = converted(numbers, source)
    odd = np.frombuffer(b"x" + given.tobytes(), np.uint8)[1:].view(source)
    assert count == 0 or odd.ctypes.data % 2
    for target in TYPES:
        assert np.array_equal(bits_of(converted(odd, target)), bits_of(converted(given, target)))


def test_convert_refuses_what_it_cannot_fill() -> None:
    numbers = np.zeros((4, 8), np.float32)
    for target, error in (
        (np.zeros((4, 8), np.float64), TypeError),
        (np.zeros((8, 4), np.float32), ValueError),
        (np.zeros((4, 16), np.float32)[:, ::2], ValueError),
        (np.zeros(129, np.uint8)[1:].view(np.float32).reshape(4, 8), ValueError),
        (numbers, ValueError),
        (np.broadcast_to(np.float32(0), (4, 8)), ValueError),
    ):
        with pytest.raises(error):
            native_pack.convert(numbers, target)
    with pytest.raises(ValueError, match="source must be a contiguous"):
        native_pack.convert(np.zeros((4, 16), np.float32)[:, ::2], numbers)


def test_repack_refuses_what_does_not_fit() -> None:
    blocks = gguf.quantize(np.zeros((16, 64), np.float32), gguf.GGMLQuantizationType.Q4_0)
    target = empty(PackedFormat.INT4, 16, 64)
    native_pack.repack(blocks, "Q4_0", target)
    with pytest.raises(ValueError, match="goes into int8"):
        native_pack.repack(blocks, "Q8_0", target)
    with pytest.raises(ValueError, match="whole blocks of 256"):
        native_pack.repack(blocks, "Q4_K", empty(PackedFormat.INT4M, 16, 64))
    with pytest.raises(ValueError, match="contiguous"):
        native_pack.repack(blocks[:15], "Q4_0", target)
    with pytest.raises(ValueError, match="contiguous"):
        native_pack.repack(np.repeat(blocks, 2, axis=1)[:, ::2], "Q4_0", target)
    with pytest.raises(TypeError, match="uint8"):
        native_pack.repack(blocks.view(np.int8), "Q4_0", target)
    on_device = PackedWeight(torch.from_numpy(target.data), PackedFormat.INT4, 16, 64)
    with pytest.raises(ValueError, match="on the host"):
        native_pack.repack(blocks, "Q4_0", on_device)
