"""Prompts of ever new lengths, in a control group of exactly the budget.

Each way to compute, resident and streamed, alone and many at once, from one thread and from forty,
with a vocabulary of today and one of three times that: the peak is within the plan, and the plan is
not much more than the peak. Every combination answers sixty prompts; a thousand are answered in
eight, among which each two settings of different kinds meet: all of them would take a day.
"""

import json
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest

from tests.checkpoints import tiny_config, write_safetensors_model
from tests.e2e.test_ceiling import memory_group
from tests.speculation import SMALL_MTP

CONTEXT = 1100
# The dtype, whether the weights are streamed, sequences, threads, words of the vocabulary.
Case = tuple[str, bool, int, int, int]
DTYPES = ("float32", "bfloat16", "int8", "int4")
# Random token ids: what is measured is the engine, not a tokenizer.
PROGRAM = """
import random, sys
from collections import deque
from threading import Thread
from thinslice import LLM, SamplingParams
from thinslice.memory.meter import peak_rss_bytes
model, memory, dtype = sys.argv[1:4]
num_seqs, num_threads, num_prompts = map(int, sys.argv[4:])
llm = LLM(model, memory=int(memory), dtype=dtype, context=CONTEXT, max_num_seqs=num_seqs)
rng = random.Random(1)
lengths = list(range(1, num_prompts + 1)) if num_prompts >= 1000 else [
    rng.randrange(1, 1001) for _ in range(num_prompts)]
rng.shuffle(lengths)
left = deque(lengths)
failed = []
# First as many rows of logits in a step as there can be, which long prompts leave no room for.
params = SamplingParams(max_tokens=24, temperature=0.8, ignore_eos=True)
sequences = [llm.engine.add_request([place + 3, 5, 7], params) for place in range(num_seqs)]
while not all(one.finish_reason for one in sequences):
    llm.engine.step()
def answer():
    try:
        while left:
            sequences = []
            for _ in range(max(num_seqs // num_threads, 1)):
                if left:
                    length = left.popleft()
                    tokens = [(length * 7919 + place * 31) % 49000 for place in range(length)]
                    params = SamplingParams(max_tokens=2, temperature=0.8, ignore_eos=True)
                    sequences.append(llm.engine.add_request(tokens, params))
            while not all(one.finish_reason for one in sequences):
                llm.engine.step()
            assert all(len(one.completion_token_ids) == 2 for one in sequences)
    except BaseException as error:
        failed.append(error)
        raise
threads = [Thread(target=answer) for _ in range(num_threads)]
for one in threads: one.start()
for one in threads: one.join()
assert not failed
plan = llm.plan
print(peak_rss_bytes(), plan.peak_bytes, plan.budget_bytes, int(plan.streaming is not None))
""".replace("CONTEXT", str(CONTEXT))
ALL = list(product(DTYPES, (False, True), (1, 64), (1, 40), (49_152, 151_936)))
PAIRS = [
    (DTYPES[2 * a + b], bool(c), (1, 64)[c ^ a], (1, 40)[c ^ b], (49_152, 151_936)[a ^ b ^ c])
    for a, b, c in product((0, 1), repeat=3)
]
# Those that have been hard to hold: of a plain run.
DRAWN = (
    ("bfloat16", False, 64, 40, 151_936),
    ("float32", False, 1, 40, 151_936),
    ("int4", True, 1, 40, 49_152),
)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Small random models with large vocabularies.

    What keeping their weights in memory adds to the least that fits is, in int4 too, over 30 MiB:
    more than what one process holds beside its model differs from the next one's.
    """
    sizes = {"intermediate_size": 1024, "num_hidden_layers": 2, "head_dim": 64}
    folders = {}
    for vocab_size, hidden_size in ((49_152, 768), (151_936, 256)):
        folder = tmp_path_factory.mktemp(f"vocabulary-{vocab_size}")
        config = tiny_config(
            vocab_size=vocab_size, hidden_size=hidden_size, max_position_embeddings=2048, **sizes
        )
        write_safetensors_model(folder, config)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(SMALL_MTP / name, folder / name)
        folders[vocab_size] = folder
    return folders


def case_id(case: Case) -> str:
    dtype, is_streamed, num_seqs, num_threads, vocab_size = case
    where = "streamed" if is_streamed else "resident"
    return f"{dtype}-{where}-{num_seqs} sequences-{num_threads} threads-{vocab_size}"


@pytest.mark.parametrize(
    "case",
    [pytest.param(one, marks=() if one in DRAWN else pytest.mark.long) for one in ALL],
    ids=case_id,
)
def test_the_plan_holds_by_the_library(case: Case, models: dict[int, Path], home: Path) -> None:
    check_the_plan_holds(case, models, home, 60)


@pytest.mark.long
@pytest.mark.parametrize("case", PAIRS, ids=case_id)
def test_the_plan_holds_for_a_thousand_prompts(
    case: Case, models: dict[int, Path], home: Path
) -> None:
    check_the_plan_holds(case, models, home, 1000)


def check_the_plan_holds(case: Case, models: dict[int, Path], home: Path, num_prompts: int) -> None:
    """Answer so many prompts at the least budget, and compare the peak with the plan."""
    dtype, is_streamed, num_seqs, num_threads, vocab_size = case
    model = models[vocab_size]
    memory = budget(model, dtype, num_seqs, is_streamed, home)
    numbers = [num_seqs, num_threads, num_prompts]
    program = [sys.executable, "-c", PROGRAM, str(model), f"{memory}", dtype, *map(str, numbers)]
    with memory_group(memory) as group:
        done = thinslice(home, *program, group=group)
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])
    peak, planned, budgeted, was_streamed = map(int, done.stdout.split())
    assert peak <= planned <= budgeted
    assert was_streamed == is_streamed
    assert planned <= 1.25 * peak


@pytest.mark.long
@pytest.mark.parametrize("vocab_size", [49_152, 151_936])
@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_plan_holds_by_the_command_line(
    dtype: str, is_streamed: bool, vocab_size: int, models: dict[int, Path], home: Path
) -> None:
    model = models[vocab_size]
    memory = budget(model, dtype, 8, is_streamed, home)
    prompts = home / "prompts.txt"
    prompts.write_text("\n".join("a b" * (index % 200 + 1) for index in range(1000)))
    asked = ["run", str(model), "--raw", "--memory", f"{memory >> 20}MiB"]
    asked += ["--dtype", dtype, "--ignore-eos", "--context", str(CONTEXT)]
    asked += ["--max-tokens", "2", "--prompts", str(prompts)]
    with memory_group(memory) as group:
        done = thinslice(home, sys.executable, "-m", "thinslice", *asked, group=group)
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])
    assert done.stdout.count("\n") == 1000
    assert all("error" not in json.loads(line) for line in done.stdout.splitlines())


def budget(model: Path, dtype: str, num_seqs: int, is_streamed: bool, home: Path) -> int:
    """The least that fits, or the least that keeps the weights in memory; packed beforehand."""
    command = [sys.executable, "-m", "thinslice"]
    if dtype.startswith("int"):
        packed = thinslice(home, *command, "run", str(model), "--dtype", dtype, "--raw", "a",
                           "--context", "64", "--max-tokens", "1")  # fmt: skip
        assert packed.returncode == 0, packed.stderr
    asked = [*command, "plan", str(model), "--dtype", dtype, "--context", str(CONTEXT)]
    asked += ["--sequences", str(num_seqs)]
    if is_streamed:
        refused = thinslice(home, *asked, "--memory", "40MiB").stderr
        return int(refused.split("--memory ")[-1].split("MiB")[0]) << 20
    done = thinslice(home, *asked, "--memory", "4GiB", "--json")
    return int(json.loads(done.stdout)["resident"]["memory_bytes"])


def thinslice(
    home: Path, *command: str, group: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """A command with a store of its own, inside the control group where there is one."""
    enter = "" if group is None else f"echo $$ > {group}/cgroup.procs; "
    return subprocess.run(
        ["env", f"THINSLICE_HOME={home}", "sh", "-c", f'{enter}exec "$@"', "sh", *command],
        capture_output=True,
        text=True,
        check=False,
    )
