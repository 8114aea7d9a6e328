"""The files a packed model is made from: which they are, whether they changed, their digests."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

from thinslice.checkpoint.file_names import CONFIG, SETTINGS, is_document
from thinslice.checkpoint.files import file_size, os_errors_named
from thinslice.checkpoint.index import Checkpoint
from thinslice.errors import CheckpointError
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
    """config.json and what is copied beside it; of a GGUF, which holds its settings, documents
    alone, where no other model lies beside it that they could be of."""
    folder = source.path if source.path.is_dir() else source.path.parent
    names = sorted(path.name for path in folder.iterdir())
    documents = [name for name in names if is_document(name)]
    if source.kind == "gguf":
        others = {name for name in names if name.endswith((".gguf", ".safetensors"))}
        copied = [] if others - {path.name for path in source.files} else documents
    else:
        copied = [CONFIG, *SETTINGS, *documents]
    return [folder / name for name in copied if (folder / name).is_file()]


def _identity(path: Path) -> tuple[int, ...]:
    file_size(path)
    with os_errors_named(path):
        status = os.stat(path)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
