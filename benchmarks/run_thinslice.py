"""One measurement of thinslice through its public Python API, for the comparisons with peers.

    python benchmarks/run_thinslice.py MODEL --prompt-tokens 8 --new-tokens 32

Prints one JSON line: seconds of the first token and of those after it, what was read from disk
meanwhile, and what the plan was. The model answers once before, so that nothing is measured cold.
`--read-memory` instead measures how fast memory is read.
"""

import argparse
import json
import random
import statistics
import sys
import time
from pathlib import Path

from thinslice import LLM, SamplingParams
from thinslice.errors import ThinsliceError
from thinslice.kernels import native
from thinslice.kernels.arrays import empty_bytes
from thinslice.units import GIB

WORDS = ("time", "people", "water", "house", "river", "music", "light", "paper", "stone", "garden")
CONTEXT_STEP = 64


def prompt_of(llm: LLM, num_tokens: int, seed: int) -> str:
    """Words that are exactly so many tokens."""
    draw = random.Random(seed)
    words = [draw.choice(WORDS) for _ in range(num_tokens)]
    while _num_tokens(llm, words) > num_tokens:
        words.pop()
    while _num_tokens(llm, words) < num_tokens:
        words.append(draw.choice(WORDS))
    assert _num_tokens(llm, words) == num_tokens, "no such number of tokens"
    return " ".join(words)


def _num_tokens(llm: LLM, words: list[str]) -> int:
    return len(llm.tokenizer.encode(" ".join(words), add_special_tokens=True))


def read_bytes() -> int:
    """What this process has made the disk read so far."""
    lines = Path("/proc/self/io").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes:"))


def measure(options: argparse.Namespace) -> dict[str, object]:
    """Load, warm up, generate."""
    start = time.perf_counter()
    context = options.prompt_tokens + options.new_tokens + 1
    llm = LLM(
        options.model,
        memory=options.memory,
        dtype=options.dtype,
        context=-(-context // CONTEXT_STEP) * CONTEXT_STEP,
        max_num_seqs=options.sequences,
        # The others draft nothing as they are run, and random prompts say nothing of drafts.
        draft="off",
        offline=True,
    )
    load_s = time.perf_counter() - start
    prompts = [prompt_of(llm, options.prompt_tokens, seed) for seed in range(options.sequences)]
    warm_up = prompt_of(llm, options.prompt_tokens, -1)
    llm.generate(warm_up, SamplingParams(temperature=0, max_tokens=2, ignore_eos=True))
    read_before, start = read_bytes(), time.perf_counter()
    params = SamplingParams(temperature=0, max_tokens=options.new_tokens, ignore_eos=True)
    completions = llm.generate(prompts, params)
    generate_s = time.perf_counter() - start
    # Of several sequences: from the first one's first token to the last one's last.
    first_s = min(completion.prefill_s for completion in completions)
    last_s = max(completion.prefill_s + completion.decode_s for completion in completions)
    num_decoded = sum(len(completion.token_ids) - 1 for completion in completions)
    return {
        "load_s": load_s,
        "prefill_s": first_s,
        "decode_s": last_s - first_s,
        "decode_tokens": num_decoded,
        "generate_s": generate_s,
        "read_bytes": read_bytes() - read_before,
        "prompt_tokens": len(completions[0].prompt_token_ids),
        "plan": llm.plan.summary(),
    }


def measure_memory() -> dict[str, object]:
    """GB/s of reading a buffer far larger than the caches, on all threads."""
    data = empty_bytes(GIB + GIB // 8)
    data.fill(1)
    rates = []
    for _ in range(5):
        start = time.perf_counter()
        native.read_memory(data)
        rates.append(data.size / (time.perf_counter() - start))
    return {"bytes_per_s": statistics.median(rates)}


def main() -> None:
    """Read the arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", nargs="?")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--memory")
    parser.add_argument("--prompt-tokens", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--sequences", type=int, default=1)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--read-memory", action="store_true")
    options = parser.parse_args()
    if options.model is None and not options.read_memory:
        parser.error("name a MODEL, or --read-memory")
    if options.threads is not None:
        native.set_num_threads(options.threads)
    try:
        result = measure_memory() if options.read_memory else measure(options)
    except ThinsliceError as error:
        sys.exit(f"error: {error.args[0].splitlines()[0]}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
