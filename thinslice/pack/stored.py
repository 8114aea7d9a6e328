"""A packed copy of a model in the store, made when it is first asked for."""

from contextlib import suppress
from pathlib import Path

from thinslice.checkpoint.index import Checkpoint
from thinslice.errors import StoreError
from thinslice.pack.layout import layout_of
from thinslice.pack.pack import PackOptions, pack_model, packing_parts, settings_of
from thinslice.pack.source import SourceFiles
from thinslice.plan.packed_format import PackedFormat
from thinslice.plan.packing import packing_for
from thinslice.store.changes import hold_packed
from thinslice.store.names import name_of_folder
from thinslice.store.pack_record import read_record
from thinslice.store.packed_copies import copy_folder
from thinslice.store.progress import Progress, silent
from thinslice.store.store import Store


def ensure_packed(
    source: Checkpoint,
    fmt: PackedFormat,
    progress: Progress = silent,
    *,
    memory_bytes: int | None = None,
) -> Path:
    """The folder of a model's packed copy; it is packed now where there is none.

    A copy that is whole is used as long as the source's files are the same; one of files that have
    changed, or by another thinslice, is made again. Another process that packs the same is waited
    for.

    Args:
        memory_bytes: the most the process may hold while packing.

    Errors: those of ``pack_model``.
    """
    root = Store().root
    folder = copy_folder(root, source.path, fmt)
    options = PackOptions(fmt, _name(source, folder, fmt), memory_bytes, True)
    with hold_packed(root, folder.name, progress):
        pack_model(source, folder, options, progress)
    return folder


def bytes_to_pack(source: Checkpoint, fmt: PackedFormat) -> int:
    """What ``ensure_packed`` takes on one thread beyond what the process holds; 0 where the copy is
    there.

    A store that cannot be read has no copy: a plan needs no store.

    Errors: CheckpointError for a model that cannot be packed.
    """
    packing = packing_for(source.shape, fmt)
    layout = layout_of(source, packing)
    with suppress(OSError, StoreError):
        folder = copy_folder(Store().root, source.path, fmt)
        record = read_record(folder)
        name = _name(source, folder, fmt)
        settings = settings_of(layout, packing, SourceFiles(source), name)
        if record is not None and record.settings == settings:
            return 0
    return sum(packing_parts(source, layout).values())


def _name(source: Checkpoint, folder: Path, fmt: PackedFormat) -> str:
    return name_of_folder(folder.name.removesuffix(f"-{fmt}")) or source.path.name
