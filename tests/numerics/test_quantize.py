"""Quantisation: exact where it is promised, and close to the best a group can have elsewhere."""

from collections.abc import Callable

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize
from gguf.quants import quantize as gguf_quantize
from numpy.typing import NDArray

from tests.numerics.quantize_reference import reference_quantize
from tests.packer import repacked
from thinslice.errors import CheckpointError
from thinslice.kernels import native, native_pack
from thinslice.kernels.native_pack import quantized
from thinslice.kernels.packed import PackedWeight, empty, unpack, unpack_parts
from thinslice.plan.packed_format import GROUP, PackedFormat

pytestmark = pytest.mark.usefixtures("kernels")

FORMATS = list(PackedFormat)
Floats = NDArray[np.floating]


def normal(n: int, k: int, seed: int = 0) -> NDArray[np.float32]:
    numbers = np.random.default_rng(seed).standard_normal((n, k), np.float32)
    return numbers * np.float32(0.02)


def heavy(n: int, k: int) -> NDArray[np.float32]:
    """Tails so heavy that a group is mostly its largest weight."""
    return (np.random.default_rng(5).standard_t(1.5, (n, k)) * 0.02).astype(np.float32)


def rms(x: Floats) -> float:
    return float(np.sqrt(np.square(x, dtype=np.float64).mean()))


def importance_of(weight: Floats) -> Floats:
    """What int4's scales weigh an error with: large weights count more."""
    squares = np.square(weight, dtype=np.float64)
    return np.sqrt(squares + squares.mean(1, keepdims=True))


def weighed_rms(error: Floats, weight: Floats) -> float:
    return float(np.sqrt((np.square(error, dtype=np.float64) * importance_of(weight)).mean()))


def bf16_bits(x: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The upper halves of float32 numbers, cut off."""
    return (x.view(np.uint32) >> 16).astype(np.uint16)


def on_every_isa(make: Callable[[], PackedWeight]) -> PackedWeight:
    """What is made, the same in every byte on each instruction set and one or two threads."""
    made = []
    for isa in native.available_isas():
        for threads in (1, 2):
            native.set_isa(isa)
            native.set_num_threads(threads)
            made.append(make())
            assert np.array_equal(made[0].data, made[-1].data), (isa, threads)
    return made[0]


def q4_k_blocks(n: int, k: int) -> NDArray[np.uint8]:
    """Random Q4_K blocks: any bits are a valid block if d and dmin are plain halves."""
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (n, k // 256, 144), dtype=np.uint8)
    units = rng.uniform(-0.02, 0.02, (n, k // 256, 2)).astype(np.float16)
    blocks[..., :4] = units.view(np.uint8)
    return blocks.reshape(n, -1)


@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q4_1, Kind.Q8_0])
@pytest.mark.parametrize(("n", "k"), [(16, 32), (50, 576), (7, 96)])
def test_gguf_blocks_keep_every_bit(kind: Kind, n: int, k: int) -> None:
    blocks = gguf_quantize(normal(n, k), kind)
    packed = on_every_isa(lambda: repacked(blocks, kind.name, k))
    values = dequantize(blocks, kind)
    parts = unpack_parts(packed)
    centred = parts.codes.astype(np.float32) - np.float32(packed.format.zero_point)
    exact = centred.reshape(n, -1, GROUP) * parts.scales[..., None]
    if parts.mins is not None:
        exact = exact + parts.mins[..., None]
    assert np.array_equal(exact.reshape(n, k), values)
    assert np.array_equal(unpack(packed), values)


@pytest.mark.parametrize(("n", "k"), [(32, 512), (50, 256), (7, 768)])
def test_q4_k_loses_only_the_rounding_of_its_scales(n: int, k: int) -> None:
    blocks = q4_k_blocks(n, k)
    values = dequantize(blocks, Kind.Q4_K)
    packed = on_every_isa(lambda: repacked(blocks, "Q4_K", k))
    parts = unpack_parts(packed)
    assert parts.mins is not None
    largest = np.abs(parts.codes.reshape(n, -1, GROUP) * parts.scales[..., None])
    bound = 2.0**-11 * (largest + np.abs(parts.mins)[..., None]).reshape(n, k)
    assert (np.abs(unpack(packed) - values) <= bound * 1.01 + 1e-9).all()


def test_scales_of_q4_k_are_rounded_to_the_nearest_half() -> None:
    """A block's own d and dmin times its six bits, taken apart as get_scale_min_k4 does."""
    blocks = q4_k_blocks(20, 512).reshape(20, 2, 144)
    units = blocks[..., :4].copy().view(np.float16).astype(np.float32)
    bits = blocks[..., 4:16].astype(np.int64)
    scales, mins = np.empty((20, 2, 8), np.float32), np.empty((20, 2, 8), np.float32)
    for group in range(8):
        if group < 4:
            scale, low = bits[..., group] & 63, bits[..., group + 4] & 63
        else:
            scale = bits[..., group + 4] & 15 | bits[..., group - 4] >> 6 << 4
            low = bits[..., group + 4] >> 4 | bits[..., group] >> 6 << 4
        scales[..., group] = units[..., 0] * scale.astype(np.float32)
        mins[..., group] = -(units[..., 1] * low.astype(np.float32))
    parts = unpack_parts(repacked(blocks.reshape(20, -1), "Q4_K", 512))
    assert parts.mins is not None
    for found, wanted in ((parts.scales, scales), (parts.mins, mins)):
        halves = wanted.astype(np.float16).reshape(20, -1).view(np.uint16)
        assert np.array_equal(found.astype(np.float16).view(np.uint16), halves)
    assert (mins > 0).any(), "a negative dmin gives a minimum above zero"


def test_scales_of_q4_k_beyond_fp16_are_refused() -> None:
    blocks = q4_k_blocks(17, 256).reshape(17, 1, 144)
    blocks[16, 0, 4:16] = 255
    for unit in range(2):
        for value, is_too_large in ((1039.0, False), (1040.0, True), (-1040.0, True)):
            halves = np.array([0.01, 0.01], np.float16)
            halves[unit] = value
            blocks[16, 0, :4] = halves.view(np.uint8)
            for isa in native.available_isas():
                native.set_isa(isa)
                if not is_too_large:
                    repacked(blocks.reshape(17, -1), "Q4_K", 256)
                    continue
                with pytest.raises(CheckpointError, match="fp16"):
                    repacked(blocks.reshape(17, -1), "Q4_K", 256)


@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q4_1, Kind.Q8_0, Kind.Q4_K])
def test_rows_of_a_part_of_a_panel_are_those_of_a_whole_one(kind: Kind) -> None:
    """And what fills up the panel is zero, whatever was there."""
    k = 768
    blocks = q4_k_blocks(16, k) if kind is Kind.Q4_K else gguf_quantize(normal(16, k), kind)
    whole = repacked(blocks, kind.name, k)
    target = empty(whole.format, 15, k)
    target.data.fill(0xAA)
    native_pack.repack(blocks[:15], kind.name, target)
    panel, rows = unpack_parts(whole), unpack_parts(target)
    assert np.array_equal(panel.codes[:15], rows.codes)
    assert np.array_equal(panel.scales[:15], rows.scales)
    if panel.mins is not None and rows.mins is not None:
        assert np.array_equal(panel.mins[:15], rows.mins)
    last = unpack_parts(PackedWeight(target.data, target.format, 16, k))
    assert not last.codes[15].any()
    assert not last.scales[15].any()


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("weight", [normal(64, 512), heavy(64, 512), normal(37, 96) * 3e5])
def test_codes_are_those_of_the_searches(fmt: PackedFormat, weight: NDArray[np.float32]) -> None:
    """But for groups where two candidates or two halves are as good as each other."""
    found, wanted = quantized(weight, fmt), reference_quantize(weight, fmt)
    ours, theirs = unpack_parts(found), unpack_parts(wanted)
    groups = (ours.codes != theirs.codes).reshape(*ours.scales.shape, GROUP).any(2)
    groups |= ours.scales != theirs.scales
    if ours.mins is not None and theirs.mins is not None:
        groups |= ours.mins != theirs.mins
    assert groups.mean() <= 0.01
    weighed = np.sqrt(importance_of(weight)) if fmt is PackedFormat.INT4 else 1.0
    error = rms((unpack(found) - weight) * weighed)
    assert error <= rms((unpack(wanted) - weight) * weighed) * (1 + 1e-4)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("size", [(16, 32), (50, 576), (7, 96), (1, 4096)])
def test_bits_do_not_depend_on_instructions_nor_threads(
    fmt: PackedFormat, size: tuple[int, int]
) -> None:
    """Subnormals, zeros of either sign and equal candidates among the weights."""
    weight = heavy(*size)
    weight[:, 1::7] *= 1e-40
    weight[:, 2::5] = -0.0
    weight[-1] = 0.03125
    on_every_isa(lambda: quantized(weight, fmt))


@pytest.mark.parametrize("fmt", FORMATS)
def test_what_fills_up_a_panel_is_zero(fmt: PackedFormat) -> None:
    weight = normal(21, 96)
    target = empty(fmt, 21, 96)
    target.data.fill(0xAA)
    native_pack.quantize(weight, target)
    parts = unpack_parts(PackedWeight(target.data, fmt, 32, 96))
    assert np.array_equal(parts.codes[:21], unpack_parts(target).codes)
    assert not parts.codes[21:].any()
    assert not parts.scales[21:].any()
    if parts.mins is not None:
        assert not parts.mins[21:].any()
    elif fmt is not PackedFormat.INT4M:  # nor is anything in the half of an odd last group
        assert unpack_parts(PackedWeight(target.data, fmt, 32, 128)).codes[:, 96:].max() == 0


@pytest.mark.parametrize("fmt", FORMATS)
def test_the_numbers_count_and_not_their_type_nor_place(fmt: PackedFormat) -> None:
    weight = normal(50, 96)
    halves = weight.astype(np.float16)
    wanted = quantized(halves.astype(np.float32), fmt)
    assert np.array_equal(on_every_isa(lambda: quantized(halves, fmt)).data, wanted.data)
    bits = bf16_bits(weight)
    numbers = (bits.astype(np.uint32) << 16).view(np.float32)
    wanted = quantized(numbers, fmt)
    assert np.array_equal(on_every_isa(lambda: quantized(bits, fmt)).data, wanted.data)
    wide = np.concatenate((normal(50, 32, seed=1), numbers), axis=1)
    odd = np.frombuffer(b"x" + wide.tobytes(), np.uint8)[1:].view(np.float32).reshape(50, 128)
    assert odd.ctypes.data % 4
    assert np.array_equal(on_every_isa(lambda: quantized(odd[:, 32:], fmt)).data, wanted.data)


@pytest.mark.parametrize("fmt", FORMATS)
def test_search_beats_the_plain_scale(fmt: PackedFormat) -> None:
    """Against round-to-nearest with the scale of the extremes, which a search must not lose to."""
    weight = normal(64, 512)
    groups = weight.reshape(64, -1, GROUP)
    if fmt is PackedFormat.INT4M:
        low, high = groups.min(2, keepdims=True), groups.max(2, keepdims=True)
        step = (high - low) / 15
        plain = ((groups - low) / step).round() * step + low
    else:
        levels = 7 if fmt is PackedFormat.INT4 else 127
        step = np.abs(groups).max(2, keepdims=True) / levels
        plain = (groups / step).round() * step
    ours = rms(unpack(quantized(weight, fmt)) - weight)
    limit = {PackedFormat.INT4: 0.90, PackedFormat.INT4M: 0.93, PackedFormat.INT8: 0.92}[fmt]
    assert ours <= limit * rms(plain.reshape(64, 512) - weight)


@pytest.mark.parametrize(
    ("fmt", "kind", "share"),
    [(PackedFormat.INT4M, Kind.Q4_1, 0.91), (PackedFormat.INT8, Kind.Q8_0, 0.92)],
)
def test_error_is_below_that_of_the_block_type(fmt: PackedFormat, kind: Kind, share: float) -> None:
    """Of the same bits a weight, as llama.cpp's quantiser fills it."""
    weight = normal(64, 512, seed=3)
    theirs = dequantize(gguf_quantize(weight, kind), kind)
    assert rms(unpack(quantized(weight, fmt)) - weight) < share * rms(theirs - weight)


def test_int4_is_better_than_q4_0_by_both_measures() -> None:
    weight = normal(64, 512, seed=3)
    ours = unpack(quantized(weight, PackedFormat.INT4)) - weight
    theirs = dequantize(gguf_quantize(weight, Kind.Q4_0), Kind.Q4_0) - weight
    assert weighed_rms(ours, weight) < 0.95 * weighed_rms(theirs, weight)
    assert rms(ours) < 0.96 * rms(theirs)


def test_int4_takes_the_scale_of_least_weighed_error() -> None:
    """Against a search ten times as fine; a scale of plain least squares is told apart."""
    weight = normal(64, 512, seed=4)
    weight[:, ::GROUP] *= 3
    groups = weight.reshape(64, -1, GROUP)
    largest = np.take_along_axis(groups, np.abs(groups).argmax(2)[..., None], 2)
    importance = importance_of(weight).reshape(groups.shape)

    def searched(importance: Floats) -> Floats:
        """The best of 73 divisors, group by group."""
        best, best_error = np.zeros(groups.shape), np.full(largest.shape, np.inf)
        for step in range(73):
            levels = (groups / (largest / -(6.4 + step / 20))).round().clip(-8, 7)
            sums = ((importance * groups * levels).sum(2), (importance * levels**2).sum(2))
            fitted = levels * (sums[0] / sums[1])[..., None]
            error = ((fitted - groups) ** 2 * importance).sum(2, keepdims=True)
            best = np.where(error < best_error, fitted, best)
            best_error = np.minimum(error, best_error)
        return best.reshape(weight.shape)

    ours = weighed_rms(unpack(quantized(weight, PackedFormat.INT4)) - weight, weight)
    finest = weighed_rms(searched(importance) - weight, weight)
    assert ours < 1.01 * finest
    plain = weighed_rms(searched(np.ones_like(importance)) - weight, weight)
    assert not plain < 1.01 * finest


@pytest.mark.parametrize("value", [3e-6, 0.02, 7.0, 4e4])
def test_int8_never_cuts_off_the_largest(value: float) -> None:
    """Whatever fp16 makes of a scale, the error stays within half a step."""
    weight = normal(32, 256) / np.float32(0.02) * np.float32(value) / 4
    weight[:, ::GROUP] = value
    packed = quantized(weight, PackedFormat.INT8)
    half_step = unpack_parts(packed).scales.repeat(GROUP, axis=1) * 0.5
    assert (np.abs(unpack(packed) - weight) <= half_step * 1.0001).all()


@pytest.mark.parametrize("fmt", FORMATS)
def test_rows_do_not_depend_on_each_other(fmt: PackedFormat) -> None:
    """More rows than a thread takes at once, not a multiple of a panel: the same as parts alone."""
    weight = normal(1100, 512)
    whole = unpack(quantized(weight, fmt))
    parts = [unpack(quantized(weight[at : at + 300], fmt)) for at in range(0, 1100, 300)]
    assert np.array_equal(whole, np.concatenate(parts))


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("value", [0.0, 1.0, -3.5, 1e-7])
def test_constant_groups(fmt: PackedFormat, value: float) -> None:
    weight = np.full((16, 64), value, np.float32)
    error = np.abs(unpack(quantized(weight, fmt)) - weight).max()
    # Scales end at 2**-24; eight times half of that is the largest int4 group that becomes zero.
    assert float(error) <= max(abs(value) / 100, 8 * 2.0**-25)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("place", [(0, 0), (15, 63), (16, 95), (20, 40)])
def test_weights_that_no_scale_fits_are_refused_wherever_they_are(
    fmt: PackedFormat, place: tuple[int, int]
) -> None:
    weight = normal(21, 96)
    for isa in native.available_isas():
        native.set_isa(isa)
        for value in (np.nan, np.inf, -np.inf):
            weight[place] = value
            with pytest.raises(CheckpointError, match="not a number"):
                quantized(weight, fmt)
        for value in (1e9, -1e9, 1e20, -3e38):  # squares of the last ones overflow
            weight[place] = value
            with pytest.raises(CheckpointError, match="fp16"):
                quantized(weight, fmt)
        weight[place] = 6e4
        quantized(weight, fmt)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="multiple of 32"):
        quantized(np.zeros((16, 48), np.float32), PackedFormat.INT4)
    with pytest.raises(TypeError, match="float"):
        quantized(np.zeros((16, 64), np.int32), PackedFormat.INT4)
    with pytest.raises(ValueError, match="matrix"):
        quantized(np.zeros(64, np.float32), PackedFormat.INT4)
    with pytest.raises(ValueError, match="contiguous"):
        quantized(np.zeros((64, 32), np.float32).T, PackedFormat.INT4)
    target = empty(PackedFormat.INT4, 16, 64)
    with pytest.raises(ValueError, match="of that shape"):
        native_pack.quantize(np.zeros((17, 64), np.float32), target)
    target.data.flags.writeable = False
    with pytest.raises(ValueError, match="written to"):
        native_pack.quantize(np.zeros((16, 64), np.float32), target)
