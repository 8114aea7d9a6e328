"""What the comparisons with peers share: processes, control groups, paired runs, the report."""

import json
import os
import shutil
import statistics
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parent.parent
OURS = "thinslice"
TIMEOUT_S = 3600.0
PIPE_WIDTH = 150
_GROUPS = Path("/sys/fs/cgroup")
_SIGKILL = 9

console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)


class RunError(Exception):
    """A contestant, or what prepares one, could not do its work; the message is one line."""


@dataclass(frozen=True)
class Figure:
    """What one run gave: the figure compared, and whatever else it told."""

    value: float
    details: Mapping[str, Any] = field(default_factory=dict)


Run = Callable[[], Figure]


@dataclass(frozen=True)
class Case:
    """Contestants that do the same work in turn.

    Attributes:
        unit: of the figures; with ``tokens/s`` more is better, with ``s`` and ``s/token`` less.
        runs: by contestant; thinslice is one of them.
        targets: by peer, how many times better than it thinslice is to be.
        note: what a reader must know to judge the figures.
    """

    name: str
    unit: str
    runs: Mapping[str, Run]
    targets: Mapping[str, float]
    note: str = ""


@dataclass(frozen=True)
class Row:
    """One line of the report.

    Attributes:
        ratio: how many times better thinslice was, the median of the rounds; of thinslice's own
            line, None.
        target: what the ratio, or the share it stands for, is to reach.
        is_ok: None where there is no target.
    """

    case: str
    contestant: str
    unit: str
    values: list[float]
    ratio: float | None = None
    target: float | None = None
    is_ok: bool | None = None
    note: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def median(self) -> float | None:
        return statistics.median(self.values) if self.values else None


def run_case(case: Case, rounds: int) -> list[Row]:
    """Every contestant in turn, as often as there are rounds; one that fails takes no more part."""
    figures: dict[str, list[Figure]] = {name: [] for name in case.runs}
    failures: dict[str, str] = {}
    for round_no in range(1, rounds + 1):
        for name, run in case.runs.items():
            if name in failures:
                continue
            try:
                figures[name].append(run())
            except RunError as error:
                failures[name] = str(error)
                console.print(f"{case.name}: {name} failed: {error}")
                continue
            value = figures[name][-1].value
            console.print(f"{case.name} {round_no}/{rounds}: {name} {value:.4g} {case.unit}")
    return [_row(case, name, figures, failures) for name in case.runs]


def _row(
    case: Case, name: str, figures: Mapping[str, list[Figure]], failures: Mapping[str, str]
) -> Row:
    values = [figure.value for figure in figures[name]]
    target = case.targets.get(name)
    ratio = None
    if name != OURS:
        pairs = list(zip(figures[OURS], figures[name], strict=False))
        ratios = [_times_better(ours.value, theirs.value, case.unit) for ours, theirs in pairs]
        ratio = statistics.median(ratios) if ratios else None
    return Row(
        case=case.name,
        contestant=name,
        unit=case.unit,
        values=values,
        ratio=ratio,
        target=target,
        is_ok=None if target is None else ratio is not None and ratio >= target,
        note=f"failed: {failures[name]}" if name in failures else case.note,
        details=figures[name][-1].details if values else {},
    )


def _times_better(ours: float, theirs: float, unit: str) -> float:
    return ours / theirs if unit == "tokens/s" else theirs / ours


def report(benchmark: str, rows: Sequence[Row], facts: Mapping[str, Any]) -> int:
    """The table on standard error, one JSON line on standard output; 1 where something failed."""
    table = Table(title=benchmark)
    for heading in ("case", "contestant", "median", "unit", "better by", "target", ""):
        table.add_column(heading, no_wrap=True)
    table.add_column("note", overflow="fold")
    for row in rows:
        median = "-" if row.median is None else f"{row.median:.4g}"
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}x"
        target = "" if row.target is None else f"{row.target:.2f}x"
        verdict = {None: "", True: "ok", False: "missed"}[row.is_ok]
        cells = (row.case, row.contestant, median, row.unit, ratio, target, verdict, row.note)
        table.add_row(*cells)
    width = None if sys.stderr.isatty() else PIPE_WIDTH
    Console(stderr=True, highlight=False, markup=False, width=width).print(table)
    figures = [{**vars(row), "median": row.median} for row in rows]
    print(json.dumps({"benchmark": benchmark, **machine(), **facts, "figures": figures}))
    return int(any(not row.values for row in rows))


def machine() -> dict[str, Any]:
    """The processor, the cores in use and the memory."""
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    names = [line.partition(":")[2].strip() for line in info.splitlines() if "model name" in line]
    flags = next((line.split() for line in info.splitlines() if line.startswith("flags")), [])
    wanted = ("avx2", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")
    return {
        "processor": names[0] if names else "unknown",
        "instructions": [flag for flag in wanted if flag in flags],
        "threads": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    }


def use_cores(count: int) -> None:
    """Keep this process, and all it starts, on so many of the cores it has.

    Errors: RunError if there are fewer.
    """
    cores = sorted(os.sched_getaffinity(0))
    if not 1 <= count <= len(cores):
        raise RunError(f"--threads {count}; this process has {len(cores)} cores")
    os.sched_setaffinity(0, cores[:count])


def run_process(
    command: Sequence[str | Path],
    *,
    group: Path | None = None,
    timeout_s: float = TIMEOUT_S,
    environment: Mapping[str, str] | None = None,
) -> str:
    """Its standard output. Inside the control group, if one is given.

    ``environment`` holds where the user's own does not say otherwise.

    Errors: RunError with the last line of what it said if it does not end well and in time.
    """
    words = [str(word) for word in command]
    if group is not None:
        words = ["sh", "-c", f'echo $$ > "{group}/cgroup.procs" && exec "$@"', "sh", *words]
    try:
        done = subprocess.run(
            words,
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout_s,
            cwd=ROOT,
            env={**(environment or {}), **os.environ},
        )
    except subprocess.TimeoutExpired:
        raise RunError(f"not done after {timeout_s:.0f} s") from None
    except OSError as error:
        raise RunError(f"{words[0]}: {error.strerror}") from None
    if done.returncode == -_SIGKILL:
        raise RunError("killed by the kernel: it needs more memory than it was held to")
    if done.returncode != 0:
        raise RunError(_complaint(done.stderr or done.stdout) or f"exit code {done.returncode}")
    return done.stdout


def _complaint(output: str) -> str:
    """The line that says what is wrong: a line that begins so, or else the last one."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if line.lower().startswith("error")]
    return "".join([*errors, *lines[-1:]][:1])[:300]


def run_json(
    command: Sequence[str | Path],
    *,
    group: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """The JSON object on the last line of its standard output. Errors: RunError."""
    output = run_process(command, group=group, environment=environment)
    lines = output.strip().splitlines()
    try:
        value = json.loads(lines[-1])
    except (IndexError, json.JSONDecodeError):
        raise RunError(f"no JSON line at the end of {Path(command[0]).name}'s output") from None
    assert isinstance(value, dict)
    return value


def run_ours(model: str | Path, *options: str, group: Path | None = None) -> dict[str, Any]:
    """run_thinslice.py in a process of its own. Errors: RunError."""
    script = ROOT / "benchmarks" / "run_thinslice.py"
    command = [sys.executable, script, model, *options]
    # As its own command line sets it.
    return run_json(command, group=group, environment={"OMP_WAIT_POLICY": "PASSIVE"})


@contextmanager
def memory_group(num_bytes: int) -> Iterator[Path]:
    """A fresh control group that holds at most so much, without swap.

    Errors: RunError where none can be made.
    """
    version_1 = (_GROUPS / "memory").is_dir()
    folder = (_GROUPS / "memory" if version_1 else _GROUPS) / f"thinslice-{uuid.uuid4().hex}"
    limit, swap = ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes")
    swap_limit = str(num_bytes)
    if not version_1:
        limit, swap, swap_limit = "memory.max", "memory.swap.max", "0"
    try:
        folder.mkdir()
        try:
            (folder / limit).write_text(str(num_bytes))
            if (folder / swap).exists():
                (folder / swap).write_text(swap_limit)
        except OSError:
            folder.rmdir()
            raise
    except OSError as error:
        raise RunError(
            f"no memory control group can be made in {folder.parent}: {error.strerror}; "
            "this needs root"
        ) from None
    try:
        yield folder
    finally:
        folder.rmdir()


def group_peak_bytes(group: Path) -> int:
    """The most the group held, page cache included; 0 where the kernel does not tell."""
    for name in ("memory.max_usage_in_bytes", "memory.peak"):
        if (group / name).exists():
            return int((group / name).read_text())
    return 0


def drop_page_cache(*paths: Path) -> None:
    """Take the files, or all files under the folders, out of the page cache.

    Pages are charged to the control group that first read them: left there by another process,
    they would be memory that a contestant uses and does not pay for.
    """
    for file in files_of(*paths):
        with file.open("rb") as opened:
            os.fsync(opened.fileno())  # what is not written yet cannot be dropped
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def files_of(*paths: Path) -> list[Path]:
    """The files themselves, and all files under the folders."""
    found = [file for path in paths for file in ([path] if path.is_file() else path.rglob("*"))]
    return [file for file in found if file.is_file()]


class Artefacts:
    """Large files made at their first use, in one folder, and deleted at the end.

    What was there before stays, and so does everything with ``keep``.
    """

    def __init__(self, folder: Path, *, keep: bool) -> None:
        self.folder = folder
        self._keep = keep
        self._made: list[Path] = []

    def need(self, name: str, make: Callable[[Path], object]) -> Path:
        """The path of that name, made by ``make(path)`` if it is not there. Errors: RunError."""
        path = self.folder / name
        if not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            console.print(f"making {path}")
            self._made.append(path)
            make(path)
        return path

    def check_space(self, num_bytes: int) -> None:
        """Errors: RunError if the disk cannot hold so much, with what is in the folder already."""
        self.folder.mkdir(parents=True, exist_ok=True)
        present = sum(file.stat().st_size for file in files_of(*self.folder.iterdir()))
        free = shutil.disk_usage(self.folder).free
        if present + free < num_bytes:
            raise RunError(
                f"the large files need {(num_bytes - present) / 1e9:.0f} GB more; {self.folder} "
                f"has {free / 1e9:.0f} GB free; --work names another folder"
            )

    def clean_up(self) -> None:
        """Delete what was made here, unless it is to be kept."""
        for path in [] if self._keep else self._made:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
