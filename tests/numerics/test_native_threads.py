"""The pool of threads: many callers, forks, exit, more threads than processors."""

import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tests.numerics import oracle
from thinslice.kernels import native
from thinslice.plan.packed_format import PackedFormat

pytestmark = pytest.mark.usefixtures("kernels")

WEIGHT = oracle.random_packed(PackedFormat.INT4, 512, 256, seed=0)
X = torch.randn(40, 256, generator=torch.Generator().manual_seed(1))


def test_callers_at_the_same_time() -> None:
    expected = native.linear(X, WEIGHT)
    native.set_num_threads(3)
    with ThreadPoolExecutor(4) as callers:
        for out in callers.map(lambda _: native.linear(X, WEIGHT), range(200)):
            assert torch.equal(out, expected)


def test_thread_count_may_change_between_calls() -> None:
    expected = native.linear(X, WEIGHT)
    for count in (1, 4, 2, 8, 1, 3):
        assert native.set_num_threads(count) == native.num_threads() == count
        assert torch.equal(native.linear(X, WEIGHT), expected)
    for count in (0, 1025):
        with pytest.raises(ValueError, match="one to 1024 threads"):
            native.set_num_threads(count)


def test_fork_and_exit() -> None:
    """A child starts its own pool, the parent keeps its own, and both end when they are done."""
    script = """
        import os, torch
        from thinslice.kernels import native
        native.set_num_threads(3)
        x, weight = torch.randn(300, 512), torch.ones(512)
        before = native.rms_norm(x, weight, 1e-6)
        child = os.fork()
        same = torch.equal(native.rms_norm(x, weight, 1e-6), before)
        if child == 0:
            os._exit(0 if same else 1)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), same)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.split() == ["0", "True"]
