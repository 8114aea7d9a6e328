"""The kernels' pool where memory or threads run short."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import pytest

from thinslice.kernels import native

ROOT = Path(__file__).parents[3]

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="bounds as Linux has them"
)

# Attention with many query heads to one KV head takes 99 MiB of scratch on each thread. The one
# that the first call leaves goes to the next caller, so it is the worker that finds no room.
NO_MEMORY = """
import resource
import numpy as np
from thinslice.kernels import native
from thinslice.kernels.native import attention
from thinslice.kernels.paged_kv import PagedKv, SequenceBatch

TOKENS, HEADS, DIM = 64, 4096, 64
rng = np.random.default_rng(0)
cache = PagedKv(*rng.standard_normal((2, 4, 1, 16, DIM), np.float32))
starts, lengths = (np.array(x, np.int32) for x in ([0, TOKENS], [TOKENS]))
batch = SequenceBatch(starts, lengths, np.arange(4, dtype=np.int32)[None])
q = rng.standard_normal((TOKENS, HEADS, DIM), np.float32)

def attend():
    return attention(q, cache, batch, scale=0.1)

native.set_num_threads(1)
expected = attend()
before, hard = resource.getrlimit(resource.RLIMIT_AS)
held = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (held + (150 << 20), hard))
assert np.array_equal(attend(), expected)
native.set_num_threads(2)
for _ in range(100):
    try:
        attend()
    except MemoryError:
        break
else:
    raise SystemExit("no MemoryError")
ones = np.ones((4096, 64), np.float32)
assert np.array_equal(native.rms_norm(ones, ones[0], 0.0), ones)
resource.setrlimit(resource.RLIMIT_AS, (before, hard))
assert native.num_threads() == 2
assert np.array_equal(attend(), expected)
print("worked again")
"""

# A user of its own has no other processes, and not root's right to start threads beyond a bound.
FEW_THREADS = """
import os, resource, sys
import numpy as np
from thinslice.kernels import native

x, ones = np.random.default_rng(0).standard_normal((4096, 64), np.float32), np.ones(64, np.float32)
native.set_num_threads(1)
expected = native.rms_norm(x, ones, 1e-6)
most = int(sys.argv[1])
before, hard = resource.getrlimit(resource.RLIMIT_NPROC)
resource.setrlimit(resource.RLIMIT_NPROC, (most, hard))
if os.geteuid() == 0:
    os.setuid(54321)
for asked in (2, 8, 1024):
    started = native.set_num_threads(asked)
    assert started == native.num_threads() == min(asked, most), (asked, started)
    assert np.array_equal(native.rms_norm(x, ones, 1e-6), expected)
resource.setrlimit(resource.RLIMIT_NPROC, (before, hard))
assert native.set_num_threads(8) == 8
assert np.array_equal(native.rms_norm(x, ones, 1e-6), expected)
"""


@contextmanager
def thread_group(most: int) -> Iterator[Path]:
    """A control group with at most so many threads; skips the test where none can be made."""
    root = Path("/sys/fs/cgroup")
    folder = (root / "pids" if (root / "pids").is_dir() else root) / f"thinslice-{uuid4().hex}"
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("control groups cannot be made here")
    try:
        if not (folder / "pids.max").exists():
            pytest.skip("control groups do not bound threads here")
        (folder / "pids.max").write_text(str(most))
        yield folder
    finally:
        folder.rmdir()


def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [*arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"},
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_memory_that_a_worker_does_not_get_is_an_error_of_the_call() -> None:
    done = run(sys.executable, "-c", NO_MEMORY)
    assert (done.returncode, done.stdout, done.stderr) == (0, "worked again\n", "")


@pytest.mark.parametrize("most", [1, 2, 5])
def test_the_pool_takes_the_threads_that_a_user_may_start(most: int) -> None:
    if os.geteuid() != 0 and most != 1:
        pytest.skip("the user's other processes count as well")
    done = run(sys.executable, "-c", FEW_THREADS, str(most))
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("most", [1, 3, 10])
def test_doctor_tells_how_few_threads_there_are(most: int) -> None:
    with thread_group(most) as group:
        script = f'echo $$ > {group}/cgroup.procs; exec "$@"'
        done = run("sh", "-c", script, "sh", sys.executable, "-m", "thinslice", "doctor")
    assert done.stderr == ""
    assert done.returncode == 1
    assert f"pids.max of {most}" in done.stdout
    if most == 1 and native.num_threads() > 1:
        assert f"1 threads of {native.num_threads()}" in " ".join(done.stdout.split())
