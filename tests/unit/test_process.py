"""What a process needs is set by whoever loads a model, and what the user has set is left alone."""

import os
import subprocess
import sys

import pytest

CLEAN = {
    k: v
    for k, v in os.environ.items()
    if k not in ("OMP_WAIT_POLICY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")
}
SHOW = (
    "import os; print(os.environ['OMP_WAIT_POLICY'], os.environ['ONEDNN_PRIMITIVE_CACHE_CAPACITY'])"
)


def run(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "always", "-c", code, *arguments],
        env=CLEAN | environment,
        capture_output=True,
        text=True,
        check=True,
    )


@pytest.mark.parametrize("name", ["LLM", "SamplingParams"])
def test_a_public_name_sets_the_environment_before_torch_is_imported(name: str) -> None:
    done = run(f"from thinslice import {name}; {SHOW}")
    assert done.stdout.split() == ["PASSIVE", "64"]
    assert "UserWarning" not in done.stderr


def test_what_the_user_has_set_stays() -> None:
    done = run(
        f"import torch; from thinslice import LLM; {SHOW}",
        OMP_WAIT_POLICY="ACTIVE",
        ONEDNN_PRIMITIVE_CACHE_CAPACITY="7",
    )
    assert done.stdout.split() == ["ACTIVE", "7"]
    assert "UserWarning" not in done.stderr


def test_it_is_said_where_torch_has_read_the_environment_already() -> None:
    done = run(f"import torch; from thinslice import LLM; {SHOW}")
    assert "import thinslice first, or set OMP_WAIT_POLICY=PASSIVE" in done.stderr


# Every second of 40 pieces is freed: none of them is at the heap's end. Without the bounds the
# allocator keeps pieces of 4 MiB too, once it has met a larger one.
FREE = """
import ctypes, sys
from thinslice.memory.give_back import KeptMemory
from thinslice.memory.meter import current_rss_bytes
from thinslice.process import bound_allocator
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
size = int(sys.argv[1])
bound_allocator(computes_floats=sys.argv[2] == "floats")
kept_memory = KeptMemory()
libc.free(libc.malloc(30 << 20))
before = current_rss_bytes()
pieces = []
for index in range(40):
    pieces.append(libc.malloc(size))
    ctypes.memset(pieces[-1], 1, size)
held = current_rss_bytes() - before
for piece in pieces[::2]:
    libc.free(piece)
if sys.argv[2] == "floats":  # packed models need no more than the bounds
    kept_memory.bound()
print(held >> 20, (current_rss_bytes() - before) >> 20)
"""


@pytest.mark.parametrize("computes", ["floats", "packed"])
@pytest.mark.parametrize("size_kib", [4096, 768])
def test_freed_memory_goes_back_to_the_system_when_a_step_ends(
    size_kib: int, computes: str
) -> None:
    done = run(FREE, str(size_kib << 10), computes)
    held, kept = map(int, done.stdout.split())
    assert held >= (40 * size_kib >> 10) - 2
    assert kept <= (20 * size_kib >> 10) + 4
