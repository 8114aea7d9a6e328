"""What the system gives this process beside memory: threads, and a stack for signals."""

import ctypes
import sys
from pathlib import Path

from thinslice.process import c_library

_CGROUP_ROOT = Path("/sys/fs/cgroup")


class _SignalStack(ctypes.Structure):
    """stack_t of sigaltstack(2), as Linux lays it out."""

    _fields_ = [
        ("pointer", ctypes.c_void_p),
        ("flags", ctypes.c_int),
        ("size", ctypes.c_size_t),
    ]


_DISABLED = 2  # SS_DISABLE


def alternate_stack_bytes() -> int | None:
    """Bytes of this thread's alternate signal stack; None where it has none or nothing tells."""
    if not sys.platform.startswith("linux"):
        return None
    stack = _SignalStack()
    if c_library().sigaltstack(None, ctypes.byref(stack)) != 0 or stack.flags & _DISABLED:
        return None
    return int(stack.size)


def pid_rooms() -> list[tuple[int, str]]:
    """For each control group over this process that bounds threads: how many more it allows, and
    what says so. Version 2 and 1 name the files alike."""
    own = Path("/proc/self/cgroup")
    if not own.exists():
        return []
    rooms = []
    for line in own.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "pids") and "pids" not in controllers.split(","):
            continue
        root = _CGROUP_ROOT if controllers == "" else _CGROUP_ROOT / "pids"
        group = Path(path.lstrip("/"))
        for folder in (root / part for part in (group, *group.parents)):
            most, held = _number(folder / "pids.max"), _number(folder / "pids.current")
            if most is not None and held is not None:
                rooms.append((most - held, f"pids.max of {most} with {held} in use"))
    return rooms


def _number(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None
