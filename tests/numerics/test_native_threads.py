"""The pool of threads: many callers, forks, exit, more threads than processors."""

import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from tests.numerics import oracle
from thinslice.kernels import native
from thinslice.kernels.arrays import BF16
from thinslice.kernels.native_pack import converted
from thinslice.plan.packed_format import PackedFormat

pytestmark = pytest.mark.usefixtures("kernels")

X = np.random.default_rng(1).standard_normal((40, 256), np.float32)
NUMBERS = np.random.default_rng(2).standard_normal((512, 256), np.float32)
WEIGHTS = {
    "int4": oracle.random_packed(PackedFormat.INT4, 512, 256, seed=0),
    "float32": NUMBERS,
    "bfloat16": converted(NUMBERS, BF16),
}
each_type = pytest.mark.parametrize("dtype", WEIGHTS)


@each_type
def test_callers_at_the_same_time(dtype: str) -> None:
    weight = WEIGHTS[dtype]
    expected = native.linear(X, weight)
    native.set_num_threads(3)
    with ThreadPoolExecutor(4) as callers:
        for out in callers.map(lambda _: native.linear(X, weight), range(200)):
            assert np.array_equal(out, expected)


@each_type
def test_thread_count_may_change_between_calls(dtype: str) -> None:
    weight = WEIGHTS[dtype]
    expected = native.linear(X, weight)
    for count in (1, 4, 2, 8, 1, 3):
        assert native.set_num_threads(count) == native.num_threads() == count
        assert np.array_equal(native.linear(X, weight), expected)
    for count in (0, 1025):
        with pytest.raises(ValueError, match="one to 1024 threads"):
            native.set_num_threads(count)


def test_fork_and_exit() -> None:
    """A child starts its own pool, the parent keeps its own, and both end when they are done."""
    script = """
        import os
        import numpy as np
        from thinslice.kernels import native
        native.set_num_threads(3)
        x = np.random.default_rng(0).standard_normal((300, 512), np.float32)
        weight = np.ones(512, np.float32)
        before = native.rms_norm(x, weight, 1e-6)
        child = os.fork()
        same = np.array_equal(native.rms_norm(x, weight, 1e-6), before)
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
