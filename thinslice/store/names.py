"""The names a model goes by on the command line, and the folder each has in the store.

    smollm2                     an embedded model
    mimo   qwen3:4b             a short name of a model of the Hugging Face Hub
    ./folder   model.gguf       a folder or a file
    org/name[@revision]         a model of the Hugging Face Hub
    org/name[@revision]:Q4_K_M  one GGUF of it

Reading a name looks at the file system only to see whether a path is there.
"""

import os
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from urllib.parse import quote, unquote

from thinslice.errors import CheckpointError, ConfigError
from thinslice.store.known_models import EMBEDDED, KNOWN, EmbeddedModel, known_model_of

# The Hub's own rules for names are the same, but for a leading underscore, which it allows.
_PART = r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?"
_REVISION = r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,62}[A-Za-z0-9_])?"
_QUANT = r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,30}[A-Za-z0-9_])?"
_HUB_NAME = re.compile(
    rf"(?P<org>{_PART})/(?P<name>{_PART})"
    rf"(?:@(?P<revision>{_REVISION}(?:/{_REVISION}){{0,3}}))?(?::(?P<quant>{_QUANT}))?"
)
_FOLDER = re.compile(
    r"(?P<org>[\w.-]+?)--(?P<name>[\w.-]+)(?:@(?P<revision>[\w.%-]+))?(?:\+(?P<quant>[\w.-]+))?",
    re.ASCII,
)
# With "--" for "/" and "%2F" for each "/" of a revision, a folder stays below 255 characters.
_LONGEST_NAME = 200
_PATH_STARTS = ("./", "../", "/", "~")
_FILE_ENDS = (".gguf", ".safetensors", ".bin", ".pt", ".pth", ".ckpt")
_OTHER_KINDS = (
    "the short names of thinslice ls --known, a folder, a .gguf file, "
    "org/name on the Hugging Face Hub"
)


@dataclass(frozen=True)
class Embedded:
    """A model thinslice knows by a short name."""

    alias: str
    model: EmbeddedModel

    @property
    def text(self) -> str:
        """The name as it is written."""
        return self.alias

    @property
    def folder(self) -> str:
        """The folder's name in the store."""
        return self.alias


@dataclass(frozen=True)
class LocalPath:
    """A folder or a file of the user's; it is there, but not yet opened."""

    path: Path


@dataclass(frozen=True)
class HubModel:
    """A repository of the Hugging Face Hub, or one GGUF of it.

    Attributes:
        revision: a branch, a tag or a commit; None for the default branch.
        quant: the quantisation a GGUF's file name ends in, in capitals; None for safetensors.
    """

    repo_id: str
    revision: str | None = None
    quant: str | None = None

    @property
    def text(self) -> str:
        """The name as it is written."""
        revision = "" if self.revision is None else f"@{self.revision}"
        quant = "" if self.quant is None else f":{self.quant}"
        return f"{self.repo_id}{revision}{quant}"

    @property
    def folder(self) -> str:
        """The folder's name in the store: no two names share one, and none leaves the store."""
        repo = self.repo_id.replace("/", "--")
        revision = "" if self.revision is None else f"@{quote(self.revision, safe='')}"
        quant = "" if self.quant is None else f"+{self.quant}"
        return f"{repo}{revision}{quant}"


StoredName = Embedded | HubModel
ModelName = Embedded | LocalPath | HubModel


def parse_model_name(text: str, stored: Iterable[str] = ()) -> ModelName:
    """Tell what kind of model a name stands for.

    An embedded model and a short name come first, then a path that exists, then the Hub;
    ``./name`` is always a path.

    Args:
        stored: names in the store, which an unknown name is compared with.

    Errors: ConfigError for a name of no kind, with the nearest known names; CheckpointError for a
    path that is not there.
    """
    if not text or any(unicodedata.category(character) == "Cc" for character in text):
        raise ConfigError(f"{text!r:.120} is not a model name; known: {_known()}")
    if text in EMBEDDED:
        return Embedded(text, EMBEDDED[text])
    if text in KNOWN:
        return HubModel(KNOWN[text].repo_id, KNOWN[text].revision)
    path = os.path.expanduser(text)
    if os.path.exists(path):
        return LocalPath(Path(path))
    is_file = text.lower().endswith(_FILE_ENDS)
    if text.startswith(_PATH_STARTS) or is_file or os.path.isabs(path):
        raise CheckpointError(f"no such file or folder: {text:.300}")
    hub_model = _parse_hub_name(text)
    if hub_model is not None:
        return hub_model
    raise ConfigError(_unknown(text, stored))


def advised_system_prompt(text: str) -> str | None:
    """The system prompt that the makers of this model recommend; None where they recommend none.

    Errors: as ``parse_model_name``.
    """
    name = parse_model_name(text)
    known = known_model_of(name.repo_id) if isinstance(name, HubModel) else None
    return None if known is None else known.system


def name_of_folder(folder: str) -> str | None:
    """The name whose folder this is, or None where no name has it."""
    if folder in EMBEDDED:
        return folder
    match = _FOLDER.fullmatch(folder)
    if match is None:
        return None
    revision = None if match["revision"] is None else unquote(match["revision"])
    name = HubModel(f"{match['org']}/{match['name']}", revision, match["quant"])
    is_own = name.folder == folder and _parse_hub_name(name.text) == name
    return name.text if is_own else None


def _parse_hub_name(text: str) -> HubModel | None:
    match = _HUB_NAME.fullmatch(text)
    if match is None or len(text) > _LONGEST_NAME or ".." in text:
        return None
    repo_id = f"{match['org']}/{match['name']}"
    # "--" stands for "/" in a folder's name; the Hub allows neither ending.
    if "--" in repo_id or repo_id.endswith(".git"):
        return None
    quant = None if match["quant"] is None else match["quant"].upper()
    return HubModel(repo_id, match["revision"], quant)


def _known() -> str:
    return f"{', '.join(EMBEDDED)}, {_OTHER_KINDS}"


def _unknown(text: str, stored: Iterable[str]) -> str:
    nearest = nearest_names(text, [*EMBEDDED, *KNOWN, *stored, *_models_here()])
    guess = f"; did you mean {' or '.join(nearest)}?" if nearest else ";"
    return f"unknown model {text!r:.120}{guess} known: {_known()}"


def nearest_names(text: str, names: Iterable[str]) -> list[str]:
    """Up to three of the names that are nearly this text, the nearest first; the one alone that
    differs in capitals only."""
    import difflib

    by_folded = {name.casefold(): name for name in names}
    if text.casefold() in by_folded:
        return [by_folded[text.casefold()]]
    return [by_folded[near] for near in difflib.get_close_matches(text.casefold(), by_folded)]


def _models_here() -> list[str]:
    """Folders and GGUF files of the current folder; the first thousand entries are looked at."""
    try:
        entries = list(islice(Path().iterdir(), 1000))
    except OSError:
        return []
    return [entry.name for entry in entries if entry.suffix == ".gguf" or _is_model(entry)]


def _is_model(folder: Path) -> bool:
    return os.path.exists(folder / "config.json")
