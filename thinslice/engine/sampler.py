"""Sampler: from rows of logits to token ids, exactly and repeatably.

The order is logits processors (processors.py), temperature, top-k, top-p, min-p. Every draw takes
one number from the sequence's own draws, so the draws of one sequence do not depend on its
company in a batch.
NumPy throughout: one thread, one order of summation.
"""

from dataclasses import dataclass
from math import log
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from thinslice.config import SamplingParams, TokenSampling
from thinslice.engine.logprobs import TokenLogprobs
from thinslice.engine.sequence import Sequence
from thinslice.errors import CheckpointError
from thinslice.kernels.arrays import Floats

Doubles = NDArray[np.float64]
Ids = NDArray[np.intp]

# How far below the likeliest token to look for those a filter keeps, in units of the temperature:
# the first nearly always holds enough, which is checked; a row is only sorted as a last resort.
_REACHES = (4.0, 8.0, 12.0)
# float32's largest: what one over the smallest temperatures is cut to.
_LARGEST_SCALE = 3.0e38
_DRAW_BLOCK = 256
NO_NUMBERS = "the model's logits are not numbers; its weights must be damaged"
# Of a float's bits, and of a sorted integer's.
_ALL_BUT_SIGN = np.int32(0x7FFFFFFF)
_PLACE = 0xFFFFFFFF


class Chosen(NamedTuple):
    """A token, and its log-probability under the distribution it was drawn from."""

    token_id: int
    logprob: float


@dataclass(frozen=True)
class Sampled:
    """The tokens that one sequence takes from its rows, and their log-probabilities if wanted."""

    token_ids: list[int]
    logprobs: list[TokenLogprobs]


def sample(logits_V: Floats, sequence: Sequence) -> int:
    """The next token id of a sequence from its logits [V], float32.

    Errors: CheckpointError for logits that are not numbers.
    Extra memory: two copies of the row where there are processors; where tokens are drawn two
    float32 copies at a time; where the filters may keep nearly all tokens, 40 bytes per token.
    """
    return _choose(logits_V, int(logits_V.argmax()), sequence, []).token_id


def best_tokens(logits_RV: Floats) -> list[int]:
    """The likeliest token of each row, the lowest id among equals."""
    best: list[int] = logits_RV.argmax(axis=1).tolist()
    return best


def sample_rows(logits_RV: Floats, best: list[int], sequence: Sequence) -> Sampled:
    """The next tokens of a sequence from the row behind its last token and one for each draft.

    Each row is sampled as if there were no draft. A draft is accepted where it is the token
    sampled, and the first row where it is not ends the run with that token. This is rejection
    sampling for a drafter that puts all its mass on one token (arXiv 2211.17192): draft x is
    accepted with probability p(x), and what takes its place is distributed as p without x,
    renormalised. And because each token takes one number from the sequence's draws, as it does
    without drafts, a seed gives the text it gives without drafts.

    The sequence is left as it was but for its draws. The caller cuts the tokens at the first
    that ends it.

    Args:
        best: ``best_tokens`` of the rows.

    Errors and extra memory: as ``sample``; with log-probabilities, three float64 rows.
    """
    drafts = sequence.draft_token_ids
    assert len(best) == len(drafts) + 1, f"{len(best)} rows, {len(drafts)} drafts"
    sampled = Sampled([], [])
    wanted = sequence.params.logprobs
    for index, row in enumerate(logits_RV):
        chosen = _choose(row, best[index], sequence, sampled.token_ids)
        if wanted is not None:
            sampled.logprobs.append(token_logprobs(row, chosen, wanted))
        sampled.token_ids.append(chosen.token_id)
        if index == len(drafts) or chosen.token_id != drafts[index]:
            break
    return sampled


def token_logprobs(logits_V: Floats, chosen: Chosen, count: int) -> TokenLogprobs:
    """Log-probabilities of a chosen token and of the ``count`` likeliest, from unchanged logits.

    Summed in float64.
    """
    shifted = logits_V.astype(np.float64)
    shifted -= logits_V.max()
    shifted -= np.log(np.exp(shifted).sum())
    likeliest: list[int] = []
    if count:
        wanted = TokenSampling(temperature=1.0, top_k=count, top_p=1.0)
        likeliest = _likeliest(logits_V, logits_V.max(), wanted, None)[1][:count].tolist()
    top = tuple((index, float(shifted[index])) for index in likeliest)
    return TokenLogprobs(float(shifted[chosen.token_id]), chosen.logprob, top)


def keep_likely(logits_V: Floats, params: SamplingParams) -> tuple[Floats, Ids]:
    """The tokens that top-k, top-p and min-p leave, likeliest first: their logits and ids.

    The probabilities are those at the params' temperature, which must not be 0.
    """
    tokens = params.token_sampling
    largest, total = logits_V.max(), None
    if tokens.top_p < 1.0 and not tokens.top_k:
        total = float(_weights(logits_V, largest, tokens.temperature).sum())
    logits, token_ids = _likeliest(logits_V, largest, tokens, total)
    if tokens.top_k:
        logits, token_ids = logits[: tokens.top_k], token_ids[: tokens.top_k]
    weights = _exact_weights(logits, tokens.temperature)
    if tokens.top_p < 1.0:
        # Mass within what top-k left, as each filter works on what the one before it left.
        total = float(weights.sum()) if total is None else total
        before = weights.cumsum() - weights
        keep = max(int((before < tokens.top_p * total).sum()), 1)
        logits, token_ids, weights = logits[:keep], token_ids[:keep], weights[:keep]
    keep = int((weights >= tokens.min_p).sum())
    return logits[:keep], token_ids[:keep]


def _choose(row: Floats, best: int, sequence: Sequence, accepted: list[int]) -> Chosen:
    params = sequence.params
    if sequence.processors:
        for processor in sequence.processors:
            row = processor(row, sequence, accepted)
        best = int(row.argmax())
    if not np.isfinite(row[best]):
        raise CheckpointError(NO_NUMBERS)
    if params.is_greedy:
        return Chosen(best, 0.0)
    draw = sequence.draws.next()
    temperature = params.token_sampling.temperature
    if not params.has_filter:
        return _draw_from_all(_weights(row, row[best], temperature), draw)
    logits, token_ids = keep_likely(row, params)
    weights = _exact_weights(logits, temperature)
    place = _draw(weights, draw)
    return Chosen(int(token_ids[place]), log(weights[place] / weights.sum()))


def _draw(weights: Floats | Doubles, draw: float) -> int:
    """The first place up to which the weights sum to more than this share of all."""
    sums = weights.cumsum(dtype=np.float64)
    # Rounded up, the share could be all of them.
    target = min(draw * sums[-1], np.nextafter(sums[-1], 0.0))
    return int(sums.searchsorted(target, side="right"))


def _draw_from_all(weights: Floats, draw: float) -> Chosen:
    """``_draw`` over a whole vocabulary: first the block of tokens, then the token in it."""
    sums = np.add.reduceat(weights, np.arange(0, len(weights), _DRAW_BLOCK)).astype(np.float64)
    block = _draw(sums, draw)
    # What is left of the draw within the block, as a share of it.
    rest = draw * sums.sum() - sums[:block].sum()
    start = block * _DRAW_BLOCK
    inside = min(max(rest / sums[block], 0.0), 1.0)
    token_id = start + _draw(weights[start : start + _DRAW_BLOCK], inside)
    return Chosen(token_id, log(float(weights[token_id]) / sums.sum()))


def _weights(logits: Floats, largest: np.float32, temperature: float) -> Floats:
    """Probabilities as multiples of the likeliest token's."""
    scaled = logits - largest
    with np.errstate(over="ignore"):
        scaled *= np.float32(min(1.0 / temperature, _LARGEST_SCALE))
    np.exp(scaled, out=scaled)
    return scaled


def _exact_weights(logits: Floats, temperature: float) -> Doubles:
    """Do the same in float64, for sorted logits."""
    with np.errstate(over="ignore"):
        weights: Doubles = np.exp((logits.astype(np.float64) - logits[0]) / temperature)
    return weights


def _likeliest(
    logits_V: Floats, largest: np.float32, tokens: TokenSampling, total: float | None
) -> tuple[Floats, Ids]:
    """The largest logits in order, equal ones by id: at least all that the filters keep.

    Args:
        total: the mass of all tokens as a multiple of the likeliest one's, where there is a top-p
            and no top-k.
    """
    for reach in _REACHES:
        token_ids = np.flatnonzero(logits_V >= largest - reach * tokens.temperature)
        logits = logits_V[token_ids]
        if _is_enough(logits, largest, tokens, total):
            break
    else:
        bound = np.finfo(np.float32).min  # what a processor has ruled out is not sorted
        if 0 < tokens.top_k < len(logits_V):
            bound = max(bound, np.partition(logits_V, -tokens.top_k)[-tokens.top_k])
        token_ids = np.flatnonzero(logits_V >= bound)
        logits = logits_V[token_ids]
    order = _descending(logits)
    return logits[order], token_ids[order]


def _is_enough(
    logits: Floats, largest: np.float32, tokens: TokenSampling, total: float | None
) -> bool:
    """Whether the logits above some bound hold all that the filters keep."""
    if tokens.top_k:
        return len(logits) >= tokens.top_k
    weights = _weights(logits, largest, tokens.temperature)
    if weights.min() < tokens.min_p:
        return True
    return total is not None and float(weights.sum(dtype=np.float64)) >= tokens.top_p * total


def _descending(logits: Floats) -> Ids:
    """The order from the largest to the smallest, equal ones by place."""
    keys = descending_keys(logits)
    keys.sort()
    return keys & _PLACE


def descending_keys(logits: Floats, first: int = 0) -> NDArray[np.int64]:
    """Integers in the order of the logits, the largest logit's first, equal ones by place.

    Value and place, counted from ``first`` on along the last axis, are sorted as one integer, which
    is many times faster than a stable argsort.
    """
    bits = (0.0 - logits).view(np.int32)  # 0 - x, as -x would tell -0 from 0
    keys: NDArray[np.int64] = np.where(bits < 0, bits ^ _ALL_BUT_SIGN, bits).astype(np.int64)
    keys <<= 32
    keys |= np.arange(first, first + logits.shape[-1])
    return keys


def of_keys(keys: NDArray[np.int64]) -> tuple[Floats, Ids]:
    """The logits, 0 where they were -0, and the places that such integers stand for."""
    ascending = (keys >> 32).astype(np.int32)
    bits = np.where(ascending < 0, ascending ^ _ALL_BUT_SIGN, ascending)
    return 0.0 - bits.view(np.float32), keys & _PLACE
