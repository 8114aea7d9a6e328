"""Engine: sequences in, tokens out, one step at a time."""

import os
from dataclasses import dataclass

import torch

from thinslice.config import SamplingParams
from thinslice.engine.runner import Runner
from thinslice.engine.sampler import sample
from thinslice.engine.scheduler import ScheduledTokens, Scheduler
from thinslice.engine.sequence import Sequence, Status
from thinslice.errors import RequestError
from thinslice.plan.memory_plan import MemoryPlan


@dataclass(frozen=True)
class NewToken:
    """A token that a step brought forth; ``finish_reason`` is set on a sequence's last one."""

    sequence: Sequence
    token_id: int
    finish_reason: str | None


class Engine:
    """Continuous batching over the paged KV cache, inside one plan."""

    def __init__(self, runner: Runner, plan: MemoryPlan, eos_token_ids: frozenset[int]) -> None:
        self.runner = runner
        self.plan = plan
        self.eos_token_ids = eos_token_ids
        self.scheduler = Scheduler(plan)
        self._next_id = 0

    @property
    def has_work(self) -> bool:
        """Whether any sequence is unfinished."""
        return self.scheduler.has_work

    def add_request(self, prompt_token_ids: list[int], params: SamplingParams) -> Sequence:
        """Queue a prompt.

        Errors: RequestError for an empty prompt, an id outside the vocabulary, or a prompt and
        completion longer than the context; nothing is ever cut.
        """
        self._check_prompt(prompt_token_ids, params)
        context = self.plan.context
        max_tokens = params.max_tokens or context - len(prompt_token_ids)
        seed = params.seed
        if seed is None:
            seed = int.from_bytes(os.urandom(7), "little")
        sequence = Sequence(
            seq_id=self._next_id,
            prompt_token_ids=prompt_token_ids,
            params=params,
            max_positions=len(prompt_token_ids) + max_tokens,
            generator=torch.Generator().manual_seed(seed),
        )
        self._next_id += 1
        self.scheduler.add(sequence)
        return sequence

    def step(self) -> list[NewToken]:
        """Run one batch and sample one token for each sequence whose prompt is through."""
        scheduled = self.scheduler.schedule()
        logits = self.runner.run(scheduled)
        sampled = [tokens.sequence for tokens in scheduled if tokens.is_sampled]
        token_ids = [sample(row, one) for one, row in zip(sampled, logits, strict=True)]
        # All at once after the last thing that can be interrupted, so that every sequence is
        # either a step further or where it was.
        self._count_computed(scheduled)
        return [
            self._commit(one, token_id) for one, token_id in zip(sampled, token_ids, strict=True)
        ]

    def abort(self, sequence: Sequence, reason: str = "abort") -> None:
        """End a sequence now and free its blocks; a finished one is left as it is."""
        if sequence.status is not Status.FINISHED:
            self.scheduler.finish(sequence, reason)

    def _count_computed(self, scheduled: list[ScheduledTokens]) -> None:
        for tokens in scheduled:
            tokens.sequence.num_computed += tokens.count

    def _commit(self, sequence: Sequence, token_id: int) -> NewToken:
        sequence.completion_token_ids.append(token_id)
        reason = self._finish_reason(sequence, token_id)
        if reason is not None:
            self.scheduler.finish(sequence, reason)
        return NewToken(sequence, token_id, reason)

    def _finish_reason(self, sequence: Sequence, token_id: int) -> str | None:
        params = sequence.params
        is_end = token_id in self.eos_token_ids and not params.ignore_eos
        if is_end or token_id in params.stop_token_ids:
            return "stop"
        return "length" if sequence.num_tokens >= sequence.max_positions else None

    def _check_prompt(self, prompt_token_ids: list[int], params: SamplingParams) -> None:
        num_prompt, context = len(prompt_token_ids), self.plan.context
        if num_prompt == 0:
            raise RequestError("the prompt is empty; give at least one token")
        if num_prompt >= context:
            raise RequestError(
                f"the prompt has {num_prompt} tokens and the context is {context}; "
                f"at most {context - 1} leave room for an answer"
            )
        if params.max_tokens is not None and num_prompt + params.max_tokens > context:
            raise RequestError(
                f"a prompt of {num_prompt} tokens and max_tokens {params.max_tokens} exceed the "
                f"context of {context}; max_tokens {context - num_prompt} fits"
            )
        vocab_size = self.runner.decoder.shape.vocab_size
        for token_id in prompt_token_ids:
            if not 0 <= token_id < vocab_size:
                raise RequestError(f"token id {token_id} is outside the vocabulary of {vocab_size}")
