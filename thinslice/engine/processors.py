"""Logits processors: what changes a row of logits before a token is chosen from it.

They run before temperature and filters, in the order in which a sequence holds them. A processor is
pure: its row depends on the row it is given, the sequence's tokens and the drafts that were
accepted before the row, and on nothing else. So a text does not depend on drafts or on its company.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Protocol

import numpy as np

from thinslice.config import SamplingParams
from thinslice.kernels.arrays import Floats


class Tokens(Protocol):
    """What a processor sees of a sequence."""

    prompt_token_ids: list[int]
    completion_token_ids: list[int]


class LogitsProcessor(Protocol):
    """One change of a row."""

    def __call__(self, logits_V: Floats, tokens: Tokens, accepted: list[int]) -> Floats:
        """Return the changed row [V], float32; ``logits_V`` stays as it is.

        Args:
            accepted: tokens that follow the completion so far.

        Extra memory: a copy of the row.
        """


class Penalties:
    """Repetition, presence and frequency penalties; see SamplingParams."""

    def __init__(self, params: SamplingParams) -> None:
        self._repetition = params.token_sampling.repetition_penalty
        self._presence, self._frequency = params.presence_penalty, params.frequency_penalty

    def __call__(self, logits_V: Floats, tokens: Tokens, accepted: list[int]) -> Floats:
        """Return the penalised row. Source: arXiv 1909.05858 for the repetition penalty."""
        logits_V = logits_V.copy()
        counts = Counter(tokens.completion_token_ids)
        counts.update(accepted)
        if self._repetition != 1.0:
            seen = list({*tokens.prompt_token_ids, *counts})
            values = logits_V[seen]
            logits_V[seen] = np.where(
                values > 0, values / self._repetition, values * self._repetition
            )
        if counts:
            times = np.array(list(counts.values()), dtype=logits_V.dtype)
            penalties = self._presence + self._frequency * times
            logits_V[list(counts)] -= penalties.astype(logits_V.dtype)
        return logits_V


class Bias:
    """A number added to the logits of some tokens; see SamplingParams."""

    def __init__(self, bias: Mapping[int, float]) -> None:
        self._ids = np.fromiter(bias.keys(), dtype=np.intp)
        self._values = np.fromiter(bias.values(), dtype=np.float32)

    def __call__(self, logits_V: Floats, tokens: Tokens, accepted: list[int]) -> Floats:
        """Return the row with the bias added."""
        logits_V = logits_V.copy()
        logits_V[self._ids] += self._values
        return logits_V


def processors_for(params: SamplingParams) -> tuple[LogitsProcessor, ...]:
    """Return the processors that the params ask for: penalties, then the bias."""
    processors: list[LogitsProcessor] = []
    if params.has_penalty:
        processors.append(Penalties(params))
    if params.logit_bias:
        processors.append(Bias(dict(params.logit_bias)))
    return tuple(processors)
