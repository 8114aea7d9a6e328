"""One measurement of the engine for benchmarks/engine.py, in a process of its own; prints JSON.

    python benchmarks/run_engine.py drafting smollm2 --draft ngram
    python benchmarks/run_engine.py load smollm2

What is generated is told by a digest of its token ids, so that two runs can be held against each
other.
"""

import argparse
import asyncio
import hashlib
import json
import random
import statistics
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from load import Request, Served, read_requests, summary

from thinslice import LLM, SamplingParams
from thinslice.engine.async_engine import AsyncEngine
from thinslice.engine.sequence import Sequence
from thinslice.errors import ThinsliceError

ROUNDS = 3
NUM_LOAD_SEQUENCES, LOAD_CONTEXT = 16, 768
NUM_SHARING, SHARED_TOKENS, OWN_TOKENS = 100, 1000, 24
OVERHEAD_SEQUENCES, OVERHEAD_TOKENS = 16, 64
GREEDY = SamplingParams(temperature=0)
CODE = """def mean(values):
    total = 0.0
    for value in values:
        total += value
    return total / len(values)

def variance(values):
    center = mean(values)
    total = 0.0
    for value in values:
        total += (value - center) ** 2
    return total / len(values)

def correlation(first, second):
    center_first, center_second = mean(first), mean(second)
    total = 0.0
    for one, other in zip(first, second):
        total += (one - center_first) * (other - center_second)
    return total / len(first) / (variance(first) * variance(second)) ** 0.5
"""
REPEAT = f"""Here is a file:

```python
{CODE}```

The same file once more, where `values` is called `numbers`:

```python
def mean(numbers):
"""


@dataclass(frozen=True)
class Generated:
    """Texts generated one after the other."""

    seconds_per_token: float
    token_ids: list[list[int]]


def generate(llm: LLM, prompts: list[list[int]], params: SamplingParams) -> Generated:
    """One prompt after the other; seconds of all tokens after each first one."""
    seconds, count, token_ids = 0.0, 0, []
    for prompt in prompts:
        sequence = llm.engine.add_request(prompt, params)
        run(llm)
        assert sequence.first_token_at is not None
        seconds += sequence.last_token_at - sequence.first_token_at
        count += len(sequence.completion_token_ids) - 1
        token_ids.append(sequence.completion_token_ids)
    return Generated(seconds / count, token_ids)


def run(llm: LLM) -> None:
    """Until nothing is left."""
    while llm.engine.has_work:
        llm.engine.step()


def digest_of(token_ids: list[list[int]]) -> str:
    return hashlib.sha256(json.dumps(token_ids).encode()).hexdigest()[:16]


def drafting(options: argparse.Namespace) -> dict[str, Any]:
    """Decode alone: the small model's own tasks, or a file that is repeated with one change."""
    llm = load(options, max_num_seqs=1, context=options.context)
    if options.prompts is None:
        prompts, max_tokens = [llm.prepare(REPEAT).token_ids], options.new_tokens
    else:
        prompts = [llm.prepare(text).token_ids for text in json.loads(options.prompts.read_text())]
        max_tokens = 128
    params = replace(GREEDY, max_tokens=max_tokens)
    done = [generate(llm, prompts, params) for _ in range(options.passes)]
    metrics = llm.engine.metrics
    return {
        "seconds_per_token": min(one.seconds_per_token for one in done),
        "tokens": digest_of(done[0].token_ids),
        "num_tokens": sum(map(len, done[0].token_ids)),
        "drafted": metrics.drafted_tokens,
        "accepted": metrics.accepted_tokens,
        "steps": metrics.steps,
        "plan": llm.plan.summary(),
        "drafting": llm.plan.describe_drafting(),
    }


def batch(options: argparse.Namespace) -> dict[str, Any]:
    """Tokens a second of several sequences together, none of which drafts."""
    llm = load(options, max_num_seqs=options.sequences, context=options.context)
    draw = random.Random(0)
    prompts = [random_prompt(llm, draw, 16) for _ in range(options.sequences)]
    params = replace(GREEDY, max_tokens=options.new_tokens, ignore_eos=True)
    sequences = [llm.engine.add_request(prompt, params) for prompt in prompts]
    run(llm)
    first = max(first_token_at(one) for one in sequences)
    last = max(one.last_token_at for one in sequences)
    count = sum(len(one.completion_token_ids) - 1 for one in sequences)
    return {"tokens_per_s": count / (last - first), "plan": llm.plan.summary()}


def shared(options: argparse.Namespace) -> dict[str, Any]:
    """Time to first token of the first and of later requests that begin alike."""
    context = SHARED_TOKENS + OWN_TOKENS + 8
    llm = load(options, max_num_seqs=1, context=context)
    draw = random.Random(0)
    warm_up = random_prompt(llm, draw, SHARED_TOKENS)
    prefix = random_prompt(llm, draw, SHARED_TOKENS)
    waits = []
    for prompt in [
        warm_up,
        *(prefix + random_prompt(llm, draw, OWN_TOKENS) for _ in range(NUM_SHARING)),
    ]:
        sequence = llm.engine.add_request(prompt, replace(GREEDY, max_tokens=2))
        run(llm)
        waits.append(first_token_at(sequence) - sequence.arrived_at)
    return {"first_s": waits[1], "later_s": statistics.median(waits[2:]), "worst_s": max(waits[2:])}


def overhead(options: argparse.Namespace) -> dict[str, Any]:
    """Of the steps of a full batch, what is not the model: scheduling, sampling, handing out."""
    llm = load(options, max_num_seqs=OVERHEAD_SEQUENCES, context=4 * OVERHEAD_TOKENS)
    draw = random.Random(0)
    params = replace(GREEDY, max_tokens=OVERHEAD_TOKENS, ignore_eos=True)
    for _ in range(OVERHEAD_SEQUENCES):
        llm.engine.add_request(random_prompt(llm, draw, OVERHEAD_TOKENS), params)
    while llm.engine.metrics.num_waiting or llm.engine.metrics.steps < 4:
        llm.engine.step()
    metrics = llm.engine.metrics
    beside = (metrics.schedule_s, metrics.sample_s, metrics.draft_s)
    before, run_before = sum(one.total for one in beside), metrics.run_s.total
    start, steps_before = time.perf_counter(), metrics.steps
    run(llm)
    seconds, steps = time.perf_counter() - start, metrics.steps - steps_before
    model_s = metrics.run_s.total - run_before
    return {
        "step_s": seconds / steps,
        "overhead_s": (seconds - model_s) / steps,
        "measured_parts_s": (sum(one.total for one in beside) - before) / steps,
    }


def serve(options: argparse.Namespace) -> dict[str, Any]:
    """Requests that come by and by, through AsyncEngine."""
    llm = load(options, max_num_seqs=NUM_LOAD_SEQUENCES, context=LOAD_CONTEXT)
    requests = read_requests(options.prompts)
    generate(llm, [requests[0].token_ids], replace(GREEDY, max_tokens=4, ignore_eos=True))
    return summary(asyncio.run(_serve_all(llm, requests)))


async def _serve_all(llm: LLM, requests: list[Request]) -> list[Served]:
    async with AsyncEngine(llm) as engine:
        start = time.perf_counter()
        return await asyncio.gather(*(_serve(llm, engine, start, one) for one in requests))


async def _serve(llm: LLM, engine: AsyncEngine, start: float, request: Request) -> Served:
    await asyncio.sleep(start + request.at_s - time.perf_counter())
    sent = time.perf_counter()
    params = replace(GREEDY, max_tokens=request.num_tokens, ignore_eos=True)
    first = 0.0
    async with await engine.submit(request.text, params) as stream:
        async for delta in stream:
            if delta.token_ids and not first:
                first = time.perf_counter()
        count = sum(len(one.token_ids) for one in stream.completions)
    return Served(sent - start, first - sent, time.perf_counter() - start, count)


def load(options: argparse.Namespace, *, max_num_seqs: int, context: int) -> LLM:
    """The model as the case has it."""
    return LLM(
        options.model,
        memory=options.memory,
        dtype=options.dtype,
        context=context,
        max_num_seqs=max_num_seqs,
        draft=options.draft,
        draft_length=options.draft_length,
        offline=True,
    )


def random_prompt(llm: LLM, draw: random.Random, count: int) -> list[int]:
    vocab_size = llm.engine.runner.decoder.shape.vocab_size
    return [draw.randrange(vocab_size) for _ in range(count)]


def first_token_at(sequence: Sequence) -> float:
    assert sequence.first_token_at is not None
    return sequence.first_token_at


WORK = {
    "drafting": drafting,
    "batch": batch,
    "shared": shared,
    "overhead": overhead,
    "load": serve,
}


def main() -> None:
    """Read the arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("work", choices=WORK)
    parser.add_argument("model")
    parser.add_argument("--draft", default="auto")
    parser.add_argument("--draft-length", type=int, default=8)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--memory", default="2GiB")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=224)
    parser.add_argument("--passes", type=int, default=ROUNDS)
    parser.add_argument("--prompts", type=Path, help="JSON list of texts, or of requests")
    parser.add_argument("--sequences", type=int, default=1)
    options = parser.parse_args()
    try:
        result = WORK[options.work](options)
    except ThinsliceError as error:
        sys.exit(f"error: {error.args[0].splitlines()[0]}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
