"""ScoredRequest: a text that is scored, followed to its end as a Request follows a completion."""

from thinslice.engine.engine import Engine
from thinslice.engine.logprobs import Logprobs
from thinslice.engine.request import Completion, Delta
from thinslice.engine.sequence import Sequence, Status


class ScoredRequest:
    """Follows one sequence that is scored; it is aborted where nobody holds its request any more.

    Attributes:
        is_told: whether ``advance`` has given the end.
    """

    index = held_bytes = 0

    def __init__(self, engine: Engine, sequence: Sequence) -> None:
        self.engine = engine
        self.sequence = sequence
        self.is_told = False

    def __del__(self) -> None:
        sequence = getattr(self, "sequence", None)  # none where its making was interrupted
        if sequence is not None and sequence.status is not Status.FINISHED:
            self.engine.let_go(sequence)

    @property
    def has_news(self) -> bool:
        """Whether the sequence has ended, which ``advance`` has not told yet."""
        return self.sequence.status is Status.FINISHED and not self.is_told

    def advance(self) -> Delta:
        """The end, with all log-probabilities: they are not copied."""
        with self.engine.lock:
            self.is_told = True
            sequence = self.sequence
            return Delta(0, [], [], sequence.logprobs, sequence.finish_reason, sequence.error)

    def completion(self) -> Completion:
        """The text with its log-probabilities, and no token behind it."""
        sequence = self.sequence
        return Completion(
            text="",
            reasoning="",
            prompt_token_ids=sequence.prompt_token_ids,
            token_ids=[],
            finish_reason=sequence.finish_reason,
            seed=sequence.draws.seed,
            prefill_s=0.0,
            decode_s=0.0,
            num_cached=sequence.num_cached,
            logprobs=sequence.logprobs if self.is_told else Logprobs(),
            error=sequence.error,
        )
