"""KL divergence, agreement and perplexity against a straight reference in numpy's float64."""

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from thinslice.engine.divergence import Divergence, DivergenceMeter, Estimate
from thinslice.errors import CheckpointError, RequestError

Logits = tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int64]]


def random_logits(num_tokens: int, vocab_size: int, noise: float = 0.3) -> Logits:
    rng, size = np.random.default_rng(num_tokens), (num_tokens, vocab_size)
    logits_a = rng.standard_normal(size, np.float32) * np.float32(4)
    logits_b = logits_a + np.float32(noise) * rng.standard_normal(size, np.float32)
    return logits_a, logits_b, rng.integers(0, vocab_size, num_tokens)


def measured(logits: Logits, tile: int) -> Divergence:
    meter = DivergenceMeter(len(logits[2]))
    for start in range(0, len(logits[2]), tile):
        logits_a, logits_b, next_ids = (one[start : start + tile] for one in logits)
        meter.add(logits_a, logits_b, next_ids)
    return meter.result()


def reference(logits: Logits) -> Divergence:
    """Every measure by its definition, one token after the other."""
    kl, nll_a, nll_b, same = [], [], [], []
    for row_a, row_b, next_id in zip(*logits, strict=True):
        p, q = (np.exp(row.astype(np.float64) - row.max()) for row in (row_a, row_b))
        p, q = p / p.sum(), q / q.sum()
        kl.append(float((p * (np.log(p) - np.log(q))).sum()))
        nll_a.append(-math.log(p[next_id]))
        nll_b.append(-math.log(q[next_id]))
        same.append(float(p.argmax() == q.argmax()))

    def estimate(values: list[float]) -> Estimate:
        return Estimate(float(np.mean(values)), float(np.std(values, ddof=1) / len(values) ** 0.5))

    def perplexity(values: list[float]) -> Estimate:
        mean = estimate(values)
        return Estimate(math.exp(mean.mean), math.exp(mean.mean) * mean.standard_error)

    return Divergence(
        num_scored=len(kl),
        kl=estimate(kl),
        kl_median=float(np.median(kl)),
        kl_99=float(np.percentile(kl, 99)),
        kl_max=max(kl),
        same_top=estimate(same),
        perplexity_a=perplexity(nll_a),
        perplexity_b=perplexity(nll_b),
        log_ratio=estimate([b - a for a, b in zip(nll_a, nll_b, strict=True)]),
    )


def numbers(divergence: Divergence) -> list[float]:
    values: list[float] = []
    for value in vars(divergence).values():
        values += (value.mean, value.standard_error) if isinstance(value, Estimate) else (value,)
    return values


def assert_close(found: Divergence, wanted: Divergence) -> None:
    np.testing.assert_allclose(numbers(found), numbers(wanted), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize(("num_tokens", "vocab_size"), [(2, 3), (101, 97), (40, 60_000)])
@pytest.mark.parametrize("tile", [16, 64])
def test_every_measure_is_the_reference(num_tokens: int, vocab_size: int, tile: int) -> None:
    """The largest spans several pieces within a tile."""
    logits = random_logits(num_tokens, vocab_size)
    assert_close(measured(logits, tile), reference(logits))


def swapped(logits: Logits) -> Logits:
    return logits[1], logits[0], logits[2]


def next_ids_off_by_one(logits: Logits) -> Logits:
    return logits[0], logits[1], np.roll(logits[2], 1)


def rows_off_by_one(logits: Logits) -> Logits:
    return logits[0], np.roll(logits[1], 1, axis=0), logits[2]


def scaled(logits: Logits) -> Logits:
    return logits[0], logits[1] * np.float32(1.00001), logits[2]


@pytest.mark.parametrize("fault", [swapped, next_ids_off_by_one, rows_off_by_one, scaled])
def test_a_planted_fault_is_seen(fault) -> None:  # type: ignore[no-untyped-def]
    logits = random_logits(101, 97)
    with pytest.raises(AssertionError):
        assert_close(measured(fault(logits), 64), reference(logits))


def test_the_same_logits_are_no_divergence_at_all() -> None:
    logits_a, _, next_ids = random_logits(64, 1000)
    same = measured((logits_a, logits_a.copy(), next_ids), 16)
    assert (same.kl.mean, same.kl.standard_error, same.kl_max) == (0.0, 0.0, 0.0)
    assert same.same_top.mean == 1.0
    assert same.perplexity_a == same.perplexity_b
    assert same.log_ratio == Estimate(0.0, 0.0)


def test_far_logits_neither_overflow_nor_vanish() -> None:
    """KL of a sure prediction from a sure other one is their distance in logits."""
    logits_a, logits_b = np.zeros((2, 2, 8), np.float32)
    logits_a[:, 0], logits_b[:, 1] = 600.0, 600.0
    far = measured((logits_a, logits_b, np.array([0, 0])), 16)
    assert far.kl.mean == 600.0
    assert far.perplexity_a.mean == 1.0
    with pytest.raises(CheckpointError, match="less likely"):
        measured((logits_a, logits_b * 2, np.array([0, 0])), 16)


def test_what_is_no_number_is_refused() -> None:
    logits_a, logits_b, next_ids = random_logits(4, 10)
    logits_b[2, 3] = math.nan
    with pytest.raises(CheckpointError, match="not numbers"):
        DivergenceMeter(4).add(logits_a, logits_b, next_ids)
    with pytest.raises(RequestError, match="1 tokens to score"):
        DivergenceMeter(1)
