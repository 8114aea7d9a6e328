"""thinslice.json: what a packed folder was made from, and how. Written last, it marks it whole."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from thinslice.store.files import publish, write_synced

RECORD = "thinslice.json"
WEIGHTS = "model.safetensors"
_FORMAT = 1
_LARGEST_BYTES = 1 << 20


@dataclass(frozen=True)
class SourceFile:
    """A file of the source: its name, and what tells whether it is still the same."""

    name: str
    num_bytes: int
    mtime_ns: int


@dataclass(frozen=True)
class PackSettings:
    """What decides every bit of a packed model.

    Attributes:
        source: the model's name, or the last part of its path.
        files: of the source, also those with its settings and its tokenizer.
        quantization: as config.json has it under ``quantization_config``.
        version: of the thinslice that packs.
        layout: a digest of the file's header: the format and the place of every tensor.
    """

    source: str
    files: tuple[SourceFile, ...]
    quantization: dict[str, Any]
    version: str
    layout: str

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> "PackSettings":
        """What ``asdict`` made of it. Errors: TypeError, KeyError, ValueError for anything else."""
        files = tuple(SourceFile(**file) for file in record["files"])
        texts = (record["source"], record["version"], record["layout"])
        texts += tuple(file.name for file in files)
        numbers = [number for file in files for number in (file.num_bytes, file.mtime_ns)]
        if not all(isinstance(text, str) for text in texts):
            raise TypeError("a name is no text")
        if not all(type(number) is int for number in numbers):
            raise TypeError("a size is no whole number")
        quantization = dict(record["quantization"])
        return cls(record["source"], files, quantization, record["version"], record["layout"])


@dataclass(frozen=True)
class PackRecord:
    """A whole packed model.

    Attributes:
        digests: SHA-256 of each source file, in the order of ``settings.files``.
        num_bytes: of model.safetensors.
    """

    settings: PackSettings
    digests: tuple[str, ...]
    num_bytes: int


def write_record(folder: Path, record: PackRecord) -> None:
    """Declare the folder whole; the record appears whole or not at all."""
    text = json.dumps({"format": _FORMAT, **asdict(record)}, indent=2)
    part = folder / f".{RECORD}.part"
    write_synced(part, text.encode())
    publish(part, folder / RECORD)


def read_record(folder: Path) -> PackRecord | None:
    """The record of a packed folder; None for a folder that is not whole or not packed."""
    try:
        with open(folder / RECORD, "rb") as file:
            record = json.loads(file.read(_LARGEST_BYTES))
        if record["format"] != _FORMAT:
            return None
        settings = PackSettings.from_dict(record["settings"])
        digests = tuple(str(digest) for digest in record["digests"])
        found = PackRecord(settings, digests, record["num_bytes"])
        is_whole = (folder / WEIGHTS).stat().st_size == found.num_bytes
    except (FileNotFoundError, NotADirectoryError, ValueError, TypeError, KeyError):
        return None
    return found if is_whole and len(digests) == len(settings.files) else None
