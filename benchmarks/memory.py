"""The ceiling and the plan's truth on a large model: `python benchmarks/memory.py`.

MiMo-7B's shape with random weights is packed and run by the real command line, each budget in a
memory control group of exactly that size without swap: killed by the kernel, a run has failed. The
prompt has 4,000 tokens, the completion 64. The peak the process had stands beside the planned one,
and the speed beside the predicted one, both without drafts; all budgets must give the same text.

`--written-packed` writes the packed model as it is, for one whose float weights the disk could not
hold: `--shape qwq-32b --written-packed --budgets 8GiB --prompt-tokens 256 --new-tokens 8`.

The last line of standard output is JSON. Large files, 21 GB, are deleted unless --keep. Needs root
on Linux.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from harness import (
    PIPE_WIDTH,
    ROOT,
    Artefacts,
    RunError,
    console,
    drop_page_cache,
    machine,
    memory_group,
)
from rich.console import Console
from rich.table import Table

from thinslice.store.store import Store
from thinslice.units import format_bytes, parse_bytes

BUDGETS = ("1GiB", "2GiB", "4GiB", "8GiB")
PACK_BUDGET = "1GiB"
WORK_BYTES = 21 * 10**9
# What a peak must reach of the planned one, and a speed of the predicted one, both ways.
LEAST_OF_PLAN, SPEED_TOLERANCE = 0.85, 0.25
TIMEOUT_S = 7200
SENTENCE = "The quick brown fox jumps over the lazy dog near the river bank."

Result = dict[str, Any]


def inside(budget: str, *arguments: str | Path, stdin: str = "") -> str:
    """Standard output of the command line in a control group of the budget's size.

    Errors: RunError where it does not end well.
    """
    words = [sys.executable, "-m", "thinslice", *map(str, arguments), "--memory", budget]
    with memory_group(parse_bytes(budget)) as group:
        enter = f'echo $$ > "{group}/cgroup.procs" && exec "$@"'
        done = subprocess.run(
            ["sh", "-c", enter, "sh", *words],
            input=stdin,
            capture_output=True,
            text=True,
            check=False,
            timeout=TIMEOUT_S,
            cwd=ROOT,
        )
    if done.returncode != 0:
        raise RunError(f"{budget}: exit code {done.returncode}; {done.stderr.strip()[-300:]}")
    return done.stdout


def run(model: Path, budget: str, amounts: tuple[int, int], kv_dtype: str) -> Result:
    """One run and what it says of itself. ``amounts`` are tokens of prompt and completion."""
    num_prompt, num_tokens = amounts
    drop_page_cache(model)
    # A word and its space are one token of the tokenizer that goes with random weights.
    prompt = " ".join(islice(cycle(SENTENCE.split()), num_prompt - num_prompt // 20))
    options = ("--raw", "--json", "--ignore-eos", "--temperature", "0", "--draft", "off")
    context = num_prompt + num_prompt // 20 + num_tokens
    sizes = ("--max-tokens", str(num_tokens), "--context", str(context), "--kv-dtype", kv_dtype)
    report: Result = json.loads(inside(budget, "run", model, *options, *sizes, stdin=prompt))
    return report


def verdict(report: Result) -> Result:
    """The shares that count, and whether they are what they should be."""
    plan, predicted = report["plan"], report["predicted_tokens_per_s"]
    peak_share = report["peak_bytes"] / plan["peak_bytes"]
    speed_share = report["decode_tokens_per_s"] / predicted
    return {
        "budget_bytes": plan["budget_bytes"],
        "planned_bytes": plan["peak_bytes"],
        "peak_bytes": report["peak_bytes"],
        "peak_share": peak_share,
        "decode_tokens_per_s": report["decode_tokens_per_s"],
        "predicted_tokens_per_s": predicted,
        "prefill_s": report["prefill_s"],
        "prompt_tokens": report["prompt_tokens"],
        "is_under": report["peak_bytes"] <= plan["peak_bytes"] <= plan["budget_bytes"],
        "is_plan_true": peak_share >= LEAST_OF_PLAN,
        "is_speed_true": abs(speed_share - 1) <= SPEED_TOLERANCE,
        "text": report["text"],
    }


def table_of(results: Sequence[Result]) -> Table:
    """Budgets, peaks and speeds beside what was planned."""
    table = Table(title="memory")
    for heading in ("budget", "planned", "peak", "of plan", "prefill", "decode", "predicted", ""):
        table.add_column(heading, no_wrap=True)
    for one in results:
        checks = ("is_under", "is_plan_true", "is_speed_true")
        failed = [name.removeprefix("is_") for name in checks if not one[name]]
        table.add_row(
            format_bytes(one["budget_bytes"]),
            format_bytes(one["planned_bytes"]),
            format_bytes(one["peak_bytes"]),
            f"{one['peak_share']:.0%}",
            f"{one['prefill_s']:.1f} s",
            f"{one['decode_tokens_per_s']:.2f}/s",
            f"{one['predicted_tokens_per_s']:.2f}/s",
            f"not {', '.join(failed)}" if failed else "ok",
        )
    return table


def make_model(artefacts: Artefacts, shape: str, dtype: str, *, written_packed: bool) -> Path:
    """A random checkpoint, packed within a budget of its own unless bfloat16 is asked for."""
    words = ["--shape", shape, "--tokenizer", Store().ensure("smollm2")]

    def make(tool: str, *options: str | Path) -> None:
        command = [sys.executable, "-m", f"tools.{tool}", *words, *options]
        subprocess.run(command, check=True, cwd=ROOT)

    if written_packed:
        name = f"{shape}-{dtype}"
        return artefacts.need(
            name, lambda path: make("make_packed", "--dtype", dtype, "--out", path)
        )
    source = artefacts.need(shape, lambda path: make("make_checkpoint", "--out", path))
    if dtype == "bfloat16":
        return source
    pack = ("pack", source, "--dtype", dtype, "--out")
    return artefacts.need(f"{shape}-{dtype}", lambda path: inside(PACK_BUDGET, *pack, path))


def main() -> int:
    """Run every budget; 1 where a ceiling or a promise did not hold."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="mimo-7b", help="as tools/make_checkpoint.py has them")
    parser.add_argument("--dtype", choices=("int4", "int8", "bfloat16"), default="int4")
    parser.add_argument("--kv-dtype", choices=("bfloat16", "int8"), default="int8")
    parser.add_argument("--written-packed", action="store_true", help="no float weights are made")
    parser.add_argument("--budgets", nargs="+", default=BUDGETS)
    parser.add_argument("--prompt-tokens", type=int, default=4000)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--work", type=Path, default=Path("build/benchmarks"))
    parser.add_argument("--keep", action="store_true", help="leave the checkpoints")
    options = parser.parse_args()
    artefacts = Artefacts(options.work, keep=options.keep)
    try:
        artefacts.check_space(WORK_BYTES)
        written = options.written_packed
        model = make_model(artefacts, options.shape, options.dtype, written_packed=written)
        # Measures the machine's speeds where that was not done before.
        measure = [sys.executable, "-m", "thinslice", "plan", model]
        subprocess.run(measure, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
        results = []
        for budget in options.budgets:
            console.print(f"running in {budget}")
            amounts = (options.prompt_tokens, options.new_tokens)
            report = run(model, budget, amounts, options.kv_dtype)
            results.append(verdict(report))
    except RunError as error:
        console.print(f"failed: {error}")
        return 1
    finally:
        artefacts.clean_up()
    width = None if sys.stderr.isatty() else PIPE_WIDTH
    Console(stderr=True, highlight=False, markup=False, width=width).print(table_of(results))
    has_one_text = len({one.pop("text") for one in results}) == 1
    print(
        json.dumps({"benchmark": "memory", **machine(), "one_text": has_one_text, "runs": results})
    )
    checks = ("is_under", "is_plan_true", "is_speed_true")
    return int(not has_one_text or any(not one[name] for one in results for name in checks))


if __name__ == "__main__":
    sys.exit(main())
