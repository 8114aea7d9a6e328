"""A program ends in peace while daemon threads are inside the kernels."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
TIMES = 1


@pytest.mark.parametrize("num_threads", [1, 3, 8])
def test_a_program_ends_while_threads_run_kernels(num_threads: int) -> None:
    script = Path(__file__).parent / "leave_kernels.py"
    done = subprocess.run(
        [sys.executable, str(script), str(num_threads), str(TIMES)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stderr == ""
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert len(lines) == 12
    assert [line for line in lines if not line.endswith(f" {{0: {TIMES}}}")] == []
