"""Pack a model: quantise it once, slice by slice, into a folder that is read as it lies on disk.

A packing that is killed at any moment goes on where the disk had all of it, and ends with the same
bits. The order: a journal, the settings (what cannot be read is refused before the long work), the
weights, their name, the record.
"""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from thinslice import __version__
from thinslice.checkpoint.index import Checkpoint
from thinslice.errors import BudgetError, ConfigError, StoreError
from thinslice.memory.meter import current_rss_bytes
from thinslice.pack.convert import scratch_bytes
from thinslice.pack.layout import PackedLayout, layout_of
from thinslice.pack.part import JOURNAL, JOURNAL_PART, PART, read_journal, write_journal
from thinslice.pack.settings_files import check_settings, write_settings
from thinslice.pack.source import SourceFiles
from thinslice.pack.write_weights import SYNC_BYTES, PackingJob, write_weights
from thinslice.plan.packed_format import PackedFormat
from thinslice.plan.packing import Packing, packing_for
from thinslice.plan.refusal import suggested_size
from thinslice.store.files import check_free_space, disk_errors, publish, remove_all_but
from thinslice.store.pack_record import (
    WEIGHTS,
    PackRecord,
    PackSettings,
    read_record,
    write_record,
)
from thinslice.store.progress import Progress, silent
from thinslice.units import MIB, describe_need, size_option

LOCK = ".pack.lock"
_MAX_THREADS = 4
# A tokenizer made from a GGUF's header, with the header's text and its own as it is saved.
_TOKENIZER_BYTES_PER_TOKEN = 1536
# What interpreter and allocator take beside what is asked of them: thread stacks, first calls.
_SLACK_BYTES = 24 * MIB
_ADVICE = "free some, or name a folder on a larger disk; what is done is kept"


@dataclass(frozen=True)
class PackOptions:
    """How a model is packed.

    Attributes:
        format: int4 or int8, of the layers' matrices.
        name: the source's name, for the record.
        memory_bytes: the most the process may hold; None for what all threads take.
        starts_over: whether what was packed from other files or in another way makes room; without
            it that is an error.
    """

    format: PackedFormat
    name: str
    memory_bytes: int | None = None
    starts_over: bool = False


@dataclass(frozen=True)
class Packed:
    """The outcome: the record of the folder, and whether it was whole before."""

    record: PackRecord
    was_there: bool


def pack_model(
    source: Checkpoint, folder: Path, options: PackOptions, progress: Progress = silent
) -> Packed:
    """Pack a checkpoint into a folder; what an earlier call has left there is gone on with.

    Peak extra memory: that of one slice for each thread, within the budget.
    Errors: ConfigError for a folder with other content; BudgetError; CheckpointError for a source
    that cannot be packed or changes meanwhile; StoreError for the disk.
    """
    if source.packing is not None:
        raise ConfigError(f"{source.path} is packed already, as {source.packing.weights}")
    packing = packing_for(source.shape, options.format)
    layout = layout_of(source, packing)
    check_settings(source)
    files = SourceFiles(source)
    settings = settings_of(layout, packing, files, options.name)
    what = f"the packed {options.name}"
    with disk_errors(folder, what, layout.num_bytes, _ADVICE), _lock(folder):
        if options.starts_over:
            _drop_others(folder, settings)
        record = _whole(folder, settings)
        if record is not None:
            return Packed(record, was_there=True)
        num_threads = _num_threads(source, layout, options.memory_bytes)
        num_done = _slices_done(folder, settings)
        if not (folder / WEIGHTS).exists():
            check_free_space(folder, what, layout.num_bytes - _on_disk(folder / PART), _ADVICE)
            write_journal(folder, settings, num_done)
            write_settings(source, packing, folder)
            job = PackingJob(source, layout, settings, files, folder)
            write_weights(job, num_done, num_threads, progress)
        digests = files.digests(lambda done, total: progress("checking the source", done, total))
        files.check_unchanged()
        if not (folder / WEIGHTS).exists():
            publish(folder / PART, folder / WEIGHTS)
        record = PackRecord(settings, digests, layout.num_bytes)
        write_record(folder, record)
        _drop_journal(folder)
        return Packed(record, was_there=False)


def settings_of(
    layout: PackedLayout, packing: Packing, files: SourceFiles, name: str
) -> PackSettings:
    """What tells one packing from another: the source's files, the packing, and how it is cut."""
    digest = hashlib.sha256(layout.header).hexdigest()
    return PackSettings(name, files.records, packing.to_dict(), __version__, digest)


def packing_parts(source: Checkpoint, layout: PackedLayout) -> dict[str, int]:
    """Bytes that packing takes on one thread, part by part, beyond what the process holds."""
    num_tokens = source.shape.vocab_size if source.kind == "gguf" else 0
    return {
        "threads": _SLACK_BYTES,
        "page cache": SYNC_BYTES,
        "tokenizer": num_tokens * _TOKENIZER_BYTES_PER_TOKEN,
        "scratch": scratch_bytes(layout),
    }


def _num_threads(source: Checkpoint, layout: PackedLayout, memory_bytes: int | None) -> int:
    """As many threads as there are cores and as the budget holds.

    Errors: BudgetError where it does not hold one.
    """
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    most = max(min(num_cores or 1, _MAX_THREADS), 1)
    if memory_bytes is None:
        return most
    parts = {"runtime": current_rss_bytes(), **packing_parts(source, layout)}
    floor = sum(parts.values())
    if floor > memory_bytes:
        fits = suggested_size(floor)
        raise BudgetError(
            f"packing does not fit --memory {size_option(memory_bytes)}\n"
            f"  {describe_need(parts.items())}; packed once, it runs in less\n"
            f"  this fits: --memory {fits}"
        )
    return min(most, 1 + (memory_bytes - floor) // parts["scratch"])


def _whole(folder: Path, settings: PackSettings) -> PackRecord | None:
    """The record of a folder that is whole and the same.

    Errors: ConfigError where another packed model is there.
    """
    record = read_record(folder)
    if record is not None:
        if record.settings != settings:
            difference = _difference(record.settings, settings)
            raise ConfigError(
                f"{folder} holds a packed model already, {difference}; name another folder"
            )
        _drop_journal(folder)
    return record


def _slices_done(folder: Path, settings: PackSettings) -> int:
    """Slices that an earlier call has left in a folder.

    Errors: ConfigError for a folder that holds anything else.
    """
    journal = read_journal(folder)
    if journal is not None:
        if journal[0] != settings:
            raise ConfigError(
                f"{folder} holds an unfinished packing, {_difference(journal[0], settings)}; "
                "delete it to begin anew"
            )
        has_weights = (folder / PART).exists() or (folder / WEIGHTS).exists()
        return journal[1] if has_weights else 0
    foreign = sorted({entry.name for entry in folder.iterdir()} - {LOCK, JOURNAL_PART})
    # A journal that cannot be read vouches for nothing, but tells whose folder this is.
    if foreign and not (folder / JOURNAL).exists():
        raise ConfigError(f"{folder} is not empty ({foreign[0]!r:.80}); name a new folder")
    for name in (PART, WEIGHTS):
        (folder / name).unlink(missing_ok=True)
    return 0


def _drop_others(folder: Path, settings: PackSettings) -> None:
    """Empty a folder unless it holds this very packing, whole or begun."""
    record, journal = read_record(folder), read_journal(folder)
    is_same = record is not None and record.settings == settings
    is_begun = record is None and journal is not None and journal[0] == settings
    if not is_same and not is_begun:
        remove_all_but(folder, {LOCK})


def _drop_journal(folder: Path) -> None:
    for name in (JOURNAL, JOURNAL_PART):
        (folder / name).unlink(missing_ok=True)


def _difference(found: PackSettings, wanted: PackSettings) -> str:
    """What tells two packings apart, for a person."""
    if found.source != wanted.source:
        return f"of {found.source}, not of {wanted.source}"
    if found.quantization != wanted.quantization:
        weights = (found.quantization.get("weights"), wanted.quantization["weights"])
        if weights[0] != weights[1]:
            return f"{weights[0]!s:.20}, not {weights[1]}"
        return "cut in another way"
    if found.version != wanted.version:
        return f"by thinslice {found.version:.40}, not {wanted.version}"
    if found.layout != wanted.layout:
        return "cut in another way"
    return f"of a {wanted.source} whose files have changed since"


def _on_disk(path: Path) -> int:
    """Bytes the disk has given a file already; one with holes has fewer than its size."""
    try:
        return os.stat(path).st_blocks * 512
    except FileNotFoundError:
        return 0


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Hold the folder alone; the system drops the lock of a process that ends, however it ends."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise StoreError(f"another process is packing into {folder}") from error
    try:
        yield
    finally:
        with suppress(OSError):
            (folder / LOCK).unlink()
        lock.release()
        with suppress(OSError):  # only an empty folder goes
            folder.rmdir()
