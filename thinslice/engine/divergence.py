"""How far one model's predictions lie from another's, from the logits of both.

The measures are those of llama.cpp's perplexity tool with --kl-divergence (kl_divergence in
tools/perplexity/perplexity.cpp), under their usual definitions: there the reference's
log-probabilities are kept in 16 bits, terms below e**-16 are left out, and sums are of fp32; here
everything from the logits on is float64.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from thinslice.errors import CheckpointError, RequestError
from thinslice.kernels.arrays import Floats

Doubles = NDArray[np.float64]

# Logits worked on at a time: 8 MiB in float64, or one row where that is longer.
_PIECE = 1 << 20
# Float64 copies of a piece that are alive at once: two of log-probabilities, and two to sum up.
_COPIES = 5
_SMALLEST_SAMPLE = 2
# What exp takes in float64; chance has 12 nats for a token of the largest vocabularies.
_LARGEST_EXPONENT = 700


@dataclass(frozen=True)
class Estimate:
    """A mean over tokens and its standard error, which takes the tokens as independent."""

    mean: float
    standard_error: float


@dataclass(frozen=True)
class Divergence:
    """How far model B is from the reference A on the scored tokens of a text.

    Attributes:
        num_scored: tokens whose prediction was looked at.
        kl: KL(A||B) of each token's prediction over the whole vocabulary, in nats.
        kl_median, kl_99, kl_max: its median, 99th percentile (linear between two values) and
            largest value.
        same_top: share of tokens for which both find the same one likeliest.
        perplexity_a, perplexity_b: exp of the mean negative log-likelihood of the text.
        log_ratio: ln(perplexity_b / perplexity_a). Its error is that of the differences token by
            token, far below what the errors of the two perplexities would suggest.
    """

    num_scored: int
    kl: Estimate
    kl_median: float
    kl_99: float
    kl_max: float
    same_top: Estimate
    perplexity_a: Estimate
    perplexity_b: Estimate
    log_ratio: Estimate


class DivergenceMeter:
    """Takes the logits of both models tile by tile; keeps 25 bytes for each token.

    Those are allocated at the start: small arrays that outlive large ones would split up the
    allocator's heap, by 60 MiB with each tile of a vocabulary of 49,152.
    """

    def __init__(self, num_tokens: int) -> None:
        if num_tokens < _SMALLEST_SAMPLE:
            raise RequestError(f"{num_tokens} tokens to score; at least {_SMALLEST_SAMPLE} needed")
        self._kl, self._nll_a, self._nll_b = np.zeros((3, num_tokens))
        self._is_same_top = np.zeros(num_tokens, np.bool_)
        self._done = 0

    def add(self, logits_a_TV: Floats, logits_b_TV: Floats, next_ids_T: NDArray[np.int64]) -> None:
        """Score the predictions of ``next_ids_T`` by the logits of the tokens before them.

        Args:
            next_ids_T: the tokens that the text goes on with.

        Peak extra memory: 40 MiB, or 40 V bytes where that is more.
        Errors: CheckpointError for logits that are not numbers.
        """
        step = max(_PIECE // logits_a_TV.shape[1], 1)
        for start in range(0, len(next_ids_T), step):
            rows = slice(start, start + step)
            self._add_piece(logits_a_TV[rows], logits_b_TV[rows], next_ids_T[rows])

    def result(self) -> Divergence:
        """The measures over all tokens.

        Errors: CheckpointError for a model that finds the text all but impossible.
        """
        assert self._done == len(self._kl), f"{self._done} of {len(self._kl)} tokens"
        kl = np.sort(self._kl)
        return Divergence(
            num_scored=len(kl),
            kl=_estimate(kl),
            kl_median=_quantile(kl, 0.5),
            kl_99=_quantile(kl, 0.99),
            kl_max=float(kl[-1]),
            same_top=_estimate(self._is_same_top.astype(np.float64)),
            perplexity_a=_perplexity(self._nll_a),
            perplexity_b=_perplexity(self._nll_b),
            log_ratio=_estimate(self._nll_b - self._nll_a),
        )

    def _add_piece(self, logits_a: Floats, logits_b: Floats, next_ids: NDArray[np.int64]) -> None:
        rows = slice(self._done, self._done + len(next_ids))
        log_a, log_b = _log_softmax(logits_a), _log_softmax(logits_b)
        places = np.arange(len(next_ids))
        self._nll_a[rows] = -log_a[places, next_ids]
        self._nll_b[rows] = -log_b[places, next_ids]
        # Of the logits: in float64 two different ones may still have equal log-probabilities.
        self._is_same_top[rows] = logits_a.argmax(-1) == logits_b.argmax(-1)
        with np.errstate(invalid="ignore"):  # what is no number is told below
            np.subtract(log_a, log_b, out=log_b)
            np.exp(log_a, out=log_a)
            kl = np.einsum("tv,tv->t", log_a, log_b)
        if not np.isfinite(kl).all():
            raise CheckpointError("a model's logits are not numbers; its weights must be damaged")
        self._kl[rows] = kl
        self._done += len(next_ids)


def _log_softmax(logits_TV: Floats) -> Doubles:
    """Log-probabilities in float64. Extra memory: they, twice."""
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        shifted = logits_TV.astype(np.float64)
        shifted -= shifted.max(axis=-1, keepdims=True)
        shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted


def scoring_bytes(vocab_size: int, tile: int) -> int:
    """The most that two tiles of logits and their scoring take.

    Each model's logits stand in float32; while the second's are made, in its own type beside.
    """
    logits = 3 * 4 * tile * vocab_size
    return logits + _COPIES * 8 * max(_PIECE, vocab_size)


def _estimate(values: Doubles) -> Estimate:
    mean, variance = float(values.mean()), float(values.var(ddof=1))
    return Estimate(mean, math.sqrt(variance / len(values)))


def _perplexity(nll: Doubles) -> Estimate:
    """The error is that of the mean, carried through exp to first order."""
    mean = _estimate(nll)
    if mean.mean > _LARGEST_EXPONENT:
        raise CheckpointError(
            f"a model finds the text less likely than e**-{_LARGEST_EXPONENT} for each token; "
            "its weights must be damaged"
        )
    perplexity = math.exp(mean.mean)
    return Estimate(perplexity, perplexity * mean.standard_error)


def _quantile(ordered: Doubles, fraction: float) -> float:
    """Linear between two values, without another copy of them."""
    place = fraction * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    low, high = float(ordered[below]), float(ordered[above])
    return low + (place - below) * (high - low)
