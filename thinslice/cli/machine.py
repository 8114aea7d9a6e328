"""What this machine has, as far as it matters to running a model on it."""

import os
import platform
import resource
import shutil
import sys
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryFile

from thinslice.errors import StoreError
from thinslice.kernels import native
from thinslice.memory.device import missing_for_cuda
from thinslice.memory.process_state import alternate_stack_bytes, pid_rooms
from thinslice.plan.available import (
    budget_for_process,
    cgroup_bound,
    free_memory,
    total_memory,
)
from thinslice.store.store import Store
from thinslice.units import GIB, MIB, format_bytes, size_option

# Threads beside the compiled kernels': the reader's, and the engine's own.
_OTHER_THREADS = 10
# Registers of AMX and AVX-512 with a frame around them.
_AMX_SIGNAL_STACK = 12 * 1024
# What the embedded model takes with its weights streamed, and on disk.
_SMALLEST_MEMORY = 128 * MIB
_SMALLEST_DISK = 300 * MIB
_PACKAGES = ("thinslice", "numpy", "tokenizers", "gguf", "huggingface_hub")
# Instruction sets that decide how fast a matrix product runs, as /proc/cpuinfo spells them.
_INSTRUCTION_SETS = (
    "avx2",
    "avx512f",
    "avx_vnni",
    "avx512_vnni",
    "avx512_bf16",
    "amx_int8",
    "amx_bf16",
    "asimd",
    "asimddp",
    "i8mm",
    "bf16",
)


@dataclass(frozen=True)
class Finding:
    """One line of the examination; ``state`` is ok, warn or bad."""

    name: str
    value: str
    state: str = "ok"


def examine() -> list[Finding]:
    """Look at processor, memory, disk, devices and versions."""
    return [
        _python(),
        *_versions(),
        _cores(),
        _instructions(),
        _kernels(),
        _memory(),
        _cgroup(),
        _threads_allowed(),
        _signal_stack(),
        _working_directory(),
        *_devices(),
        *_disk(),
    ]


def _python() -> Finding:
    text = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    return Finding("Python", text, "ok" if sys.version_info >= (3, 11) else "bad")


def _versions() -> list[Finding]:
    findings = []
    for package in _PACKAGES:
        try:
            findings.append(Finding(package, version(package)))
        except PackageNotFoundError:
            findings.append(Finding(package, "not installed", "bad"))
    return findings


def _cores() -> Finding:
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return Finding("cores", f"{count} usable")


def _instructions() -> Finding:
    found = [name for name in _INSTRUCTION_SETS if name in _cpu_flags()]
    return Finding("instructions", " ".join(found) or "unknown")


def _cpu_flags() -> set[str]:
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return set()
    for line in path.read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return set(value.split())
    return set()


def _kernels() -> Finding:
    if not native.is_available():
        return Finding("compiled kernels", native.describe(), "bad")
    asked = native.num_threads()
    started = native.set_num_threads(asked)
    if started == asked:
        return Finding("compiled kernels", native.describe())
    text = f"{native.describe()} of {asked}: the system starts no more"
    return Finding("compiled kernels", text, "warn")


def _memory() -> Finding:
    total, free = total_memory(), free_memory()
    if total is None or free is None:
        return Finding("memory", "this system does not tell; name --memory", "warn")
    budget = budget_for_process(None)
    text = (
        f"{format_bytes(total)}, {format_bytes(free)} free to this process; without --memory the "
        f"budget is {size_option(budget.num_bytes)}: {budget.source}"
    )
    return Finding("memory", text, "ok" if budget.num_bytes >= _SMALLEST_MEMORY else "bad")


def _cgroup() -> Finding:
    bound = cgroup_bound()
    if bound is None:
        return Finding("control group", "no memory bound")
    held = f"{format_bytes(bound.held_bytes)} held by all its processes, this one included"
    return Finding("control group", f"{format_bytes(bound.num_bytes)}, {held}")


def _threads_allowed() -> Finding:
    """What the system allows this process to start: libraries and kernels need a few each."""
    rooms = pid_rooms()
    if hasattr(resource, "RLIMIT_NPROC") and os.geteuid() != 0:
        soft = resource.getrlimit(resource.RLIMIT_NPROC)[0]
        if soft != resource.RLIM_INFINITY:
            rooms.append((soft, "of the user in all, ulimit -u"))
    if not rooms:
        return Finding("threads", "no bound")
    room, whose = min(rooms)
    needed = (native.num_threads() if native.is_available() else 1) + _OTHER_THREADS
    if room >= needed:
        return Finding("threads", f"{room} more allowed ({whose})")
    text = f"{max(room, 0)} more allowed ({whose}); about {needed} are needed: raise pids.max"
    return Finding("threads", text, "bad")


def _signal_stack() -> Finding:
    """The kernel grants AMX only to a process whose alternate signal stacks hold its registers.

    Source: Linux, Documentation/arch/x86/xstate.rst.
    """
    size = alternate_stack_bytes()
    text = "no alternate one" if size is None else f"alternate one of {format_bytes(size)}"
    has_amx = native.is_available() and "amx_int8" in _cpu_flags()
    if not has_amx or "amx" in native.available_isas():
        return Finding("signal stack", text)
    if size is not None and size < _AMX_SIGNAL_STACK:
        return Finding("signal stack", f"{text}: too small for AMX, which is not used", "warn")
    reason = "AMX is not granted and not used; another thread's may be too small"
    return Finding("signal stack", f"{text}; {reason}", "warn")


def _working_directory() -> Finding:
    try:
        folder = os.getcwd()
    except OSError as error:
        text = f"{error.strerror}: names of files are not found; change to another folder"
        return Finding("working directory", text, "bad")
    if not os.access(folder, os.R_OK | os.X_OK):
        return Finding("working directory", f"{folder} cannot be read", "warn")
    return Finding("working directory", folder)


def _devices() -> list[Finding]:
    if (missing := missing_for_cuda()) is not None:
        return [Finding("CUDA", missing)]
    triton = import_module("triton").__version__
    findings = [Finding("torch", version("torch")), Finding("Triton", triton)]
    cards = import_module("thinslice.memory.cuda_device").cards()
    for index, (name, num_bytes) in enumerate(cards):
        text = f"{name}, {num_bytes / GIB:.1f} GiB; for --device cuda"
        findings.append(Finding(f"GPU {index}", text))
    return findings


def _unwritable(folder: Path) -> str | None:
    """Why no file can be made there; found out by making one."""
    try:
        with TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return error.strerror or type(error).__name__


def _disk() -> list[Finding]:
    try:
        root = Store().root
        existing = next(path for path in (root, *root.parents) if path.exists())
        free = shutil.disk_usage(existing).free
        if (reason := _unwritable(existing)) is not None:
            return [Finding("model store", f"{root} cannot be written: {reason}", "bad")]
        Store().list()
    except StoreError as error:
        return [Finding("model store", str(error), "bad")]
    except OSError as error:
        reason = error.strerror or type(error).__name__
        return [Finding("model store", f"{root} cannot be read: {reason}", "bad")]
    state = "ok" if free >= _SMALLEST_DISK else "bad"
    return [Finding("model store", f"{root}, {format_bytes(free)} free on its disk", state)]
