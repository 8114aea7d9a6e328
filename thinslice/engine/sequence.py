"""Sequence: one prompt on its way to a completion."""

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Optional

from thinslice.config import DEFAULT_SCHEDULING, SamplingParams, Scheduling
from thinslice.engine.draws import Draws
from thinslice.engine.grammar import Grammar
from thinslice.engine.logprobs import Logprobs
from thinslice.engine.processors import LogitsProcessor, processors_for
from thinslice.errors import RequestError


class Status(Enum):
    """The state of a sequence."""

    WAITING = auto()
    RUNNING = auto()
    FINISHED = auto()


@dataclass(frozen=True)
class StepOutput:
    """What a step brought a sequence: its new tokens, or its end, or both.

    Attributes:
        finish_reason: set on a sequence's last output, None before.
    """

    sequence: "Sequence"
    token_ids: tuple[int, ...]
    finish_reason: str | None


OnOutput = Callable[[StepOutput], None]


@dataclass(frozen=True)
class Scored:
    """What is asked of a sequence that is scored and not gone on with.

    Attributes:
        start: position from which on the log-probabilities of its tokens are wanted.
        num_top: likeliest tokens that are told beside each.
    """

    start: int
    num_top: int


@dataclass(eq=False)
class Sequence:
    """The state of one request.

    Attributes:
        max_positions: the most positions it can come to hold: prompt plus longest completion.
        num_computed: tokens whose K and V are in the cache.
        num_held: the last of those, whose K and V of a prediction layer are not in it yet.
        blocks: its block table.
        finish_reason: ``stop``, ``length``, ``scored``, ``abort``, ``deadline`` or ``error`` once
            finished.
        error: what went wrong where the reason is ``error``.
        draft_token_ids: guesses at the tokens behind the last one, to be run with it.
        logprobs: of each token of the completion, where they are asked for; of a sequence that is
            scored, of its own tokens so far.
        digests: of the empty prefix, then of each full block; grows as blocks are looked up.
        num_cached: tokens found in the prefix cache when it was first admitted.
        num_preemptions: how often it lost its blocks to another.
        num_drafted, num_accepted: drafts that were run, and those of them that stood.
        leader: the sequence of the same prompt that computes it for this one.
        arrived_at, first_token_at, last_token_at: on the engine's clock.
        scored: None where a completion is asked for.
        grammar: of the completion; None where its form is free.
        processors: what changes its logits before each token is chosen.
        on_output: called with each of its outputs, in the thread that runs steps.
    """

    seq_id: int
    prompt_token_ids: list[int]
    params: SamplingParams
    max_positions: int
    draws: Draws
    completion_token_ids: list[int] = field(default_factory=list)
    status: Status = Status.WAITING
    num_computed: int = 0
    num_held: int = 0
    blocks: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    error: Exception | None = None
    draft_token_ids: list[int] = field(default_factory=list)
    logprobs: Logprobs = field(default_factory=Logprobs)
    digests: list[bytes] = field(default_factory=list)
    num_cached: int = 0
    num_preemptions: int = 0
    num_drafted: int = 0
    num_accepted: int = 0
    leader: Optional["Sequence"] = None
    arrived_at: float = 0.0
    first_token_at: float | None = None
    last_token_at: float = 0.0
    on_output: OnOutput | None = None
    scheduling: Scheduling = DEFAULT_SCHEDULING
    scored: Scored | None = None
    grammar: Grammar | None = None
    processors: tuple[LogitsProcessor, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.processors = processors_for(self.params)
        if self.grammar is not None:
            # Last: no bias makes a token possible that it does not allow.
            self.processors += (self.grammar.follower(),)

    @property
    def num_tokens(self) -> int:
        """Tokens of prompt and completion so far."""
        return len(self.prompt_token_ids) + len(self.completion_token_ids)

    @property
    def num_uncomputed(self) -> int:
        """Tokens still to run through the model before the next one can be sampled, or all are
        scored; nothing is asked about what comes behind the last of those."""
        return self.num_tokens - self.num_computed - (self.scored is not None)

    @property
    def next_row(self) -> int:
        """The first position whose logits are still wanted."""
        if self.scored is None:
            return self.num_tokens - 1
        return self.scored.start - 1 + len(self.logprobs)

    @property
    def num_settled(self) -> int:
        """Tokens whose K and V are all in the cache; full blocks of them may be shared."""
        return self.num_computed - self.num_held

    @property
    def order(self) -> tuple[int, int]:
        """Sequences are served in this order: by priority, then first come."""
        return (self.scheduling.priority, self.seq_id)

    @property
    def deadline(self) -> float:
        """When it ends at the latest, on the engine's clock."""
        return self.scheduling.deadline_from(self.arrived_at)

    @property
    def waits_for_leader(self) -> bool:
        """Whether another sequence is still to compute the prompt that both have."""
        leader = self.leader
        if leader is None or leader.status is Status.FINISHED:
            return False
        return not leader.completion_token_ids

    def scores(self) -> Logprobs:
        """What came of a text that was scored.

        Errors: whatever went wrong with it; RequestError where somebody else ended it.
        """
        if self.error is not None:
            raise self.error
        if self.finish_reason != "scored":
            raise RequestError(f"scoring was ended: {self.finish_reason}")
        return self.logprobs

    def tokens(self, start: int, stop: int) -> list[int]:
        """Token ids of positions ``[start, stop)``; drafts follow the completion."""
        num_prompt = len(self.prompt_token_ids)
        if stop <= num_prompt:
            return self.prompt_token_ids[start:stop]
        if start >= num_prompt and not self.draft_token_ids:
            return self.completion_token_ids[start - num_prompt : stop - num_prompt]
        behind = self.completion_token_ids + self.draft_token_ids
        if start >= num_prompt:
            return behind[start - num_prompt : stop - num_prompt]
        return self.prompt_token_ids[start:] + behind[: stop - num_prompt]
