"""From the logits of a step to what it brings each sequence, before anything is committed."""

from collections.abc import Sequence as Rows
from dataclasses import dataclass
from itertools import accumulate

from thinslice.engine.contained import Contained
from thinslice.engine.logprobs import Logprobs, TokenLogprobs
from thinslice.engine.sampler import Sampled, best_tokens, sample_rows
from thinslice.engine.scheduler import ScheduledTokens
from thinslice.engine.scoring import Scores
from thinslice.engine.sequence import Sequence
from thinslice.errors import CheckpointError
from thinslice.kernels.arrays import Floats


@dataclass(frozen=True)
class Advance:
    """What a step brings one sequence.

    Attributes:
        tokens: what ran.
        new_ids: up to one that ends the sequence; none within a prompt.
        logprobs: of the new tokens, where they are asked for; of those that are scored.
        finish_reason: why the sequence ends with them.
        error: what went wrong in sampling.
    """

    tokens: ScheduledTokens
    new_ids: tuple[int, ...] = ()
    logprobs: Rows[TokenLogprobs] = ()
    finish_reason: str | None = None
    error: Exception | None = None

    @property
    def goes_on(self) -> bool:
        """Whether the sequence has its prompt behind it and more tokens to come."""
        return bool(self.new_ids) and self.finish_reason is None

    @property
    def num_accepted(self) -> int:
        """Drafts that stand."""
        return max(len(self.new_ids) - 1, 0)

    @property
    def num_certain(self) -> int:
        """Positions whose K and V stay: of all that ran, those of rejected drafts do not."""
        return self.tokens.count - self.tokens.num_drafts + self.num_accepted

    @property
    def next_token_ids(self) -> list[int]:
        """The token after each of those positions."""
        sequence = self.tokens.sequence
        start = sequence.num_computed + 1
        stop = min(start + self.num_certain, sequence.num_tokens)
        return [*sequence.tokens(start, stop), *self.new_ids]


def advance_all(
    scheduled: Rows[ScheduledTokens],
    logits_RV: Floats,
    eos_token_ids: frozenset[int],
    scores: Scores | None = None,
) -> list[Advance]:
    """Sample behind each sequence whose tokens are all through, and note what was scored.

    The sequences are left as they were but for their draws.
    """
    best = best_tokens(logits_RV)
    stops = accumulate(tokens.num_rows for tokens in scheduled)
    nothing: list[Logprobs | CheckpointError] = [Logprobs()] * len(scheduled)
    results = nothing if scores is None else scores.results()
    advances = []
    for tokens, stop, scored in zip(scheduled, stops, results, strict=True):
        start = stop - tokens.num_rows
        if tokens.num_scored:
            advances.append(_scored(tokens, scored))
            continue
        if start == stop:
            advances.append(Advance(tokens))
            continue
        with Contained() as trouble:
            sampled = sample_rows(logits_RV[start:stop], best[start:stop], tokens.sequence)
        if trouble.error is not None:
            advances.append(Advance(tokens, error=trouble.error))
        else:
            advances.append(_cut(tokens, sampled, eos_token_ids))
    return advances


def _scored(tokens: ScheduledTokens, scored: Logprobs | CheckpointError) -> Advance:
    if isinstance(scored, CheckpointError):
        return Advance(tokens, error=scored)
    is_last = tokens.count == tokens.sequence.num_uncomputed
    return Advance(tokens, logprobs=scored, finish_reason="scored" if is_last else None)


def _cut(tokens: ScheduledTokens, sampled: Sampled, eos_token_ids: frozenset[int]) -> Advance:
    """What was sampled, up to the token that ends the sequence."""
    sequence = tokens.sequence
    for count, token_id in enumerate(sampled.token_ids, 1):
        reason = _finish_reason(sequence, token_id, sequence.num_tokens + count, eos_token_ids)
        if reason is not None:
            break
    return Advance(
        tokens, tuple(sampled.token_ids[:count]), tuple(sampled.logprobs[:count]), reason
    )


def _finish_reason(
    sequence: Sequence, token_id: int, num_tokens: int, eos_token_ids: frozenset[int]
) -> str | None:
    """Why a sequence ends with a token that makes it so many; None where it goes on."""
    params = sequence.params
    is_end = token_id in eos_token_ids and not params.ignore_eos
    if is_end or token_id in params.stop_token_ids:
        return "stop"
    return "length" if num_tokens >= sequence.max_positions else None
