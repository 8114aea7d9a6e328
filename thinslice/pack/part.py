"""A packed file while it is being written: its bytes, and the journal of what is safe on disk."""

import json
import os
from dataclasses import asdict
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from thinslice.store.files import publish, write_synced
from thinslice.store.pack_record import PackSettings

PART = ".model.safetensors.part"
JOURNAL = ".pack.json"
JOURNAL_PART = f"{JOURNAL}.part"
_FORMAT = 1
_LARGEST_BYTES = 1 << 20


class PartFile:
    """An open file that is written at given places; threads may write at the same time.

    Nothing stays in the page cache beyond the next ``sync``, so that what is written does not
    count against the budget.
    """

    def __init__(self, path: Path, *, is_new: bool) -> None:
        flags = os.O_RDWR | os.O_CREAT | (os.O_TRUNC if is_new else 0)
        self._file = os.open(path, flags, 0o644)

    def write(self, offset: int, data: NDArray[np.uint8]) -> None:
        """Write uint8 data. Errors: OSError."""
        self.write_bytes(offset, data.data)

    def write_bytes(self, offset: int, data: bytes | memoryview) -> None:
        """Write bytes. Errors: OSError."""
        view = memoryview(data)
        while view:
            count = os.pwrite(self._file, view, offset)
            view, offset = view[count:], offset + count

    def sync(self) -> None:
        """Wait until the disk has all that was written, and drop it from the page cache."""
        os.fsync(self._file)
        if hasattr(os, "posix_fadvise"):  # not on macOS
            os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_DONTNEED)

    def end_at(self, num_bytes: int) -> None:
        """Give the file its size: what was not written is zero."""
        os.truncate(self._file, num_bytes)

    def close(self) -> None:
        """Close it."""
        os.close(self._file)


def write_journal(folder: Path, settings: PackSettings, num_slices: int) -> None:
    """Note that so many slices, from the first on, are safe on disk."""
    record = {"format": _FORMAT, "settings": asdict(settings), "num_slices": num_slices}
    write_synced(folder / JOURNAL_PART, json.dumps(record).encode())
    publish(folder / JOURNAL_PART, folder / JOURNAL)


def read_journal(folder: Path) -> tuple[PackSettings, int] | None:
    """The settings of a packing that was broken off, and its slices; None where there is none."""
    try:
        with open(folder / JOURNAL, "rb") as file:
            record = json.loads(file.read(_LARGEST_BYTES))
        num_slices = record["num_slices"]
        if record["format"] != _FORMAT or type(num_slices) is not int or num_slices < 0:
            return None
        return PackSettings.from_dict(record["settings"]), num_slices
    except (OSError, ValueError, TypeError, KeyError):
        return None
