"""Quantisation: exact where it is promised, and close to the best a group can have elsewhere."""

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize
from gguf.quants import quantize as gguf_quantize

from thinslice.errors import CheckpointError
from thinslice.kernels.packed import unpack, unpack_parts
from thinslice.kernels.quantize import from_gguf, quantize
from thinslice.plan.packed_format import GROUP, PackedFormat

FORMATS = list(PackedFormat)


def normal(n: int, k: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) * 0.02


def rms(x: torch.Tensor) -> float:
    return float(x.to(torch.float64).square().mean().sqrt())


def weighed_rms(error: torch.Tensor, weight: torch.Tensor) -> float:
    """The error that int4's scales are chosen for: large weights count more."""
    squares = weight.double().square()
    importance = (squares + squares.mean(1, keepdim=True)).sqrt()
    return float((error.double().square() * importance).mean().sqrt())


def q4_k_blocks(n: int, k: int) -> np.ndarray:
    """Random Q4_K blocks: any bits are a valid block if d and dmin are plain halves."""
    blocks = np.random.default_rng(0).integers(0, 256, (n, k // 256, 144), dtype=np.uint8)
    blocks[..., :4] = np.array([0.01, 0.02], dtype=np.float16).view(np.uint8)
    return blocks.reshape(n, -1)


@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q4_1, Kind.Q8_0])
@pytest.mark.parametrize(("n", "k"), [(16, 32), (50, 576)])
def test_gguf_blocks_keep_every_bit(kind: Kind, n: int, k: int) -> None:
    blocks = gguf_quantize(normal(n, k).numpy(), kind)
    packed = from_gguf(blocks, kind, k)
    values = torch.from_numpy(dequantize(blocks, kind))
    parts = unpack_parts(packed)
    centred = (parts.codes.float() - packed.format.zero_point).unflatten(1, (-1, GROUP))
    exact = centred * parts.scales.unsqueeze(2)
    if parts.mins is not None:
        exact = exact + parts.mins.unsqueeze(2)
    assert torch.equal(exact.flatten(1), values)
    assert torch.equal(unpack(packed), values)


def test_q4_k_loses_only_the_rounding_of_its_scales() -> None:
    blocks = q4_k_blocks(32, 512)
    values = torch.from_numpy(dequantize(blocks, Kind.Q4_K))
    packed = from_gguf(blocks, Kind.Q4_K, 512)
    parts = unpack_parts(packed)
    assert parts.mins is not None
    largest = parts.codes.float().unflatten(1, (-1, GROUP)) * parts.scales.unsqueeze(2)
    bound = 2.0**-11 * (largest.abs() + parts.mins.abs().unsqueeze(2)).flatten(1)
    assert ((unpack(packed) - values).abs() <= bound * 1.01 + 1e-9).all()


@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q4_1, Kind.Q8_0, Kind.Q4_K])
def test_words_in_whole_panels_and_codes_of_single_rows_give_the_same(kind: Kind) -> None:
    """15 rows go through the codes one by one; the same rows in a panel go as words."""
    k = 768
    blocks = q4_k_blocks(16, k) if kind is Kind.Q4_K else gguf_quantize(normal(16, k).numpy(), kind)
    panel, rows = (unpack_parts(from_gguf(part, kind, k)) for part in (blocks, blocks[:15]))
    assert torch.equal(panel.codes[:15], rows.codes)
    assert torch.equal(panel.scales[:15], rows.scales)
    if panel.mins is not None and rows.mins is not None:
        assert torch.equal(panel.mins[:15], rows.mins)


def k_quant_blocks(kind: Kind, n: int, k: int) -> np.ndarray:
    """Random Q5_K or Q6_K blocks with plain halves where the format has them."""
    size = {Kind.Q5_K: 176, Kind.Q6_K: 210}[kind]
    blocks = np.random.default_rng(1).integers(0, 256, (n, k // 256, size), dtype=np.uint8)
    if kind is Kind.Q5_K:
        blocks[..., :4] = np.array([0.01, 0.02], dtype=np.float16).view(np.uint8)
    else:
        blocks[..., -2:] = np.array([0.001], dtype=np.float16).view(np.uint8)
    return blocks.reshape(n, -1)


@pytest.mark.parametrize("kind", [Kind.Q5_K, Kind.Q6_K])
def test_k_quants_are_within_half_a_step_of_int8(kind: Kind) -> None:
    blocks = k_quant_blocks(kind, 16, 512)
    values = torch.from_numpy(dequantize(blocks, kind))
    packed = from_gguf(blocks, kind, 512)
    assert packed.format is PackedFormat.INT8
    half_step = unpack_parts(packed).scales.repeat_interleave(GROUP, dim=1) * 0.5
    assert ((unpack(packed) - values).abs() <= half_step * 1.001).all()


@pytest.mark.parametrize("fmt", FORMATS)
def test_search_beats_the_plain_scale(fmt: PackedFormat) -> None:
    """Against round-to-nearest with the scale of the extremes, which a search must not lose to."""
    weight = normal(64, 512)
    groups = weight.unflatten(1, (-1, GROUP))
    if fmt is PackedFormat.INT4M:
        low, high = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
        step = (high - low) / 15
        plain = ((groups - low) / step).round() * step + low
    else:
        levels = 7 if fmt is PackedFormat.INT4 else 127
        step = groups.abs().amax(2, keepdim=True) / levels
        plain = (groups / step).round() * step
    ours = rms(unpack(quantize(weight, fmt)) - weight)
    limit = {PackedFormat.INT4: 0.90, PackedFormat.INT4M: 0.93, PackedFormat.INT8: 0.92}[fmt]
    assert ours <= limit * rms(plain.flatten(1) - weight)


@pytest.mark.parametrize(
    ("fmt", "kind", "share"),
    [(PackedFormat.INT4M, Kind.Q4_1, 0.91), (PackedFormat.INT8, Kind.Q8_0, 0.92)],
)
def test_error_is_below_that_of_the_block_type(fmt: PackedFormat, kind: Kind, share: float) -> None:
    """Of the same bits a weight, as llama.cpp's quantiser fills it."""
    weight = normal(64, 512, seed=3)
    theirs = torch.from_numpy(dequantize(gguf_quantize(weight.numpy(), kind), kind))
    assert rms(unpack(quantize(weight, fmt)) - weight) < share * rms(theirs - weight)


def test_int4_is_better_than_q4_0_by_both_measures() -> None:
    weight = normal(64, 512, seed=3)
    ours = unpack(quantize(weight, PackedFormat.INT4)) - weight
    theirs = torch.from_numpy(dequantize(gguf_quantize(weight.numpy(), Kind.Q4_0), Kind.Q4_0))
    theirs -= weight
    assert weighed_rms(ours, weight) < 0.95 * weighed_rms(theirs, weight)
    assert rms(ours) < 0.96 * rms(theirs)


def test_int4_takes_the_scale_of_least_weighed_error() -> None:
    """Against a search ten times as fine; a scale of plain least squares is told apart."""
    weight = normal(64, 512, seed=4)
    weight[:, ::GROUP] *= 3
    groups = weight.unflatten(1, (-1, GROUP))
    largest = groups.gather(2, groups.abs().argmax(2, keepdim=True))
    squares = weight.square()
    importance = (squares + squares.mean(1, keepdim=True)).sqrt().unflatten(1, (-1, GROUP))

    def searched(importance: torch.Tensor) -> torch.Tensor:
        """The best of 73 divisors, group by group."""
        best, best_error = torch.zeros_like(groups), torch.full_like(largest, torch.inf)
        for step in range(73):
            levels = (groups / (largest / -(6.4 + step / 20))).round().clamp(-8, 7)
            sums = ((importance * groups * levels).sum(2), (importance * levels**2).sum(2))
            fitted = levels * (sums[0] / sums[1]).unsqueeze(2)
            error = ((fitted - groups) ** 2 * importance).sum(2, keepdim=True)
            best = torch.where(error < best_error, fitted, best)
            best_error = torch.minimum(error, best_error)
        return best.flatten(1)

    ours = weighed_rms(unpack(quantize(weight, PackedFormat.INT4)) - weight, weight)
    assert ours < 1.01 * weighed_rms(searched(importance) - weight, weight)
    plain = weighed_rms(searched(torch.ones_like(importance)) - weight, weight)
    assert not plain < 1.01 * weighed_rms(searched(importance) - weight, weight)


@pytest.mark.parametrize("value", [3e-6, 0.02, 7.0, 4e4])
def test_int8_never_cuts_off_the_largest(value: float) -> None:
    """Whatever fp16 makes of a scale, the error stays within half a step."""
    weight = normal(32, 256) / 0.02 * value / 4
    weight[:, ::GROUP] = value
    packed = quantize(weight, PackedFormat.INT8)
    half_step = unpack_parts(packed).scales.repeat_interleave(GROUP, dim=1) * 0.5
    assert ((unpack(packed) - weight).abs() <= half_step * 1.0001).all()


@pytest.mark.parametrize("fmt", FORMATS)
def test_pieces_do_not_show(fmt: PackedFormat) -> None:
    """More rows than one piece, not a multiple of a panel: the same as each part alone."""
    weight = normal(1100, 512)
    whole = unpack(quantize(weight, fmt))
    parts = [unpack(quantize(part, fmt)) for part in weight.split(300)]
    assert torch.equal(whole, torch.cat(parts))


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("value", [0.0, 1.0, -3.5, 1e-7])
def test_constant_groups(fmt: PackedFormat, value: float) -> None:
    weight = torch.full((16, 64), value)
    error = (unpack(quantize(weight, fmt)) - weight).abs().max()
    # Scales end at 2**-24; eight times half of that is the largest int4 group that becomes zero.
    assert float(error) <= max(abs(value) / 100, 8 * 2.0**-25)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="multiple of 32"):
        quantize(torch.zeros(16, 48), PackedFormat.INT4)
    with pytest.raises(TypeError, match="float"):
        quantize(torch.zeros(16, 64, dtype=torch.int32), PackedFormat.INT4)
    with pytest.raises(CheckpointError, match="not a number"):
        quantize(torch.full((16, 64), float("nan")), PackedFormat.INT8)
    with pytest.raises(CheckpointError, match="fp16"):
        quantize(torch.full((16, 64), 1e9), PackedFormat.INT8)
    with pytest.raises(CheckpointError, match="Q3_K has no packed format"):
        from_gguf(np.zeros((1, 110), np.uint8), Kind.Q3_K, 256)
    with pytest.raises(CheckpointError, match="18 bytes"):
        from_gguf(np.zeros((1, 17), np.uint8), Kind.Q4_0, 32)
