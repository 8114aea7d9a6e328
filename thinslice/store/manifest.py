"""The record of a stored model: manifest.json, the last file of a pull to get its name.

A folder without a manifest, or whose files are not those of its manifest, is an unfinished pull.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from thinslice.errors import StoreError
from thinslice.store.files import publish, write_synced
from thinslice.store.names import StoredName

MANIFEST = "manifest.json"
_FORMAT = 1
_LARGEST_BYTES = 1 << 20


@dataclass(frozen=True)
class StoredFile:
    """One file of a model; sha256 is None for a file the store does not keep."""

    path: str
    num_bytes: int
    sha256: str | None


@dataclass(frozen=True)
class Fetched:
    """What a source hands to the store: files that are complete, checked and on the disk.

    Attributes:
        entry: the file open_checkpoint takes, or "." for the folder.
        source: where the files came from, for a person.
        revision: the commit, or the version of the package.
        licence: None where the source does not tell it.
    """

    source: str
    revision: str
    entry: str
    files: tuple[StoredFile, ...]
    licence: str | None


@dataclass(frozen=True)
class StoredModel:
    """A complete model.

    Attributes:
        path: what open_checkpoint takes: the folder, or the (first) .gguf file.
        source: where the files came from, for a person.
        revision: the commit, or the version of the package; None for a path of the user's.
        architecture: as Hugging Face names it.
        context_length: positions the model was made for.
        pulled_at: the time the pull ended, in UTC, as ISO 8601; None for a path of the user's.
        weights: the type most of them have on disk, or the formats of a packed model; None where
            an earlier thinslice has pulled it.
    """

    name: str
    path: Path
    source: str
    revision: str | None
    licence: str | None
    architecture: str
    context_length: int
    files: tuple[StoredFile, ...]
    pulled_at: str | None
    weights: str | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes of all files."""
        return sum(file.num_bytes for file in self.files)


def folder_in(root: Path, name: StoredName) -> Path:
    """The folder of a model in a store, there or not.

    Errors: StoreError where a link stands in its place, which could lead out of the store.
    """
    folder = root / name.folder
    if folder.parent != root or folder.is_symlink():
        raise StoreError(f"{folder} is a link; the store keeps models in folders of its own")
    return folder


def write_manifest(folder: Path, model: StoredModel) -> None:
    """Declare the folder complete; the manifest appears whole or not at all."""
    record = asdict(model)
    entry = record.pop("path").relative_to(folder).as_posix()
    text = json.dumps({"format": _FORMAT, "entry": entry, **record}, indent=2)
    part = folder / f"{MANIFEST}.part"
    write_synced(part, text.encode())
    publish(part, folder / MANIFEST)


def read_manifest(folder: Path, name: str) -> StoredModel | None:
    """The model in this folder, or None where a pull of it is still to be finished.

    A manifest of another name (letter case, on a file system that does not tell them apart) and
    one whose files are missing or of another size count as none.
    """
    try:
        with open(folder / MANIFEST, "rb") as manifest:
            record = json.loads(manifest.read(_LARGEST_BYTES))
        model = _model_from(record, folder)
        sizes = [(folder / file.path).stat().st_size for file in model.files]
    except (FileNotFoundError, NotADirectoryError, ValueError, TypeError, KeyError):
        return None
    is_complete = model.name == name and sizes == [file.num_bytes for file in model.files]
    return model if is_complete else None


def _model_from(record: Any, folder: Path) -> StoredModel:
    if not isinstance(record, dict) or record.pop("format") != _FORMAT:
        raise ValueError("not a manifest of this format")
    files = tuple(StoredFile(**file) for file in record.pop("files"))
    entry = record.pop("entry")
    if entry not in (".", *(file.path for file in files)):
        raise ValueError("the entry is not one of the files")
    return StoredModel(path=folder / entry, files=files, **record)
