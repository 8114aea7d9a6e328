"""Metrics of an engine: counters, gauges and histograms as plain numbers.

Only the thread that runs steps writes them. Another thread that reads them sees each number whole,
and all of them perhaps in the middle of a step.
"""

from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass, field

from thinslice.engine.advance import Advance
from thinslice.engine.scheduler import Scheduler
from thinslice.engine.sequence import Sequence

# Seconds; powers of about the square root of ten, as a latency spreads over orders of magnitude.
_LATENCY_BOUNDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
_OVERHEAD_BOUNDS = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)


@dataclass
class Histogram:
    """How often a value lay in which range.

    Attributes:
        bounds: upper bounds, inclusive, of all ranges but the last, which has none.
        counts: one for each range.
        total: sum of all values.
    """

    bounds: tuple[float, ...]
    counts: list[int] = field(default_factory=list)
    total: float = 0.0

    def __post_init__(self) -> None:
        self.counts = self.counts or [0] * (len(self.bounds) + 1)

    def observe(self, value: float) -> None:
        """Count one value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    @property
    def count(self) -> int:
        """Values counted."""
        return sum(self.counts)

    @property
    def mean(self) -> float:
        """The average value; 0 where there is none."""
        return self.total / self.count if self.count else 0.0


def _latency() -> Histogram:
    return Histogram(_LATENCY_BOUNDS)


def _overhead() -> Histogram:
    return Histogram(_OVERHEAD_BOUNDS)


@dataclass
class Metrics:
    """What an engine has done, and how it stands after its last step.

    Attributes:
        num_waiting, num_running: sequences now.
        kv_blocks, kv_blocks_used, kv_blocks_cached: blocks in all; held by running sequences; with
            a prefix that can be found.
        kv_blocks_spilled: blocks in host memory, beside those.
        requests: sequences that ended, by their finish reason.
        prompt_tokens, completion_tokens: tokens in and out.
        prefix_hit_tokens: prompt tokens that were found in the prefix cache.
        preemptions: times a sequence lost its blocks to another.
        drafted_tokens, accepted_tokens: drafts that were run, and those of them that stood.
        steps: batches run.
        time_to_first_token_s: from arrival.
        time_per_token_s: of each finished sequence, between its first token and its last.
        schedule_s, run_s, sample_s, draft_s: parts of each step: choosing what runs; the model;
            from logits to tokens handed out; drafting for the next.
        sweep_s, slice_wait_s: where weights are streamed, of each step: the pass over the weights,
            and how much of it was waiting for slices.
        streamed_bytes: read from disk so far.
    """

    num_waiting: int = 0
    num_running: int = 0
    kv_blocks: int = 0
    kv_blocks_used: int = 0
    kv_blocks_cached: int = 0
    kv_blocks_spilled: int = 0
    requests: Counter[str] = field(default_factory=Counter)
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prefix_hit_tokens: int = 0
    preemptions: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    steps: int = 0
    time_to_first_token_s: Histogram = field(default_factory=_latency)
    time_per_token_s: Histogram = field(default_factory=_latency)
    schedule_s: Histogram = field(default_factory=_overhead)
    run_s: Histogram = field(default_factory=_latency)
    sample_s: Histogram = field(default_factory=_overhead)
    draft_s: Histogram = field(default_factory=_overhead)
    sweep_s: Histogram = field(default_factory=_latency)
    slice_wait_s: Histogram = field(default_factory=_latency)
    streamed_bytes: int = 0

    def count_advances(self, advances: list[Advance]) -> None:
        """Count what a step brought its sequences, once they have it."""
        for advance in advances:
            sequence, num_new = advance.tokens.sequence, len(advance.new_ids)
            if num_new > 0:
                self.completion_tokens += num_new
                self.drafted_tokens += advance.tokens.num_drafts
                self.accepted_tokens += advance.num_accepted
            first_at = sequence.first_token_at
            if first_at is not None and 0 < num_new == len(sequence.completion_token_ids):
                self.time_to_first_token_s.observe(first_at - sequence.arrived_at)
            if sequence.finish_reason is not None:
                self.count_end(sequence)

    def count_end(self, sequence: Sequence) -> None:
        """Count a sequence that has ended."""
        self.requests[str(sequence.finish_reason)] += 1
        num_tokens = len(sequence.completion_token_ids)
        if sequence.first_token_at is not None and num_tokens > 1:
            seconds = sequence.last_token_at - sequence.first_token_at
            self.time_per_token_s.observe(seconds / (num_tokens - 1))

    def look_at(self, scheduler: Scheduler) -> None:
        """Note how the engine stands."""
        self.num_waiting = len(scheduler.waiting)
        self.num_running = len(scheduler.running)
        self.kv_blocks_used = self.kv_blocks - scheduler.blocks.num_free
        self.kv_blocks_cached = scheduler.blocks.num_cached
        self.kv_blocks_spilled = scheduler.blocks.num_spilled
        self.prefix_hit_tokens = scheduler.num_prefix_hits
        self.preemptions = scheduler.num_preemptions
