"""Packed copies in the store: a model quantised once, beside the model it was made from.

They are kept under ``packed`` in the store's folder, named after the model's own folder and the
format. Their names on the command line are those paths: packed/smollm2-int4.
"""

import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from thinslice.errors import StoreError
from thinslice.plan.packed_format import PackedFormat
from thinslice.store.names import name_of_folder
from thinslice.store.pack_record import read_record

PACKED = "packed"
_NAME = re.compile(r"packed/([\w.@%+-]{1,255})", re.ASCII)
_ENDING = re.compile(r"(.+)-(int4|int8)", re.ASCII)
_LONGEST_LOCAL = 80


@dataclass(frozen=True)
class PackedCopy:
    """One packed copy, or what an unfinished packing has left.

    Attributes:
        name: as it is written on the command line.
        model: the stored model it was made from; None for one of a path of the user's.
        format: int4 or int8.
    """

    name: str
    path: Path
    model: str | None
    format: str
    num_bytes: int
    is_whole: bool


def packed_copies(root: Path) -> tuple[PackedCopy, ...]:
    """All packed copies in a store, by name. What else is there is not ours."""
    return tuple(sorted(_copies(root), key=lambda copy: copy.name))


def is_copy_name(text: str) -> bool:
    """Whether a packed copy could have this name."""
    return _NAME.fullmatch(text) is not None


def find_copy(root: Path, text: str) -> PackedCopy | None:
    """The packed copy of this name, if it is there, whole or not."""
    if not is_copy_name(text):
        return None
    return next((copy for copy in packed_copies(root) if copy.name == text), None)


def copy_folder(root: Path, source: Path, fmt: PackedFormat) -> Path:
    """Return the folder of a model's packed copy.

    Args:
        source: the model's folder or file, in the store or elsewhere.

    Errors: StoreError where a link stands in its place, which could lead out of the store.
    """
    folder = root / PACKED / f"{_key(root, source)}-{fmt}"
    for place in (folder.parent, folder):
        if place.is_symlink():
            raise StoreError(f"{place} is a link; the store keeps models in folders of its own")
    return folder


def bytes_below(folder: Path) -> int:
    """Bytes of all files in a folder, also while they are renamed."""
    sizes = 0
    for place, _, files in os.walk(folder):
        for file in files:
            with suppress(FileNotFoundError):
                sizes += os.lstat(os.path.join(place, file)).st_size
    return sizes


def _key(root: Path, source: Path) -> str:
    absolute = Path(os.path.abspath(source))
    if absolute.is_relative_to(root):
        folder = absolute.relative_to(root).parts[0]
        if name_of_folder(folder) is not None:
            return folder
    plain = re.sub(r"[^A-Za-z0-9._-]", "_", absolute.name)[:_LONGEST_LOCAL]
    return f"{plain}-{hashlib.sha256(os.fsencode(absolute)).hexdigest()[:12]}"


def _copies(root: Path) -> Iterator[PackedCopy]:
    place = root / PACKED
    if place.is_symlink() or not place.is_dir():
        return
    for folder in place.iterdir():
        match = _ENDING.fullmatch(folder.name)
        name = f"{PACKED}/{folder.name}"
        is_ours = match is not None and _NAME.fullmatch(name) and not folder.is_symlink()
        if match is not None and is_ours and folder.is_dir():
            yield PackedCopy(
                name=name,
                path=folder,
                model=name_of_folder(match[1]),
                format=match[2],
                num_bytes=bytes_below(folder),
                is_whole=read_record(folder) is not None,
            )
