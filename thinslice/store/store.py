"""Store: the models on this disk, by name.

Reading the store imports nothing heavy. What changes it (pull and remove) is in changes.py, which
is imported when it is first used.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar, cast

from thinslice.errors import ConfigError, StoreError
from thinslice.forks import cached_property
from thinslice.plan.model_shape import ModelShape
from thinslice.store.manifest import StoredModel, folder_in, read_manifest
from thinslice.store.names import (
    Embedded,
    HubModel,
    LocalPath,
    ModelName,
    StoredName,
    name_of_folder,
    nearest_names,
    parse_model_name,
)
from thinslice.store.packed_copies import (
    PackedCopy,
    bytes_below,
    find_copy,
    is_copy_name,
    packed_copies,
)
from thinslice.store.progress import Progress, silent

Method = TypeVar("Method", bound=Callable[..., Any])


@dataclass(frozen=True)
class UnfinishedPull:
    """A pull that was broken off: `pull` goes on with it, `remove` drops it."""

    name: str
    num_bytes: int


def default_root(environ: Mapping[str, str]) -> Path:
    """$THINSLICE_HOME/models, or thinslice/models where the system keeps a user's data.

    Errors: StoreError where the system knows no such place.
    """
    if home := environ.get("THINSLICE_HOME"):
        expanded = os.path.expanduser(home)
        if expanded.startswith("~"):
            raise StoreError(
                f"THINSLICE_HOME is {home!r:.300}, and this system knows no such home folder; set "
                "it to a path without ~"
            )
        return Path(expanded) / "models"
    data_home = environ.get("XDG_DATA_HOME", "")
    # The XDG base directory specification has a relative path ignored.
    if os.path.isabs(data_home):
        return Path(data_home) / "thinslice" / "models"
    user_home = os.path.expanduser("~")
    if not os.path.isabs(user_home):
        raise StoreError(
            "there is no place for a model store, as HOME is not set and this user has no home "
            "folder; set THINSLICE_HOME to a folder"
        )
    return Path(user_home) / ".local" / "share" / "thinslice" / "models"


def _errors_named(method: Method) -> Method:
    """Have the file system's refusals raised as a StoreError that names the store."""

    @wraps(method)
    def named(self: "Store", *args: Any, **kwargs: Any) -> Any:
        try:
            return method(self, *args, **kwargs)
        except OSError as error:
            reason = error.strerror or type(error).__name__
            place = error.filename if isinstance(error.filename, str) else self.root
            raise StoreError(f"cannot use the store: {place}: {reason}") from error

    return cast(Method, named)


class Store:
    """The models kept under one folder.

    Args:
        root: the folder; by default the one default_root names. It is made by the first pull.
    """

    def __init__(self, root: Path | None = None) -> None:
        self._root = root

    @cached_property
    def root(self) -> Path:
        """The folder. Errors: StoreError where none was given and the system names none."""
        return Path(os.path.abspath(self._root or default_root(os.environ)))

    @_errors_named
    def check_name(self, text: str) -> None:
        """Refuse what can be no model before anything slow is done for it.

        Errors: ConfigError, CheckpointError from the name.
        """
        if self._copy(text) is None:
            self._parse(text)

    @_errors_named
    def resolve(self, text: str) -> Path:
        """What open_checkpoint takes for a name: a path of the user's, or of a stored model.

        Nothing is fetched.

        Errors: ConfigError, CheckpointError from the name; StoreError where it is not stored.
        """
        if (copy := self._copy(text)) is not None:
            return _whole(copy).path
        name = self._parse(text)
        return name.path if isinstance(name, LocalPath) else self._stored(name, text).path

    @_errors_named
    def locate(
        self, text: str, progress: Progress | None = None, *, offline: bool = False
    ) -> Path | ModelShape:
        """Like resolve, but of a model of the Hub that is not stored the shape, and the embedded
        model is fetched.

        Of a model of the Hub the settings are fetched, a few KB, and not kept.

        Args:
            offline: use no network; only a stored model is found.

        Errors: ConfigError, StoreError, CheckpointError; StoreError for a GGUF that is not stored,
        whose shape is in its weights' file.
        """
        if self._copy(text) is not None:
            return self.resolve(text)
        name = self._parse(text)
        if isinstance(name, Embedded) or (isinstance(name, HubModel) and offline):
            return self._pull(name, text, progress, offline).path
        is_stored = isinstance(name, LocalPath) or folder_in(self.root, name).is_dir()
        if is_stored or not isinstance(name, HubModel) or name.quant is not None:
            return self.resolve(text)
        from thinslice.store import changes

        return changes.hub_shape(name, progress or silent)

    @_errors_named
    def ensure(self, text: str, progress: Progress | None = None, *, offline: bool = False) -> Path:
        """Like resolve, but a model that is not stored is pulled first."""
        if (copy := self._copy(text)) is not None:
            return _whole(copy).path
        name = self._parse(text)
        if isinstance(name, LocalPath):
            return name.path
        return self._pull(name, text, progress, offline).path

    @_errors_named
    def pull(
        self, text: str, progress: Progress | None = None, *, offline: bool = False
    ) -> StoredModel:
        """Fetch a model, or what is missing of it; one that is stored is not fetched again.

        Args:
            offline: use no network; only a stored model is found.

        Errors: ConfigError for a path or an unknown name; StoreError for the network, the disk or
            a file that is not what it should be; CheckpointError for a model thinslice cannot
            open, before its weights are fetched where its settings tell.
        """
        name = self._parse(text)
        if isinstance(name, LocalPath):
            raise ConfigError(f"{text!r:.300} is here already: a path needs no pull")
        return self._pull(name, text, progress, offline)

    @_errors_named
    def list(self) -> tuple[StoredModel, ...]:
        """The complete models, by name."""
        models = (read_manifest(folder, name) for name, folder in self._folders())
        return tuple(model for model in models if model is not None)

    @_errors_named
    def unfinished(self) -> tuple[UnfinishedPull, ...]:
        """The pulls that were broken off, or are under way in another process, by name."""
        return tuple(
            UnfinishedPull(name, bytes_below(folder))
            for name, folder in self._folders()
            if read_manifest(folder, name) is None
        )

    @_errors_named
    def packed(self) -> tuple[PackedCopy, ...]:
        """The packed copies, whole or not, by name."""
        return packed_copies(self.root)

    @_errors_named
    def show(self, text: str) -> StoredModel:
        """The record of a stored model; one of a path or of a packed copy is read from its files.

        Errors: ConfigError, StoreError, CheckpointError.
        """
        from thinslice.store import changes

        if (copy := self._copy(text)) is not None:
            packed = changes.describe_path(_whole(copy).path)
            return replace(packed, name=copy.name, source="packed copy")
        name = self._parse(text)
        if isinstance(name, LocalPath):
            return changes.describe_path(name.path)
        return self._stored(name, text)

    @_errors_named
    def remove(self, text: str) -> int:
        """Delete a model with its packed copies, a packed copy alone, or what an unfinished pull or
        packing has left; returns the bytes it had.

        Errors: ConfigError for a path; StoreError where it is not stored, or is being pulled or
        packed.
        """
        from thinslice.store import changes

        if (copy := self._copy(text)) is not None:
            changes.remove_packed(self.root, copy.path)
            return copy.num_bytes
        name = self._parse(text)
        if isinstance(name, LocalPath):
            raise ConfigError(f"{text!r:.300} is not in the store; only stored models are removed")
        folder = folder_in(self.root, name)
        if not folder.is_dir():
            raise StoreError(f"{self._missing(name)}; `thinslice ls` lists what is")
        num_bytes = bytes_below(folder)
        for copy in self.packed():
            if copy.model == name.text:
                num_bytes += copy.num_bytes
                changes.remove_packed(self.root, copy.path)
        changes.remove(self.root, name)
        return num_bytes

    def _copy(self, text: str) -> PackedCopy | None:
        return find_copy(self.root, text) if is_copy_name(text) else None

    def _parse(self, text: str) -> ModelName:
        return parse_model_name(text, self._names())

    def _names(self) -> Iterator[str]:
        """The names in the store, as far as it can be read."""
        with suppress(StoreError, OSError):
            yield from (name for name, _ in self._folders())

    def _pull(
        self, name: StoredName, text: str, progress: Progress | None, offline: bool
    ) -> StoredModel:
        stored = read_manifest(folder_in(self.root, name), name.text)
        if stored is not None:
            return stored
        if offline:
            raise StoreError(f"{self._not_stored(name, text)}, but not offline")
        from thinslice.store import changes

        return changes.pull(self.root, name, progress or silent)

    def _stored(self, name: StoredName, text: str) -> StoredModel:
        folder = folder_in(self.root, name)
        model = read_manifest(folder, name.text)
        if model is None:
            raise StoreError(self._not_stored(name, text))
        return model

    def _not_stored(self, name: StoredName, text: str) -> str:
        if folder_in(self.root, name).is_dir():
            return f"the pull of {name.text} is unfinished; `thinslice pull {text}` ends it"
        return f"{self._missing(name)}; `thinslice pull {text}` fetches it"

    def _missing(self, name: StoredName) -> str:
        near = nearest_names(name.text, [stored for stored, _ in self._folders()])
        guess = f" (did you mean {' or '.join(near)}?)" if near else ""
        return f"{name.text} is not stored{guess}"

    def _folders(self) -> Iterator[tuple[str, Path]]:
        """Name and folder of each model, complete or not. What else is there is not ours."""
        try:
            folders = sorted(self.root.iterdir())
        except FileNotFoundError:
            return
        except OSError as error:
            raise StoreError(f"cannot read the store {self.root}: {error.strerror}") from error
        for folder in folders:
            name = name_of_folder(folder.name)
            if name is not None and folder.is_dir() and not folder.is_symlink():
                yield name, folder


def _whole(copy: PackedCopy) -> PackedCopy:
    if not copy.is_whole:
        raise StoreError(
            f"the packing of {copy.name} is unfinished; running the model as {copy.format} ends "
            f"it, `thinslice rm {copy.name}` drops it"
        )
    return copy
