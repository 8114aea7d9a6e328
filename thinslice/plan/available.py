"""How much memory this machine, or the control group the process runs in, has to give."""

from dataclasses import dataclass
from pathlib import Path

from thinslice.errors import BudgetError, ConfigError
from thinslice.units import MIB, format_bytes, size_option

# Without --memory a plan takes this share of what is free to this process, so that the machine
# stays usable to others.
DEFAULT_SHARE = 0.8
# In a control group that nobody else is seen in there is nobody to leave a fifth to. The rest is
# the kernel's own: page tables, sockets, files being written.
_OWN_GROUP_SHARE = 0.95
# A group is one's own where others hold less than this share of its bound.
_OTHERS_SHARE = 0.1
# A default in whole steps is the same from one command to the next.
_STEP_BYTES = 8 * MIB
_MEMINFO = Path("/proc/meminfo")
_STATUS = Path("/proc/self/status")
_CGROUP_ROOT = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Budget:
    """The most that the process may hold.

    Attributes:
        source: where the number comes from if nobody named it: ``80% of the 4.00 GiB that ...``.
    """

    num_bytes: int
    source: str | None = None


@dataclass(frozen=True)
class GroupBound:
    """A control group over this process.

    Attributes:
        num_bytes: the most that all its processes may hold together.
        held_bytes: what they hold now that cannot be given back: no page cache.
    """

    num_bytes: int
    held_bytes: int


def default_budget(free_bytes: int) -> int:
    """The budget of memory that is not the machine's own, as a card's: a share of what is free."""
    return _share(free_bytes, DEFAULT_SHARE)


def budget_for_process(named_bytes: int | None, option: str = "--memory") -> Budget:
    """The budget of this process: the one that was named, or else a share of what it can hold.

    What it can hold is what is free and what it holds already. Of the machine that is 80%; of a
    control group that nobody else is seen in it is 95%; the lower counts.

    Args:
        option: by which a budget is named, for errors.

    Errors: BudgetError for a named budget above what machine or control group have, for the kernel
    kills a process that comes to it; ConfigError where none is named and nothing is known.
    """
    if named_bytes is not None:
        check_bound(named_bytes, option)
        return Budget(named_bytes)
    choices = []
    own_bytes = _own_bytes()
    if (machine := _meminfo("MemAvailable")) is not None:
        choices.append(_default("that this machine has free", machine + own_bytes, DEFAULT_SHARE))
    for group in _group_bounds():
        others = max(group.held_bytes - own_bytes, 0)
        share = DEFAULT_SHARE
        if others < group.num_bytes * _OTHERS_SHARE:
            share = _OWN_GROUP_SHARE
        room = max(group.num_bytes - others, 0)
        whose = f"that the control group of {format_bytes(group.num_bytes)} leaves this process"
        choices.append(_default(whose, room, share))
    if not choices:
        raise ConfigError(f"this system does not tell its free memory; name {option}")
    return min(choices, key=lambda choice: choice.num_bytes)


def check_bound(
    num_bytes: int, option: str = "--memory", bound: tuple[int, str] | None = None
) -> None:
    """Errors: BudgetError for more memory than there is at all.

    Args:
        bound: how much there is and what says so; by default ``known_bound``.
    """
    bound = bound or known_bound()
    if bound is not None and num_bytes > bound[0]:
        raise BudgetError(
            f"{option} {size_option(num_bytes)} is more than {bound[1]}: {format_bytes(bound[0])}; "
            f"{option} {size_option(bound[0] // MIB * MIB)} is the most, and others need some of it"
        )


def known_bound() -> tuple[int, str] | None:
    """The most that this process can ever hold, and what says so; None where nothing does."""
    bounds = [(group.num_bytes, "its control group may hold") for group in _group_bounds()]
    if (total := total_memory()) is not None:
        bounds.append((total, "this machine has"))
    return min(bounds, default=None)


def free_memory() -> int | None:
    """Bytes this process could hold, those it holds already included.

    None where the system does not tell.
    """
    own_bytes = _own_bytes()
    rooms = [group.num_bytes - max(group.held_bytes - own_bytes, 0) for group in _group_bounds()]
    if (machine := _meminfo("MemAvailable")) is not None:
        rooms.append(machine + own_bytes)
    return max(min(rooms), 0) if rooms else None


def total_memory() -> int | None:
    """Bytes of memory in this machine, or None where the system does not tell."""
    return _meminfo("MemTotal")


def cgroup_bound() -> GroupBound | None:
    """The control group over this process that leaves it least, or None where there is no bound.

    Reads version 2 (memory.max) and version 1 (memory.limit_in_bytes).
    """
    return min(_group_bounds(), key=lambda group: group.num_bytes - group.held_bytes, default=None)


def _default(whose: str, free_bytes: int, share: float) -> Budget:
    source = f"{share:.0%} of the {format_bytes(free_bytes)} {whose}"
    return Budget(_share(free_bytes, share), source)


def _share(free_bytes: int, share: float) -> int:
    return int(free_bytes * share) // _STEP_BYTES * _STEP_BYTES


def _own_bytes() -> int:
    """Bytes this process holds; mapped files are page cache and count as free."""
    if not _STATUS.exists():
        return 0
    fields = (line.split() for line in _STATUS.read_text().splitlines())
    names = ("RssAnon:", "RssShmem:")
    return 1024 * sum(int(field[1]) for field in fields if field[0] in names)


def _group_bounds() -> list[GroupBound]:
    folders = _cgroup_folders()
    return [bound for folder in folders if (bound := _bound_of(folder)) is not None]


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


def _bound_of(folder: Path) -> GroupBound | None:
    for bound_name, usage_name in (
        ("memory.max", "memory.current"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        bound = _number(folder / bound_name)
        usage = _number(folder / usage_name)
        # Version 1 writes a number near 2**63 where there is no bound.
        if bound is not None and usage is not None and bound < 1 << 60:
            return GroupBound(bound, max(usage - _page_cache(folder), 0))
    return None


def _number(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _page_cache(folder: Path) -> int:
    """Bytes of files that the group holds and can give back, with those of the groups below it."""
    try:
        lines = (folder / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    values = dict(line.split() for line in lines if len(line.split()) == 2)
    names = ("inactive_file", "active_file")
    return sum(int(values.get(f"total_{name}", values.get(name, 0))) for name in names)
