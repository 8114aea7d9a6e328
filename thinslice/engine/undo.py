"""What puts an engine back where an operation on it is interrupted.

An interrupt, or memory that runs out, may come at any line. So an operation notes how things stand
before it changes anything, and takes the note away when all is changed, each in one assignment.
Where the note is still there, the operation was interrupted and is undone. Undoing may be
interrupted too: it does the same however often it is begun.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from thinslice.engine.drafting import Drafting
from thinslice.engine.draws import State
from thinslice.engine.scheduler import Scheduler
from thinslice.engine.sequence import Sequence, Status


@dataclass(frozen=True)
class _Before:
    """A running sequence before a step, as far as the step's end changes it.

    Attributes:
        draws_state: None where nothing is drawn.
    """

    sequence: Sequence
    draws_state: State | None
    num_completion: int
    num_logprobs: int
    num_digests: int
    counts: tuple[int, int]
    times: tuple[float | None, float]

    @classmethod
    def of(cls, sequence: Sequence) -> "_Before":
        is_drawn = not sequence.params.is_greedy
        return cls(
            sequence=sequence,
            draws_state=sequence.draws.state() if is_drawn else None,
            num_completion=len(sequence.completion_token_ids),
            num_logprobs=len(sequence.logprobs),
            num_digests=len(sequence.digests),
            counts=(sequence.num_drafted, sequence.num_accepted),
            times=(sequence.first_token_at, sequence.last_token_at),
        )

    def restore(self) -> None:
        sequence = self.sequence
        if self.draws_state is not None:
            sequence.draws.restore(self.draws_state)
        del sequence.completion_token_ids[self.num_completion :]
        sequence.logprobs.truncate(self.num_logprobs)
        del sequence.digests[self.num_digests :]
        sequence.num_drafted, sequence.num_accepted = self.counts
        sequence.first_token_at, sequence.last_token_at = self.times
        if sequence.status is Status.FINISHED:
            sequence.status = Status.RUNNING
        sequence.finish_reason = sequence.error = None


class Undo:
    """The note of one operation.

    Args:
        stepping: sequences that are to get their next tokens.
        changes_blocks: whether who holds which block, and who runs, may be half changed already.
            What cannot be told then is not kept: all sequences go back to wait without blocks, as
            if others had displaced them, and write the tokens that they would have written.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        stepping: Iterable[Sequence] = (),
        changes_blocks: bool = True,
    ) -> None:
        self._unfinished = [*scheduler.waiting, *scheduler.running]
        self._before = [_Before.of(sequence) for sequence in stepping]
        self.changes_blocks = changes_blocks

    def restore(self, scheduler: Scheduler, drafting: Drafting | None) -> None:
        """Undo the operation. A sequence that it was ending is ended none the less, unless its
        end came of the step that is undone."""
        for before in self._before:
            before.restore()
        if not self.changes_blocks:
            return
        scheduler.restart([s for s in self._unfinished if s.status is not Status.FINISHED])
        if drafting is not None:
            drafting.forget()
