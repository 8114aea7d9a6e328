"""What was typed into chat, across starts: one private file of bounded size, oldest lines go."""

import json
import os
from collections.abc import Container, Iterable, Mapping
from pathlib import Path

from prompt_toolkit.history import History

from thinslice.store.files import publish

# Characters. An entry of more is not kept: it would be shown in the input line in full.
LONGEST_ENTRY = 4096
_MOST_CHARACTERS = 128 * 1024
_LARGEST_FILE = 8 * _MOST_CHARACTERS


def history_path(environ: Mapping[str, str]) -> Path | None:
    """$THINSLICE_HOME/chat-history, or where the system keeps a user's state; None without one."""
    if home := environ.get("THINSLICE_HOME"):
        return Path(os.path.expanduser(home)).absolute() / "chat-history"
    state = environ.get("XDG_STATE_HOME", "")
    if not os.path.isabs(state):
        state = os.path.join(os.path.expanduser("~"), ".local", "state")
    return Path(state) / "thinslice" / "chat-history" if os.path.isabs(state) else None


class ChatHistory(History):
    """The newest entries, at most 128 KiB of them, in memory and in the file.

    Args:
        path: the file, made with mode 0600; None keeps the history in memory only.
        unkept: lines that are not worth keeping.

    Attributes:
        trouble: why the history is not kept across starts; None where it is.
    """

    def __init__(self, path: Path | None, unkept: Container[str] = ()) -> None:
        super().__init__()
        self._unkept = unkept
        self._path = path
        self.trouble: str | None = None

    def load_history_strings(self) -> Iterable[str]:
        """The entries of earlier starts, newest first."""
        return self._read()

    def append_string(self, string: str) -> None:
        """Nothing: prompt_toolkit's call, with the line as it is shown. See ``remember``."""

    def remember(self, text: str) -> None:
        """Take in what was typed, unless it repeats the last entry or is not to be kept."""
        is_repeated = bool(self._loaded_strings) and self._loaded_strings[0] == text
        is_worth_it = bool(text.strip()) and text.strip() not in self._unkept
        if is_repeated or not is_worth_it or len(text) > LONGEST_ENTRY:
            return
        super().append_string(text)
        del self._loaded_strings[len(_newest(self._loaded_strings)) :]

    def store_string(self, string: str) -> None:
        """Write the file anew, with this entry as the last one."""
        if self._path is None or self.trouble is not None:
            return
        # Read again: another chat may have written meanwhile.
        entries = _newest([string, *self._read()])
        text = "".join(json.dumps(entry) + "\n" for entry in reversed(entries))
        part = self._path.with_name(f".{self._path.name}.{os.getpid()}.part")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            part.unlink(missing_ok=True)
            descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with open(descriptor, "w", encoding="utf-8") as file:
                file.write(text)
            publish(part, self._path)
        except OSError as error:
            self.trouble = f"{self._path}: {error.strerror}"

    def _read(self) -> list[str]:
        """Newest first; what cannot be read as an entry is left out."""
        if self._path is None:
            return []
        try:
            with open(self._path, "rb") as file:
                lines = file.read(_LARGEST_FILE).decode("utf-8", "replace").splitlines()
        except FileNotFoundError:
            return []
        except OSError as error:
            self.trouble = f"{self._path}: {error.strerror}"
            return []
        return _newest([entry for entry in map(_entry, reversed(lines)) if entry is not None])


def _entry(line: str) -> str | None:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return entry if isinstance(entry, str) and 0 < len(entry) <= LONGEST_ENTRY else None


def _newest(entries: list[str]) -> list[str]:
    """As many of the first entries as are kept."""
    num_characters = 0
    for count, entry in enumerate(entries):
        num_characters += len(entry)
        if num_characters > _MOST_CHARACTERS:
            return entries[:count]
    return entries
