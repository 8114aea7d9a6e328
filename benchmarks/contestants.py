"""Who takes part in the comparison in memory, and the files they work on."""

import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import ROOT, Artefacts, Figure, Run, RunError, run_json, run_ours, run_process
from peer_environment import PeerEnvironment

from thinslice.plan.shape_from_config import shape_from_config
from thinslice.plan.weight_layout import layout_of, packed_layout, stored_as
from thinslice.store.store import Store

sys.path.append(str(ROOT))  # tools is a folder of scripts, not an installed package
from tools.make_checkpoint import CONFIGS

DTYPES = ("int4", "int8", "bfloat16")
# Groups of 32 numbers with a scale of 16 bits, here as there; but for thinslice's head, 8 bits.
GGUF_TYPES = {"int4": "Q4_0", "int8": "Q8_0"}
NUM_SEQUENCES = 16
BATCH_PROMPT = 32

Result = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """What is run, and how much of it.

    Attributes:
        shape: the large one, as tools/make_checkpoint.py knows it.
        dtype: thinslice's in every case; None takes what the case is about, as files hold it.
        layers: that transformers runs of the large shape, for all of them.
    """

    threads: int
    shape: str = "mimo-7b"
    prompt_tokens: int = 512
    new_tokens: int = 32
    rounds: int = 3
    layers: int = 12
    dtype: str | None = None


# To test the programs themselves.
QUICK = {"shape": "smollm2-135m", "prompt_tokens": 64, "new_tokens": 4, "rounds": 1}


class Contestants:
    """Makes the runs of a case, and the files they read."""

    def __init__(self, peers: PeerEnvironment, artefacts: Artefacts, settings: Settings) -> None:
        self.peers = peers
        self.artefacts = artefacts
        self.settings = settings
        self.threads = str(settings.threads)
        self.smollm2 = Store().ensure("smollm2", None)

    def small_model(self) -> Path:
        """SmolLM2 as a GGUF in Q4_1."""
        return self.smollm2

    def checkpoint(self) -> Path:
        """Random weights of the large shape in bfloat16."""
        shape = self.settings.shape
        script = ROOT / "tools" / "make_checkpoint.py"
        command = [sys.executable, script, "--shape", shape, "--tokenizer", self.smollm2, "--out"]
        return self.artefacts.need(shape, lambda path: run_process([*command, path]))

    def packed(self, dtype: str) -> Path:
        """The same, as thinslice runs them."""
        if dtype == "bfloat16":
            return self.checkpoint()
        command = [sys.executable, "-m", "thinslice", "pack"]
        return self.artefacts.need(
            f"{self.settings.shape}-{dtype}",
            lambda path: run_process(
                [*command, self.checkpoint(), "--dtype", dtype, "--out", path]
            ),
        )

    def gguf(self, dtype: str) -> Path:
        """Random weights of the large shape as llama.cpp runs them."""
        shape, type_ = self.settings.shape, GGUF_TYPES[dtype]
        command = [sys.executable, "-m", "tools.make_gguf", "--shape", shape, "--type", type_]
        return self.artefacts.need(
            f"{shape}-{type_.lower()}.gguf",
            lambda path: run_process([*command, "--out", path]),
        )

    def ours(
        self,
        model: Callable[[], Path],
        figure: Callable[[Result], float],
        **amounts: int,
    ) -> Run:
        """thinslice; ``amounts`` are options of run_thinslice.py."""

        def run() -> Figure:
            words = [f"--{name.replace('_', '-')}={value}" for name, value in amounts.items()]
            words += ["--dtype", self.settings.dtype or "auto", "--threads", self.threads]
            result = run_ours(model(), *words)
            return Figure(figure(result), result)

        return run

    def llama_bench(self, model: Callable[[], Path], prompt_tokens: int, new_tokens: int) -> Run:
        """One repetition after llama-bench's own warm-up."""

        def run() -> Figure:
            amounts = ["-p", str(prompt_tokens), "-n", str(new_tokens), "-t", self.threads]
            program = self.peers.llama("llama-bench")
            result = run_json([program, "-m", model(), *amounts, "-r", "1", "-o", "jsonl"])
            return Figure(result["avg_ts"], {"model_bytes": result["model_size"]})

        return run

    def llama_batched_bench(self, new_tokens: int) -> Run:
        """Several sequences at once, each with a prompt of its own."""

        def run() -> Figure:
            program = self.peers.llama("llama-batched-bench")
            sizes = ["-npp", BATCH_PROMPT, "-ntg", new_tokens, "-npl", NUM_SEQUENCES]
            words = [str(size) for size in sizes]
            command = [program, "-m", self.smollm2, *words, "-t", self.threads]
            result = run_json([*command, "--output-format", "jsonl"])
            return Figure(result["speed_tg"], {"prefill_s": result["t_pp"]})

        return run

    def library(
        self,
        kind: str,
        model: Callable[[], Path],
        figure: Callable[[Result], float],
        **amounts: int,
    ) -> Run:
        """A peer of run_peer.py; ``amounts`` are its options."""

        def run() -> Figure:
            words = [f"--{name.replace('_', '-')}={value}" for name, value in amounts.items()]
            script = ROOT / "benchmarks" / "run_peer.py"
            command = [*self.peers.python, script, kind, model(), "--threads", self.threads]
            result = run_json([*command, *words])
            return Figure(figure(result), result)

        return run

    @property
    def num_layers(self) -> int:
        """Layers of the large shape."""
        return int(CONFIGS[self.settings.shape]["num_hidden_layers"])

    def read_limit(self, dtype: str) -> Run:
        """Tokens/s if what thinslice reads for a token came as fast as memory can be read."""
        shape = shape_from_config({**CONFIGS[self.settings.shape], "num_nextn_predict_layers": 0})
        if dtype == "bfloat16":
            layout = layout_of(shape, stored_as(shape, "BF16"), dtype)
        else:
            layout = packed_layout(shape, dtype)
        token_bytes = sum(matrix.kept_bytes(matrix.rows) for matrix in layout.sweep)

        def run() -> Figure:
            script = ROOT / "benchmarks" / "run_thinslice.py"
            command = [sys.executable, script, "--read-memory", "--threads", self.threads]
            rate = run_json(command)["bytes_per_s"]
            return Figure(rate / token_bytes, {"bytes_per_s": rate, "token_bytes": token_bytes})

        return run

    def first_output(self, command: list[str | Path]) -> Run:
        """Seconds from a process's start to the first letter it writes, its files in memory."""

        def run() -> Figure:
            first_letter_s(command)
            return Figure(first_letter_s(command))

        return run


def first_letter_s(command: list[str | Path]) -> float:
    """Start a process, wait for what it writes, end it. Errors: RunError if it writes nothing."""
    start = time.perf_counter()
    quiet = subprocess.DEVNULL
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=quiet, stdin=quiet, cwd=ROOT
    ) as process:
        assert process.stdout is not None
        letter = process.stdout.read(1)
        while letter.isspace():
            letter = process.stdout.read(1)
        seconds = time.perf_counter() - start
        process.kill()
    if not letter:
        raise RunError(f"{Path(command[0]).name} wrote nothing")
    return seconds


def decode_rate(result: Result) -> float:
    """Tokens/s after the first one, of all sequences together."""
    return result["decode_tokens"] / result["decode_s"]
