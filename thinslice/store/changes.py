"""What changes the store: pull and remove, one process at a time for each model.

A pull that is killed at any moment leaves nothing, files a later pull goes on with, or a complete
model: each file gets its name when it is whole and checked, and the manifest comes last.
"""

import math
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout

from thinslice.checkpoint.file_names import MODEL_CARD
from thinslice.checkpoint.index import Checkpoint
from thinslice.checkpoint.open import open_checkpoint
from thinslice.errors import CheckpointError, StoreError
from thinslice.plan.model_shape import ModelShape
from thinslice.store import embedded
from thinslice.store.files import disk_errors
from thinslice.store.manifest import (
    MANIFEST,
    Fetched,
    StoredFile,
    StoredModel,
    folder_in,
    read_manifest,
    write_manifest,
)
from thinslice.store.names import Embedded, HubModel, StoredName
from thinslice.store.pack_record import RECORD
from thinslice.store.packed_copies import PACKED
from thinslice.store.progress import Progress
from thinslice.units import format_bytes

# Front matter and prose; a model's own comes to some ten KiB.
_LARGEST_CARD = 256 * 1024
_LOCKS = ".locks"


def pull(root: Path, name: StoredName, progress: Progress) -> StoredModel:
    """Fetch what is missing of a model, check that it opens, and record it.

    Errors: StoreError; CheckpointError where the model cannot be opened. Its files are kept, as an
    unfinished pull: the fault may be with the disk, or be gone with the next thinslice.
    """
    folder = folder_in(root, name)
    with disk_errors(root, name.text), _lock(root, name, progress):
        stored = read_manifest(folder, name.text)
        if stored is not None:
            return stored
        try:
            model = _describe(name, folder, _fetch(name, folder, progress))
            write_manifest(folder, model)
        finally:
            with suppress(OSError):  # only an empty folder goes
                folder.rmdir()
        return model


def hub_shape(name: HubModel, progress: Progress) -> ModelShape:
    """The shape of a model of the Hub, by its settings; see ``hub.fetch_shape``."""
    from thinslice.store import hub

    return hub.fetch_shape(name, progress)


def remove(root: Path, name: StoredName) -> None:
    """Delete a model; one that is half deleted counts as an unfinished pull.

    Errors: StoreError while the model is being pulled.
    """
    folder = folder_in(root, name)
    with disk_errors(root, name.text, verb="remove"), _lock(root, name, None):
        (folder / MANIFEST).unlink(missing_ok=True)
        # rmtree deletes a link, it does not follow one.
        shutil.rmtree(folder)


def remove_packed(root: Path, folder: Path) -> None:
    """Delete a packed copy; one that is half deleted counts as unfinished.

    Errors: StoreError while it is being packed.
    """
    with disk_errors(root, folder.name, verb="remove"), hold_packed(root, folder.name, None):
        (folder / RECORD).unlink(missing_ok=True)
        shutil.rmtree(folder)


def describe_path(path: Path) -> StoredModel:
    """The record of a model outside the store, from its files alone.

    Errors: CheckpointError.
    """
    checkpoint = open_checkpoint(path)
    return StoredModel(
        name=str(path),
        path=path,
        source="local path",
        revision=None,
        licence=_printable(checkpoint.metadata.get("general.license") or _licence_of_card(path)),
        architecture=checkpoint.shape.architecture,
        context_length=checkpoint.shape.max_position_embeddings,
        weights=_weights(checkpoint),
        files=tuple(
            StoredFile(os.path.relpath(file, path if path.is_dir() else path.parent), size, None)
            for file, size in ((file, file.stat().st_size) for file in checkpoint.files)
        ),
        pulled_at=None,
    )


def _licence_of_card(path: Path) -> str | None:
    """The licence that a folder's model card gives; None where there is none to be read."""
    from thinslice.store import hub

    card = path / MODEL_CARD
    try:
        if not card.is_file() or card.stat().st_size > _LARGEST_CARD:
            return None
        return hub.licence_of(card)
    except OSError:
        return None


def _weights(checkpoint: Checkpoint) -> str:
    """The type of the weights: that of most of them, or the formats of a packed checkpoint."""
    if checkpoint.packing is not None:
        head = checkpoint.tensors[checkpoint.shape.head_name]
        return f"{checkpoint.packing.weights}, head {head.dtype}"
    sizes: Counter[str] = Counter()
    for entry in checkpoint.tensors.values():
        sizes[entry.dtype] += math.prod(entry.shape)
    return sizes.most_common(1)[0][0]


def _fetch(name: StoredName, folder: Path, progress: Progress) -> Fetched:
    if isinstance(name, Embedded):
        return embedded.fetch(name.model, folder, progress)
    from thinslice.store import hub

    return hub.fetch(name, folder, progress)


def _describe(name: StoredName, folder: Path, fetched: Fetched) -> StoredModel:
    try:
        model = describe_path(folder / fetched.entry)
    except CheckpointError as error:
        kept = format_bytes(sum(file.num_bytes for file in fetched.files))
        raise CheckpointError(
            f"{error}\n  its files are kept; `thinslice rm {name.text}` frees {kept}"
        ) from error
    return replace(
        model,
        name=name.text,
        source=fetched.source,
        revision=fetched.revision,
        licence=_printable(fetched.licence) or model.licence,
        files=fetched.files,
        pulled_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _printable(text: object) -> str | None:
    """A licence's name as a stranger wrote it, if it can be shown on a terminal."""
    return text if isinstance(text, str) and text.isprintable() and len(text) <= 200 else None


@contextmanager
def hold_packed(root: Path, folder: str, progress: Progress | None) -> Iterator[None]:
    """Hold a packed copy alone, by the name of its folder; see ``_hold``."""
    with _hold(root, f"{PACKED}-{folder}", ("packing", "packing", f"{PACKED}/{folder}"), progress):
        yield


@contextmanager
def _lock(root: Path, name: StoredName, progress: Progress | None) -> Iterator[None]:
    """Hold a model alone; see ``_hold``."""
    with _hold(root, name.folder, ("pulling", "pull", name.text), progress):
        yield


@contextmanager
def _hold(
    root: Path, key: str, what: tuple[str, str, str], progress: Progress | None
) -> Iterator[None]:
    """Hold a lock. Work on a model waits for its turn; without ``progress`` that is an error.

    Args:
        what: what is being done, as a verb and as a noun, and the model's name.

    The operating system drops the lock of a process that ends, however it ends.
    """
    doing, deed, name = what
    path = root / _LOCKS / f"{key}.lock"
    lock = _acquired(path, 0)
    if lock is None:
        if progress is None:
            raise StoreError(f"another process is {doing} {name}; remove it when that has ended")
        progress(f"waiting for another {deed} of {name}", 0, 0)
        lock = _acquired(path, -1)
        assert lock is not None, "waited without end"
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink()
        lock.release()


def _acquired(path: Path, timeout_s: float) -> FileLock | None:
    """The lock of a file that is still there once it is held; None where another holds it.

    Whoever lets a lock go removes its file, perhaps while another process waits for that very file:
    then a third one would make a new file and hold it at the same time.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        lock = FileLock(path)
        try:
            lock.acquire(timeout=timeout_s)
        except Timeout:
            return None
        if _is_open_at(lock, path):
            return lock
        lock.release()


def _is_open_at(lock: FileLock, path: Path) -> bool:
    """Whether the file that is locked is the one of this name."""
    descriptor = lock._context.lock_file_fd
    try:
        there = path.stat()
    except FileNotFoundError:
        return False
    return descriptor is not None and os.path.samestat(os.fstat(descriptor), there)
