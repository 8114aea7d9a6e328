"""The budget is a ceiling: the real command line inside a memory control group of that size."""

import json
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.speculation import SMALL_MTP
from thinslice.units import MIB, parse_bytes
from tools.make_checkpoint import Job, write_checkpoint

GROUPS = Path("/sys/fs/cgroup")
WORDS = "The quick brown fox jumps over the lazy dog near the river bank. "


@contextmanager
def memory_group(num_bytes: int) -> Iterator[Path | None]:
    """A control group that holds at most so much, without swap; None where none can be made."""
    version_1 = (GROUPS / "memory").is_dir()
    folder = (GROUPS / "memory" if version_1 else GROUPS) / f"thinslice-{uuid.uuid4().hex}"
    try:
        folder.mkdir()
        name = "memory.limit_in_bytes" if version_1 else "memory.max"
        (folder / name).write_text(str(num_bytes))
    except OSError:
        if folder.is_dir():
            folder.rmdir()
        yield None
        return
    try:
        swap = folder / ("memory.memsw.limit_in_bytes" if version_1 else "memory.swap.max")
        if swap.exists():
            swap.write_text(str(num_bytes) if version_1 else "0")
        yield folder
    finally:
        folder.rmdir()


def run_inside(group: Path | None, *arguments: str, stdin: str) -> subprocess.CompletedProcess[str]:
    return python_inside(group, "-m", "thinslice", *arguments, stdin=stdin)


def python_inside(
    group: Path | None, *arguments: str, stdin: str = ""
) -> subprocess.CompletedProcess[str]:
    enter = "" if group is None else f"echo $$ > {group}/cgroup.procs; "
    return subprocess.run(
        ["sh", "-c", f'{enter}exec "$@"', "sh", sys.executable, *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
        env=os.environ,
    )


@pytest.mark.parametrize(
    ("memory", "num_prompt_tokens", "num_tokens", "dtype"),
    [
        ("floor", 200, 1, "auto"),
        ("265MiB", 3600, 2, "auto"),  # streamed
        ("1GiB", 4000, 64, "auto"),
        ("300MiB", 1500, 1, "bfloat16"),
        pytest.param("320MiB", 1500, 1, "auto", marks=pytest.mark.long),
        pytest.param("2GiB", 4000, 4, "auto", marks=pytest.mark.long),
        pytest.param("floor", 200, 1, "bfloat16", marks=pytest.mark.long),
        pytest.param("250MiB", 3600, 2, "bfloat16", marks=pytest.mark.long),
        pytest.param("1GiB", 4000, 64, "bfloat16", marks=pytest.mark.long),
        pytest.param("2GiB", 4000, 4, "bfloat16", marks=pytest.mark.long),
    ],
)
def test_the_process_lives_within_its_budget_as_planned(
    memory: str, num_prompt_tokens: int, num_tokens: int, dtype: str, smollm2_path: Path
) -> None:
    """Killed by the kernel, the process would not exit with 0. The peak is the planned one, to
    15%, with a context that the prompt fills.
    """
    context = num_prompt_tokens + num_prompt_tokens // 20 + num_tokens
    fit = ["--dtype", dtype, "--context", str(context)]
    memory = floor_of("smollm2", *fit) if memory == "floor" else memory
    budget = parse_bytes(memory)
    prompt = (WORDS * 400)[: num_prompt_tokens * 4]
    arguments = ["run", "smollm2", "--raw", "--json", "--ignore-eos", "--memory", memory, *fit]
    with memory_group(budget) as group:
        done = run_inside(group, *arguments, "--max-tokens", str(num_tokens), stdin=prompt)
        if group is None:
            print("no memory control group can be made here: only the process's peak is checked")
        assert done.returncode == 0, (done.returncode, done.stderr)
    report = json.loads(done.stdout)
    assert report["completion_tokens"] == num_tokens
    assert report["prompt_tokens"] > num_prompt_tokens * 0.8
    planned = report["plan"]["peak_bytes"]
    assert 0.85 * planned <= report["peak_bytes"] <= planned <= budget


@pytest.fixture(scope="module")
def small_mimo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of 0.2 GB with a prediction layer."""
    folder = tmp_path_factory.mktemp("models") / "small-mimo"
    write_checkpoint(Job("small-mimo", folder, tokenizer=SMALL_MTP))
    return folder


@pytest.mark.parametrize("memory", ["floor", "1GiB"])
def test_a_process_that_drafts_lives_within_its_budget_as_planned(
    memory: str, small_mimo: Path, is_long: bool
) -> None:
    """Streamed and resident, with the prediction layer loaded and its rows taken in."""
    context, num_tokens = 1600, 64 if is_long else 12
    fit = ["--context", str(context), "--draft", "mtp", "--dtype", "bfloat16"]
    memory = floor_of(str(small_mimo), *fit) if memory == "floor" else memory
    budget = parse_bytes(memory)
    arguments = ["run", str(small_mimo), "--raw", "--json", "--ignore-eos", "--memory", memory]
    with memory_group(budget) as group:
        done = run_inside(
            group, *arguments, *fit, "--max-tokens", str(num_tokens), stdin=(WORDS * 30)[:1500]
        )
        assert done.returncode == 0, (done.returncode, done.stderr)
    report = json.loads(done.stdout)
    assert report["completion_tokens"] == num_tokens
    assert report["drafted_tokens"] > 0
    assert report["plan"]["parts"]["drafting"] > 20 * MIB
    planned = report["plan"]["peak_bytes"]
    assert 0.85 * planned <= report["peak_bytes"] <= planned <= budget


def floor_of(model: str, *fit: str) -> str:
    """The budget that a refusal names as the least that fits."""
    refused = run_inside(None, "run", model, "--memory", "60MiB", *fit, stdin="hi")
    assert refused.returncode == 3
    return refused.stderr.split("--memory ")[-1].strip()
