"""What a process holds stays within bounds that whoever loads a model sets."""

import subprocess
import sys

import pytest

# Every second of 40 pieces is freed: none of them is at the heap's end. Without the bounds the
# allocator keeps pieces of 4 MiB too, once it has met a larger one.
FREE = """
import ctypes, sys
from thinslice.memory.meter import current_rss_bytes
from thinslice.process import bound_allocator
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
size = int(sys.argv[1])
bound_allocator()
libc.free(libc.malloc(30 << 20))
before = current_rss_bytes()
pieces = []
for index in range(40):
    pieces.append(libc.malloc(size))
    ctypes.memset(pieces[-1], 1, size)
held = current_rss_bytes() - before
for piece in pieces[::2]:
    libc.free(piece)
print(held >> 20, (current_rss_bytes() - before) >> 20)
"""


@pytest.mark.parametrize("size_kib", [4096, 768])
def test_freed_memory_goes_back_to_the_system_at_once(size_kib: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FREE, str(size_kib << 10)],
        capture_output=True,
        text=True,
        check=True,
    )
    held, kept = map(int, done.stdout.split())
    assert held >= (40 * size_kib >> 10) - 2
    assert kept <= (20 * size_kib >> 10) + 4
