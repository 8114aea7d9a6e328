"""What the kernel says of the process: asking costs next to nothing."""

import subprocess
import sys
from pathlib import Path

import pytest

_MANY_MAPPINGS = """
import mmap
from thinslice.memory.meter import current_rss_bytes, touched_library_bytes

kinds = mmap.PROT_READ, mmap.PROT_READ | mmap.PROT_WRITE  # neighbours of one kind are one mapping
kept = [mmap.mmap(-1, mmap.PAGESIZE, prot=kinds[idx % 2]) for idx in range(8000)]
before = current_rss_bytes()
touched_library_bytes()
touched_library_bytes()
print(current_rss_bytes() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="the system has no smaps")
def test_reading_thousands_of_mappings_takes_no_memory_that_plans_would_miss() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _MANY_MAPPINGS], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 256 * 1024
