"""Without --memory the budget is what this process can have, and the same number for everybody."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.test_ceiling import memory_group, run_inside
from tests.warm_start import warm_thinslice
from thinslice.units import MIB, parse_bytes

API = """
import json
from thinslice import LLM
from thinslice.errors import BudgetError
try:
    with LLM("smollm2", max_num_seqs=1) as llm:
        print(json.dumps([llm.plan.budget_bytes, llm.plan.streaming is None]))
    LLM("smollm2", memory="2GiB")
except BudgetError as error:
    print(error)
"""


def test_the_default_in_a_control_group_is_one_number_and_it_runs(smollm2_path: Path) -> None:
    """Resident where the whole group as --memory would be, too; nothing is killed or refused."""
    with memory_group(384 * MIB) as group:
        if group is None:
            pytest.fail("no memory control group can be made here")
        examined = json.loads(run_inside(group, "doctor", "--json", stdin="").stdout)
        planned = json.loads(run_inside(group, "plan", "smollm2", "--json", stdin="").stdout)
        asked = ("run", "smollm2", "--json", "--max-tokens", "4")
        answered = run_inside(group, *asked, stdin="Say hello.")
        assert answered.returncode == 0, answered.stderr
        enter = f'echo $$ > {group}/cgroup.procs; exec "$@"'
        command = ["sh", "-c", enter, "sh", sys.executable, "-c", API]
        of_api = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    assert examined["works"]
    memory = next(one for one in examined["findings"] if one["name"] == "memory")
    told = re.search(r"the budget is (\S+): 95% of", memory["value"])
    assert told is not None, memory
    answer = json.loads(answered.stdout)
    assert answer["plan"]["streaming"] is None
    assert answer["peak_bytes"] <= answer["plan"]["peak_bytes"] <= 384 * MIB
    lines = of_api.stdout.splitlines()
    budgets = [
        parse_bytes(told[1]),
        planned["budget_bytes"],
        answer["plan"]["budget_bytes"],
        json.loads(lines[0])[0],
    ]
    # What the kernel holds for each of them differs by a MiB or two.
    assert max(budgets) - min(budgets) <= 8 * MIB, budgets
    assert min(budgets) >= 343 * MIB
    assert 'memory="2GiB" is more than its control group may hold: 384.00 MiB' in lines[1]


def test_what_the_control_group_cannot_hold_is_refused_and_never_suggested(
    smollm2_path: Path,
) -> None:
    with memory_group(384 * MIB) as group:
        if group is None:
            pytest.fail("no memory control group can be made here")
        too_much = run_inside(group, "run", "smollm2", "--memory", "385MiB", stdin="hi")
        fit = ("--context", "8192", "--dtype", "float32")
        nobody_named = run_inside(group, "run", "smollm2", *fit, stdin="hi")
        elsewhere = run_inside(group, "plan", "smollm2", "--memory", "2GiB", stdin="")
    assert too_much.returncode == 3
    assert "--memory 384MiB is the most" in too_much.stderr
    assert nobody_named.returncode == 3
    assert "--memory was not given: " in nobody_named.stderr
    assert "95% of the 3" in nobody_named.stderr
    assert not re.search(r"^    --memory", nobody_named.stderr, re.MULTILINE)
    assert elsewhere.returncode == 0
    assert "planned for another machine: --memory 2GiB is more" in elsewhere.stderr


@pytest.mark.parametrize("command", ["run", "plan", "bench", "pack"])
def test_more_than_the_machine_has_is_not_taken_in_silence(
    command: str, smollm2_path: Path, tmp_path: Path
) -> None:
    more = ("--dtype", "int8", "--out", str(tmp_path / "out")) if command == "pack" else ()
    asked = [*warm_thinslice(), command, "smollm2", "--memory", "1024TiB", *more]
    done = subprocess.run(asked, input="hi", capture_output=True, text=True, check=False)
    assert done.returncode == (0 if command == "plan" else 3)
    assert "is more than this machine has" in done.stderr


def test_measuring_the_machine_takes_what_a_small_control_group_has(
    tmp_path: Path, smollm2_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("THINSLICE_HOME", str(tmp_path))
    with memory_group(200 * MIB) as group:
        if group is None:
            pytest.fail("no memory control group can be made here")
        asked = ("plan", str(smollm2_path), "--memory", "150MiB", "--context", "512", "--json")
        planned = run_inside(group, *asked, stdin="")
    assert planned.returncode == 0, (planned.returncode, planned.stderr)
    assert list(tmp_path.rglob("hardware-*.json"))
