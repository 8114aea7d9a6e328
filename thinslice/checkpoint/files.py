"""Safe ways to touch the files of a model folder, none of which is trusted."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from thinslice.errors import CheckpointError
from thinslice.units import format_bytes

# What Git puts in a file's place where Git LFS has not fetched it; a few lines of text.
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


@contextmanager
def os_errors_named(path: Path) -> Iterator[None]:
    """Turn an operating system error inside the block into a CheckpointError naming the file."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise CheckpointError(f"{path} cannot be read: {reason}") from error


def is_there(path: Path) -> bool:
    """Whether a folder has something of that name, if only a folder or a link that leads nowhere.

    What cannot be read is then refused where it is read, and not taken for absent.
    """
    return os.path.lexists(path)


def file_size(path: Path) -> int:
    """Bytes of a regular file, links followed.

    Errors: CheckpointError if there is none: a pipe or a device would block or never end.
    """
    with os_errors_named(path):
        if not path.exists():
            raise CheckpointError(f"{path} does not exist")
        if not path.is_file():
            raise CheckpointError(f"{path} is not a regular file")
        return path.stat().st_size


def read_json_object(path: Path, max_bytes: int) -> dict[str, Any]:
    """Read a small JSON file whose top is an object.

    Errors: CheckpointError if it is missing, larger than ``max_bytes``, or as
    ``parse_json_object`` has it.
    """
    num_bytes = file_size(path)
    if num_bytes > max_bytes:
        raise CheckpointError(f"{path} has {num_bytes} bytes; at most {max_bytes} are expected")
    with os_errors_named(path), path.open("rb") as file:
        content = file.read(num_bytes)
    refuse_lfs_pointer(path, content)
    return parse_json_object(content, str(path))


def refuse_lfs_pointer(path: Path, beginning: bytes) -> None:
    """Refuse a file of which there is only the pointer that Git keeps in its place.

    Args:
        beginning: the file's first bytes, 40 of them or more where it has so many.

    Errors: CheckpointError that says what to do.
    """
    if beginning.startswith(_LFS_POINTER):
        raise CheckpointError(
            f"{path} is a Git LFS pointer, not the file itself: fetch the file with git lfs pull "
            "in its folder, or download it again"
        )


def read_exactly(file: int, view: memoryview, offset: int, path: Path) -> None:
    """Fill ``view`` from a file's bytes at ``offset``.

    Errors: CheckpointError if the file ends before that; OSError.
    """
    done = 0
    while done < len(view):
        num_bytes = os.preadv(file, [view[done:]], offset + done)
        if num_bytes == 0:
            raise CheckpointError(f"{path} ends at byte {offset + done}: it changed while in use")
        done += num_bytes


def read_and_forget(file: int, view: memoryview, offset: int, path: Path) -> None:
    """``read_exactly``, after which the system's cache holds no more of the file than before.

    What somebody has in the cache is taken from there and stays: a disk is read at 2 GB/s, the
    cache at ten times that.
    """
    done = _read_cached(file, view, offset)
    if done == len(view):
        return
    read_exactly(file, view[done:], offset + done, path)
    if hasattr(os, "posix_fadvise"):  # not on macOS
        os.posix_fadvise(file, offset + done, len(view) - done, os.POSIX_FADV_DONTNEED)


def _read_cached(file: int, view: memoryview, offset: int) -> int:
    """How many bytes from the first on the system's cache has given."""
    if not hasattr(os, "RWF_NOWAIT"):
        return 0
    try:
        return os.preadv(file, [view], offset, os.RWF_NOWAIT)
    except OSError:  # none, or a file system that does not tell
        return 0


def parse_json_object(content: bytes, source: str) -> dict[str, Any]:
    """Parse a JSON object in which no key appears twice, at any depth.

    Errors: CheckpointError, beginning with ``source``, for anything else.
    """
    try:
        value = json.loads(content.decode(), object_pairs_hook=_without_duplicates)
    except RecursionError:
        raise CheckpointError(f"{source}: JSON is nested too deeply") from None
    except ValueError as error:  # of the syntax, the encoding, a number or a duplicate key
        raise CheckpointError(f"{source}: not valid JSON: {error!s:.120}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{source}: JSON holds no object")
    return value


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"key {key!r:.80} appears twice")
        result[key] = value
    return result


def read_capped(path: Path, max_bytes: int) -> bytes:
    """The content of a file.

    Errors: CheckpointError for one that is larger, is an LFS pointer, or cannot be read.
    """
    num_bytes = file_size(path)
    if num_bytes > max_bytes:
        raise CheckpointError(
            f"{path} has {format_bytes(num_bytes)}; at most {format_bytes(max_bytes)} are expected"
        )
    with os_errors_named(path), path.open("rb") as file:
        content = file.read(max_bytes)
    refuse_lfs_pointer(path, content)
    return content
