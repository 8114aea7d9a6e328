"""Ten minutes of mixed load on the asynchronous engine, with everything going wrong that can.

    python tools/soak.py [--seconds 600] [--model smollm2] [--memory 1GiB] [--seed 7]

Tasks read their answers, leave early, are cancelled, or let their streams go unread. Steps and
requests fail by a planted error; the model is closed under its streams and loaded again; programs
end while an engine is open, or are killed. Nothing may hang, every answer must be what the request
gives alone, exit codes must be right, no block may be left, and memory must not grow.

Prints one line and ends with 1 where any of that does not hold.
"""

import argparse
import asyncio
import gc
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

from thinslice.config import SamplingParams, Scheduling
from thinslice.engine.async_engine import AsyncEngine
from thinslice.engine.async_stream import AsyncStream
from thinslice.engine.llm import LLM
from thinslice.errors import BusyError, RequestError
from thinslice.units import MIB

NUM_TASKS, NUM_KINDS = 12, 24
# A round ends with the model closed under its streams. Of the whole time, children take this share.
ROUND_S, CHILD_SHARE = 30.0, 0.3
# Each load and each first kind of work leaves some pieces of 1 MiB of Python's own allocator, held
# by a few small objects such as names in the cache of types' attributes, until that has settled:
# seen over the first seven loads, and the first three rounds of work.
WARM_UP_LOADS, WARM_UP_ROUNDS = 10, 4
# Of the peaks of the rounds, the last fifth against the first after the warm-up; judged where there
# are enough of them.
LARGEST_GROWTH, ROUNDS_TO_JUDGE = 0.01, 10
# Longer without a step's news, or without a child's end, is a hang.
PATIENCE_S = 300.0
# Requests of which some meet each kind of fault.
ENOUGH = 500
PLANTED, CLOSED = "planted", "this model is closed"
# The ways in which a child ends, with its exit code.
CHILD_ENDS = {
    "leave": 0,
    "daemon": 0,
    "exit": 9,
    "SIGKILL": -signal.SIGKILL,
    "SIGTERM": -signal.SIGTERM,
    "SIGINT": 130,
}
WORDS = ("river", "stone", "light", "garden", "winter", "paper", "engine", "letter", "quiet")
ENDLESS = SamplingParams(ignore_eos=True, max_tokens=None, seed=1)


@dataclass
class Kind:
    """A request, and the tokens that each of its samples gives alone."""

    prompt: str
    params: SamplingParams
    alone: list[list[int]] = field(default_factory=list)


def draw_kind(rng: random.Random) -> Kind:
    """Some begin alike; lengths differ by an order of magnitude."""
    beginning = rng.choice(["", "", "You are a patient teacher. " * 4])
    params = SamplingParams(
        temperature=rng.choice([0.0, 0.6, 1.0]),
        top_p=rng.choice([0.95, 1.0]),
        frequency_penalty=rng.choice([0.0, 0.2]),
        max_tokens=rng.choice([1, 8, 40]),
        ignore_eos=rng.random() < 0.5,
        stop=(" the",) if rng.random() < 0.2 else (),
        n=rng.choice([1, 1, 1, 3]),
        seed=rng.randrange(1000),
    )
    return Kind(beginning + " ".join(rng.choices(WORDS, k=rng.choice([3, 8, 25]))), params)


def load(options: argparse.Namespace) -> LLM:
    """The model, with room for a few sequences."""
    return LLM(options.model, memory=options.memory, context=480, max_num_seqs=6)


@dataclass
class Load:
    """What the tasks do to one engine until a time, how it ended, and what was wrong."""

    engine: AsyncEngine
    kinds: list[Kind]
    until: float
    rng: random.Random
    ends: Counter[str]
    wrong: list[str]

    async def task(self) -> None:
        """One request after the other."""
        while time.monotonic() < self.until:
            try:
                await self._request(self.rng.choice(self.kinds))
            except BusyError:
                await asyncio.sleep(0.05)
            except RequestError as error:
                if CLOSED not in str(error):
                    self.wrong.append(f"refused: {error}")
                return

    async def _request(self, kind: Kind) -> None:
        rng = self.rng
        scheduling = Scheduling(
            priority=rng.choice([0, 0, 1]), deadline_s=rng.choice([None, None, None, 2.0])
        )
        stream = await self.engine.submit(kind.prompt, kind.params, scheduling)
        way = rng.choice(["read"] * 6 + ["left", "unread", "dropped", "cancelled"])
        if way == "read":
            await self._read(stream, kind)
            return
        self.ends[way] += 1
        if way == "unread":
            return
        if way == "cancelled":
            reading = asyncio.create_task(self._read(stream, kind))
            await asyncio.sleep(rng.random() * 0.2)
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
            return
        await asyncio.wait_for(anext(stream), PATIENCE_S)
        if way == "left":
            await stream.aclose()

    async def _read(self, stream: AsyncStream, kind: Kind) -> None:
        tokens: list[list[int]] = [[] for _ in kind.alone]
        while (delta := await asyncio.wait_for(anext(stream, None), PATIENCE_S)) is not None:
            tokens[delta.index] += delta.token_ids
            if delta.finish_reason is None:
                continue
            got, expected, reason = (
                tokens[delta.index],
                kind.alone[delta.index],
                delta.finish_reason,
            )
            self.ends[reason] += 1
            is_whole = reason in ("stop", "length")
            if got != (expected if is_whole else expected[: len(got)]):
                self.wrong.append(f"other tokens ({reason}): {kind.prompt[:40]!r}")
            if reason == "error" and not any(one in str(delta.error) for one in (PLANTED, CLOSED)):
                self.wrong.append(f"an error: {delta.error!r}")


@contextmanager
def faults(llm: LLM, rng: random.Random, planted: Counter[str]) -> Iterator[None]:
    """Steps and requests that fail now and then; ``planted`` counts them by kind."""
    runner, queue = llm.engine.runner, llm.queue
    run = runner.run

    def failing_run(*args: Any) -> Any:
        if rng.random() < 0.005:
            planted["step"] += 1
            raise OSError(PLANTED)
        return run(*args)

    def failing_queue(*args: Any) -> Any:
        if rng.random() < 0.03:
            planted["request"] += 1
            raise MemoryError(PLANTED)
        requests = queue(*args)
        if rng.random() < 0.03:
            planted["text"] += 1
            requests[0]._stops.push = failing_text  # type: ignore[method-assign]
        return requests

    def failing_text(text: str) -> str:
        raise ZeroDivisionError(PLANTED)

    runner.run, llm.queue = failing_run, failing_queue  # type: ignore[method-assign]
    try:
        yield
    finally:
        runner.run, llm.queue = run, queue  # type: ignore[method-assign]


async def one_round(llm: LLM, load_of: Load, closes: bool, peaks: list[int]) -> None:
    """The load until its time is over; then the model is closed under it, or the engine."""
    async with load_of.engine:
        tasks = [asyncio.create_task(load_of.task()) for _ in range(NUM_TASKS)]
        peak = 0
        while time.monotonic() < load_of.until:
            await asyncio.sleep(1)
            gc.collect()
            peak = max(peak, anonymous_bytes())
        peaks.append(peak)
        if closes:
            endless = await load_of.engine.submit("Once", ENDLESS)
            await asyncio.to_thread(llm.close)
            async for delta in endless:
                last = delta.finish_reason
            if last != "error":
                load_of.wrong.append(f"a stream of a closed model ended with {last}")
        await asyncio.wait_for(asyncio.gather(*tasks), PATIENCE_S)


def anonymous_bytes() -> int:
    """Memory that is this process's own, swapped out or not."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return sum(int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "VmSwap"))


def serve(options: argparse.Namespace, until: float, wrong: list[str]) -> tuple[str, list[int]]:
    """Rounds of load until a time; a summary, and the peak of each round."""
    rng, ends, peaks = random.Random(options.seed), Counter[str](), list[int]()
    kinds = [draw_kind(rng) for _ in range(NUM_KINDS)]
    for _ in range(WARM_UP_LOADS):
        load(options).close()
    llm = load(options)
    for kind in kinds:
        kind.alone = [one.token_ids for one in llm.generate(kind.prompt, kind.params)]
    num_rounds, planted = 0, Counter[str]()
    while num_rounds == 0 or time.monotonic() < until:
        end = min(time.monotonic() + ROUND_S, max(until, time.monotonic() + 2))
        closes, num_rounds = end < until, num_rounds + 1
        load_of = Load(AsyncEngine(llm), kinds, end, rng, ends, wrong)
        with faults(llm, rng, planted):
            asyncio.run(one_round(llm, load_of, closes, peaks))
        if closes:
            llm = load(options)
    blocks = llm.engine.scheduler.blocks
    blocks.check()
    if blocks.num_free != blocks.num_blocks:
        wrong.append(f"{blocks.num_blocks - blocks.num_free} blocks are left")
    llm.close()
    missing = {"step", "request", "text"} - {*planted} if sum(ends.values()) > ENOUGH else set()
    if missing:
        wrong.append(f"no fault was planted in a {' nor a '.join(sorted(missing))}")
    return f"{num_rounds} rounds, requests {dict(ends)}, faults {dict(planted)}", peaks


def child(options: argparse.Namespace) -> int:
    """A program with an engine at work, which ends as it is told to or is killed."""
    llm = load(options)

    async def work() -> None:
        engine = AsyncEngine(llm)
        engine.start()
        streams = [await engine.submit(word, ENDLESS) for word in WORDS[:4]]
        await anext(streams[0])
        print("ready", flush=True)
        if options.child.startswith("SIG"):
            await asyncio.sleep(PATIENCE_S)

    def generate() -> None:
        while True:
            llm.generate("Hello", ENDLESS)

    if options.child == "daemon":
        threading.Thread(target=generate, daemon=True).start()
        while not llm.engine.metrics.steps:
            time.sleep(0.01)
        print("ready", flush=True)
        return 0
    try:
        asyncio.run(work())
    except KeyboardInterrupt:
        return 130
    return CHILD_ENDS[options.child]


def end_a_child(options: argparse.Namespace, way: str, rng: random.Random) -> str | None:
    """What was wrong with the end of one."""
    passed = ["--model", options.model, "--memory", options.memory, "--child", way]
    process = subprocess.Popen(
        [sys.executable, __file__, *passed], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(rng.random() * 0.5)
        if way.startswith("SIG"):
            process.send_signal(signal.Signals[way])
        _, errors = process.communicate(timeout=PATIENCE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return f"a child that ends by {way} hangs"
    if process.returncode == CHILD_ENDS[way]:
        return None
    return f"a child that ends by {way} ended with {process.returncode}: {errors.decode()[-300:]}"


def growth_of(peaks: list[int]) -> float:
    """How much more the last rounds held than the first."""
    warm = peaks[WARM_UP_ROUNDS:] or peaks
    fifth = max(len(warm) // 5, 1)
    return mean(warm[-fifth:]) / mean(warm[:fifth]) - 1


def main() -> int:
    """Run and judge."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--memory", default="1GiB")
    parser.add_argument("--seed", type=int, default=random.randrange(1000))
    parser.add_argument("--child", choices=CHILD_ENDS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # A shell that runs this in the background has interrupts ignored, here and in every child.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if options.child:
        return child(options)
    start, wrong, rng = time.monotonic(), list[str](), random.Random(options.seed)
    summary, peaks = serve(options, start + options.seconds * (1 - CHILD_SHARE), wrong)
    growth = growth_of(peaks)
    if len(peaks) >= ROUNDS_TO_JUDGE and growth > LARGEST_GROWTH:
        wrong.append(f"memory grew by {growth:.2%}")
    num_children = 0
    while num_children < len(CHILD_ENDS) or time.monotonic() < start + options.seconds:
        trouble = end_a_child(options, [*CHILD_ENDS][num_children % len(CHILD_ENDS)], rng)
        wrong += [] if trouble is None else [trouble]
        num_children += 1
    print(
        f"{'FAILED' if wrong else 'ok'} (seed {options.seed}): {summary}, {num_children} programs "
        f"ended, peaks of {peaks[0] / MIB:.1f} to {peaks[-1] / MIB:.1f} MiB ({growth:+.2%})"
    )
    for text, count in Counter(wrong).items():
        print(f"  {count} x {text}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
