"""Speed of the CPU kernels beside the memory's own, in one run: `python benchmarks/kernels.py`.

Every figure is the median of passes over more weights than the caches hold; the read bandwidth is
measured between them, so a share stays true when other work slows the machine. The last line is
JSON.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from thinslice.kernels import native
from thinslice.kernels.arrays import empty, empty_bytes
from thinslice.kernels.packed import PackedWeight
from thinslice.plan.packed_format import PackedFormat, packed_bytes

OUT_FEATURES, IN_FEATURES = 11008, 4096
WORKING_SET = 1200 * 10**6
DECODE_ROWS = (1, 2, 4, 8, 16)
PREFILL_ROWS = (16, 64, 128, 256, 512)


@dataclass(frozen=True)
class Figure:
    """One line of the table."""

    what: str
    rows: int
    threads: int
    gigabytes_per_s: float
    share_of_read: float
    tera_ops_per_s: float


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def weights(fmt: PackedFormat) -> list[PackedWeight]:
    """Enough matrices to outgrow the caches, in one buffer of 2 MiB pages, the scales finite."""
    size = packed_bytes(fmt, OUT_FEATURES, IN_FEATURES)
    count = -(-WORKING_SET // size)
    buffer = empty_bytes(count * size)
    # Bytes below 0x3c: any two of them are a small finite half.
    pattern = np.random.default_rng(0).integers(0, 60, 1 << 20, np.uint8)
    for start in range(0, buffer.size, pattern.size):
        piece = buffer[start : start + pattern.size]
        piece[...] = pattern[: piece.size]
    parts = buffer.reshape(count, size)
    return [PackedWeight(part, fmt, OUT_FEATURES, IN_FEATURES) for part in parts]


def read_bandwidth(matrices: list[PackedWeight], first: int, count: int) -> float:
    """GB/s of reading `count` matrices from `first` on, the way the kernels walk over memory."""
    total = 0.0
    for i in range(first, first + count):
        data = matrices[i % len(matrices)].data
        total += seconds(lambda data=data: native.read_memory(data))  # type: ignore[misc]
    return count * matrices[0].data.size / total / 1e9


def measure(matrices: list[PackedWeight], rows: int, threads: int, passes: int) -> Figure:
    """Pairs of a few calls and a read of as many bytes, taken in turn."""
    native.set_num_threads(threads)
    x = np.random.default_rng(0).standard_normal((rows, IN_FEATURES), np.float32)
    out = empty((rows, OUT_FEATURES), np.float32)
    calls = 8 if rows <= 16 else 1
    size = matrices[0].data.size
    times, reads = [], []
    for i in range(passes):
        first = 2 * i * calls
        taken = [matrices[(first + j) % len(matrices)] for j in range(calls)]
        times.append(seconds(lambda taken=taken: [native.linear(x, w, out=out) for w in taken]))  # type: ignore[misc]
        reads.append(read_bandwidth(matrices, first + calls, calls))
    per_call = statistics.median(times) / calls
    shares = [calls * size / t / 1e9 / read for t, read in zip(times, reads, strict=True)]
    return Figure(
        what=matrices[0].format.value,
        rows=rows,
        threads=threads,
        gigabytes_per_s=size / per_call / 1e9,
        share_of_read=statistics.median(shares),
        tera_ops_per_s=2 * rows * OUT_FEATURES * IN_FEATURES / per_call / 1e12,
    )


def measure_torch(rows: int, threads: int, passes: int) -> Figure:
    """torch's bf16 linear (oneDNN) on the same shape, as another library's."""
    import torch  # noqa: PLC0415 -- of no other figure

    torch.set_num_threads(threads)
    count = -(-WORKING_SET // (2 * OUT_FEATURES * IN_FEATURES))
    matrices = torch.zeros(count, OUT_FEATURES, IN_FEATURES, dtype=torch.bfloat16)
    x = torch.randn(rows, IN_FEATURES).to(torch.bfloat16)
    times = []
    for i in range(passes + 1):
        weight = matrices[i % count]
        times.append(seconds(lambda w=weight: torch.nn.functional.linear(x, w)))  # type: ignore[misc]
    per_call = statistics.median(times[1:])
    return Figure(
        what="torch bf16",
        rows=rows,
        threads=threads,
        gigabytes_per_s=2 * OUT_FEATURES * IN_FEATURES / per_call / 1e9,
        share_of_read=float("nan"),
        tera_ops_per_s=2 * rows * OUT_FEATURES * IN_FEATURES / per_call / 1e12,
    )


def print_figure(figure: Figure) -> None:
    print(
        f"{figure.what:>10} {figure.rows:5} rows {figure.threads} threads "
        f"{figure.gigabytes_per_s:7.1f} GB/s {figure.share_of_read:7.2f} of read "
        f"{figure.tera_ops_per_s:7.3f} TOP/s",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--isa", choices=native.available_isas(), default=native.isa())
    parser.add_argument("--threads", type=int, nargs="+", default=[1, native.num_threads()])
    parser.add_argument("--formats", nargs="+", default=[f.value for f in PackedFormat])
    parser.add_argument("--passes", type=int, default=7)
    parser.add_argument("--skip-prefill", action="store_true")
    parser.add_argument("--skip-torch", action="store_true")
    args = parser.parse_args()
    native.set_isa(args.isa)
    figures = []
    for name in args.formats:
        matrices = weights(PackedFormat(name))
        rows = DECODE_ROWS if args.skip_prefill else sorted({*DECODE_ROWS, *PREFILL_ROWS})
        for threads in sorted(set(args.threads)):
            for count in rows:
                figures.append(measure(matrices, count, threads, args.passes))
                print_figure(figures[-1])
        del matrices
    if not args.skip_torch:
        for count in (1, 4, 16, 64, 512):
            figures.append(measure_torch(count, max(args.threads), args.passes))
            print_figure(figures[-1])
    report = {"benchmark": "kernels", "isa": args.isa, "shape": [OUT_FEATURES, IN_FEATURES]}
    print(json.dumps({**report, "figures": [vars(figure) for figure in figures]}))


if __name__ == "__main__":
    main()
