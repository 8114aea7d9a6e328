"""A packed copy of a model in the store, made when it is first asked for."""

from pathlib import Path

from thinslice.checkpoint.index import Checkpoint
from thinslice.pack.pack import PackOptions, pack_model
from thinslice.plan.packed_format import PackedFormat
from thinslice.store.changes import hold_packed
from thinslice.store.names import name_of_folder
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
    key = folder.name.removesuffix(f"-{fmt}")
    options = PackOptions(fmt, name_of_folder(key) or source.path.name, memory_bytes, True)
    with hold_packed(root, folder.name, progress):
        pack_model(source, folder, options, progress)
    return folder
