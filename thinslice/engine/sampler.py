"""Sampler: from one row of logits to one token id, exactly and repeatably.

The order is penalties, temperature, top-k, top-p, min-p. Every draw takes one number from the
sequence's own generator, so the draws of one sequence do not depend on its company in a batch.
"""

from collections import Counter

import torch

from thinslice.config import SamplingParams
from thinslice.engine.sequence import Sequence

# Top-p needs the likeliest tokens in order. Sorting this many is enough whenever they hold the
# wanted mass, which is checked; else the whole row is sorted.
_CANDIDATES = 1024


def sample(logits_V: torch.Tensor, sequence: Sequence) -> int:
    """The next token id of a sequence from its logits [V], float32.

    Extra memory: 3 V float64, and where the whole row is sorted V int64 and V float64 more.
    """
    params = sequence.params
    logits_V = penalize(logits_V, sequence)
    if params.is_greedy:
        return int(logits_V.argmax())
    # From the largest down, in float64, so that no temperature however small overflows.
    scaled_V = (logits_V.double() - logits_V.max()) / params.temperature
    logits, token_ids = keep_likely(scaled_V, params)
    weights = logits.exp().cumsum(0)
    draw = torch.rand((), dtype=torch.float64, generator=sequence.generator)
    index = int(torch.searchsorted(weights, draw * weights[-1], right=True))
    return int(token_ids[min(index, len(token_ids) - 1)])


def penalize(logits_V: torch.Tensor, sequence: Sequence) -> torch.Tensor:
    """Apply the repetition, presence and frequency penalties; a copy where any is on."""
    params = sequence.params
    repetition, presence = params.repetition_penalty, params.presence_penalty
    frequency = params.frequency_penalty
    if repetition == 1.0 and presence == 0.0 and frequency == 0.0:
        return logits_V
    logits_V = logits_V.clone()
    counts = Counter(sequence.completion_token_ids)
    if repetition != 1.0:
        seen = torch.tensor(sorted({*sequence.prompt_token_ids, *counts}))
        values = logits_V[seen]
        logits_V[seen] = torch.where(values > 0, values / repetition, values * repetition)
    if counts:
        penalties = [presence + frequency * count for count in counts.values()]
        logits_V[torch.tensor(list(counts))] -= torch.tensor(penalties)
    return logits_V


def keep_likely(
    logits_V: torch.Tensor, params: SamplingParams
) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens that top-k, top-p and min-p leave, likeliest first: their logits and ids."""
    size = logits_V.shape[0]
    wanted = min(params.top_k or size, size)
    logits, token_ids = _likeliest(logits_V, min(wanted, _CANDIDATES))
    if len(logits) < wanted and not _holds_enough(logits, logits_V, params):
        logits, token_ids = _likeliest(logits_V, wanted)
    if params.top_p < 1.0:
        # Mass within what top-k left, as each filter works on what the one before it left.
        total = logits if params.top_k else logits_V
        probs = (logits - total.logsumexp(0)).exp()
        before = probs.cumsum(0) - probs
        keep = int((before < params.top_p).sum())
        logits, token_ids = logits[:keep], token_ids[:keep]
    if params.min_p > 0.0:
        keep = int(((logits - logits[0]).exp() >= params.min_p).sum())
        logits, token_ids = logits[:keep], token_ids[:keep]
    return logits, token_ids


def _likeliest(logits_V: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``count`` largest logits in order, equal ones by id."""
    if count < logits_V.shape[0]:
        threshold = torch.topk(logits_V, count).values[-1]
        token_ids = (logits_V >= threshold).nonzero().squeeze(1)
    else:
        token_ids = torch.arange(logits_V.shape[0])
    order = torch.sort(logits_V[token_ids], descending=True, stable=True)
    return order.values[:count], token_ids[order.indices[:count]]


def _holds_enough(logits: torch.Tensor, logits_V: torch.Tensor, params: SamplingParams) -> bool:
    """Whether the candidates already hold all that top-p or min-p would keep."""
    if params.top_k:
        return False
    if params.min_p > 0.0 and float((logits[-1] - logits[0]).exp()) < params.min_p:
        return True
    mass = (logits.logsumexp(0) - logits_V.logsumexp(0)).exp()
    return params.top_p < 1.0 and float(mass) >= params.top_p
