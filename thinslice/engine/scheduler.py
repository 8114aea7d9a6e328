"""Scheduler: which tokens of which sequences run in the next step."""

from bisect import insort
from dataclasses import dataclass, field

from thinslice.config import Scheduling
from thinslice.engine.block_manager import BlockManager
from thinslice.engine.sequence import Sequence, Status
from thinslice.plan.memory_plan import MemoryPlan

# Entries of shares beyond which those that say nothing any more are looked for.
_FEWEST = 64


@dataclass(frozen=True)
class ScheduledTokens:
    """The next tokens of one sequence.

    Attributes:
        count: how many run, drafts included.
        num_drafts: the last of them, which are guesses.
        num_rows: how many of the last ones are sampled behind; 0 within a prompt, else one more
            than there are drafts.
        num_scored: how many of the last ones say how likely the token after them was.
    """

    sequence: Sequence
    count: int
    num_drafts: int = 0
    num_rows: int = 0
    num_scored: int = 0


@dataclass
class _Step:
    """One step in the making: what is scheduled, and for how many more tokens there is room."""

    room: int
    scheduled: dict[int, ScheduledTokens] = field(default_factory=dict)

    def add(self, tokens: ScheduledTokens) -> None:
        self.scheduled[tokens.sequence.seq_id] = tokens
        self.room -= tokens.count

    def remove(self, sequence: Sequence) -> None:
        tokens = self.scheduled.pop(sequence.seq_id, None)
        if tokens is not None:
            self.room += tokens.count


class Shares:
    """Gives sequences their turns, within each priority: where several tenants have some waiting,
    each has one admitted in turn.

    A tenant's next sequence comes a turn after its last one, and none comes before the turn that is
    being admitted: who was idle has saved up nothing. With one tenant alone it is first come first
    served. A sequence's turn is known when it arrives and never changes, so that all sequences have
    one order, by which they are admitted, served and displaced.

    Time: constant, but for a sweep when the entries have doubled. Memory: an entry for each tenant
    whose turns lie ahead.
    Source: start-time fair queueing (Goyal, Vin and Cheng, SIGCOMM 1996), with a cost of one for
    each sequence.
    """

    def __init__(self) -> None:
        self._last: dict[tuple[int, str], int] = {}
        self._now: dict[int, int] = {}
        self._sweep_at = _FEWEST

    def turn_of(self, scheduling: Scheduling) -> int:
        """The turn of a sequence that arrives."""
        place = (scheduling.priority, scheduling.tenant)
        turn = self._now.get(scheduling.priority, 0)
        if place in self._last:
            turn = max(turn, self._last[place] + 1)
        self._last[place] = turn
        if len(self._last) > self._sweep_at:
            self._sweep()
        return turn

    def note_admitted(self, scheduling: Scheduling, turn: int) -> None:
        """A sequence with this turn runs: none that arrives comes before it."""
        self._now[scheduling.priority] = max(self._now.get(scheduling.priority, 0), turn)

    def clear(self) -> None:
        """Nothing is left: turns begin anew."""
        self._last.clear()
        self._now.clear()
        self._sweep_at = _FEWEST

    def _sweep(self) -> None:
        """Forget tenants whose next turn would be the one that is admitted anyway."""
        now = self._now
        self._last = {
            place: turn for place, turn in self._last.items() if turn >= now.get(place[0], 0)
        }
        self._sweep_at = max(2 * len(self._last), _FEWEST)


class Scheduler:
    """Serves sequences by priority, then tenants in turn, and of each first come.

    Each step takes the next token of every running sequence, then prompt chunks in what room is
    left. Blocks are given as they are needed. Where none are left, the running sequence that is
    last in order gives up its own and waits; what is then not in the prefix cache any more, nor
    spilled, is computed again, and it goes on as if nothing had been. The first in order never
    gives way, and any sequence alone fits, so there is always one that moves on.

    A sequence is admitted when all its tokens fit beside what the running ones already need; to
    make room, it displaces running ones of a higher priority value.

    Attributes:
        capacity: the most positions a sequence may come to hold; who adds one sees to that.
        num_preemptions: sequences sent back so far.
        num_prefix_hits: tokens found in the prefix cache so far, when sequences first came in.
    """

    def __init__(self, plan: MemoryPlan) -> None:
        self.chunk = plan.chunk
        self.max_num_seqs = plan.max_num_seqs
        num_host_blocks = 0 if plan.device is None else plan.device.num_spilled_blocks
        self.blocks = BlockManager(
            plan.num_kv_blocks, plan.block_size, plan.num_mtp_layers, num_host_blocks
        )
        self.capacity = min(plan.context, plan.num_kv_blocks * plan.block_size)
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self.num_prefix_hits = 0
        self._shares = Shares()

    @property
    def has_work(self) -> bool:
        """Whether any sequence is unfinished."""
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        """Put a sequence in the queue, at the place that its order gives it."""
        assert sequence.max_positions <= self.capacity, "a sequence that can never fit"
        if not self.has_work:
            self._shares.clear()
        sequence.turn = self._shares.turn_of(sequence.scheduling)
        insort(self.waiting, sequence, key=_order)

    def schedule(self, now: float = 0.0) -> list[ScheduledTokens]:
        """The next step's tokens, at most ``chunk`` in all.

        Args:
            now: the time, which sequences that are admitted first are marked with.
        """
        step = _Step(self.chunk)
        ready = [s for s in self.running if s.num_uncomputed == 1]
        prefills = [s for s in self.running if s.num_uncomputed > 1]
        in_order = [*sorted(ready, key=_order), *sorted(prefills, key=_order)]
        for place, sequence in enumerate(in_order):
            # Drafts leave room for the tokens of those that come after.
            others = max(len(ready) - place - 1, 0)
            if sequence.status is Status.RUNNING:
                self._schedule(sequence, step, others)
        self._admit(step, now)
        return list(step.scheduled.values())

    def expired(self, now: float) -> list[Sequence]:
        """Unfinished sequences past their deadline."""
        return [s for s in (*self.running, *self.waiting) if s.deadline <= now]

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it is, and free its blocks."""
        status, sequence.status = sequence.status, Status.FINISHED
        if status is Status.WAITING:
            self.waiting.remove(sequence)
        elif status is Status.RUNNING:
            self.running.remove(sequence)
            self.blocks.release(sequence)

    def restart(self, sequences: list[Sequence]) -> None:
        """Begin again with these sequences, all of them waiting, and nothing in the blocks."""
        self.blocks.reset()
        self.running = []
        self.waiting = sorted(sequences, key=_order)
        for sequence in sequences:
            sequence.blocks = []
            self._send_back(sequence)

    def _schedule(self, sequence: Sequence, step: _Step, others: int = 0) -> None:
        """Give a running sequence its next tokens, with blocks for them.

        Args:
            others: tokens that drafts leave room for.
        """
        count = min(sequence.num_uncomputed, step.room)
        if count == 0:
            return
        stop = sequence.num_computed + count
        while not self.blocks.grow(sequence, stop):
            victim = max(self.running, key=_order)
            self._preempt(victim, step)
            if victim is sequence:
                return
        if sequence.scored is not None:
            num_scored = max(stop - sequence.next_row, 0)
            step.add(ScheduledTokens(sequence, count, num_scored=num_scored))
        elif count < sequence.num_uncomputed:
            step.add(ScheduledTokens(sequence, count))
        else:
            num_drafts = self._fit_drafts(sequence, step.room - count - others)
            step.add(ScheduledTokens(sequence, count + num_drafts, num_drafts, 1 + num_drafts))

    def _fit_drafts(self, sequence: Sequence, room: int) -> int:
        """Cut the drafts to what fits, without taking anybody's blocks, and say how many remain.

        All of them accepted and one token more must not exceed the longest completion.
        """
        drafts, num_tokens = sequence.draft_token_ids, sequence.num_tokens
        most = max(min(len(drafts), room, sequence.max_positions - num_tokens - 1), 0)
        if not self.blocks.grow(sequence, num_tokens + most):
            most = len(sequence.blocks) * self.blocks.block_size - num_tokens
        del drafts[most:]
        return most

    def _admit(self, step: _Step, now: float) -> None:
        """Let waiting sequences in, in order, until one has to go on waiting."""
        for sequence in [*self.waiting]:
            if step.room == 0:
                return
            if sequence.waits_for_leader:
                continue
            if not self._fits(sequence) and not self._displace_for(sequence, step):
                return
            self.waiting.remove(sequence)
            self._shares.note_admitted(sequence.scheduling, sequence.turn)
            self.blocks.take_prefix(sequence)
            if sequence.num_preemptions == 0:
                sequence.num_cached = sequence.num_computed
                self.num_prefix_hits += sequence.num_cached
                sequence.admitted_at = now
            sequence.status = Status.RUNNING
            self.running.append(sequence)
            self._schedule(sequence, step)

    def _fits(self, sequence: Sequence) -> bool:
        if len(self.running) >= min(self.max_num_seqs, self.chunk):
            return False
        room = self.blocks.num_free - self._num_needed(self.running)
        return self.blocks.num_taken_by(sequence) <= room

    def _num_needed(self, sequences: list[Sequence]) -> int:
        """Blocks that running sequences still need for their prompts, and soon for what follows."""
        return sum(max(self._soon(sequence) - len(sequence.blocks), 0) for sequence in sequences)

    def _soon(self, sequence: Sequence) -> int:
        """Blocks that a sequence will hold soon: one more than now, unless it never comes to it."""
        most = self.blocks.blocks_for(sequence.max_positions)
        return min(self.blocks.blocks_for(sequence.num_tokens) + 1, most)

    def _displace_for(self, sequence: Sequence, step: _Step) -> bool:
        """Preempt sequences of a higher priority value, the last in order first, if that helps."""
        priority = sequence.scheduling.priority
        others = [s for s in self.running if s.scheduling.priority <= priority]
        victims = [s for s in self.running if s.scheduling.priority > priority]
        free = self.blocks.num_free + sum(self.blocks.num_alone(victim) for victim in victims)
        if not victims or self.blocks.num_taken_by(sequence) > free - self._num_needed(others):
            return False
        for victim in sorted(victims, key=_order, reverse=True):
            self._preempt(victim, step)
            if self._fits(sequence):
                return True
        return False  # what it shared with them was counted as held

    def _preempt(self, sequence: Sequence, step: _Step) -> None:
        """Send a running sequence back to wait, without its blocks but with all its tokens."""
        step.remove(sequence)
        self.running.remove(sequence)
        self.blocks.release(sequence)
        self._send_back(sequence)
        insort(self.waiting, sequence, key=_order)

    def _send_back(self, sequence: Sequence) -> None:
        """Make a sequence that has no blocks any more one that waits."""
        sequence.num_computed = sequence.num_held = 0
        sequence.draft_token_ids.clear()
        if sequence.status is Status.RUNNING:
            sequence.status = Status.WAITING
            sequence.num_preemptions += 1
            self.num_preemptions += 1


def _order(sequence: Sequence) -> tuple[int, int, int]:
    return sequence.order
