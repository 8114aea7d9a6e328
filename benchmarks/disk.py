"""How fast a disk gives up a file: by request size and requests in flight, against plain reads.

    python benchmarks/disk.py FILE [--amount 1GiB]

FILE is any large file on the disk in question, better a model than a fresh copy: what was just
written may still be in a cache below the file system. Each figure reads another part of the file,
through the reader that streams weights; plain reads go through the page cache, emptied of the file
before. Prints a table and, as its last line, the same as JSON.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

from thinslice.errors import ThinsliceError
from thinslice.memory.slice_reader import ReaderOptions, SliceReader
from thinslice.memory.slice_schedule import Slice, buffer_bytes_for
from thinslice.units import KIB, MIB, format_bytes, parse_bytes

SLICE_BYTES = 16 * MIB
NUM_BUFFERS = 3
REQUEST_SIZES = (256 * KIB, MIB, 2 * MIB, 4 * MIB, 8 * MIB)
DEPTHS = (1, 2, 4, 8)


class Parts:
    """Hands out one part of a file after the other, from the front again when it ends."""

    def __init__(self, path: Path, num_bytes: int) -> None:
        self.path = path
        self.num_bytes = min(num_bytes, path.stat().st_size // SLICE_BYTES * SLICE_BYTES)
        self._start = 0

    def next_slices(self) -> list[Slice]:
        """The slices of the next part."""
        if self._start + self.num_bytes > self.path.stat().st_size:
            self._start = 0
        end = self._start + self.num_bytes
        slices = [Slice(self.path, at, SLICE_BYTES) for at in range(self._start, end, SLICE_BYTES)]
        self._start = end
        return slices


def direct_rate(slices: list[Slice], options: ReaderOptions) -> float:
    """Bytes per second through a SliceReader whose consumer does nothing."""
    num_bytes = buffer_bytes_for(SLICE_BYTES)
    with SliceReader.open(
        slices, buffer_bytes=num_bytes, num_buffers=NUM_BUFFERS, options=options
    ) as reader:
        start = time.perf_counter()
        for one in slices:
            with reader.next(one):
                pass
        return len(slices) * SLICE_BYTES / (time.perf_counter() - start)


def plain_rate(slices: list[Slice]) -> float:
    """Bytes per second of ordinary reads of 1 MiB, one after the other."""
    buffer = bytearray(MIB)
    with open(slices[0].path, "rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(slices[0].offset)
        start = time.perf_counter()
        for _ in range(len(slices) * SLICE_BYTES // MIB):
            file.readinto(buffer)
        rate = len(slices) * SLICE_BYTES / (time.perf_counter() - start)
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return rate


def is_direct(path: Path) -> bool:
    """Whether the reader gets past the page cache here."""
    one = [Slice(path, 0, 1)]
    with SliceReader.open(one, buffer_bytes=buffer_bytes_for(1), num_buffers=1) as reader:
        return not reader.buffered_paths


def measure(path: Path, num_bytes: int) -> dict[str, object]:
    """Print the table row by row and return what it says."""
    parts = Parts(path, num_bytes)
    if parts.num_bytes == 0:
        sys.exit(f"error: {path} has less than {format_bytes(SLICE_BYTES)}; name a larger file")
    has_direct = is_direct(path)
    way = "past the page cache" if has_direct else "THROUGH the page cache: no direct reads here"
    print(f"{path}, {format_bytes(parts.num_bytes)} for each figure, {way}")
    print(f"GB/s        {''.join(f'{depth:>8}' for depth in DEPTHS)}  in flight")
    rates: dict[str, dict[str, float]] = {}
    for size in REQUEST_SIZES:
        row = {}
        for depth in DEPTHS:
            row[str(depth)] = direct_rate(parts.next_slices(), ReaderOptions(size, depth))
        print(f"{format_bytes(size):>12}{''.join(f'{rate / 1e9:8.2f}' for rate in row.values())}")
        rates[str(size)] = row
    plain = plain_rate(parts.next_slices())
    print(f"{'plain reads':>12}{plain / 1e9:8.2f}")
    return {
        "benchmark": "disk",
        "is_direct": has_direct,
        "bytes_per_figure": parts.num_bytes,
        "bytes_per_s_by_request_bytes_and_depth": rates,
        "plain_bytes_per_s": plain,
    }


def main() -> None:
    """Read the arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("file", type=Path, help="any large file on the disk in question")
    parser.add_argument("--amount", default="1GiB", help="to read for each figure (%(default)s)")
    arguments = parser.parse_args()
    try:
        result = measure(arguments.file, parse_bytes(arguments.amount))
    except (ThinsliceError, OSError) as error:
        sys.exit(f"error: {error}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
