"""What a source hands to the store once a model's files are in its folder."""

from dataclasses import dataclass

from thinslice.store.manifest import StoredFile


@dataclass(frozen=True)
class Fetched:
    """Files that are complete, checked and on the disk.

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
