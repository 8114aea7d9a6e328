"""The engine by itself and beside llama-server: `python benchmarks/engine.py`.

Drafting with and without, whose tokens must be the same; requests that come by and by; a prefix
that a hundred requests share; what a step takes beside the model. `--model DIR --memory 2GiB` adds
the cases where weights are streamed. A table goes to standard error; the last line is JSON.
llama-server is built at the first run, as for benchmarks/peers.py.
"""

import argparse
import json
import random
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
    Case,
    Figure,
    Row,
    Run,
    RunError,
    report,
    run_case,
    run_json,
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


@dataclass(frozen=True)
class Setting:
    """What all cases share."""

    work: Path
    peers: PeerEnvironment
    threads: int
    rate: float


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
    prompts = setting.work / "prompts.json"
    prompts.write_text(json.dumps(texts))
    packed = setting.work / "small-int8"
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
    """One round of requests gives both figures, so each is measured once for the two cases."""
    path = Store().ensure("smollm2")
    requests = arrivals(setting.rate, load_tokenizer(open_checkpoint(path)))
    file = setting.work / "requests.json"
    write_requests(file, requests)
    command = [setting.peers.llama("llama-server"), "-m", path]
    command += ["-np", NUM_SLOTS, "-c", NUM_SLOTS * SLOT_CONTEXT, "-t", setting.threads, "-ngl", 0]

    ours = Kept(lambda: run_engine("load", "smollm2", "--prompts", file))
    theirs = Kept(lambda: serve_with_llama(command, requests))
    note = f"64 requests, {setting.rate:g} a second; prompts 32-512, outputs 16-256; random words"
    rates = {OURS: figure_of("tokens_per_s", ours), LLAMA: figure_of("tokens_per_s", theirs)}
    waits = {
        OURS: figure_of("p99_wait_s", ours.again),
        LLAMA: figure_of("p99_wait_s", theirs.again),
    }
    return [
        Case("load-tokens", "tokens/s", rates, {LLAMA: 2.5}, note),
        Case("load-p99-first-token", "s", waits, {LLAMA: 2.0}, note),
    ]


class Kept:
    """A measurement whose results give a second case its figures, in the same order."""

    def __init__(self, measure: Callable[[], dict[str, Any]]) -> None:
        self._measure = measure
        self._results: list[dict[str, Any]] = []

    def __call__(self) -> dict[str, Any]:
        """Measure."""
        self._results.append(self._measure())
        return self._results[-1]

    def again(self) -> dict[str, Any]:
        """The first result that was not given again yet. Errors: RunError where there is none."""
        if not self._results:
            raise RunError("it was not measured")
        return self._results.pop(0)


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


def streamed_cases(model: Path, memory: str) -> list[Case]:
    """Weights that do not fit: a sweep serves all sequences, and all drafts."""
    common = ("--memory", memory, "--new-tokens", 24, "--passes", 1)

    def batch(sequences: int) -> Run:
        return figure_of(
            "tokens_per_s",
            lambda: run_engine("batch", model, *common, "--draft", "off", "--sequences", sequences),
        )

    runs = {OURS: batch(8), ONE: batch(1)}
    return [
        Case("streamed-batch-of-8", "tokens/s", runs, {ONE: 6.0}, f"{model.name} in {memory}"),
        drafting_case("streamed-ngram", 2.0, "ngram", model, *common, "--context", 1024),
    ]


CASES: dict[str, Callable[[Setting], "Case | list[Case]"]] = {
    "mtp": mtp_cases,
    "ngram": ngram_case,
    "load": load_cases,
    "shared": shared_case,
    "overhead": overhead_case,
}


def main() -> int:
    """Read the arguments, measure, report."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=CASES, default=None)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rate", type=float, default=4.0, help="requests a second")
    parser.add_argument("--model", type=Path, help="a model for the streamed cases")
    parser.add_argument("--memory", default="2GiB", help="the budget of those")
    parser.add_argument("--peers", type=Path, default=DEFAULT_FOLDER)
    options = parser.parse_args()
    rows: list[Row] = []
    try:
        use_cores(options.threads)
        with tempfile.TemporaryDirectory() as folder:
            peers = PeerEnvironment(options.peers)
            names = options.only or ([] if options.model else list(CASES))
            if "load" in names:
                peers.set_up()
            setting = Setting(Path(folder), peers, options.threads, options.rate)
            cases: list[Case] = []
            for name in names:
                made = CASES[name](setting)
                cases += made if isinstance(made, list) else [made]
            if options.model is not None:
                cases += streamed_cases(options.model, options.memory)
            for case in cases:
                rows += run_case(case, options.rounds)
    except (RunError, ThinsliceError) as error:
        sys.exit(f"error: {error}")
    return report("engine", rows, {"rounds": options.rounds, "rate": options.rate})


if __name__ == "__main__":
    sys.exit(main())
