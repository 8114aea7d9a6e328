"""Files that survive a crash: written under another name, synced, checked, then renamed."""

import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from thinslice.errors import StoreError
from thinslice.units import MIB, format_bytes

COPY_BYTES = MIB
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_ADVICE = "remove a model with `thinslice rm`, or name a larger disk in THINSLICE_HOME"


@contextmanager
def disk_errors(
    folder: Path, what: str, num_bytes: int = 0, advice: str = _ADVICE, *, verb: str = "store"
) -> Iterator[None]:
    """Turn the file system's refusals into a StoreError that names what was being stored.

    Args:
        num_bytes: what the work needs in all, told where the disk turns out to be full.
        advice: what would help then.
        verb: what is done with it.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise StoreError(_full(folder, what, num_bytes, advice)) from error
        reason = error.strerror or type(error).__name__
        raise StoreError(f"cannot {verb} {what} in {folder}: {reason}") from error


def check_free_space(folder: Path, what: str, num_bytes: int, advice: str = _ADVICE) -> None:
    """Refuse work that the disk cannot hold, before it is started.

    Errors: StoreError with the need and what is free.
    """
    if num_bytes > _free_bytes(folder):
        raise StoreError(_full(folder, what, num_bytes, advice))


def _full(folder: Path, what: str, num_bytes: int, advice: str) -> str:
    need = f"needs {format_bytes(num_bytes)} more, " if num_bytes else ""
    return (
        f"the disk is full for {what}: {need}{format_bytes(_free_bytes(folder))} free in {folder}; "
        f"{advice}"
    )


def _free_bytes(folder: Path) -> int:
    """Free space where the folder is, or is going to be."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


def write_synced(path: Path, data: bytes) -> None:
    """Write a small file and wait until the disk has it."""
    with open(path, "wb") as out:
        out.write(data)
        out.flush()
        os.fsync(out.fileno())


def sync_file(path: Path) -> None:
    """Wait until the disk has all of a file, whichever process wrote it."""
    with open(path, "r+b") as file:
        os.fsync(file.fileno())


def publish(part: Path, final: Path) -> None:
    """Give a written and synced file its name, and wait until the disk has the name."""
    os.replace(part, final)
    sync_folder(final.parent)


def sync_folder(folder: Path) -> None:
    """Wait until the disk has the folder's names. Windows has no such call and needs none."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path, report: Callable[[int], None], *more: "hashlib._Hash") -> str:
    """The SHA-256 of a file, in bounded memory.

    Args:
        report: told how many bytes are done.
        more: further hashes to feed on the way.
    """
    digest = hashlib.sha256()
    done = 0
    with open(path, "rb") as source:
        while block := source.read(COPY_BYTES):
            for each in (digest, *more):
                each.update(block)
            done += len(block)
            report(done)
    return digest.hexdigest()


def remove_all_but(folder: Path, keep: set[str]) -> None:
    """Remove what earlier pulls left in a folder; a link is removed, never followed."""
    for entry in folder.iterdir():
        if entry.name in keep:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)
