"""Sequence: one prompt on its way to a completion."""

from dataclasses import dataclass, field
from enum import Enum, auto

import torch

from thinslice.config import SamplingParams


class Status(Enum):
    """Where a sequence is."""

    WAITING = auto()
    RUNNING = auto()
    FINISHED = auto()


@dataclass
class Sequence:
    """The state of one request.

    Attributes:
        max_positions: the most positions it can come to hold: prompt plus longest completion.
        num_computed: tokens whose K and V are in the cache.
        blocks: its block table.
        finish_reason: ``stop``, ``length`` or ``abort`` once finished.
    """

    seq_id: int
    prompt_token_ids: list[int]
    params: SamplingParams
    max_positions: int
    generator: torch.Generator
    completion_token_ids: list[int] = field(default_factory=list)
    status: Status = Status.WAITING
    num_computed: int = 0
    blocks: tuple[int, ...] = ()
    finish_reason: str | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens of prompt and completion so far."""
        return len(self.prompt_token_ids) + len(self.completion_token_ids)

    @property
    def num_uncomputed(self) -> int:
        """Tokens still to run through the model before the next one can be sampled."""
        return self.num_tokens - self.num_computed

    def tokens(self, start: int, stop: int) -> list[int]:
        """Token ids of positions ``[start, stop)``."""
        num_prompt = len(self.prompt_token_ids)
        if stop <= num_prompt:
            return self.prompt_token_ids[start:stop]
        if start >= num_prompt:
            return self.completion_token_ids[start - num_prompt : stop - num_prompt]
        return self.prompt_token_ids[start:] + self.completion_token_ids[: stop - num_prompt]
