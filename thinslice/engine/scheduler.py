"""Scheduler: which tokens of which sequences run in the next step."""

from collections import deque
from dataclasses import dataclass

from thinslice.engine.block_manager import BlockManager
from thinslice.engine.sequence import Sequence, Status
from thinslice.plan.memory_plan import MemoryPlan


@dataclass(frozen=True)
class ScheduledTokens:
    """The next ``count`` uncomputed tokens of one sequence."""

    sequence: Sequence
    count: int

    @property
    def is_sampled(self) -> bool:
        """Whether these are its last uncomputed tokens, so that a new one is sampled."""
        return self.count == self.sequence.num_uncomputed


class Scheduler:
    """First come, first served; generated tokens first, then prompt chunks in what room is left.

    A sequence is admitted once all blocks it may ever need are free, so none is ever preempted.
    """

    def __init__(self, plan: MemoryPlan) -> None:
        self.chunk = plan.chunk
        self.max_num_seqs = plan.max_num_seqs
        self.blocks = BlockManager(plan.num_kv_blocks, plan.block_size)
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    @property
    def has_work(self) -> bool:
        """Whether any sequence is unfinished."""
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        """Put a sequence at the end of the queue."""
        self.waiting.append(sequence)

    def schedule(self) -> list[ScheduledTokens]:
        """The next step's tokens, at most ``chunk`` in all."""
        self._admit()
        room = self.chunk
        scheduled: list[ScheduledTokens] = []
        for sequence in sorted(self.running, key=lambda s: s.num_uncomputed > 1):
            count = min(sequence.num_uncomputed, room)
            if count > 0:
                scheduled.append(ScheduledTokens(sequence, count))
                room -= count
        return scheduled

    def finish(self, sequence: Sequence, reason: str) -> None:
        """Take a sequence out, wherever it is, and free its blocks."""
        if sequence.status is Status.WAITING:
            self.waiting.remove(sequence)
        elif sequence.status is Status.RUNNING:
            self.running.remove(sequence)
            self.blocks.release(sequence.seq_id)
        sequence.status = Status.FINISHED
        sequence.finish_reason = reason

    def _admit(self) -> None:
        while self.waiting and len(self.running) < self.max_num_seqs:
            sequence = self.waiting[0]
            if not self.blocks.can_reserve(sequence.max_positions):
                return
            self.waiting.popleft()
            sequence.blocks = self.blocks.reserve(sequence.seq_id, sequence.max_positions)
            sequence.status = Status.RUNNING
            self.running.append(sequence)
