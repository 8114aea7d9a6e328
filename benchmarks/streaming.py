"""thinslice beside its peers where memory is too small: `python benchmarks/streaming.py`.

MiMo-7B's shape with random weights, one token at a time. Every run has a fresh memory control group
of the named size, without swap, and starts with none of its files in the page cache; this needs
root on Linux. In bfloat16 in 4 GiB beside accelerate's disk offload and AirLLM, in int4 in 2 GiB
beside llama.cpp's memory mapping. The disk's own speed is measured after each of thinslice's runs:
`disk limit` is the time it takes the disk to deliver what thinslice read.

Figures are medians of the rounds. A table goes to standard error; the last line is JSON. Large
files, 40 GB, are deleted at the end unless --keep.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

from contestants import DTYPES, GGUF_TYPES, QUICK, Contestants, Result, Settings
from disk import Parts, direct_rate
from harness import (
    OURS,
    ROOT,
    Artefacts,
    Case,
    Figure,
    Row,
    Run,
    RunError,
    console,
    drop_page_cache,
    group_peak_bytes,
    memory_group,
    report,
    run_case,
    run_json,
    run_ours,
    run_process,
    use_cores,
)
from peer_environment import DEFAULT_FOLDER, PeerEnvironment

from thinslice.errors import ThinsliceError
from thinslice.memory.slice_reader import ReaderOptions
from thinslice.units import GIB, MIB, parse_bytes

ACCELERATE, AIRLLM, LLAMA, LIMIT = "accelerate", "AirLLM", "llama.cpp mmap", "disk limit"
# How many times faster than each peer thinslice is to be.
TARGETS = {ACCELERATE: 1.6, AIRLLM: 2.8, LLAMA: 1.6, LIMIT: 1 / 1.15}
# A checkpoint in bfloat16, AirLLM's copy of it, and 4 bits for thinslice and for llama.cpp.
WORK_BYTES = 40 * 10**9
PROMPT_TOKENS = 4
DISK_AMOUNT = 2 * GIB
DISK_OPTIONS = tuple(ReaderOptions(size, depth) for size in (MIB, 4 * MIB) for depth in (4, 8))


class Streams:
    """Makes the runs: each in its own control group, with its files on disk only."""

    def __init__(self, make: Contestants, memory: str) -> None:
        self.make = make
        self.memory = memory

    def amounts(self) -> list[str]:
        """Options of both run_thinslice.py and run_peer.py."""
        new_tokens = str(self.make.settings.new_tokens + 1)
        amounts = ["--prompt-tokens", str(PROMPT_TOKENS), "--new-tokens", new_tokens]
        return [*amounts, "--threads", self.make.threads]

    def held(self, files: Path, run: Callable[[Path], Result]) -> Result:
        """What ``run(group)`` gives, the group's own peak with it."""
        drop_page_cache(files)
        with memory_group(parse_bytes(self.memory)) as group:
            result = run(group)
            return {**result, "group_peak_bytes": group_peak_bytes(group)}

    def ours(self, model: Callable[[], Path], dtype: str, last: dict[str, Result]) -> Run:
        """thinslice with the group's size as its budget; its result is left in ``last``."""

        def run() -> Figure:
            path = model()
            words = [*self.amounts(), "--dtype", dtype, "--memory", self.memory]
            last[OURS] = self.held(path, lambda group: run_ours(path, *words, group=group))
            return Figure(token_seconds(last[OURS]), last[OURS])

        return run

    def disk_limit(self, model: Callable[[], Path], last: dict[str, Result]) -> Run:
        """Seconds the disk alone would take for a token's share of what thinslice read last."""

        def run() -> Figure:
            if OURS not in last or last[OURS]["read_bytes"] == 0:
                raise RunError("thinslice has read nothing")
            rate = disk_rate(largest_file(model()))
            disk_s = last[OURS]["read_bytes"] / rate
            # The prompt is a sweep as every token is, so all of the time is compared.
            share = disk_s / last[OURS]["generate_s"]
            return Figure(share * token_seconds(last[OURS]), {"bytes_per_s": rate})

        return run

    def library(self, kind: str, files: Callable[[], Path], *options: str) -> Run:
        """A peer of run_peer.py, which reads those files."""

        def run() -> Figure:
            path = qwen2_view(self.make)
            script = ROOT / "benchmarks" / "run_peer.py"
            command = [
                *self.make.peers.python,
                script,
                kind,
                path,
                *self.amounts(),
                "--no-warm-up",
                *options,
            ]
            result = self.held(files(), lambda group: run_json(command, group=group))
            return Figure(token_seconds(result), result)

        return run

    def llama(self, model: Callable[[], Path]) -> Run:
        """Mapped, and not repacked: what is repacked is no longer the file's and must fit."""

        def run() -> Figure:
            path, amount = model(), str(self.make.settings.new_tokens)
            program = self.make.peers.llama("llama-bench")
            words = ["-p", "0", "-n", amount, "-r", "1", "-t", self.make.threads, "-o", "jsonl"]
            command = [program, "-m", path, *words, "--load-mode", "mmap", "--repack", "0"]
            result = self.held(path, lambda group: run_json(command, group=group))
            return Figure(1 / result["avg_ts"], {"group_peak_bytes": result["group_peak_bytes"]})

        return run


def token_seconds(result: Result) -> float:
    """Seconds for each token after the first."""
    return float(result["decode_s"] / result["decode_tokens"])


def largest_file(path: Path) -> Path:
    """The file itself, or the largest one in the folder."""
    files = [path] if path.is_file() else [file for file in path.iterdir() if file.is_file()]
    return max(files, key=lambda file: file.stat().st_size)


def disk_rate(path: Path) -> float:
    """Bytes/s past the page cache, with the best of a few request sizes and depths."""
    parts = Parts(path, DISK_AMOUNT // len(DISK_OPTIONS))
    if parts.num_bytes == 0:
        raise RunError(f"{path} is too small to measure a disk with")
    return max(direct_rate(parts.next_slices(), options) for options in DISK_OPTIONS)


def qwen2_view(make: Contestants) -> Path:
    """The checkpoint as a Qwen2 for transformers, which does not know MiMo: links and a config.

    The prediction layer's tensors are then unexpected, and are left alone.
    """
    checkpoint = make.checkpoint()

    def link(folder: Path) -> None:
        folder.mkdir()
        config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
        if config["model_type"] == "mimo":
            config |= {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        for file in checkpoint.iterdir():
            if file.name != "config.json":
                (folder / file.name).symlink_to(file)

    return make.artefacts.need(f"{checkpoint.name}-qwen2", link)


def airllm_files(make: Contestants) -> Path:
    """The checkpoint as AirLLM reads it, which it writes at its first use: a copy."""
    script = ROOT / "benchmarks" / "run_peer.py"
    command = [*make.peers.python, script, "airllm-split", qwen2_view(make), "--folder"]
    return make.artefacts.need("airllm", lambda folder: run_process([*command, folder]))


def bfloat16_case(make: Contestants, options: argparse.Namespace) -> Case:
    """In bfloat16, beside accelerate and AirLLM."""
    streams, last = Streams(make, options.bfloat16_memory), {}
    folder = make.artefacts.need("accelerate", Path.mkdir)
    accelerate_options = ["--resident", options.resident, "--folder", str(folder)]
    airllm_options = ["--folder", str(make.artefacts.folder / "airllm")]
    runs = {
        OURS: streams.ours(make.checkpoint, "bfloat16", last),
        LIMIT: streams.disk_limit(make.checkpoint, last),
        ACCELERATE: streams.library("accelerate", make.checkpoint, *accelerate_options),
        AIRLLM: streams.library("airllm", lambda: airllm_files(make), *airllm_options),
    }
    return Case("bfloat16", "s/token", runs, TARGETS, f"in {streams.memory}")


def int4_case(make: Contestants, options: argparse.Namespace) -> Case:
    """In int4, beside llama.cpp, which leaves it to the page cache what stays."""
    streams, last = Streams(make, options.int4_memory), {}
    dtype = make.settings.dtype or "int4"
    runs = {
        OURS: streams.ours(lambda: make.packed(dtype), make.settings.dtype or "auto", last),
        LIMIT: streams.disk_limit(lambda: make.packed(dtype), last),
        LLAMA: streams.llama(lambda: make.gguf("int4")),
    }
    note = f"in {streams.memory}, {GGUF_TYPES['int4']} without repacking"
    if dtype != "int4":
        note += f" beside {dtype}"
    return Case("int4", "s/token", runs, TARGETS, note)


CASES: dict[str, Callable[[Contestants, argparse.Namespace], Case]] = {
    "bfloat16": bfloat16_case,
    "int4": int4_case,
}


def run(options: argparse.Namespace) -> int:
    """Set up, measure, report. Errors: RunError."""
    use_cores(options.threads)
    options.work = options.work or options.peers / "work"
    with memory_group(GIB):  # before the hours that all else takes
        pass
    peers = PeerEnvironment(options.peers)
    peers.set_up()
    artefacts = Artefacts(options.work, keep=options.keep)
    chosen = {"threads": options.threads, "dtype": options.dtype, "new_tokens": options.tokens}
    quick = QUICK if options.quick else {}
    if not options.quick:
        artefacts.check_space(WORK_BYTES)
    make = Contestants(peers, artefacts, Settings(**{**chosen, **quick}))
    rounds = options.rounds or make.settings.rounds
    rows: list[Row] = []
    try:
        for name in options.only or CASES:
            rows += run_case(CASES[name](make, options), rounds)
    finally:
        artefacts.clean_up()
    facts = {
        "is_quick": options.quick,
        "shape": make.settings.shape,
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "peers": peers.versions(),
    }
    return report("streaming", rows, facts)


def main() -> None:
    """Read the arguments, run, exit: 1 where a contestant could not run."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--peers", type=Path, default=DEFAULT_FOLDER, help="(%(default)s)")
    parser.add_argument("--work", type=Path, help="where large files go; in the peers' folder")
    parser.add_argument("--keep", action="store_true", help="leave the large files there")
    parser.add_argument("--only", nargs="+", choices=CASES, metavar="NAME", help="cases")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--tokens", type=int, default=4, help="after the first (%(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, help="thinslice's beside llama.cpp")
    parser.add_argument("--bfloat16-memory", default="4GiB", help="(%(default)s)")
    parser.add_argument("--int4-memory", default="2GiB", help="(%(default)s)")
    parser.add_argument("--resident", default="1.5GiB", help="of accelerate (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="a small model, to test this program")
    try:
        sys.exit(run(parser.parse_args()))
    except (RunError, ThinsliceError, OSError) as error:
        console.print(f"error: {error}")
        sys.exit(1)


if __name__ == "__main__":
    main()
