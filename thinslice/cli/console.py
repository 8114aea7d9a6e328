"""What the command line shows: for a person on a terminal, or plain when piped.

Nothing shown is read as markup: a model's text, a file's name and an error may hold anything.
"""

import errno
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from io import TextIOBase
from typing import TYPE_CHECKING, Any, TextIO

from rich.console import Console
from rich.file_proxy import FileProxy
from rich.text import Text

from thinslice.errors import StoreError

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID
    from rich.table import Table

# Wider than any line we print: a pipe gets whole lines, a terminal is asked for its width.
_PIPE_WIDTH = 4096
# Help is read, also by way of a pipe.
_PAGE_WIDTH = 100
# Seconds after which a bar is worth a look.
_PATIENCE_S = 0.5


def _open_closed_streams() -> None:
    """Give the process a null device for each stream that whoever started it has closed."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115


class ReaderGoneError(BrokenPipeError):
    """Whoever read the output has gone, as `head` does: a wish to end, and no error."""


def _unwrapped(stream: TextIO) -> TextIO:
    """The stream below what rich puts in its place while a bar moves, which writes to us again."""
    return stream.rich_proxied_file if isinstance(stream, FileProxy) else stream  # type: ignore[return-value]


class _Output(TextIOBase):
    """Standard output, whose errors are ours: the one place where printing can fail."""

    @property
    def stream(self) -> TextIO:
        """The stream it writes to; looked up each time, because a test may replace it."""
        return _unwrapped(sys.stdout)

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """The encoding of the stream."""
        return self.stream.encoding or "utf-8"

    def isatty(self) -> bool:
        """Whether somebody looks."""
        return self.stream.isatty()

    def fileno(self) -> int:
        """The stream's file descriptor."""
        return self.stream.fileno()

    def write(self, text: str) -> int:
        """Write text. Errors: StoreError for a full or failing disk; ReaderGoneError."""
        with self._errors_named():
            return self.stream.write(text)

    def flush(self) -> None:
        """Hand over what is buffered. Errors: as ``write``."""
        with self._errors_named():
            self.stream.flush()

    @contextmanager
    def _errors_named(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError as error:
            raise ReaderGoneError from error
        except OSError as error:
            raise unwritten("the output", error) from error


def unwritten(what: str, error: OSError) -> StoreError:
    """The error for something that could not be written."""
    reason = "the disk is full" if error.errno == errno.ENOSPC else error.strerror or error
    return StoreError(f"cannot write {what}: {reason}")


class _Notes(_Output):
    """Standard error. Where it cannot be written, nobody can be told: the answer still counts."""

    @property
    def stream(self) -> TextIO:
        """The stream it writes to."""
        return _unwrapped(sys.stderr)

    @contextmanager
    def _errors_named(self) -> Iterator[None]:
        with suppress(OSError):
            yield

    def write(self, text: str) -> int:
        """Write text where that is possible."""
        super().write(text)
        return len(text)


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Leave the decision to the command line; rich would end the process with code 1."""
        raise ReaderGoneError


def _console(stream: _Output, is_page: bool = False) -> Console:
    return _Console(
        file=stream,  # type: ignore[arg-type]  # rich asks for IO[str] and takes any writer
        highlight=False,
        soft_wrap=not is_page,
        width=None if stream.isatty() else _PAGE_WIDTH if is_page else _PIPE_WIDTH,
        markup=False,
        emoji=False,
    )


_open_closed_streams()
# Answers go to out, everything about them to err, so that a pipe carries the answer alone.
out = _console(_Output())
helping = _console(_Output(), is_page=True)
err = _console(_Notes())
# What only informs goes through this one, which --quiet silences.
notes = _console(_Notes())

# Control characters that could command the terminal; tab and newline are text.
_CONTROL = dict.fromkeys([*range(0x09), 0x0B, 0x0C, *range(0x0E, 0x20), 0x7F, *range(0x80, 0xA0)])


def safe(text: str, console: Console = out) -> str:
    """Text from elsewhere, without control characters where it goes to a terminal."""
    return text.translate(_CONTROL) if console.file.isatty() else text


def write(text: str, *, dim: bool = False) -> None:
    """Print a piece of a model's text to standard output at once, as it is."""
    shown = safe(text)
    if out.is_terminal and dim:
        out.print(Text(shown, style="dim"), end="")
    else:
        out.file.write(shown)
    out.file.flush()


def print_json(record: dict[str, Any]) -> None:
    """Print one JSON object on a line of standard output.

    Characters that the output's encoding does not have are written as JSON's escapes.
    """
    text = json.dumps(record, ensure_ascii=False)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except (UnicodeEncodeError, LookupError):
        text = json.dumps(record)
    out.file.write(text + "\n")
    out.file.flush()


def silence_notes(is_quiet: bool) -> None:
    """Print errors and answers only from now on, for --quiet."""
    notes.quiet = is_quiet


def note(text: str) -> None:
    """Print one line about what happened, to standard error."""
    notes.print(Text(_in_lines(safe(text, notes), notes), style="dim"))


def note_all(lines: Iterable[str]) -> None:
    """Print what there is to know of a model's files, one line each."""
    for line in lines:
        note(line)


def print_error(text: str) -> None:
    """Print an error to standard error."""
    shown = Text(_in_lines(f"error: {safe(text, err)}", err))
    shown.stylize("bold red", 0, len("error:"))
    err.print(shown)


def show_text(text: str) -> None:
    """Print text of ours to standard output, a terminal's lines broken between words."""
    out.print(_in_lines(text, out))


def _in_lines(text: str, console: Console) -> str:
    """Text for a terminal, broken between words; piped as it is."""
    if not console.file.isatty():
        return text
    from thinslice.cli.word_wrap import WordWrap

    wrap = WordWrap(lambda: console.width)
    return wrap.push(text) + wrap.finish()


def plain_table(*headings: str) -> "Table":
    """A table without lines, of two columns where none have a heading. See ``print_table``."""
    from rich.table import Table

    columns = headings or ("", "")
    table = Table(*columns, box=None, show_header=bool(headings), pad_edge=False)
    for column in table.columns:
        column.overflow = "fold"
    return table


def print_table(table: "Table") -> None:
    """Print a table to standard output; nothing of it is left out where a terminal is narrow.

    There each row of more than two columns comes as lines of its own, a heading before each cell;
    in two columns the cells are broken into lines.
    """
    from rich.measure import Measurement

    is_narrow = (
        Measurement.get(out, out.options.update(width=_PIPE_WIDTH), table).maximum > out.width
    )
    if not is_narrow or len(table.columns) < 3:
        out.print(table)
        return
    for cells in zip(*(column.cells for column in table.columns), strict=True):
        out.print(_in_lines(str(cells[0]), out))
        rest = plain_table()
        for column, cell in zip(table.columns[1:], cells[1:], strict=True):
            if cell:
                rest.add_row(f"  {column.header}", cell)
        out.print(rest)


class ProgressBars:
    """A bar with the time left for each thing under way; none where nobody looks, nor for what is
    done in half a second.

    Args:
        counted: what progress is told in: bytes, shown as such, or a word for other things.
    """

    def __init__(self, counted: str) -> None:
        self._counted = counted
        self._is_silent = notes.quiet or not err.is_terminal
        self._started_at = time.perf_counter()
        self._bars: Progress | None = None
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, description: str, done: int, total: int) -> None:
        """Show that ``done`` of ``total`` bytes, or whatever is counted, are through."""
        if self._is_silent or time.perf_counter() - self._started_at < _PATIENCE_S:
            return
        if self._bars is None:
            self._bars = self._made()
            self._bars.start()
        is_new = description not in self._tasks
        if is_new:
            self._tasks[description] = self._bars.add_task(description, total=total or None)
        task = self._tasks[description]
        self._bars.update(task, completed=done, total=total or None, refresh=is_new)

    def close(self) -> None:
        """Take the bars away."""
        if self._bars is not None:
            self._bars.stop()

    def _made(self) -> "Progress":
        from rich import progress

        counts: tuple[progress.ProgressColumn, ...] = (progress.DownloadColumn(binary_units=True),)
        if self._counted != "bytes":
            words = progress.TextColumn(self._counted, markup=False)
            counts = (progress.MofNCompleteColumn(), words)
        columns = (
            progress.TextColumn("{task.description}", markup=False),
            progress.BarColumn(),
            *counts,
            progress.TimeRemainingColumn(),
        )
        return progress.Progress(*columns, console=err, transient=True)


@contextmanager
def progress_bars(counted: str = "bytes") -> Iterator[ProgressBars]:
    """Bars on standard error for as long as the context lasts; they vanish at its end.

    Args:
        counted: see ProgressBars.
    """
    bars = ProgressBars(counted)
    try:
        yield bars
    finally:
        bars.close()
