"""Where a prompt comes from: an argument, files, standard input, in this order."""

import os
import select
import stat
import sys
from codecs import BOM_UTF8
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from thinslice.cli.console import note
from thinslice.errors import ConfigError, RequestError
from thinslice.units import MIB

# Asks for standard input, as a prompt or behind one.
PIPED = "-"
# No context of a model we run holds as much text.
LARGEST_INPUT = 8 * MIB


def read_prompt(prompt: str | None, piped: str | None, files: Sequence[Path]) -> str:
    """The text to answer, its parts apart by an empty line.

    Args:
        prompt: the argument; ``-`` stands for standard input, and so does none at all.
        piped: ``-`` where standard input follows the prompt; None where it is left alone.
        files: whose text stands between the two.

    Errors: ConfigError for arguments that make no prompt and files that cannot be read;
    RequestError for text that is empty, too large or not UTF-8.
    """
    if piped not in (None, PIPED):
        raise ConfigError(f"unexpected: {piped}; a text of several words goes in quotes")
    if prompt == PIPED and piped == PIPED:
        raise ConfigError("standard input can be read once; write - one time")
    is_input = PIPED in (prompt, piped) or (prompt is None and not files)
    if is_input and sys.stdin.isatty() and prompt is None:
        raise ConfigError(
            "no prompt; give it as an argument or on standard input, "
            "or start a conversation with thinslice chat"
        )
    parts = [] if prompt in (None, PIPED) else [_as_typed(str(prompt))]
    parts += [_read_file(file) for file in files]
    if is_input:
        piped_text = _decoded(_read(sys.stdin.buffer, "standard input"), "standard input")
        if not piped_text and any(parts):
            note("standard input is empty")
        parts.append(piped_text)
    text = "\n\n".join(part for part in parts if part)
    if not text.strip():
        raise RequestError("the prompt is empty; give it as an argument or on standard input")
    return text


def has_unread_input() -> bool:
    """Whether standard input has text at this moment that nobody asked for."""
    try:
        descriptor = sys.stdin.fileno()
        status = os.fstat(descriptor)
        if stat.S_ISREG(status.st_mode):
            return os.lseek(descriptor, 0, os.SEEK_CUR) < status.st_size
        if not stat.S_ISFIFO(status.st_mode):
            return False
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        return any(events & select.POLLIN for _, events in poll.poll(0))
    except (OSError, ValueError, AttributeError):  # closed, or a system without poll
        return False


def _as_typed(argument: str) -> str:
    """An argument as the UTF-8 that it was typed in, whatever the locale took it for."""
    return _decoded(os.fsencode(argument), "the prompt")


def _read_file(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return _decoded(_read(file, str(path)), str(path))
    except OSError as error:
        hint = "; standard input is /dev/stdin" if f"{path}" == PIPED else ""
        raise ConfigError(f"{path} cannot be read: {error.strerror}{hint}") from None


def _read(stream: BinaryIO, name: str) -> bytes:
    data = stream.read(LARGEST_INPUT + 1)
    if len(data) > LARGEST_INPUT:
        raise RequestError(f"{name} has over {LARGEST_INPUT >> 20} MiB: no prompt")
    return data


def _decoded(data: bytes, name: str) -> str:
    try:
        return data.removeprefix(BOM_UTF8).decode()
    except UnicodeDecodeError as error:
        raise RequestError(
            f"{name} is not UTF-8: byte {data[error.start]:#04x} at {error.start}"
        ) from None
