"""Engine: sequences in, tokens out, one step at a time."""

import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import replace

from thinslice.config import SamplingParams, Scheduling
from thinslice.engine.advance import Advance, advance_all
from thinslice.engine.arguments import checked_params, checked_scheduling
from thinslice.engine.checks import TokenIds, check_prompt, checked_ids, checked_scored
from thinslice.engine.contained import Contained
from thinslice.engine.drafting import Drafting
from thinslice.engine.logprobs import Logprobs
from thinslice.engine.metrics import Metrics
from thinslice.engine.new_sequences import NewSequences
from thinslice.engine.operation import Operation, Turn, Undo
from thinslice.engine.processors import LogitsProcessor
from thinslice.engine.replace import replace_weights
from thinslice.engine.results import ResultsRoom
from thinslice.engine.runner import Runner
from thinslice.engine.scheduler import ScheduledTokens, Scheduler
from thinslice.engine.scoring import Scores
from thinslice.engine.sequence import OnOutput, Sequence, Status, StepOutput
from thinslice.errors import RequestError
from thinslice.kernels.arrays import Array, Floats
from thinslice.memory.ledger import Reservation
from thinslice.plan.memory_plan import MemoryPlan

CLOSED = "this model is closed; load it anew"


class Engine:
    """Continuous batching over the paged KV cache, inside one plan.

    Threads take turns. Whatever interrupts a step, at whatever line, the step is done as a whole or
    undone: all sequences go on as if nothing had been.

    Attributes:
        drafting: None where nothing is drafted.
        metrics: what was done so far.
        results: the room that the plan leaves to answers.
        clock: seconds; deadlines and timings are on it.
    """

    def __init__(
        self,
        runner: Runner,
        plan: MemoryPlan,
        eos_token_ids: frozenset[int],
        drafting: Drafting | None = None,
    ) -> None:
        self._runner: Runner | None = runner
        self.reservation: Reservation | None = None
        self.drafting = drafting
        self.plan = plan
        self.eos_token_ids = eos_token_ids
        self.scheduler = Scheduler(plan)
        self.metrics = Metrics(kv_blocks=plan.num_kv_blocks)
        self.results = ResultsRoom(plan)
        self.clock: Callable[[], float] = time.perf_counter
        self._new = NewSequences(self.scheduler.capacity, self.results)
        self._turn = Turn()
        weakref.finalize(self, self._turn.keep)
        self._undo: Undo | None = None
        self._dropped: deque[Sequence] = deque()
        self._operation = Operation(self._turn, self._settle, self._dropped)

    @property
    def runner(self) -> Runner:
        """What runs the model.

        Errors: RequestError once it is closed, and as ``Runner.check``.
        """
        if self._runner is None:
            raise RequestError(CLOSED)
        self._runner.check()
        return self._runner

    def close(self) -> None:
        """End all sequences with an error, and let weights, KV cache, threads and files go.

        A step that runs in another thread is waited for.
        """
        self._operation.check_entry()
        with self.lock, self._operation:
            if self._runner is None:
                return
            for sequence in [*self.scheduler.running, *self.scheduler.waiting]:
                self._end(sequence, "error", RequestError(CLOSED))
            self._runner.close()
            self._runner = self.drafting = None
            if self.reservation is not None:
                self.reservation.release()

    @property
    def lock(self) -> "threading.RLock":
        """Held by the thread that changes the engine; who holds it sees no step half done."""
        return self._turn.lock

    @property
    def has_work(self) -> bool:
        """Whether any sequence is unfinished."""
        if self._undo is not None and not self._operation.is_mine:
            with self.lock, self._operation:
                pass
        return self.scheduler.has_work

    def add_request(
        self,
        prompt_token_ids: TokenIds,
        params: SamplingParams,
        on_output: OnOutput | None = None,
        scheduling: Scheduling | None = None,
    ) -> Sequence:
        """Queue a prompt for one completion.

        Args:
            prompt_token_ids: a list or an array of ints.
            on_output: called with each of the sequence's outputs. An exception in it ends this
                sequence alone, with the reason ``error``.

        Errors: RequestError as ``check_request``, and for params that ask for several.
        """
        if checked_params(params).n != 1:
            raise RequestError(f"n is {params.n}; this gives one completion, generate several")
        return self.add_samples(prompt_token_ids, params, on_output, scheduling)[0]

    def add_samples(
        self,
        prompt_token_ids: TokenIds,
        params: SamplingParams,
        on_output: OnOutput | None = None,
        scheduling: Scheduling | None = None,
        processors: Callable[[], tuple[LogitsProcessor, ...]] = tuple,
    ) -> list[Sequence]:
        """Queue a prompt for ``params.n`` completions, which share its blocks.

        The first computes the prompt. The others wait for it, take its full blocks from the prefix
        cache, and compute only what stands in the last one.

        Args:
            processors: makes further ones for each completion, behind those of the params.

        Errors: RequestError as ``check_request``; what ``processors`` raises.
        """
        sequences = self.new_samples(prompt_token_ids, params, scheduling, processors)
        self.add(sequences, on_output)
        return sequences

    def new_samples(
        self,
        prompt_token_ids: TokenIds,
        params: SamplingParams,
        scheduling: Scheduling | None = None,
        processors: Callable[[], tuple[LogitsProcessor, ...]] = tuple,
    ) -> list[Sequence]:
        """The sequences of ``add_samples``, for ``add``. Safe in any thread. Errors: the same."""
        ids, params = checked_ids(prompt_token_ids), checked_params(params)
        self.check_request(ids, params)
        sequences = self._new.samples(ids, params, checked_scheduling(scheduling), processors)
        return self._arrived(sequences)

    def add(self, sequences: list[Sequence], on_output: OnOutput | None = None) -> None:
        """Queue sequences of one prompt that were made for this engine."""
        self._operation.check_entry()
        with self.lock, self._operation:
            self._undo = Undo(self.scheduler)
            for sequence in sequences:
                sequence.on_output = on_output
                self.scheduler.add(sequence)
            self.metrics.prompt_tokens += len(sequences[0].prompt_token_ids)
            self._undo = None

    def score(
        self,
        token_ids: TokenIds,
        start: int = 1,
        num_top: int = 0,
        scheduling: Scheduling | None = None,
    ) -> Logprobs:
        """How likely the model finds each token of a text, after those before it.

        Other sequences run on in the same steps.

        Args:
            token_ids: a list or an array of ints.
            start: the position of the first token that is scored; nothing precedes that at 0.
            num_top: likeliest tokens told beside each.

        Returns one for each token from ``start`` on, the numbers of TokenLogprobs' ``logprob`` and
        ``top``; nothing was drawn.
        Time: one pass over the tokens, but for those before ``start`` that the prefix cache has.
        Errors: RequestError as ``add_scored``, and where the sequence was ended by somebody else;
        CheckpointError for logits that are not numbers.
        """
        sequence = self.add_scored(token_ids, start, num_top, scheduling=scheduling)
        try:
            while sequence.status is not Status.FINISHED:
                self.step()
        finally:
            self.abort(sequence)
        return sequence.scores()

    def add_scored(
        self,
        token_ids: TokenIds,
        start: int = 1,
        num_top: int = 0,
        on_output: OnOutput | None = None,
        scheduling: Scheduling | None = None,
    ) -> Sequence:
        """Queue a text to be scored, as ``score``; the sequence ends with the reason ``scored``.

        Errors: RequestError for a text that is empty or longer than the context, an id outside the
        vocabulary, or a start that leaves no token; BusyError where the plan has no room for what
        is to be told.
        """
        sequence = self.new_scored(token_ids, start, num_top, scheduling)
        self.add([sequence], on_output)
        return sequence

    def new_scored(
        self,
        token_ids: TokenIds,
        start: int = 1,
        num_top: int = 0,
        scheduling: Scheduling | None = None,
    ) -> Sequence:
        """The sequence of ``add_scored``, for ``add``. Safe in any thread. Errors: the same."""
        ids, scheduling = checked_ids(token_ids), checked_scheduling(scheduling)
        vocab_size = self.runner.decoder.shape.vocab_size
        asked = checked_scored(ids, start, num_top, self.scheduler.capacity, vocab_size)
        return self._arrived([self._new.scored(ids, asked, scheduling)])[0]

    def _arrived(self, sequences: list[Sequence]) -> list[Sequence]:
        now = self.clock()
        for sequence in sequences:
            sequence.arrived_at = now
        return sequences

    def check_request(self, prompt_token_ids: list[int], params: SamplingParams) -> None:
        """Refuse what can never be served; reads nothing that a step changes.

        Errors: RequestError for an empty prompt, an id outside the vocabulary, or a prompt and
        completion longer than the context; nothing is ever cut.
        """
        vocab_size = self.runner.decoder.shape.vocab_size
        check_prompt(prompt_token_ids, params, self.scheduler.capacity, vocab_size)

    def step(self) -> list[StepOutput]:
        """Run one batch, sample behind each sequence whose tokens are all through, and draft.

        Each sequence is afterwards either a step further or, where this raises, as it was.
        Sequences past their deadline are ended instead, if there are any.
        Errors: RequestError once the model is closed.
        """
        self._operation.check_entry()
        with self.lock, self._operation:
            runner, expired = self.runner, self.scheduler.expired(self.clock())
            if expired:
                return [self._expire(sequence) for sequence in expired]
            return self._step(runner) if self.scheduler.has_work else []

    def replace_weights(self, tensors: Mapping[str, object]) -> None:
        """Put other numbers in the place of weights; see engine/replace.py."""
        self._operation.check_entry()
        with self.lock, self._operation:
            if self._runner is None:
                raise RequestError(CLOSED)
            replace_weights(self._runner, self.scheduler, tensors)

    def abort(self, sequence: Sequence) -> None:
        """End a sequence now and free its blocks; a finished one is left as it is.

        In the middle of the engine's work, as in a signal handler, it ends behind that.
        """
        if self._operation.is_mine:
            self._dropped.append(sequence)
            return
        with self.lock, self._operation:
            if sequence.status is not Status.FINISHED:
                self._end(sequence, "abort")

    def end(self, sequence: Sequence, reason: str, error: Exception | None = None) -> None:
        """End a sequence, for a reason that holds also where it had ended for another already."""
        self._operation.check_entry()
        with self.lock, self._operation:
            self._end(sequence, reason, error)

    def let_go(self, sequence: Sequence) -> None:
        """Abort a sequence that nobody reads any more.

        Safe in any thread, also where the engine is at work: the sequence then ends behind that.
        """
        self._dropped.append(sequence)
        lock = self.lock
        if self._operation.is_running or not lock.acquire(blocking=False):
            return
        try:
            with self._operation:
                pass
        finally:
            lock.release()

    def _step(self, runner: Runner) -> list[StepOutput]:
        start = time.perf_counter()
        scheduled = self._schedule()
        scheduled_at = time.perf_counter()
        runner.move_blocks(self.scheduler.blocks.moves)
        scores = None
        if any(tokens.num_scored for tokens in scheduled):
            scores = Scores(scheduled, runner.decoder.shape.vocab_size, self.plan.max_num_seqs)
        logits_RV, hidden_TD = self._run(runner, scheduled, scores)
        ran_at = time.perf_counter()
        sampled = [one.sequence for one in scheduled if one.num_rows or one.num_scored]
        self._undo = undo = Undo(self.scheduler, sampled, changes_blocks=False)
        advances = advance_all(scheduled, logits_RV, self.eos_token_ids, scores)
        del logits_RV
        sampled_at = time.perf_counter()
        drafts = self._draft(advances, hidden_TD, sampled_at - scheduled_at)
        drafted_at = time.perf_counter()
        undo.changes_blocks = True
        outputs = self._commit(advances, drafts)
        self._undo = None  # From here on the step holds, whatever comes.
        self.metrics.count_advances(advances)
        outputs = [self._hand_out(output) for output in outputs]
        self.metrics.steps += 1
        self.metrics.schedule_s.observe(scheduled_at - start)
        self.metrics.run_s.observe(ran_at - scheduled_at)
        self.metrics.draft_s.observe(drafted_at - sampled_at)
        self.metrics.sample_s.observe(time.perf_counter() - drafted_at + sampled_at - ran_at)
        return outputs

    def _schedule(self) -> list[ScheduledTokens]:
        self._undo = Undo(self.scheduler)
        scheduled = self.scheduler.schedule(self.clock())
        self._undo = None
        assert scheduled, "work is left and nothing is scheduled"
        return scheduled

    def _run(
        self, runner: Runner, scheduled: list[ScheduledTokens], scores: Scores | None
    ) -> tuple[Floats, Array | None]:
        """The model's pass over one batch: logits, and the residual stream where it is needed
        again. With the sweep's metrics where weights are streamed."""
        source = runner.weights.source
        if self.plan.streaming is None:
            logits_RV, hidden_TD = runner.run(scheduled, scores)
            return logits_RV, hidden_TD if self.plan.num_mtp_layers else None
        start, before = time.perf_counter(), source.read_stats()
        logits_RV, hidden_TD = runner.run(scheduled, scores)
        after = source.read_stats()
        self.metrics.sweep_s.observe(time.perf_counter() - start)
        self.metrics.slice_wait_s.observe(after.wait_s - before.wait_s)
        self.metrics.streamed_bytes = after.num_bytes
        return logits_RV, hidden_TD if self.plan.num_mtp_layers else None

    def _draft(
        self, advances: list[Advance], hidden_TD: Array | None, seconds: float
    ) -> list[list[int]]:
        """Guesses for the next step, after learning from those of this one."""
        if self.drafting is None:
            return [[] for _ in advances]
        self.drafting.record(advances, seconds)
        return self.drafting.propose(advances, hidden_TD, self.scheduler.running)

    def _commit(self, advances: list[Advance], drafts: list[list[int]]) -> list[StepOutput]:
        """Note what was computed, append what was sampled, end what has ended."""
        outputs: list[StepOutput] = []
        if self.drafting is not None:
            self.drafting.commit()
        for advance, draft in zip(advances, drafts, strict=True):
            sequence = advance.tokens.sequence
            if advance.error is not None:
                self._take_out(sequence, "error", advance.error)
                outputs.append(StepOutput(sequence, (), "error"))
                continue
            num_before, num_certain = sequence.num_settled, advance.num_certain
            sequence.logprobs.extend(advance.logprobs)
            if advance.new_ids:
                self._append(advance)
                sequence.draft_token_ids = draft
            # Rejected drafts do not count: their positions are written again.
            sequence.num_computed += num_certain
            sequence.num_held = 0 if self.drafting is None else self.drafting.num_held(sequence)
            self.scheduler.blocks.cache_computed(sequence, num_before)
            if advance.finish_reason is not None:
                self._take_out(sequence, advance.finish_reason)
            if advance.new_ids or advance.finish_reason is not None:
                outputs.append(StepOutput(sequence, advance.new_ids, advance.finish_reason))
        return outputs

    def _append(self, advance: Advance) -> None:
        """Append the new tokens of a sequence."""
        now, sequence = self.clock(), advance.tokens.sequence
        sequence.completion_token_ids += advance.new_ids
        sequence.num_drafted += advance.tokens.num_drafts
        sequence.num_accepted += advance.num_accepted
        sequence.last_token_at = now
        if sequence.first_token_at is None:
            sequence.first_token_at = now

    def _end(self, sequence: Sequence, reason: str, error: Exception | None = None) -> None:
        """The end of a sequence that does not come of a step."""
        earlier = sequence.finish_reason
        self._undo = Undo(self.scheduler)
        self._take_out(sequence, reason, error)
        self._undo = None
        if earlier is None:
            self.metrics.count_end(sequence)
        elif earlier != reason:
            self.metrics.requests[earlier] -= 1
            self.metrics.requests[reason] += 1

    def _take_out(self, sequence: Sequence, reason: str, error: Exception | None = None) -> None:
        """The one place where a sequence ends. Whoever comes here has an ``Undo``."""
        sequence.finish_reason, sequence.error = reason, error
        self.scheduler.remove(sequence)

    def _expire(self, sequence: Sequence) -> StepOutput:
        self._end(sequence, "deadline")
        return self._hand_out(StepOutput(sequence, (), "deadline"))

    def _hand_out(self, output: StepOutput) -> StepOutput:
        """Call back whoever wants this output; what goes wrong there ends the sequence."""
        sequence = output.sequence
        if sequence.on_output is None:
            return output
        with Contained() as trouble:
            sequence.on_output(output)
        if trouble.error is None:
            return output
        self._end(sequence, "error", trouble.error)
        return replace(output, finish_reason="error")

    def _settle(self) -> None:
        """Undo what was interrupted, and end what nobody reads any more."""
        if self._undo is not None:
            self._undo.restore(self.scheduler, self.drafting)
            self._undo = None
        while self._dropped:
            if self._dropped[0].status is not Status.FINISHED:
                self._end(self._dropped[0], "abort")
            self._dropped.popleft()
        self.metrics.look_at(self.scheduler)
