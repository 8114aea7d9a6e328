"""Ten minutes of mixed load on the asynchronous engine: memory must not grow, nothing may be left.

    python tools/soak.py [--minutes 10] [--model smollm2] [--memory 1GiB]

Prints one line; exits with 1 if anonymous memory grew by more than 1% after the first fifth of the
time, if a request ended for a reason it should not have, or if a block is not free in the end.
"""

import argparse
import asyncio
import gc
import os
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from thinslice.config import SamplingParams
from thinslice.engine.async_engine import AsyncEngine
from thinslice.engine.llm import LLM
from thinslice.units import MIB

NUM_TASKS = 12
LARGEST_GROWTH = 0.01
WARM_UP_SHARE = 0.2
EXPECTED_ENDS = {"stop", "length", "deadline", "left"}
WORDS = ("river", "stone", "light", "garden", "winter", "paper", "engine", "letter", "quiet")


@dataclass
class Load:
    """What the tasks do, and how it ended."""

    engine: AsyncEngine
    until: float
    rng: random.Random
    ends: Counter[str]

    def prompt(self) -> str:
        """Some begin alike; lengths differ by two orders of magnitude."""
        rng = self.rng
        beginning = rng.choice(["", "", "You are a patient teacher of geography. " * 6])
        return beginning + " ".join(rng.choices(WORDS, k=rng.choice([3, 20, 150])))

    def params(self) -> SamplingParams:
        rng = self.rng
        return SamplingParams(
            temperature=rng.choice([0.0, 0.6, 1.0]),
            top_p=rng.choice([0.95, 1.0]),
            frequency_penalty=rng.choice([0.0, 0.2]),
            max_tokens=rng.choice([1, 8, 40]),
            ignore_eos=rng.random() < 0.5,
            stop=(" the",) if rng.random() < 0.2 else (),
            n=rng.choice([1, 1, 1, 3]),
            logprobs=rng.choice([None, None, 5]),
            priority=rng.choice([0, 0, 1]),
            deadline_s=rng.choice([None, None, None, 2.0]),
        )

    async def task(self) -> None:
        """One request after the other; every fifth is left early."""
        while time.monotonic() < self.until:
            leaves_after = self.rng.randint(1, 5) if self.rng.random() < 0.2 else None
            async with await self.engine.submit(self.prompt(), self.params()) as stream:
                num_deltas = 0
                async for delta in stream:
                    num_deltas += 1
                    if delta.finish_reason is not None:
                        self.ends[delta.finish_reason] += 1
                    if num_deltas == leaves_after:
                        self.ends["left"] += 1
                        break


async def watch(until: float, samples: list[tuple[float, int]]) -> None:
    """Note the time and the anonymous memory every two seconds."""
    while time.monotonic() < until:
        await asyncio.sleep(2)
        gc.collect()
        samples.append((time.monotonic(), anonymous_bytes()))


def anonymous_bytes() -> int:
    """Memory that is this process's own, swapped out or not."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return sum(int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "VmSwap"))


async def soak(llm: LLM, seconds: float) -> tuple[Counter[str], list[int]]:
    """Run the load; how requests ended, and the memory after the warm-up."""
    start = time.monotonic()
    until = start + seconds
    samples: list[tuple[float, int]] = []
    async with AsyncEngine(llm) as engine:
        load = Load(engine, until, random.Random(0), Counter())
        await asyncio.gather(watch(until, samples), *(load.task() for _ in range(NUM_TASKS)))
    warm = start + WARM_UP_SHARE * seconds
    return load.ends, [num_bytes for at, num_bytes in samples if at >= warm]


def main() -> int:
    """Run and judge."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--memory", default="1GiB")
    options = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    llm = LLM(options.model, memory=options.memory, context=512, max_num_seqs=6)
    ends, memory = asyncio.run(soak(llm, options.minutes * 60))
    fifth = max(len(memory) // 5, 1)
    first, last = mean(memory[:fifth]), mean(memory[-fifth:])
    growth = last / first - 1
    blocks, metrics = llm.engine.scheduler.blocks, llm.engine.metrics
    blocks.check()
    is_good = (
        growth <= LARGEST_GROWTH
        and set(ends) <= EXPECTED_ENDS
        and blocks.num_free == blocks.num_blocks
    )
    verdict = "ok" if is_good else "FAILED"
    print(
        f"{verdict}: anonymous memory {first / MIB:.1f} -> {last / MIB:.1f} MiB ({growth:+.2%}), "
        f"{blocks.num_blocks - blocks.num_free} blocks left, requests {dict(ends)}, "
        f"{metrics.completion_tokens} tokens, {metrics.preemptions} preemptions, "
        f"{metrics.prefix_hit_tokens} prefix hits"
    )
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
