"""What the kernel says this process holds: the measure beside every plan."""

import ctypes
import mmap
import re
import resource
import sys
from functools import cache
from pathlib import Path

from thinslice.plan.cost import LIBRARY_PAGES_BYTES
from thinslice.process import c_library

_STATUS = Path("/proc/self/status")
_STATM = Path("/proc/self/statm")
_SMAPS = Path("/proc/self/smaps")
_MAPPING = re.compile(r"[0-9a-f]+-[0-9a-f]+ ")
_LIBRARIES = re.compile(r"/(_multiarray_umath|tokenizers|_native)[^/]*\.so")


def peak_rss_bytes() -> int:
    """The most resident memory this process has held so far."""
    if _STATUS.exists():
        return _status_bytes("VmHWM")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def current_rss_bytes() -> int:
    """Resident memory now; where the system does not tell, the peak so far."""
    return _status_bytes("VmRSS") if _STATUS.exists() else peak_rss_bytes()


def anonymous_bytes() -> int:
    """Resident memory now that is no part of a file; 0 where the system does not tell.

    It takes about 10 microseconds.
    """
    if not _STATM.exists():
        return 0
    _, resident, of_files, *_ = _STATM.read_text().split()
    return (int(resident) - int(of_files)) * mmap.PAGESIZE


def resident_bytes(address: int, num_bytes: int) -> int:
    """Return how many bytes of a range of this process's memory are resident, by whole pages; 0
    where the system does not tell."""
    if not sys.platform.startswith("linux") or num_bytes == 0:
        return 0
    page = mmap.PAGESIZE
    start = address // page * page
    count = -(-(address + num_bytes - start) // page)
    states = bytearray(count)  # an array of ctypes' has a class for each length, kept for good
    into = ctypes.byref(ctypes.c_char.from_buffer(states))
    if c_library().mincore(ctypes.c_void_p(start), ctypes.c_size_t(count * page), into):
        return 0
    return min(sum(state & 1 for state in states) * page, num_bytes)


def rss_to_plan_from() -> int:
    """Resident memory now, as if no model had run in this process yet.

    A plan counts what libraries come to hold once they run. What they hold already is not counted a
    second time.
    """
    return current_rss_bytes() - touched_library_bytes()


def touched_library_bytes() -> int:
    """Pages of libraries' code that have come since the first plan, as far as plans count them."""
    if not _SMAPS.exists():
        return 0
    is_first = _library_bytes_at_first.cache_info().currsize == 0
    at_first = _library_bytes_at_first()
    # Reading the mappings takes as long as planning does.
    return 0 if is_first else min(max(_library_bytes() - at_first, 0), LIBRARY_PAGES_BYTES)


@cache
def _library_bytes_at_first() -> int:
    return _library_bytes()


def _library_bytes() -> int:
    """Resident pages of the libraries that compute, and of no others."""
    total, is_library = 0, False
    # Line by line: of a process with thousands of mappings the whole text takes megabytes, which
    # would come between a plan and the next one.
    with _SMAPS.open(errors="replace") as lines:
        for line in lines:
            if line.startswith("Rss:"):
                total += int(line.split()[1]) * 1024 * is_library
            elif _MAPPING.match(line):
                is_library = _LIBRARIES.search(line) is not None
    return total


def _status_bytes(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"{_STATUS} has no {field}")
