"""Operations on an engine: whose turn it is to change it, and what undoes a change that is
interrupted.

One thread at a time has the turn, and nobody once Python ends. An interrupt, or memory that runs
out, may come at any line. So an operation notes how things stand before it changes anything, and
takes the note away when all is changed, each in one assignment. Where the note is still there, the
operation was interrupted and is undone. Undoing may be interrupted too: it does the same however
often it is begun.
"""

import os
import threading
import weakref
from collections.abc import Callable, Iterable, Sized
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from thinslice.engine.drafting import Drafting
from thinslice.engine.draws import State
from thinslice.engine.scheduler import Scheduler
from thinslice.engine.sequence import Sequence, Status
from thinslice.errors import BusyError
from thinslice.forks import fork_safe, is_mine


class Turn:
    """A lock that outlives a fork and ends with the interpreter.

    It is held while the engine is changed; the thread that holds it may take it again.

    When the interpreter ends, every thread that then asks for the lock of Python's is ended where
    it is. In the middle of a compiled call that aborts the process. So ``keep`` waits at exit for
    the step that is running, and whoever wants to run another one waits for its turn for good.
    """

    def __init__(self) -> None:
        self.lock = fork_safe(threading.RLock())

    def keep(self) -> None:
        """Take the last turn, for good."""
        self.lock.acquire()

    @property
    def is_mine(self) -> bool:
        """Whether this thread holds the lock."""
        return is_mine(self.lock)


class Operation:
    """What is done within, by the thread whose turn it is, is done as a whole or undone: at its
    end, or before the next one where its end is interrupted as well.

    Args:
        settle: undoes what was interrupted, and does what was put off.
        put_off: what is to be done by that.

    """

    def __init__(self, turn: Turn, settle: Callable[[], None], put_off: Sized) -> None:
        self._turn = turn
        self._settle: Any = weakref.WeakMethod(settle)
        self._put_off = put_off
        self._pid: int | None = None  # of the process that is within

    @property
    def is_running(self) -> bool:
        """Whether the thread whose turn it is, is within. Not in a child that was forked then."""
        return self._pid == os.getpid()

    @property
    def is_mine(self) -> bool:
        """Whether this thread is within already: who asks is a signal handler then, the finaliser
        of an object that was let go of in the middle of it, or a callback."""
        return self.is_running and self._turn.is_mine

    def check_entry(self) -> None:
        """Errors: BusyError where this thread is within."""
        if self.is_mine:
            raise BusyError(
                "this thread is in the middle of the engine's work: a signal handler, a finaliser "
                "or a callback can abort requests, and nothing else"
            )

    def __enter__(self) -> None:
        self._settle_within()
        self._pid = os.getpid()

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._settle_within()
        while self._put_off:  # by a handler that came when it was done
            self._settle_within()

    def _settle_within(self) -> None:
        try:
            self._pid = os.getpid()
            settle = self._settle()
            if settle is None:  # the engine goes together with who lets go of a sequence
                self._put_off = ()
            else:
                settle()
        finally:
            self._pid = None


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
