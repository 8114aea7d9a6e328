"""API keys: who may use a server, known by the SHA-256 of their keys."""

import hashlib
import hmac
import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thinslice.errors import ConfigError

# A key in the environment, of a server for one.
VARIABLE = "THINSLICE_API_KEY"
_LARGEST_FILE = 1 << 20
_FEWEST_CHARACTERS = 8
_DIGEST = re.compile(r"[0-9a-f]{64}")
_FIELDS = {"name", "sha256"}


@dataclass(frozen=True)
class Key:
    """Who has a key.

    Attributes:
        name: shown in logs; prompts of different names share no cached prefixes.
        digest: SHA-256 of the key's UTF-8 bytes.
    """

    name: str
    digest: bytes


class Keys:
    """The keys of a server; without any it is open to whoever reaches it."""

    def __init__(self, keys: tuple[Key, ...] = ()) -> None:
        self._keys = keys

    def __bool__(self) -> bool:
        return bool(self._keys)

    def find(self, given: str) -> Key | None:
        """Whose key that is. It takes as long for every key, right or wrong."""
        digest = hashlib.sha256(given.encode(errors="surrogateescape")).digest()
        found = None
        for key in self._keys:
            if hmac.compare_digest(key.digest, digest):
                found = key
        return found


def read_keys(path: Path | None, environ: Mapping[str, str] = os.environ) -> Keys:
    """The keys of a TOML file, and the one in the environment.

    The file has a ``[[key]]`` for each, with a ``name`` and the ``sha256`` of the key in hex.

    Errors: ConfigError for a file that cannot be read or holds something else.
    """
    keys = [] if path is None else [_key(one, path) for one in _entries(path)]
    if given := environ.get(VARIABLE):
        if len(given) < _FEWEST_CHARACTERS:
            raise ConfigError(f"{VARIABLE} is shorter than {_FEWEST_CHARACTERS} characters")
        keys.append(Key("environment", hashlib.sha256(given.encode()).digest()))
    for name in (names := [key.name for key in keys]):
        if names.count(name) > 1:
            raise ConfigError(f"two keys are called {name!r:.60}")
    return Keys(tuple(keys))


def _entries(path: Path) -> list[Any]:
    try:
        with path.open("rb") as file:
            content = file.read(_LARGEST_FILE + 1)
        found = tomllib.loads(content.decode())
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is no TOML: {error!s:.120}") from error
    entries = found.get("key")
    if set(found) != {"key"} or not isinstance(entries, list) or not entries:
        raise ConfigError(f"{path} holds no keys, or something else beside; expected [[key]]")
    return entries


def _key(entry: Any, path: Path) -> Key:
    if not isinstance(entry, dict) or set(entry) != _FIELDS:
        # Without what stands in them: it may be the key itself.
        got = ", ".join(map(str, entry)) if isinstance(entry, dict) else "no table"
        raise ConfigError(f"{path}: a key has the fields name and sha256, got {got:.60}")
    name, digest = entry["name"], entry["sha256"]
    if not isinstance(name, str) or not 0 < len(name) <= 100 or not name.isprintable():
        raise ConfigError(f"{path}: a key's name is text of 1..100 characters, got {name!r:.60}")
    if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
        raise ConfigError(f"{path}: sha256 of the key {name!r:.60} is no 64 hexadecimal digits")
    return Key(name, bytes.fromhex(digest))
