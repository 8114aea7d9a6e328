"""How an answer looks while it comes: as it is, or with the reasoning folded away."""

import time
from typing import TYPE_CHECKING

from rich.text import Text

from thinslice.cli.console import notes, out, safe, write
from thinslice.cli.word_wrap import WordWrap

if TYPE_CHECKING:
    from rich.status import Status

# Seconds that a prompt may take before its progress is worth a line.
_PATIENCE_S = 2.0


class PromptStatus:
    """On a terminal, one line that says how far a prompt is, once it takes long."""

    def __init__(self) -> None:
        self._started_at = time.perf_counter()
        self._status = quiet_status()
        self._is_shown = False

    def show(self, num_done: int, num_tokens: int) -> None:
        """So many of the prompt's tokens have been computed."""
        is_long = time.perf_counter() - self._started_at > _PATIENCE_S
        if self._status is None or not (is_long or self._is_shown):
            return
        if not self._is_shown:
            self._is_shown = True
            self._status.start()
        text = f"reading the prompt: {num_done:,} of {num_tokens:,} tokens"
        self._status.update(Text(text, style="dim"))

    def end(self) -> None:
        """Take the line away."""
        if self._is_shown and self._status is not None:
            self._status.stop()
        self._is_shown = False


def quiet_status() -> "Status | None":
    """A line that moves while something goes on; None where nobody looks at it."""
    is_shown = notes.is_terminal and not notes.quiet
    return notes.status("", spinner="dots") if is_shown else None


def _wrap_for_terminal() -> WordWrap | None:
    """None where an answer is piped: it is written as it is, whatever the colours."""
    return WordWrap(lambda: out.width) if out.file.isatty() else None


class PlainView:
    """Shows one completion as it is: the reasoning too, dimmed on a terminal.

    There lines are broken between words, and a prompt that takes long shows how far it is.
    """

    def __init__(self) -> None:
        self._prompt = PromptStatus()
        self._wrap = _wrap_for_terminal()
        self._kind = ""

    def read_prompt(self, num_done: int, num_tokens: int) -> None:
        """Show that so many of the prompt's tokens have been computed, once it takes long."""
        self._prompt.show(num_done, num_tokens)

    def add(self, kind: str, text: str) -> None:
        """Show the next piece of the completion."""
        self._prompt.end()
        if kind != self._kind:
            self._end_word()
        self._kind = kind
        self._write(text if self._wrap is None else self._wrap.push(safe(text)))

    def close(self) -> None:
        """Show what is held back; also after an error or an interrupt."""
        self._prompt.end()
        self._end_word()

    def _end_word(self) -> None:
        if self._wrap is not None:
            self._write(self._wrap.finish())

    def _write(self, text: str) -> None:
        write(text, dim=self._kind == "reasoning")


class AnswerView:
    """Shows one answer.

    On a terminal a prompt that takes long shows how far it is; the reasoning stands as one dimmed
    status line that moves with it, and is folded to a line saying how long it took once the answer
    begins; the answer is broken into lines between words. Piped, only the answer is written, as it
    is.
    """

    def __init__(self) -> None:
        self._started_at = time.perf_counter()
        self._prompt = PromptStatus()
        self._status = quiet_status()
        self._wrap = _wrap_for_terminal()
        self._num_words = 0
        self._tail = ""
        self._is_folded = True

    def read_prompt(self, num_done: int, num_tokens: int) -> None:
        """Show that so many of the prompt's tokens have been computed, once it takes long."""
        self._prompt.show(num_done, num_tokens)

    def add(self, kind: str, text: str) -> None:
        """Show the next piece of the completion."""
        self._prompt.end()
        if kind == "reasoning":
            self._reason(text)
            return
        self._fold()
        write(text if self._wrap is None else self._wrap.push(safe(text)))

    def close(self) -> None:
        """End the answer's last line; also after an error or an interrupt."""
        self._prompt.end()
        self._fold()
        if self._wrap is not None:
            write(self._wrap.finish())
        out.print()

    def _reason(self, text: str) -> None:
        if self._is_folded and self._status is not None:
            self._status.start()
        self._is_folded = False
        self._num_words += text.count(" ")
        self._tail = (self._tail + text)[-200:].replace("\n", " ")
        if self._status is not None:
            width = max(notes.width - 20, 10)
            self._status.update(Text(safe(self._tail[-width:], notes), style="dim"))

    def _fold(self) -> None:
        if self._is_folded:
            return
        self._is_folded = True
        if self._status is not None:
            self._status.stop()
            seconds = time.perf_counter() - self._started_at
            notes.print(
                Text(
                    f"▸ thought for {seconds:.1f} s, about {self._num_words} words (/reasoning)",
                    style="dim",
                )
            )
