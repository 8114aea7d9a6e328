"""How much memory this machine, or the control group the process runs in, has to give."""

from pathlib import Path

from thinslice.units import MIB

# Without --memory a plan takes this share of what is free, so that the machine stays usable.
DEFAULT_SHARE = 0.8
_MEMINFO = Path("/proc/meminfo")
_CGROUP_ROOT = Path("/sys/fs/cgroup")


def default_budget(free_bytes: int) -> int:
    """The budget where the user names none: a share of what is free, in whole MiB."""
    return int(free_bytes * DEFAULT_SHARE) // MIB * MIB


def free_memory() -> int | None:
    """Bytes a new process could hold: free memory, or the control group's room where lower.

    None where the system does not tell.
    """
    machine = _meminfo_available()
    group = cgroup_bound()
    if group is None:
        return machine
    room = max(group[0] - group[1], 0)
    return room if machine is None else min(machine, room)


def total_memory() -> int | None:
    """Bytes of memory in this machine, or None where the system does not tell."""
    return _meminfo("MemTotal")


def cgroup_bound() -> tuple[int, int] | None:
    """The tightest control group bound over this process and what that group holds now.

    Reads version 2 (memory.max) and version 1 (memory.limit_in_bytes). Page cache that can be
    given back is not counted as held. None where there is no bound.
    """
    bounds = [bound for folder in _cgroup_folders() if (bound := _bound_of(folder)) is not None]
    return min(bounds, key=lambda bound: bound[0] - bound[1], default=None)


def _meminfo_available() -> int | None:
    return _meminfo("MemAvailable")


def _meminfo(field: str) -> int | None:
    if not _MEMINFO.exists():
        return None
    for line in _MEMINFO.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    return None


def _cgroup_folders() -> list[Path]:
    """This process's memory control group and every one above it."""
    own = Path("/proc/self/cgroup")
    if not own.exists():
        return []
    folders: list[Path] = []
    for line in own.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory") and "memory" not in controllers.split(","):
            continue
        root = _CGROUP_ROOT if controllers == "" else _CGROUP_ROOT / "memory"
        group = Path(path.lstrip("/"))
        folders += [root / part for part in (group, *group.parents)]
    return folders


def _bound_of(folder: Path) -> tuple[int, int] | None:
    for bound_name, usage_name in (
        ("memory.max", "memory.current"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        bound = _number(folder / bound_name)
        usage = _number(folder / usage_name)
        # Version 1 writes a number near 2**63 where there is no bound.
        if bound is not None and usage is not None and bound < 1 << 60:
            return bound, max(usage - _inactive_file(folder), 0)
    return None


def _number(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _inactive_file(folder: Path) -> int:
    try:
        lines = (folder / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    values = dict(line.split() for line in lines if len(line.split()) == 2)
    return int(values.get("total_inactive_file", values.get("inactive_file", 0)))
