"""The file of run --prompts: its lines, one in memory at a time, from the first as often as asked.

A pipe can be read once, and what came through it is kept in a temporary file without a name.
"""

import os
import stat
import tempfile
from codecs import BOM_UTF8
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from thinslice.errors import ConfigError
from thinslice.store.files import disk_errors
from thinslice.units import MIB

# No context of a model we run holds as much text.
_LARGEST_LINE = 8 * MIB
# Not /tmp, which is memory on many machines.
_ON_DISK = Path("/var/tmp")
_ADVICE = "name a folder on a larger disk in TMPDIR"


@dataclass(frozen=True)
class PromptFile:
    """What can be read again and again.

    Attributes:
        path: as the user named it.
        kept: the lines of what can be read once; None for a file that can be read again.
    """

    path: Path
    kept: IO[bytes] | None = None

    @property
    def is_json(self) -> bool:
        """Whether each line is a JSON value, rather than a prompt as it stands."""
        return self.path.suffix.lower() == ".jsonl"

    def lines(self) -> Iterator[bytes]:
        """The lines that are not blank, without a byte order mark; one iteration at a time.

        Errors: ConfigError where the file cannot be read, or for a line of over 8 MiB.
        """
        if self.kept is None:
            with opened(self.path, "rb") as file:
                yield from _lines(file, self.path)
        else:
            self.kept.seek(0)
            yield from _lines(self.kept, self.path)

    def num_lines(self) -> int:
        """The lines that are not blank. Errors: as ``lines``."""
        return sum(1 for _ in self.lines())


@contextmanager
def readable_again(path: Path) -> Iterator[PromptFile]:
    """A file of prompts for as long as the context lasts; it may be a pipe, which is read to its
    end first.

    Memory: one line. Disk: what comes through the pipe.
    Errors: ConfigError where it cannot be read, or for a line of over 8 MiB; StoreError where there
    is no room to keep it.
    """
    with opened(path, "rb") as source:
        if stat.S_ISREG(os.fstat(source.fileno()).st_mode):
            yield PromptFile(path)
            return
        kept = _kept(source, path)
    with kept:
        yield PromptFile(path, kept)


def opened(path: Path, mode: str) -> IO[bytes]:
    """A file of the user's. Errors: ConfigError."""
    try:
        return open(path, mode)
    except OSError as error:
        verb = "read" if mode == "rb" else "write"
        hint = "; standard input is /dev/stdin" if f"{path}" == "-" and mode == "rb" else ""
        raise ConfigError(f"cannot {verb} {path}: {error.strerror}{hint}") from None


def _kept(source: IO[bytes], path: Path) -> IO[bytes]:
    """The lines of what can be read once, to be read again; the file goes when it is closed."""
    folder = _folder()
    with (
        disk_errors(folder, f"the prompts of {path}", advice=_ADVICE),
        tempfile.TemporaryFile(dir=folder) as kept,
    ):
        kept.writelines(_lines(source, path))
        kept.flush()
        return os.fdopen(os.dup(kept.fileno()), "rb")


def _folder() -> Path:
    if not os.environ.get("TMPDIR") and os.access(_ON_DISK, os.W_OK):
        return _ON_DISK
    return Path(tempfile.gettempdir())


def _lines(file: IO[bytes], path: Path) -> Iterator[bytes]:
    mark = BOM_UTF8
    while line := _read_line(file, path):
        line, mark = line.removeprefix(mark), b""
        if line.strip():
            yield line


def _read_line(file: IO[bytes], path: Path) -> bytes:
    try:
        line = file.readline(_LARGEST_LINE + 1)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    if len(line) > _LARGEST_LINE:
        raise ConfigError(f"{path} has a line of over {_LARGEST_LINE >> 20} MiB")
    return line
