"""Measure a loaded model: random prompts of one length, all at once, with completions of one."""

import random
import time
from dataclasses import dataclass
from statistics import median

from thinslice.config import SamplingParams
from thinslice.engine.engine import Engine
from thinslice.engine.sequence import Sequence

_WARM_UP_TOKENS = 4


@dataclass(frozen=True)
class BenchmarkResult:
    """What was measured; docs/benchmarks.md says how.

    Attributes:
        prefill_s, decode_s: until the last sequence had its first token; from there to the end.
        prefill_tokens_per_s, decode_tokens_per_s: of all sequences together, in those two times.
        time_to_first_token_s, last_time_to_first_token_s: median and longest over the sequences.
        steps: batches run. Where weights are streamed, each is one sweep over them.
        tokens_per_sweep: completion tokens of all sequences for each step of the decoding.
        drafted_tokens, accepted_tokens: drafts that were run in the decoding, and those that stood.
        accepted_per_sweep: drafts accepted for each step of the decoding.
        streamed_bytes_per_sweep: read from disk for each step.
        slice_wait_share: of the time in the model, what went by waiting for slices.
        overhead_s: for each step, all that is not the model: scheduling, sampling, handing out.
        draft_s: for each step, what drafting takes.
        preemptions: times a sequence lost its KV blocks to another: the plan holds fewer at once.
    """

    prefill_s: float
    decode_s: float
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    time_to_first_token_s: float
    last_time_to_first_token_s: float
    steps: int
    tokens_per_sweep: float
    drafted_tokens: int
    accepted_tokens: int
    accepted_per_sweep: float
    streamed_bytes_per_sweep: float
    slice_wait_share: float
    overhead_s: float
    draft_s: float
    preemptions: int


def benchmark(
    engine: Engine, prompt_tokens: int, completion_tokens: int, sequences: int
) -> BenchmarkResult:
    """Run ``sequences`` different random prompts at once, greedily, each to its whole length.

    A short completion runs before, so that nothing is measured that happens only once.
    Errors: RequestError where prompt and completion exceed the context.
    """
    params = SamplingParams(temperature=0, max_tokens=completion_tokens, ignore_eos=True)
    rng = random.Random(0)
    vocab_size = engine.runner.decoder.shape.vocab_size
    prompts = [[rng.randrange(vocab_size) for _ in range(prompt_tokens)] for _ in range(sequences)]
    engine.check_request(prompts[0], params)
    _warm_up(engine)
    before = _Totals.of(engine)
    start = time.perf_counter()
    running = [engine.add_request(prompt, params) for prompt in prompts]
    while any(sequence.first_token_at is None for sequence in running):
        engine.step()
    prefilled_at, prefilled = time.perf_counter(), _Totals.of(engine)
    while engine.has_work:
        engine.step()
    done = _Totals.of(engine)
    decode_s = time.perf_counter() - prefilled_at
    whole, decode = done.since(before), done.since(prefilled)
    waits = _first_token_times(running)
    return BenchmarkResult(
        prefill_s=prefilled_at - start,
        decode_s=decode_s,
        prefill_tokens_per_s=prompt_tokens * sequences / (prefilled_at - start),
        decode_tokens_per_s=decode.tokens / decode_s if decode.tokens else 0.0,
        time_to_first_token_s=median(waits),
        last_time_to_first_token_s=max(waits),
        steps=whole.steps,
        tokens_per_sweep=decode.tokens / max(decode.steps, 1),
        drafted_tokens=decode.drafted,
        accepted_tokens=decode.accepted,
        accepted_per_sweep=decode.accepted / max(decode.steps, 1),
        streamed_bytes_per_sweep=whole.streamed_bytes / whole.steps,
        slice_wait_share=whole.wait_s / whole.run_s,
        overhead_s=whole.overhead_s / whole.steps,
        draft_s=whole.draft_s / whole.steps,
        preemptions=whole.preemptions,
    )


def _warm_up(engine: Engine) -> None:
    params = SamplingParams(temperature=0, max_tokens=_WARM_UP_TOKENS, ignore_eos=True)
    engine.add_request([0], params)
    while engine.has_work:
        engine.step()


def _first_token_times(sequences: list[Sequence]) -> list[float]:
    return [s.first_token_at - s.arrived_at for s in sequences if s.first_token_at is not None]


@dataclass(frozen=True)
class _Totals:
    """What an engine's metrics add up to at some time."""

    steps: int
    tokens: int
    drafted: int
    accepted: int
    preemptions: int
    streamed_bytes: int
    run_s: float
    wait_s: float
    overhead_s: float
    draft_s: float

    @classmethod
    def of(cls, engine: Engine) -> "_Totals":
        metrics = engine.metrics
        return cls(
            steps=metrics.steps,
            tokens=metrics.completion_tokens,
            drafted=metrics.drafted_tokens,
            accepted=metrics.accepted_tokens,
            preemptions=metrics.preemptions,
            streamed_bytes=metrics.streamed_bytes,
            run_s=metrics.run_s.total,
            wait_s=metrics.slice_wait_s.total,
            overhead_s=metrics.schedule_s.total + metrics.sample_s.total,
            draft_s=metrics.draft_s.total,
        )

    def since(self, earlier: "_Totals") -> "_Totals":
        return _Totals(
            steps=self.steps - earlier.steps,
            tokens=self.tokens - earlier.tokens,
            drafted=self.drafted - earlier.drafted,
            accepted=self.accepted - earlier.accepted,
            preemptions=self.preemptions - earlier.preemptions,
            streamed_bytes=self.streamed_bytes - earlier.streamed_bytes,
            run_s=self.run_s - earlier.run_s,
            wait_s=self.wait_s - earlier.wait_s,
            overhead_s=self.overhead_s - earlier.overhead_s,
            draft_s=self.draft_s - earlier.draft_s,
        )
