"""From the logits of a step to what it brings each sequence, before anything is committed."""

from collections.abc import Callable
from collections.abc import Sequence as Rows
from dataclasses import dataclass
from itertools import accumulate

import torch

from thinslice.engine.contained import Contained
from thinslice.engine.logprobs import TokenLogprobs
from thinslice.engine.sampler import Sampled, best_tokens, sample_rows
from thinslice.engine.scheduler import ScheduledTokens
from thinslice.engine.sequence import Sequence

# Sequence, a token for it and how many tokens it has with that, to the reason why it ends there.
FinishReason = Callable[[Sequence, int, int], str | None]


@dataclass(frozen=True)
class Advance:
    """What a step brings one sequence.

    Attributes:
        tokens: what ran.
        new_ids: up to one that ends the sequence; none within a prompt.
        logprobs: of the new tokens, where they are asked for.
        finish_reason: why the sequence ends with them.
        error: what went wrong in sampling.
    """

    tokens: ScheduledTokens
    new_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
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
    scheduled: Rows[ScheduledTokens], logits_RV: torch.Tensor, finish_reason: FinishReason
) -> list[Advance]:
    """Sample behind each sequence whose tokens are all through.

    The sequences are left as they were but for their generators.
    """
    best = best_tokens(logits_RV)
    stops = accumulate(tokens.num_rows for tokens in scheduled)
    advances = []
    for tokens, stop in zip(scheduled, stops, strict=True):
        start = stop - tokens.num_rows
        if start == stop:
            advances.append(Advance(tokens))
            continue
        with Contained() as trouble:
            sampled = sample_rows(logits_RV[start:stop], best[start:stop], tokens.sequence)
        if trouble.error is not None:
            advances.append(Advance(tokens, error=trouble.error))
        else:
            advances.append(_cut(tokens, sampled, finish_reason))
    return advances


def _cut(tokens: ScheduledTokens, sampled: Sampled, finish_reason: FinishReason) -> Advance:
    """What was sampled, up to the token that ends the sequence."""
    sequence = tokens.sequence
    for count, token_id in enumerate(sampled.token_ids, 1):
        reason = finish_reason(sequence, token_id, sequence.num_tokens + count)
        if reason is not None:
            break
    return Advance(
        tokens, tuple(sampled.token_ids[:count]), tuple(sampled.logprobs[:count]), reason
    )
