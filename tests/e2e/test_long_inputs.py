"""Whatever comes in, and however much of it, the process stays within its budget and answers."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.test_ceiling import memory_group, python_inside, run_inside
from tests.terminals import thinslice_in_terminal
from thinslice.units import MIB

SIZE = 5_000_000
KINDS = {
    "hindi": "पानी का सूत्र क्या है और उसका उपयोग कहाँ होता है? ",
    "emoji": "😀🎉👩‍👩‍👧🇮🇳",
    "spaces": " ",
    "letter": "a",
    "random": "",
}
# Of one letter or of emoji alone nothing but the whole tells where tokens end.
REFUSALS = {"spaces": "empty", "letter": "in a row", "emoji": "in a row"}
MEMORY = "391MiB"
# What a library's user does: the longest text that there is, then one that fits.
BY_LIBRARY = """
import sys
from pathlib import Path
from thinslice import LLM, SamplingParams
from thinslice.errors import RequestError
llm = LLM("smollm2", memory=sys.argv[2], context=1024)
text = Path(sys.argv[1]).read_text(encoding="utf-8")
for prompt in (text, [{"role": "user", "content": text}]):
    try:
        llm.generate([prompt])
        sys.exit("a prompt that cannot fit was taken")
    except RequestError as error:
        print(error)
print(llm.generate(["Hello"], SamplingParams(max_tokens=4))[0].finish_reason)
"""
# The most samples and likeliest tokens that may be asked for; of more prompts than there is room.
AT_THEIR_LARGEST = """
from thinslice import LLM, SamplingParams
from thinslice.config import MAX_LOGPROBS, MAX_SAMPLES
from thinslice.errors import RequestError
from thinslice.memory.meter import peak_rss_bytes
llm = LLM("smollm2", memory="615MiB", context=512, max_num_seqs=16)
largest = {"n": MAX_SAMPLES, "logprobs": MAX_LOGPROBS, "ignore_eos": True}
prompts = [f"Number {index}" for index in range(100)]
try:
    llm.generate(prompts, SamplingParams(**largest))
    raise SystemExit("more was promised than there is room for")
except RequestError as error:
    assert "max_tokens" in str(error), error
answers = llm.generate(prompts[:4], SamplingParams(**largest, max_tokens=4))
assert all(len(one.logprobs) == 4 for one in answers)
print(peak_rss_bytes(), llm.plan.peak_bytes, llm.plan.budget_bytes)
"""


def drawn(kind: str, always: str) -> Any:
    """A kind, which only the long form tries where it is not the one of always."""
    return pytest.param(kind, marks=() if kind == always else pytest.mark.long)


def text_of(kind: str, num_bytes: int = SIZE) -> str:
    if kind == "random":
        noise = random.Random(7).randbytes(num_bytes * 2 // 3)
        return noise.decode(errors="replace")[: num_bytes // 3]
    unit = KINDS[kind]
    return unit * (num_bytes // len(unit.encode()))


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_that_is_far_too_long_is_refused_within_the_budget(
    kind: str, smollm2_path: Path
) -> None:
    with memory_group(391 * MIB) as group:
        done = run_inside(
            group, "run", "smollm2", "--memory", MEMORY, "--max-tokens", "4", stdin=text_of(kind)
        )
    assert done.returncode == 5, (done.returncode, done.stderr[-500:])
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert REFUSALS.get(kind, "context") in errors[0]


@pytest.mark.parametrize("kind", [drawn(kind, "hindi") for kind in KINDS])
def test_a_file_that_is_far_too_long_is_refused_within_the_budget(
    kind: str, tmp_path: Path, smollm2_path: Path
) -> None:
    path = tmp_path / "long.txt"
    path.write_text(text_of(kind), encoding="utf-8")
    with memory_group(391 * MIB) as group:
        done = run_inside(
            group, "run", "smollm2", "--memory", MEMORY, "Read:", "--file", str(path), stdin=""
        )
    assert done.returncode == 5, (done.returncode, done.stderr[-500:])
    assert "context" in done.stderr or "in a row" in done.stderr


@pytest.mark.parametrize("kind", [drawn(kind, "emoji") for kind in KINDS])
def test_a_message_that_is_far_too_long_is_told_and_the_chat_goes_on(
    kind: str, smollm2_path: Path
) -> None:
    with memory_group(415 * MIB) as group:
        done = run_inside(
            group,
            *("chat", "smollm2", "--memory", "415MiB", "--max-tokens", "2"),
            stdin=" ".join(text_of(kind).split("\n")) + "\nHello\n",
        )
    # Piped, it ends with the code of its first error.
    num_errors = 0 if kind == "spaces" else 1
    assert done.returncode == 5 * num_errors, (done.returncode, done.stderr[-500:])
    assert done.stdout.strip(), "the second message was not answered"
    if kind != "spaces":
        assert done.stderr.count("error: ") == 1


@pytest.mark.parametrize("kind", [drawn(kind, "random") for kind in KINDS])
def test_a_paste_that_is_far_too_long_is_told_and_the_chat_goes_on(
    kind: str, tmp_path: Path, smollm2_path: Path
) -> None:
    text = "".join(one if one.isprintable() else " " for one in text_of(kind))
    options = ("chat", "smollm2", "--memory", "415MiB", "--max-tokens", "2")
    with (
        memory_group(415 * MIB) as group,
        thinslice_in_terminal(*options, home=tmp_path) as program,
    ):
        if group is not None:
            (group / "cgroup.procs").write_text(str(program.pid))
        program.wait_for("/help for commands")
        program.wait_for_prompt()
        program.type(f"\x1b[200~{text}\x1b[201~\r")
        if kind != "spaces":
            program.wait_for("error: ")
        program.wait_for_prompt()
        program.type("\x03")
        program.wait_for_prompt()
        program.type("/tokens\r")
        assert "0 of " in program.wait_for_prompt()
        program.type("/bye\r")
        assert program.end() == 0


def test_log_probabilities_of_many_samples_stay_within_the_plan(smollm2_path: Path) -> None:
    with memory_group(615 * MIB) as group:
        done = python_inside(group, "-c", AT_THEIR_LARGEST)
    assert done.returncode == 0, (done.returncode, done.stderr[-500:])
    peak, planned, budget = map(int, done.stdout.split())
    assert peak <= planned <= budget


@pytest.mark.parametrize("kind", ["hindi", "random"])
def test_a_library_refuses_it_too_and_goes_on(
    kind: str, tmp_path: Path, smollm2_path: Path
) -> None:
    path = tmp_path / "long.txt"
    path.write_text(text_of(kind), encoding="utf-8")
    with memory_group(391 * MIB) as group:
        done = python_inside(group, "-c", BY_LIBRARY, str(path), MEMORY)
    assert done.returncode == 0, (done.returncode, done.stderr[-500:])
    first, second, last = done.stdout.splitlines()
    assert "context" in first
    assert "context" in second
    assert last in ("length", "stop")


def test_many_prompts_of_every_kind_are_answered_one_by_one(
    tmp_path: Path, smollm2_path: Path, is_long: bool
) -> None:
    num_prompts = 1000 if is_long else 150
    gap = num_prompts // 5 - 1
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    kinds = [kind for kind in KINDS if kind != "spaces"]  # of which none is a prompt
    short = ["Name a river.", *(text_of(kind, 300) for kind in kinds)]
    long = [text_of(kind, 400_000) for kind in kinds]
    lines = [json.dumps(short[index % len(short)]) for index in range(num_prompts)]
    for place, text in enumerate(long):
        lines[place * gap + 3] = json.dumps(text)
    prompts.write_text("\n".join(lines), encoding="utf-8")
    with memory_group(515 * MIB) as group:
        done = run_inside(
            group,
            *("run", "smollm2", "--memory", "515MiB", "--context", "1024", "--max-tokens", "1"),
            *("--prompts", str(prompts), "--out", str(out)),
            stdin="",
        )
    assert done.returncode == 5, (done.returncode, done.stderr[-500:])
    answers = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [one["index"] for one in answers] == [*range(num_prompts)]
    failed = [one["index"] for one in answers if "error" in one]
    assert failed == [place * gap + 3 for place in range(len(long))]
