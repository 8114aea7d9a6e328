"""What the kernel says this process holds: the measure beside every plan."""

import resource
import sys
from functools import cache
from pathlib import Path

from thinslice.units import MIB

_STATUS = Path("/proc/self/status")
# Each plan counts so much for libraries once they run: what the smallest allowance has.
_MOST_TOUCHED_BYTES = 12 * MIB


def peak_rss_bytes() -> int:
    """The most resident memory this process has held so far."""
    if _STATUS.exists():
        return _status_bytes("VmHWM")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def current_rss_bytes() -> int:
    """Resident memory now; where the system does not tell, the peak so far."""
    return _status_bytes("VmRSS") if _STATUS.exists() else peak_rss_bytes()


def rss_to_plan_from() -> int:
    """Resident memory now, as if no model had run in this process yet.

    A plan counts what libraries come to hold once they run. What earlier models have made them hold
    already, the pages of their code, is not counted a second time.
    """
    if not _STATUS.exists():
        return current_rss_bytes()
    at_first = _mapped_at_first()
    touched = max(_status_bytes("RssFile") - at_first, 0)
    return current_rss_bytes() - min(touched, _MOST_TOUCHED_BYTES)


@cache
def _mapped_at_first() -> int:
    """Pages of files, in bytes, when the first plan of this process was made."""
    return _status_bytes("RssFile")


def _status_bytes(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"{_STATUS} has no {field}")
