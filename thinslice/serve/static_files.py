"""The files of the page, as they are in the package."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

_FOLDER = Path(__file__).parent / "static"
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}


@dataclass(frozen=True)
class StaticFile:
    """A file as it is sent.

    Attributes:
        etag: of its content, as the header has it.
    """

    content: bytes
    media_type: str
    etag: str


def _read(path: Path) -> StaticFile:
    content = path.read_bytes()
    return StaticFile(content, _TYPES[path.suffix], f'"{hashlib.sha256(content).hexdigest()[:32]}"')


def _address(path: Path) -> str:
    return "/" if path.name == "index.html" else f"/page/{path.name}"


# By the paths they are served under.
STATIC_FILES = {_address(path): _read(path) for path in sorted(_FOLDER.iterdir())}
