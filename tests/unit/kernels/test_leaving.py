"""A program ends in peace while daemon threads are inside the kernels."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(
    "num_threads",
    [pytest.param(1, marks=pytest.mark.long), 3, pytest.param(8, marks=pytest.mark.long)],
)
def test_a_program_ends_while_threads_run_kernels(num_threads: int, is_long: bool) -> None:
    times = 10 if is_long else 1
    script = Path(__file__).parent / "leave_kernels.py"
    done = subprocess.run(
        [sys.executable, str(script), str(num_threads), str(times)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=False,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.stderr == ""
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert len(lines) == 15
    assert [line for line in lines if not line.endswith(f" {{0: {times}}}")] == []


def test_no_call_takes_the_lock_of_pythons_back_by_itself() -> None:
    """Only GilRelease knows that the interpreter may have ended meanwhile."""
    sources = sorted((ROOT / "thinslice" / "kernels" / "cpu").glob("*.cpp"))
    assert len(sources) > 5
    for path in sources:
        assert "gil_scoped_release" not in path.read_text(), path.name
