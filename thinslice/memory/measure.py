"""Measure what this machine can do, once, and keep the figures beside the models.

All phases together take under ten seconds and a bounded amount of memory and disk. Of several
passes the fastest counts: other work on the machine can only slow one down.
"""

import json
import logging
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

import numpy as np

from thinslice.errors import ConfigError, StoreError
from thinslice.kernels import native
from thinslice.kernels.arrays import BF16, aligned_buffer, empty
from thinslice.kernels.native import Matrix
from thinslice.kernels.native_pack import converted, quantized
from thinslice.memory.meter import current_rss_bytes
from thinslice.memory.slice_reader import SliceReader
from thinslice.memory.slice_schedule import Slice, buffer_bytes_for
from thinslice.plan.available import free_memory
from thinslice.plan.packed_format import PackedFormat
from thinslice.plan.predict import MEASURED_ROWS, HardwareProfile
from thinslice.units import KIB, MIB, format_bytes

SMALLEST_MAX_BYTES = 64 * MIB
DEFAULT_MAX_BYTES = 256 * MIB

_PHASE_S = 1.0
_OVERHEAD_S = 0.3
_WRITING_S = 2.0
_SAMPLE_BYTES = 256 * MIB
SMALLEST_SAMPLE_BYTES = 64 * MIB
_SLICE_BYTES = 16 * MIB
_NUM_BUFFERS = 3
# The size of a projection.
_GEMM_IN, _GEMM_OUT = 2048, 2048
# A profile that was measured on a busy machine is measured again once others leave this share of
# the cores, over so many seconds.
_FREE_SHARE = 0.8
_LOOK_S = 0.2
_MAX_PROFILE_BYTES = 64 * KIB
_CPUINFO = Path("/proc/cpuinfo")
_STAT = Path("/proc/stat")
_log = logging.getLogger(__name__)


def measured_profile(store_root: Path, weights: Path | None) -> HardwareProfile:
    """The machine's speeds and those of a disk, measured the first time, and again when they were
    measured on a busy machine that is quieter now.

    Args:
        weights: a file of the model; its disk is measured where it is large enough to be read for
            that, else the store's.

    Errors: StoreError, CheckpointError.
    """
    try:
        store_root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"the store {store_root} cannot be made: {error.strerror}") from error
    path, folder = _profile_place(store_root, weights)
    return load_or_measure(path, folder, None if folder == store_root else weights)


def known_profile(store_root: Path, weights: Path) -> HardwareProfile | None:
    """The profile that ``measured_profile`` has kept, or None if nothing was measured yet."""
    return kept_profile(*_profile_place(store_root, weights))


def _profile_place(store_root: Path, weights: Path | None) -> tuple[Path, Path]:
    """Return the profile's file and the folder whose disk it describes."""
    is_small = weights is None or weights.stat().st_size < SMALLEST_SAMPLE_BYTES
    folder = store_root if weights is None or is_small else weights.parent
    return store_root / f"hardware-{folder.stat().st_dev}.json", folder


def load_or_measure(path: Path, folder: Path, sample: Path | None = None) -> HardwareProfile:
    """The profile kept at ``path`` if it is of this machine; else measure, and keep it there.

    One that was measured while others kept the cores busy is measured again as soon as they are
    quieter, and of the two the one with more of the cores is kept.

    Args:
        folder, sample: as ``measure_hardware`` takes them.

    Errors: as ``measure_hardware``. A kept profile that cannot be read is measured anew, and one
    that cannot be kept is still returned; both are logged.
    """
    kept = kept_profile(path, folder)
    if kept is not None and (not kept.is_busy or cores_free() < _FREE_SHARE):
        return kept
    profile = measure_hardware(folder, sample=sample, max_bytes=_most_bytes())
    if kept is not None and kept.cpu_share >= profile.cpu_share:
        return kept
    try:
        _keep(path, profile)
    except OSError as error:
        _log.warning("the measured speeds cannot be kept in %s: %s", path, error.strerror)
    return profile


def kept_profile(path: Path, folder: Path) -> HardwareProfile | None:
    """The profile kept at ``path`` if it is of this machine and of the disk of ``folder``."""
    kept = _load(path)
    return kept if kept is not None and kept.machine == machine_key(folder) else None


def measure_hardware(
    folder: Path, *, sample: Path | None = None, max_bytes: int = DEFAULT_MAX_BYTES
) -> HardwareProfile:
    """Measure memory, matrix products and the disk of ``folder``.

    Args:
        sample: a file on that disk to read, at least 64 MiB (a smaller one is passed over); better
            than the file of up to 256 MiB that is otherwise written, read and removed again, for
            what was just written may still be in a cache below the file system.
        max_bytes: memory to take, at least SMALLEST_MAX_BYTES.

    Memory: max_bytes, one phase after the other.
    Errors: StoreError if the folder cannot hold the file; CheckpointError if the sample cannot be
    read.
    """
    assert max_bytes >= SMALLEST_MAX_BYTES, f"{max_bytes} bytes are too few to measure with"
    disk_rate, overhead_s, is_direct = _measure_disk(folder, sample)
    start, cpu_start = time.perf_counter(), time.process_time()
    memory_rate = _memory_read_rate(max_bytes)
    ones = empty((_GEMM_OUT, _GEMM_IN), np.dtype(np.float32))
    ones.fill(1.0)
    float32_rate, packed_rate = _rate(ones), _rate(quantized(ones, PackedFormat.INT4))
    bfloat16_rate = _rate(converted(ones, BF16))
    computing_s = (time.perf_counter() - start) * native.num_threads()
    return HardwareProfile(
        machine=machine_key(folder),
        measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
        num_threads=native.num_threads(),
        memory_read_bytes_per_s=memory_rate,
        disk_read_bytes_per_s=disk_rate,
        is_disk_direct=is_direct,
        bfloat16_flops_per_s=bfloat16_rate,
        float32_flops_per_s=float32_rate,
        packed_flops_per_s=packed_rate,
        slice_overhead_s=overhead_s,
        cpu_share=(time.process_time() - cpu_start) / computing_s,
    )


def cores_free() -> float:
    """The share of this process's cores that others leave to it now, looked at for a moment; 1
    where the system does not tell."""
    before = _core_ticks()
    time.sleep(_LOOK_S)
    after = _core_ticks()
    total = after[0] - before[0]
    return 1.0 if total <= 0 else (after[1] - before[1]) / total


def _core_ticks() -> tuple[int, int]:
    """Clock ticks of the cores this process may use, and those of them in which nothing ran."""
    if not _STAT.exists() or not hasattr(os, "sched_getaffinity"):
        return 0, 0
    names = {f"cpu{core}" for core in os.sched_getaffinity(0)}
    lines = (line.split() for line in _STAT.read_text().splitlines())
    cores = [[int(ticks) for ticks in line[1:9]] for line in lines if line and line[0] in names]
    # Source: proc_stat(5): user, nice, system, idle, iowait, irq, softirq, steal.
    return sum(map(sum, cores)), sum(core[3] + core[4] for core in cores)


def _most_bytes() -> int:
    """What measuring may take: half of what the machine or a control group has left."""
    free = free_memory()
    if free is None:
        return DEFAULT_MAX_BYTES
    room = (free - current_rss_bytes()) // 2
    return min(max(room, SMALLEST_MAX_BYTES), DEFAULT_MAX_BYTES)


def machine_key(folder: Path) -> str:
    """What the figures depend on: processor, cores and threads in use, and the disk."""
    has_affinity = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count()
    return f"{_processor()}, {cores} cores, {native.describe()}, device {os.stat(folder).st_dev}"


def _processor() -> str:
    if _CPUINFO.exists():
        for line in _CPUINFO.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def _memory_read_rate(max_bytes: int) -> float:
    """Bytes per second of a walk over ``max_bytes``.

    How a small walk can speak for memory and not for the last-level cache: on a virtual machine
    said to have 480 MiB of that cache (2 cores), a walk over 32 MiB gave 54 GB/s, 64 MiB 50,
    128 MiB 31, 256 MiB 29 and 2048 MiB 29, for a guest gets a share of a cache and a cyclic walk
    keeps little of it. Where one process does own so large a cache, the figure is an upper bound.
    Huge pages, as weights have them in the reader's ring: with small ones it was 20 GB/s.
    """
    data = aligned_buffer(max_bytes // MIB * MIB)
    return data.nbytes / _best_s(lambda: native.read_memory(data))


def _rate(weight: Matrix) -> float:
    """Operations per second of products with a matrix. Memory: under 64 MiB."""
    inputs = np.full((MEASURED_ROWS, _GEMM_IN), 0.5, np.float32)
    seconds = _best_s(lambda: native.linear(inputs, weight))
    return 2 * MEASURED_ROWS * _GEMM_IN * _GEMM_OUT / seconds


def _best_s(work: Callable[[], object]) -> float:
    """The fastest of the passes that fit into one phase, at least one, after one to warm up."""
    work()
    best = float("inf")
    end = time.perf_counter() + _PHASE_S
    while best == float("inf") or time.perf_counter() < end:
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best


def _measure_disk(folder: Path, sample: Path | None) -> tuple[float, float, bool]:
    """Bytes per second, seconds for one more slice, and whether the page cache was avoided."""
    if sample is not None and sample.stat().st_size >= SMALLEST_SAMPLE_BYTES:
        return _read_sample(sample)
    with _written_sample(folder) as path:
        return _read_sample(path)


def _read_sample(path: Path) -> tuple[float, float, bool]:
    size = path.stat().st_size
    slices = [
        Slice(path, at, _SLICE_BYTES) for at in range(0, size - _SLICE_BYTES + 1, _SLICE_BYTES)
    ]
    per_slice_s, is_direct = _seconds_per_slice(slices, _PHASE_S)
    small = [Slice(path, at, 4 * KIB) for at in range(0, _SLICE_BYTES, 4 * KIB)]
    overhead_s, _ = _seconds_per_slice(small, _OVERHEAD_S)
    return _SLICE_BYTES / per_slice_s, overhead_s, is_direct


def _seconds_per_slice(slices: list[Slice], phase_s: float) -> tuple[float, bool]:
    """Walk the slices over and over for a while; also whether past the page cache."""
    buffer_bytes = buffer_bytes_for(slices[0].num_bytes)
    with SliceReader.open(slices, buffer_bytes=buffer_bytes, num_buffers=_NUM_BUFFERS) as reader:
        is_direct = not reader.buffered_paths
        start = time.perf_counter()
        count, elapsed_s = 0, 0.0
        while elapsed_s < phase_s:
            with reader.next(slices[count % len(slices)]):
                count += 1
            elapsed_s = time.perf_counter() - start
    return elapsed_s / count, is_direct


@contextmanager
def _written_sample(folder: Path) -> Iterator[Path]:
    """A file of random bytes, removed afterwards."""
    free = shutil.disk_usage(folder).free
    if free < _SAMPLE_BYTES:
        raise StoreError(
            f"measuring the disk needs {format_bytes(_SAMPLE_BYTES)} free in {folder}, "
            f"which has {format_bytes(free)}"
        )
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".measuring-") as file:
            _write_random(file)
            yield Path(file.name)
    except OSError as error:
        raise StoreError(f"measuring the disk of {folder}: {error.strerror}") from error


def _write_random(file: IO[bytes]) -> None:
    """Write for a while and at most _SAMPLE_BYTES; to a slow disk, only a part of that."""
    content = os.urandom(_SLICE_BYTES)
    end = time.perf_counter() + _WRITING_S
    for _ in range(_SAMPLE_BYTES // _SLICE_BYTES):
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
        if time.perf_counter() > end:
            return


def _load(path: Path) -> HardwareProfile | None:
    try:
        with path.open("rb") as file:
            values = json.loads(file.read(_MAX_PROFILE_BYTES))
        if not isinstance(values, dict):
            raise ConfigError("hardware profile: no object")
        return HardwareProfile.from_dict(values)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError, ConfigError) as error:
        _log.info("measuring anew, for %s cannot be used: %s", path, error)
        return None


def _keep(path: Path, profile: HardwareProfile) -> None:
    """Written under another name, synced, then renamed: a crash leaves the old file or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(
        "w", dir=path.parent, prefix=f".{path.name}-", delete=False
    ) as file:
        try:
            json.dump(profile.to_dict(), file, indent=2)
            file.flush()
            os.fsync(file.fileno())
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise
