"""Fill a packed file slice by slice, on several threads, and note what the disk has."""

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from thinslice.checkpoint.index import Checkpoint
from thinslice.checkpoint.reader import CheckpointReader
from thinslice.pack.convert import convert
from thinslice.pack.layout import PackedLayout, Work
from thinslice.pack.part import PART, PartFile, write_journal
from thinslice.pack.source import SourceFiles
from thinslice.store.pack_record import PackSettings
from thinslice.store.progress import Progress
from thinslice.units import MIB

# Written bytes that may wait for the disk, in the page cache; they count against the budget.
SYNC_BYTES = 16 * MIB


@dataclass(frozen=True, eq=False)
class PackingJob:
    """What is packed, and the folder that it goes to."""

    source: Checkpoint
    layout: PackedLayout
    settings: PackSettings
    files: SourceFiles
    folder: Path


@dataclass(frozen=True)
class _Slice:
    work: Work
    start: int
    stop: int

    @property
    def source_bytes(self) -> int:
        return (self.stop - self.start) * self.work.entry.row_bytes


def write_weights(job: PackingJob, num_done: int, num_threads: int, progress: Progress) -> None:
    """Write all slices after the first ``num_done``, and wait until the disk has everything.

    Each thread works on slices of its own. Which thread has which slice changes no bit.
    Peak extra memory: ``scratch_bytes`` for each thread, and SYNC_BYTES of page cache.
    Errors: CheckpointError from the source; OSError from the disk.
    """
    slices = [_Slice(work, *rows) for work in job.layout.work for rows in work.ranges()]
    total = sum(one.source_bytes for one in slices)
    done = sum(one.source_bytes for one in slices[:num_done])
    step = f"packing as {job.settings.quantization['weights']}"
    part = PartFile(job.folder / PART, is_new=num_done == 0)
    with (
        closing(part),
        CheckpointReader(job.source) as reader,
        ThreadPoolExecutor(num_threads, "thinslice-pack") as threads,
    ):
        if num_done == 0:
            part.write_bytes(0, job.layout.header)
        rest = iter(slices[num_done:])
        running: deque[tuple[_Slice, Future[int]]] = deque()
        num_waiting = 0

        def start_next() -> None:
            if (one := next(rest, None)) is not None:
                running.append((one, threads.submit(_write, one, reader, part)))

        for _ in range(2 * num_threads):
            start_next()
        while running:
            one, written = running.popleft()
            num_waiting += written.result()
            start_next()
            num_done, done = num_done + 1, done + one.source_bytes
            progress(step, done, total)
            if num_waiting >= SYNC_BYTES:
                _save(job, part, num_done)
                num_waiting = 0
        part.end_at(job.layout.num_bytes)
        _save(job, part, num_done)


def _write(one: _Slice, reader: CheckpointReader, part: PartFile) -> int:
    """Convert and write one slice; returns the bytes written."""
    count = 0
    for offset, data in convert(reader, one.work, one.start, one.stop):
        part.write(offset, data)
        count += data.size
    return count


def _save(job: PackingJob, part: PartFile, num_done: int) -> None:
    part.sync()
    job.files.check_unchanged()
    write_journal(job.folder, job.settings, num_done)
