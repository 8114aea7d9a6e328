"""Hold the answers of two checkouts against each other, bit for bit: what a change of shape keeps.

    python tools/same_answers.py ../other-checkout [--only WORD]

Runs the same prompts through both, each with its own .venv, over models in every format, budgets
that keep the weights in memory and budgets that stream them, with drafts and without, alone and in
a batch. Compared are the tokens and the bits of the log-probabilities of the twenty likeliest at
each place, which any other bit of a logit changes. Prints a table; exits with 1 where anything
differs. Needs about 1 GB of disk for the models that it makes, and ten minutes.
"""

import argparse
import hashlib
import json
import os
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve()
PROMPTS = (
    "The capital of France is",
    "पानी का सूत्र क्या है? एक वाक्य में बताइए।",
    "Count: " + " ".join(str(number) for number in range(120)),
)
# Made with the tokenizer of the embedded model, which a vocabulary of 49,152 takes.
MADE = ("smollm2-135m", "small-mimo")


@dataclass(frozen=True)
class Case:
    """A model and how it is loaded."""

    model: str
    dtype: str
    memory: str
    context: int
    draft: str
    max_num_seqs: int

    @property
    def name(self) -> str:
        return " ".join(str(value) for value in asdict(self).values())


def cases() -> Iterator[Case]:
    """Every format, resident and streamed, with and without drafts, one sequence and three."""
    formats = [("smollm2", dtype) for dtype in ("auto", "int8", "float32")]
    formats += [("smollm2-135m", dtype) for dtype in ("int8", "int4", "float32")]
    formats += [("small-mimo", dtype) for dtype in ("int8", "int4")]
    for model, dtype in formats:
        for memory in ("1500MiB", "400MiB"):
            for draft, max_num_seqs in (("off", 1), ("auto", 3)):
                yield Case(model, dtype, memory, 512, draft, max_num_seqs)


def make_models(folder: Path) -> None:
    """Write the checkpoints, with the tokenizer of the embedded model."""
    from thinslice.store.store import Store  # noqa: PLC0415 - the comparing side needs none of it
    from tools.make_checkpoint import CONFIGS, Job, write_checkpoint  # noqa: PLC0415

    tokenizer = Store().ensure("smollm2", None, offline=False)
    CONFIGS["small-mimo"]["vocab_size"] = 49152
    for shape in MADE:
        write_checkpoint(Job(shape, folder / shape, tokenizer=tokenizer))


def digest_of(case: Case, folder: Path) -> str:
    """A digest of all tokens and log-probabilities, or the error that there was."""
    from thinslice import LLM, SamplingParams  # noqa: PLC0415
    from thinslice.errors import ThinsliceError  # noqa: PLC0415

    model = str(folder / case.model) if case.model in MADE else case.model
    settings: dict[str, Any] = asdict(case)
    del settings["model"]
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=20)
    sha = hashlib.sha256()
    try:
        with LLM(model, **settings) as llm:
            for completion in llm.generate(list(PROMPTS), params):
                sha.update(repr(completion.token_ids).encode())
                for token in completion.logprobs:
                    top = [value for _, value in token.top]
                    sha.update(struct.pack(f"<{len(top) + 1}d", token.logprob, *top))
                    sha.update(repr([token_id for token_id, _ in token.top]).encode())
    except ThinsliceError as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return sha.hexdigest()[:16]


def answers_of(tree: Path, folder: Path, chosen: Sequence[Case]) -> dict[str, str]:
    """What a checkout answers; each case in a process of its own."""
    home = folder / f"home-{hashlib.sha256(str(tree).encode()).hexdigest()[:8]}"
    environment = {**os.environ, "THINSLICE_HOME": str(home)}
    python = tree / ".venv" / "bin" / "python"
    answers = {}
    for case in chosen:
        command = [str(python), str(HERE), "--case", json.dumps(asdict(case)), str(folder)]
        result = subprocess.run(
            command, cwd=tree, env=environment, capture_output=True, text=True, check=False
        )
        lines = result.stdout.splitlines() or result.stderr.splitlines() or ["nothing printed"]
        answers[case.name] = lines[-1]
        print(f"{tree}: {case.name}: {lines[-1]}", file=sys.stderr)
    return answers


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("other", type=Path, help="a checkout with its .venv")
    parser.add_argument("--only", default="", help="only cases whose name has this word")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(digest_of(Case(**json.loads(options.case)), options.other))
        return 0
    here, other = HERE.parents[1], options.other.resolve()
    chosen = [case for case in cases() if options.only in case.name]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_models(folder)
        mine, theirs = answers_of(here, folder, chosen), answers_of(other, folder, chosen)
    table = Table("case", here.name, other.name, "", box=None)
    for name, answer in mine.items():
        table.add_row(name, answer, theirs[name], "" if answer == theirs[name] else "DIFFERS")
    Console(width=200).print(table)
    num_different = sum(answer != theirs[name] for name, answer in mine.items())
    print(f"{len(mine)} cases, {num_different} differ")
    return int(num_different > 0)


if __name__ == "__main__":
    sys.path.insert(0, str(HERE.parents[1]))
    sys.exit(main())
