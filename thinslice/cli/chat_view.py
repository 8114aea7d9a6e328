"""How an answer looks while it comes: the reasoning dimmed and folded away, the answer plain."""

import time

from rich.text import Text

from thinslice.cli.console import err, note, out, safe, write


class AnswerView:
    """Shows one answer.

    On a terminal the reasoning stands as one dimmed status line that moves with it, and is folded
    to a line saying how long it took once the answer begins. Piped, only the answer is written.
    """

    def __init__(self) -> None:
        self._started_at = time.perf_counter()
        self._status = err.status("", spinner="dots") if err.is_terminal else None
        self._num_words = 0
        self._tail = ""
        self._is_folded = True

    def add(self, kind: str, text: str) -> None:
        """Show the next piece of the completion."""
        if kind == "reasoning":
            self._reason(text)
            return
        self._fold()
        write(text)

    def close(self) -> None:
        """End the answer's last line."""
        self._fold()
        out.print()

    def _reason(self, text: str) -> None:
        if self._is_folded and self._status is not None:
            self._status.start()
        self._is_folded = False
        self._num_words += text.count(" ")
        self._tail = (self._tail + text)[-200:].replace("\n", " ")
        if self._status is not None:
            width = max(err.width - 20, 10)
            self._status.update(Text(safe(self._tail[-width:], err), style="dim"))

    def _fold(self) -> None:
        if self._is_folded:
            return
        self._is_folded = True
        if self._status is not None:
            self._status.stop()
            seconds = time.perf_counter() - self._started_at
            note(f"▸ thought for {seconds:.1f} s, about {self._num_words} words (/reasoning)")
