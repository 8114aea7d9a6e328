"""The files a packed model is made from: which they are, whether they changed, their digests."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

from thinslice.checkpoint.file_names import CONFIG, SETTINGS, TOOL_TEMPLATES, is_document
from thinslice.checkpoint.files import file_size, os_errors_named
from thinslice.checkpoint.index import Checkpoint
from thinslice.errors import CheckpointError
from thinslice.store.manifest import MANIFEST
from thinslice.store.pack_record import SourceFile
from thinslice.units import MIB

_BLOCK_BYTES = MIB


class SourceFiles:
    """The source's files as they are when this is made."""

    def __init__(self, source: Checkpoint) -> None:
        self.paths = (*source.files, *settings_files(source))
        self._identities = [_identity(path) for path in self.paths]
        self.records = tuple(
            SourceFile(path.name, identity[2], identity[3])
            for path, identity in zip(self.paths, self._identities, strict=True)
        )

    def check_unchanged(self) -> None:
        """Errors: CheckpointError if a file is gone, was replaced or was written to."""
        for path, identity in zip(self.paths, self._identities, strict=True):
            if _identity(path) != identity:
                raise CheckpointError(f"{path} changed while it was packed; pack the model again")

    def digests(self, report: Callable[[int, int], None]) -> tuple[str, ...]:
        """The SHA-256 of each file.

        ``report`` is told how many bytes are done, and how many there are. Peak extra memory: one
        MiB.
        """
        total = sum(record.num_bytes for record in self.records)
        digests, done = [], 0
        for path in self.paths:
            digest = hashlib.sha256()
            with os_errors_named(path), path.open("rb", buffering=0) as file:
                start = 0
                while block := file.read(_BLOCK_BYTES):
                    digest.update(block)
                    if hasattr(os, "posix_fadvise"):  # not on macOS
                        # No more than was read: what the system has read ahead is wanted next.
                        advice = os.POSIX_FADV_DONTNEED
                        os.posix_fadvise(file.fileno(), start, len(block), advice)
                    start += len(block)
                    done += len(block)
                    report(done, total)
            digests.append(digest.hexdigest())
        return tuple(digests)


def settings_files(source: Checkpoint) -> list[Path]:
    """config.json and what is copied beside it; nothing for a GGUF, which holds all of it."""
    if source.kind == "gguf":
        return []
    names = [CONFIG, *SETTINGS, *reversed(TOOL_TEMPLATES), *_documents(source.path)]
    return [source.path / name for name in names if (source.path / name).is_file()]


def own_documents(source: Checkpoint) -> list[Path]:
    """Model card and licence of a GGUF that the store has fetched; nothing for any other source.

    What lies beside a file that is anywhere else may be of anything.
    """
    folder = source.files[0].parent
    if source.kind != "gguf" or not (folder / MANIFEST).is_file():
        return []
    return [folder / name for name in _documents(folder)]


def _documents(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if is_document(path.name))


def _identity(path: Path) -> tuple[int, ...]:
    file_size(path)
    with os_errors_named(path):
        status = os.stat(path)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
