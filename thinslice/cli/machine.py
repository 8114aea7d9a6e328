"""What this machine has, as far as it matters to running a model on it."""

import os
import platform
import shutil
import sys
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from thinslice.engine.planning import native_dtype
from thinslice.errors import StoreError
from thinslice.kernels import native
from thinslice.memory.cuda_device import missing_for_cuda
from thinslice.plan.available import cgroup_bound, default_budget, free_memory, total_memory
from thinslice.store.store import Store
from thinslice.units import GIB, MIB, format_bytes

# What the embedded model takes at its smallest context, and on disk.
_SMALLEST_MEMORY = 600 * MIB
_SMALLEST_DISK = 300 * MIB
_PACKAGES = ("thinslice", "torch", "tokenizers", "numpy", "gguf", "huggingface_hub")
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
    return Finding("cores", f"{count} usable, {torch.get_num_threads()} threads")


def _instructions() -> Finding:
    found = [name for name in _INSTRUCTION_SETS if name in _cpu_flags()]
    dtype = native_dtype()
    state = "ok" if dtype == "bfloat16" else "warn"
    return Finding("instructions", f"{' '.join(found) or 'unknown'}; computes in {dtype}", state)


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
    state = "ok" if native.is_available() else "warn"
    return Finding("compiled kernels", native.describe(), state)


def _memory() -> Finding:
    total, free = total_memory(), free_memory()
    if total is None or free is None:
        return Finding("memory", "this system does not tell; name --memory", "warn")
    text = (
        f"{format_bytes(total)}, {format_bytes(free)} free; "
        f"without --memory the budget is {format_bytes(default_budget(free))}"
    )
    return Finding("memory", text, "ok" if free >= _SMALLEST_MEMORY else "bad")


def _cgroup() -> Finding:
    bound = cgroup_bound()
    if bound is None:
        return Finding("control group", "no memory bound")
    return Finding("control group", f"{format_bytes(bound[0])}, {format_bytes(bound[1])} in use")


def _devices() -> list[Finding]:
    if (missing := missing_for_cuda()) is not None:
        return [Finding("CUDA", missing)]
    findings = [Finding("Triton", import_module("triton").__version__)]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        text = f"{properties.name}, {properties.total_memory / GIB:.1f} GiB; for --device cuda"
        findings.append(Finding(f"GPU {index}", text))
    return findings


def _disk() -> list[Finding]:
    try:
        root = Store().root
        existing = next(path for path in (root, *root.parents) if path.exists())
        free = shutil.disk_usage(existing).free
        if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
            return [Finding("model store", f"{root} cannot be written", "bad")]
        Store().list()
    except StoreError as error:
        return [Finding("model store", str(error), "bad")]
    except OSError as error:
        reason = error.strerror or type(error).__name__
        return [Finding("model store", f"{root} cannot be read: {reason}", "bad")]
    state = "ok" if free >= _SMALLEST_DISK else "bad"
    return [Finding("model store", f"{root}, {format_bytes(free)} free on its disk", state)]
