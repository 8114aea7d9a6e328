"""thinslice beside its peers on this machine, in memory: `python benchmarks/peers.py`.

Sets the peers up in a folder of their own at the first run, then lets all do the same work in
turn, with the same number of threads, weights of the same number of bits and prompts of the same
length; every figure is the median of the rounds, every ratio the median of the rounds' ratios. A
ratio beside `read limit` is the share of the memory's read bandwidth that decoding reaches.

The environment is everyone's: on busy cores set OMP_WAIT_POLICY=PASSIVE, or threads that spin
while they wait slow all of torch down. A table goes to standard error; the last line is JSON.
Large files, 41 GB, are deleted at the end unless --keep.
"""

import argparse
import os
import statistics
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from contestants import (
    BATCH_PROMPT,
    DTYPES,
    GGUF_TYPES,
    NUM_SEQUENCES,
    QUICK,
    Contestants,
    Result,
    Settings,
    decode_rate,
)
from harness import (
    OURS,
    Artefacts,
    Case,
    Figure,
    Row,
    Run,
    RunError,
    console,
    report,
    run_case,
    use_cores,
)
from peer_environment import DEFAULT_FOLDER, PeerEnvironment

from thinslice.errors import ThinsliceError

LLAMA, OPENVINO, TRANSFORMERS = "llama.cpp", "OpenVINO GenAI", "transformers bf16"
LIMIT, START_LIMIT = "read limit", "limit"
START_LIMIT_S = 0.45
# How many times better than each peer thinslice is to be, and the share of the read limit.
TARGETS: dict[str, dict[str, float]] = {
    "mimo-int4-decode": {LLAMA: 2.0, LIMIT: 0.85},
    "mimo-int8-decode": {LLAMA: 1.3, LIMIT: 0.85},
    "mimo-int4-prefill": {LLAMA: 5.0, TRANSFORMERS: 1.0},
    "smollm2-decode": {LLAMA: 1.5, OPENVINO: 2.0, TRANSFORMERS: 6.0},
    "smollm2-prefill": {TRANSFORMERS: 1.0},
    "smollm2-batch": {LLAMA: 3.0},
    "smollm2-start": {LLAMA: 1 / 1.4, START_LIMIT: 1.0},
}
# A checkpoint in bfloat16, and from it or beside it 4 and 8 bits, for thinslice and for llama.cpp.
WORK_BYTES = 41 * 10**9
SHORT_PROMPT = 8
PROMPT = "Explain in two sentences why the sky is blue."


def case_of(name: str, unit: str, runs: Mapping[str, Run], note: str) -> Case:
    """A case with its targets."""
    return Case(name, unit, runs, TARGETS[name], note)


def large_decode(make: Contestants, name: str) -> Case:
    """MiMo-7B's shape, one sequence, one token at a time."""
    dtype = make.settings.dtype or name
    amount = make.settings.new_tokens
    amounts = {"prompt_tokens": SHORT_PROMPT, "new_tokens": amount + 1}
    runs = {
        OURS: make.ours(lambda: make.packed(dtype), decode_rate, **amounts),
        LLAMA: make.llama_bench(lambda: make.gguf(name), 0, amount),
    }
    if dtype == name:
        runs[LIMIT] = make.read_limit(name)
    note = f"{GGUF_TYPES[name]}" if dtype == name else f"{GGUF_TYPES[name]} beside {dtype}"
    return case_of(f"mimo-{name}-decode", "tokens/s", runs, note)


def large_prefill(make: Contestants) -> Case:
    """MiMo-7B's shape, one prompt."""
    dtype = make.settings.dtype or "int4"
    amount = make.settings.prompt_tokens

    def rate(result: Result) -> float:
        return amount / result["prefill_s"]

    amounts = {"prompt_tokens": amount, "new_tokens": 1}
    random = {"prompt_tokens": amount, "layers": make.settings.layers}
    runs = {
        OURS: make.ours(lambda: make.packed(dtype), rate, **amounts),
        LLAMA: make.llama_bench(lambda: make.gguf("int4"), amount, 0),
        TRANSFORMERS: make.library("transformers-random", make.checkpoint, rate, **random),
    }
    note = f"{amount} tokens"
    if make.settings.layers < make.num_layers:
        note += (
            f"; transformers: {make.settings.layers} layers measured, scaled to {make.num_layers}"
        )
    return case_of("mimo-int4-prefill", "tokens/s", runs, note)


def small_decode(make: Contestants) -> Case:
    """SmolLM2, one sequence, one token at a time."""
    amount = 4 * make.settings.new_tokens
    amounts = {"prompt_tokens": SHORT_PROMPT, "new_tokens": amount + 1}
    runs = {
        OURS: make.ours(make.small_model, decode_rate, **amounts),
        LLAMA: make.llama_bench(make.small_model, 0, amount),
        OPENVINO: make.library("openvino", make.small_model, decode_rate, **amounts),
        TRANSFORMERS: make.library("transformers-gguf", make.small_model, decode_rate, **amounts),
    }
    return case_of("smollm2-decode", "tokens/s", runs, "Q4_1")


def small_prefill(make: Contestants) -> Case:
    """SmolLM2, one prompt."""
    amount = make.settings.prompt_tokens

    def rate(result: Result) -> float:
        return amount / result["prefill_s"]

    amounts = {"prompt_tokens": amount, "new_tokens": 2}
    runs = {
        OURS: make.ours(make.small_model, rate, **amounts),
        LLAMA: make.llama_bench(make.small_model, amount, 0),
        OPENVINO: make.library("openvino", make.small_model, rate, **amounts),
        TRANSFORMERS: make.library("transformers-gguf", make.small_model, rate, **amounts),
    }
    return Case(
        "smollm2-prefill", "tokens/s", runs, TARGETS["smollm2-prefill"], f"Q4_1, {amount} tokens"
    )


def small_batch(make: Contestants) -> Case:
    """SmolLM2, several sequences at once."""
    amount = make.settings.new_tokens
    amounts = {
        "prompt_tokens": BATCH_PROMPT,
        "new_tokens": amount + 1,
        "sequences": NUM_SEQUENCES,
    }
    runs = {
        OURS: make.ours(make.small_model, decode_rate, **amounts),
        LLAMA: make.llama_batched_bench(amount),
    }
    note = f"Q4_1, {NUM_SEQUENCES} sequences, all their tokens"
    return case_of("smollm2-batch", "tokens/s", runs, note)


def small_start(make: Contestants) -> Case:
    """SmolLM2 from the start of the process to the first word, with all files in memory."""
    ours = [sys.executable, "-m", "thinslice", "run", "smollm2", "--memory", "1GiB"]
    if make.settings.dtype is not None:
        ours += ["--dtype", make.settings.dtype]
    theirs = [make.peers.llama("llama-completion"), "-m", make.smollm2, "-t", make.threads]
    greedy = ["--temp", "0", "-n", "8", "-no-cnv", "--no-display-prompt", "-p", PROMPT]
    runs = {
        OURS: make.first_output([*ours, "--temperature", "0", "--max-tokens", "8", PROMPT]),
        LLAMA: make.first_output([*theirs, *greedy]),
        START_LIMIT: lambda: Figure(START_LIMIT_S),
    }
    return case_of("smollm2-start", "s", runs, "process start to first word")


CASES: dict[str, Callable[[Contestants], Case]] = {
    "mimo-int4-decode": lambda make: large_decode(make, "int4"),
    "mimo-int8-decode": lambda make: large_decode(make, "int8"),
    "mimo-int4-prefill": large_prefill,
    "smollm2-decode": small_decode,
    "smollm2-prefill": small_prefill,
    "smollm2-batch": small_batch,
    "smollm2-start": small_start,
}


def with_shares(rows: list[Row]) -> list[Row]:
    """The rows, every share of the read limit among their notes."""
    limits = {row.case: row.values for row in rows if row.contestant == LIMIT}
    told = []
    for row in rows:
        pairs = list(zip(row.values, limits.get(row.case, []), strict=False))
        if pairs and row.contestant != LIMIT:
            share = statistics.median(value / limit for value, limit in pairs)
            row = replace(row, note=f"{row.note}; {share:.0%} of read bandwidth")
        told.append(row)
    return told


def run(options: argparse.Namespace) -> int:
    """Set up, measure, report. Errors: RunError."""
    use_cores(options.threads)
    peers = PeerEnvironment(options.peers)
    peers.set_up()
    artefacts = Artefacts(options.work or options.peers / "work", keep=options.keep)
    chosen = {"threads": options.threads, "dtype": options.dtype, "layers": options.layers}
    quick = QUICK if options.quick else {}
    if not options.quick:
        artefacts.check_space(WORK_BYTES)
    make = Contestants(peers, artefacts, Settings(**{**chosen, **quick}))
    rows: list[Row] = []
    try:
        for name in options.only or CASES:
            rows += run_case(CASES[name](make), options.rounds or make.settings.rounds)
    finally:
        artefacts.clean_up()
    facts = {
        "is_quick": options.quick,
        "shape": make.settings.shape,
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "peers": peers.versions(),
    }
    return report("peers", with_shares(rows), facts)


def main() -> None:
    """Read the arguments, run, exit: 1 where a contestant could not run."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--peers", type=Path, default=DEFAULT_FOLDER, help="(%(default)s)")
    parser.add_argument("--work", type=Path, help="where large files go; in the peers' folder")
    parser.add_argument("--keep", action="store_true", help="leave the large files there")
    parser.add_argument("--only", nargs="+", choices=CASES, metavar="NAME", help="cases")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--dtype", choices=DTYPES, help="thinslice's in all cases, for comparison")
    parser.add_argument("--layers", type=int, default=12, help="of transformers' large model")
    parser.add_argument("--quick", action="store_true", help="small sizes, to test this program")
    try:
        sys.exit(run(parser.parse_args()))
    except (RunError, ThinsliceError, OSError) as error:
        console.print(f"error: {error}")
        sys.exit(1)


if __name__ == "__main__":
    main()
