"""The engine by itself and beside llama-server: `python benchmarks/engine.py`.

Drafting with and without, whose tokens must be the same; requests that come by and by; a prefix
that a hundred requests share; what a step takes beside the model; and MiMo-7B's shape streamed in
2 GiB: drafts, and eight sequences at once. Its weights are random, but for a head that makes its
greedy text repeat itself every 16 tokens: there drafts find matches. A table goes to standard
error; the last line is JSON. llama-server is built at the first run, as for benchmarks/peers.py;
the streamed model takes 20 GB of disk while it is made, deleted at the end unless --keep.
"""

import argparse
import json
import random
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from harness import (
    OURS,
    ROOT,
    Artefacts,
    Case,
    Figure,
    Row,
    Run,
    RunError,
    report,
    run_case,
    run_json,
    run_process,
    use_cores,
)
from load import arrivals, serve_with_llama, write_requests
from peer_environment import DEFAULT_FOLDER, PeerEnvironment

from thinslice.checkpoint.open import open_checkpoint
from thinslice.errors import ThinsliceError
from thinslice.pack.pack import PackOptions, pack_model
from thinslice.plan.packed_format import PackedFormat
from thinslice.store.store import Store
from thinslice.text.tokenizer import load_tokenizer

sys.path.insert(0, str(ROOT))
from tools.small_mtp_text import examples

SMALL_MTP = ROOT / "tests" / "models" / "small_mtp"
WITHOUT, LLAMA, ONE, FIRST, STEP = "no drafts", "llama-server", "one sequence", "first", "step"
NUM_PROMPTS, NUM_SLOTS, SLOT_CONTEXT = 24, 16, 768
# An overhead of 15% of a step, and a later first token in 0.15 of the first one's time.
SHARE = 1 / 0.15
# MiMo-7B's shape in bfloat16, and in int4.
STREAMED_BYTES = 21 * 10**9
CYCLE = 16


@dataclass(frozen=True)
class Setting:
    """What all cases share.

    Attributes:
        scratch: for small files.
        artefacts: large ones.
        rate: requests a second, more than llama-server can serve.
        memory: the budget of the streamed cases.
    """

    scratch: Path
    artefacts: Artefacts
    peers: PeerEnvironment
    threads: int
    rate: float
    memory: str


def run_engine(work: str, model: str | Path, *options: object) -> dict[str, Any]:
    """run_engine.py in a process of its own. Errors: RunError."""
    command = [sys.executable, ROOT / "benchmarks" / "run_engine.py", work, model]
    return run_json([*command, *map(str, options)], environment={"OMP_WAIT_POLICY": "PASSIVE"})


def drafting_case(
    name: str, target: float, drafts: str, model: str | Path, *options: object
) -> Case:
    """The same text with drafts and without; texts that differ are a failure."""
    texts: dict[str, str] = {}

    def one(draft: str) -> Run:
        def measure() -> Figure:
            result = run_engine("drafting", model, "--draft", draft, *options)
            texts.setdefault("expected", result["tokens"])
            if result["tokens"] != texts["expected"]:
                raise RunError("the tokens are not those of the other run")
            return Figure(result["seconds_per_token"], result)

        return measure

    runs = {OURS: one(drafts), WITHOUT: one("off")}
    return Case(name, "s/token", runs, {WITHOUT: target}, "identical tokens")


def mtp_cases(setting: Setting) -> list[Case]:
    """The small trained model on its own tasks."""
    texts = [one.prompt + "\n" for one in examples_for(NUM_PROMPTS)]
    prompts = setting.scratch / "prompts.json"
    prompts.write_text(json.dumps(texts))
    packed = setting.scratch / "small-int8"
    pack_model(open_checkpoint(SMALL_MTP), packed, PackOptions(PackedFormat.INT8, "small"))
    kinds: dict[str, tuple[Path, tuple[str, ...]]] = {
        "float32": (SMALL_MTP, ("--dtype", "float32")),
        "int8": (packed, ()),
    }
    return [
        drafting_case(f"small-{name}-drafts", 1.5, "auto", model, "--prompts", prompts, *options)
        for name, (model, options) in kinds.items()
    ]


def examples_for(count: int) -> list[Any]:
    """Held-out tasks of the small model."""
    return [*islice(examples(random.Random(3), held_out=True), count)]


def ngram_case(_: Setting) -> Case:
    """A file that is repeated with one change."""
    return drafting_case("smollm2-repeats-a-file", 2.0, "ngram", "smollm2", "--context", 1024)


def load_cases(setting: Setting) -> list[Case]:
    """Tokens a second where more requests come than either can serve; then the wait for a first
    token where as many come as llama-server was seen to serve."""
    path = Store().ensure("smollm2")
    tokenizer = load_tokenizer(open_checkpoint(path))
    command = [setting.peers.llama("llama-server"), "-m", path]
    command += ["-np", NUM_SLOTS, "-c", NUM_SLOTS * SLOT_CONTEXT, "-t", setting.threads, "-ngl", 0]
    saturated: list[float] = []

    def ours(rate: Callable[[], float]) -> dict[str, Any]:
        file = setting.scratch / "requests.json"
        write_requests(file, arrivals(rate(), tokenizer))
        return run_engine("load", "smollm2", "--prompts", file)

    def theirs(rate: Callable[[], float]) -> dict[str, Any]:
        return serve_with_llama(command, arrivals(rate(), tokenizer))

    def flooded() -> dict[str, Any]:
        result = theirs(lambda: setting.rate)
        saturated.append(result["requests_per_s"])
        return result

    def saturating() -> float:
        if not saturated:
            raise RunError("the rate that saturates llama-server was not measured")
        return statistics.median(saturated)

    rates = {
        OURS: figure_of("tokens_per_s", lambda: ours(lambda: setting.rate)),
        LLAMA: figure_of("tokens_per_s", flooded),
    }
    waits = {
        OURS: figure_of("p99_wait_s", lambda: ours(saturating)),
        LLAMA: figure_of("p99_wait_s", lambda: theirs(saturating)),
    }
    work = "64 requests; prompts 32-512, outputs 16-256; random words"
    note = f"{setting.rate:g} requests a second: {work}"
    return [
        Case("load-tokens", "tokens/s", rates, {LLAMA: 2.5}, note),
        Case("load-p99-first-token", "s", waits, {LLAMA: 2.0}, "as many as llama-server serves"),
    ]


def figure_of(name: str, measure: Callable[[], Mapping[str, Any]]) -> Run:
    """One of the values that a measurement gives."""

    def run() -> Figure:
        result = measure()
        return Figure(result[name], result)

    return run


def pair_case(work: str, fields: tuple[str, str], other: str, note: str) -> Case:
    """Two values of one measurement, of which the first is to be at most 0.15 of the second."""
    results: list[dict[str, Any]] = []

    def ours() -> Figure:
        results.append(run_engine(work, "smollm2"))
        return Figure(results[-1][fields[0]], results[-1])

    def theirs() -> Figure:
        return Figure(results[-1][fields[1]], results[-1])

    return Case(work, "s", {OURS: ours, other: theirs}, {other: SHARE}, note)


def shared_case(_: Setting) -> Case:
    """A hundred requests that begin with the same thousand tokens."""
    note = "time to first token of the median later request"
    return pair_case("shared", ("later_s", "first_s"), FIRST, note)


def overhead_case(_: Setting) -> Case:
    """Scheduling, sampling and Python of a step of 16 sequences."""
    note = "beside the model, of a step of 16 sequences"
    return pair_case("overhead", ("overhead_s", "step_s"), STEP, note)


def repeating_model(artefacts: Artefacts) -> Path:
    """MiMo-7B's shape in int4, whose greedy text repeats itself."""
    make = [
        sys.executable,
        "-m",
        "tools.make_checkpoint",
        "--shape",
        "mimo-7b",
        "--cycle",
        str(CYCLE),
    ]
    make += ["--tokenizer", Store().ensure("smollm2"), "--out"]
    pack = [sys.executable, "-m", "thinslice", "pack", "--dtype", "int4"]

    def packed(path: Path) -> None:
        source = artefacts.need("mimo-7b-cycle", lambda source: run_process([*make, source]))
        run_process([*pack, source, "--out", path])

    artefacts.check_space(STREAMED_BYTES)
    return artefacts.need("mimo-7b-cycle-int4", packed)


def streamed_cases(setting: Setting) -> list[Case]:
    """Weights that do not fit: a sweep serves all sequences, and all drafts."""
    model = repeating_model(setting.artefacts)
    common = ("--memory", setting.memory, "--passes", 1, "--new-tokens")

    def batch(sequences: int) -> Run:
        options = (*common, 24, "--draft", "off", "--sequences", sequences)
        return figure_of("tokens_per_s", lambda: run_engine("batch", model, *options))

    runs = {OURS: batch(8), ONE: batch(1)}
    return [
        Case("streamed-batch-of-8", "tokens/s", runs, {ONE: 6.0}, f"in {setting.memory}"),
        drafting_case("streamed-ngram", 2.0, "ngram", model, *common, 64, "--context", 1024),
    ]


CASES: dict[str, Callable[[Setting], "Case | list[Case]"]] = {
    "mtp": mtp_cases,
    "ngram": ngram_case,
    "load": load_cases,
    "shared": shared_case,
    "overhead": overhead_case,
    "streamed": streamed_cases,
}


def main() -> int:
    """Read the arguments, measure, report."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=CASES, default=None)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rate", type=float, default=4.0, help="requests a second")
    parser.add_argument("--memory", default="2GiB", help="the budget of the streamed cases")
    parser.add_argument("--peers", type=Path, default=DEFAULT_FOLDER)
    parser.add_argument("--work", type=Path, help="where large files go; in the peers' folder")
    parser.add_argument("--keep", action="store_true", help="leave the large files there")
    options = parser.parse_args()
    artefacts = Artefacts(options.work or options.peers / "work", keep=options.keep)
    rows: list[Row] = []
    try:
        use_cores(options.threads)
        with tempfile.TemporaryDirectory() as folder:
            peers = PeerEnvironment(options.peers)
            names = options.only or list(CASES)
            if "load" in names:
                peers.set_up()
            sizes = (options.threads, options.rate, options.memory)
            setting = Setting(Path(folder), artefacts, peers, *sizes)
            for name in names:
                made = CASES[name](setting)
                for case in made if isinstance(made, list) else [made]:
                    rows += run_case(case, options.rounds)
    except (RunError, ThinsliceError) as error:
        sys.exit(f"error: {error}")
    finally:
        artefacts.clean_up()
    return report("engine", rows, {"rounds": options.rounds, "rate": options.rate})


if __name__ == "__main__":
    sys.exit(main())
