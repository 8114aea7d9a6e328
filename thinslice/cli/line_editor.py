"""The input line of chat: editing, history, completion, and long texts kept out of the line.

The editor's work and memory grow with what it shows, many times over, so it never shows much: a
text that would make the line long is kept aside, and a mark such as ``[text 1: 20,000 characters]``
stands in its place. Keys that come many at a time, as a paste without brackets does, are taken as
one piece.
"""

import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from prompt_toolkit import PromptSession
from prompt_toolkit.buffer import Buffer
from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document
from prompt_toolkit.enums import DEFAULT_BUFFER
from prompt_toolkit.filters import has_focus
from prompt_toolkit.input.typeahead import get_typeahead
from prompt_toolkit.input.vt100 import Vt100Input
from prompt_toolkit.key_binding import KeyBindings, KeyPress, KeyPressEvent
from prompt_toolkit.keys import Keys
from prompt_toolkit.output import create_output

from thinslice.cli.chat_history import ChatHistory
from thinslice.cli.terminal import PASTE_END, PASTE_START, Terminal
from thinslice.errors import RequestError

# Characters of a message, as much as a context of any model we run can hold of plain text.
LONGEST_MESSAGE = 1024 * 1024
# Characters and lines that the editor itself holds.
LONGEST_LINE = 2000
_MOST_LINES = 20
_MOST_UNDO = 50
# A terminal is read 1,024 bytes at a time, of which a paste's mark may be some: behind a piece of
# so many bytes the same paste may go on.
_FULL_PIECE = 1000
_REDRAW_S = 0.05


@dataclass(frozen=True)
class _Piece:
    """A piece of a paste that was put into the line: where the paste began, and the line then."""

    start: int
    line: str
    cursor: int


class KeptTexts:
    """The texts that stand as marks in the line."""

    def __init__(self) -> None:
        self._last: _Piece | None = None
        self._pieces: dict[int, list[str]] = {}
        self._lengths: dict[int, int] = {}

    def clear(self) -> None:
        """Forget them."""
        self._pieces.clear()
        self._lengths.clear()
        self._last = None

    def insert(self, buffer: Buffer, text: str, is_pasted: bool = True) -> None:
        """Put text into the line at the cursor, or keep it aside where the line would be long.

        Args:
            is_pasted: it came at once, if only as one character that was cut in two on the way.
        """
        text = text.replace("\r\n", "\n").replace("\r", "\n")
        line, cursor = buffer.text, buffer.cursor_position
        last, is_full = self._last, len(text.encode(errors="replace")) >= _FULL_PIECE
        goes_on = last is not None and is_pasted and (last.line, last.cursor) == (line, cursor)
        start = last.start if last is not None and goes_on else cursor
        number = self._mark_before(buffer.document)
        is_short = (
            len(line) + len(text) <= LONGEST_LINE
            and line.count("\n") + text.count("\n") <= _MOST_LINES
        )
        if number is not None and (goes_on or not is_short):
            buffer.delete_before_cursor(len(self._mark(number)))
            self._keep(buffer, number, text)
        elif is_short:
            buffer.insert_text(text)
        else:
            # Of a paste that goes on, the beginning stands in the line.
            buffer.delete_before_cursor(cursor - start)
            self._keep(buffer, self._new(buffer.text), line[start:cursor] + text)
        piece = _Piece(start, buffer.text, buffer.cursor_position)
        self._last = piece if is_full or (goes_on and len(text) == 1) else None

    def _keep(self, buffer: Buffer, number: int, text: str) -> None:
        """Add to a text, and put its mark at the cursor."""
        room = LONGEST_MESSAGE + 1 - sum(self._lengths.values())
        self._pieces[number].append(text[:room])
        self._lengths[number] += len(text[:room])
        buffer.insert_text(self._mark(number))

    def erase_mark(self, buffer: Buffer) -> bool:
        """Erase the mark before the cursor; False where none is there."""
        number = self._mark_before(buffer.document)
        if number is None:
            return False
        buffer.delete_before_cursor(len(self._mark(number)))
        return True

    def whole(self, line: str) -> str:
        """The line with the texts in the places of their marks.

        Errors: RequestError where that is too long to be a message, or a mark was damaged.
        """
        marks = {self._mark(number): number for number in self._pieces}
        present = [number for mark, number in marks.items() if mark in line]
        if len(line) + sum(self._lengths[number] for number in present) > LONGEST_MESSAGE:
            raise RequestError(
                f"the message has over {LONGEST_MESSAGE:,} characters and was not sent; no context "
                "holds as much: send a part of it"
            )
        for mark, number in marks.items():
            if number not in present and mark[: mark.index(":")] in line:
                raise RequestError(
                    f"the mark {mark} was edited, so the text it stands for is lost and the "
                    "message was not sent; Backspace behind a mark removes it whole"
                )
        if not present:
            return line
        pattern = "|".join(re.escape(mark) for mark in marks)
        return re.sub(pattern, lambda match: "".join(self._pieces[marks[match[0]]]), line)

    def _new(self, line: str) -> int:
        """The number of a new text. Erased ones, which an undo could bring back, make room."""
        number = max(self._pieces, default=0) + 1
        if sum(self._lengths.values()) > LONGEST_MESSAGE // 2:
            for old in [old for old in self._pieces if self._mark(old) not in line]:
                del self._pieces[old], self._lengths[old]
        self._pieces[number], self._lengths[number] = [], 0
        return number

    def _mark(self, number: int) -> str:
        length = self._lengths[number]
        more = "over " if length > LONGEST_MESSAGE else ""
        return f"[text {number}: {more}{min(length, LONGEST_MESSAGE):,} characters]"

    def _mark_before(self, document: Document) -> int | None:
        before = document.current_line_before_cursor
        marks = ((number, self._mark(number)) for number in self._pieces)
        return next((number for number, mark in marks if before.endswith(mark)), None)


class BurstInput(Vt100Input):
    """Keys from a terminal; text that comes at once, or as a paste, is one key."""

    def __init__(self) -> None:
        super().__init__(sys.stdin)
        self._is_pasting = False
        self._unread = ""

    def read_keys(self) -> list[KeyPress]:
        """The keys that have come; of a paste, the pieces that have come."""
        data = self._unread + self.stdin_reader.read()
        self._unread = ""
        keys: list[KeyPress] = []
        while data:
            mark = PASTE_END if self._is_pasting else PASTE_START
            text, found, data = data.partition(mark)
            if not found and (cut := _partial_mark(text, PASTE_END if self._is_pasting else "")):
                text, self._unread = text[:-cut], text[-cut:]
            if self._is_pasting:
                keys += [KeyPress(Keys.BracketedPaste, text)] if text else []
            else:
                keys += self._parsed(text)
            if found:
                self._is_pasting = not self._is_pasting
        return keys

    def _parsed(self, text: str) -> list[KeyPress]:
        self.vt100_parser.feed(text)
        pressed, self._buffer = self._buffer, []
        return in_bursts(pressed)


def in_bursts(pressed: Iterable[KeyPress]) -> list[KeyPress]:
    """Join neighbouring characters to one piece of pasted text."""
    keys: list[KeyPress] = []
    text: list[str] = []
    for key in [*pressed, None]:
        if key is not None and _is_text(key, text):
            text.append(key.data)
            continue
        if len(text) == 1:
            keys.append(KeyPress(text[0], text[0]))
        elif text:
            keys.append(KeyPress(Keys.BracketedPaste, "".join(text)))
        text = []
        if key is not None:
            keys.append(key)
    return keys


def _is_text(key: KeyPress, before: list[str]) -> bool:
    """Whether a key is a character. So is a tab within a text, but not behind a command's name."""
    if key.key == Keys.Tab:
        return bool(before) and before[0] != "/"
    return len(key.key) == 1 and key.data.isprintable()


def _partial_mark(text: str, mark: str) -> int:
    """How many of a text's last characters may be the beginning of a mark."""
    return next((n for n in range(len(mark) - 1, 0, -1) if text.endswith(mark[:n])), 0)


class WordsCompleter(Completer):
    """Completes the words that a function finds for the text so far, on Tab."""

    def __init__(self, words_for: Callable[[str], Iterable[str]]) -> None:
        self._words_for = words_for

    def get_completions(self, document: Document, _: CompleteEvent) -> Iterable[Completion]:
        """The words that go on with what stands before the cursor."""
        before = document.text_before_cursor
        start = before.rpartition(" ")[2]
        for word in self._words_for(before):
            if word.startswith(start):
                yield Completion(word, start_position=-len(start))


class LineEditor:
    """Reads messages from a terminal that is lent to it for each.

    Args:
        words_for: gives the words that can follow a text, for completion.

    Attributes:
        replaced: the offered text, where the last line was a command in its place.
    """

    def __init__(
        self, terminal: Terminal, history: ChatHistory, words_for: Callable[[str], Iterable[str]]
    ) -> None:
        self._terminal = terminal
        self._history = history
        self._kept = KeptTexts()
        self._offered = ""
        self.replaced = ""
        self._input = BurstInput()
        output = create_output()
        # Pastes stay marked behind a prompt: one that comes during an answer is one text then. The
        # terminal turns the marks off when chat lets go of it.
        output.disable_bracketed_paste = lambda: None  # type: ignore[method-assign]
        self._session: PromptSession[str] = PromptSession(
            history=history,
            input=self._input,
            output=output,
            completer=WordsCompleter(words_for),
            complete_while_typing=False,
            validate_while_typing=False,
            enable_suspend=True,
            key_bindings=self._bindings(),
        )
        self._session.app.min_redraw_interval = _REDRAW_S
        self._session.default_buffer.on_text_changed += _bound_undo

    def read(self, prompt: str, offered: str = "") -> str:
        """One line, with the offered text in it to begin with.

        Errors: EOFError for Ctrl-D, KeyboardInterrupt for Ctrl-C, RequestError for a line that is
        too long.
        """
        self._kept.clear()
        shown = Buffer()
        self._kept.insert(shown, offered)
        self._offered, self.replaced = shown.text, ""
        with self._terminal.lent():
            try:
                line = self._session.prompt(prompt, default=shown.text)
            finally:
                unused = "".join(map(_as_typed, get_typeahead(self._input)))
                self._terminal.put_ahead(unused)
        if offered and line.lstrip().startswith("/") and not line.startswith(shown.text):
            self.replaced = offered
        text = self._kept.whole(line)
        self._history.remember(text)
        return text

    def _bindings(self) -> KeyBindings:
        bindings = KeyBindings()
        in_line = has_focus(DEFAULT_BUFFER)

        @bindings.add(Keys.BracketedPaste, filter=in_line)
        def _paste(event: KeyPressEvent) -> None:
            event.current_buffer.save_to_undo_stack()
            self._insert(event)

        @bindings.add(Keys.BracketedPaste, filter=~in_line)
        def _search(event: KeyPressEvent) -> None:
            room = max(LONGEST_LINE - len(event.current_buffer.text), 0)
            event.current_buffer.insert_text(event.data[:room])

        @bindings.add("<any>", filter=in_line, save_before=lambda event: not event.is_repeat)
        def _type(event: KeyPressEvent) -> None:
            self._insert(event)

        @bindings.add("backspace", filter=in_line, save_before=lambda event: not event.is_repeat)
        def _erase(event: KeyPressEvent) -> None:
            if not self._kept.erase_mark(event.current_buffer):
                event.current_buffer.delete_before_cursor(1)

        return bindings

    def _insert(self, event: KeyPressEvent) -> None:
        """Put what was typed into the line; a command takes the place of an offered text."""
        buffer = event.current_buffer
        is_untouched = self._offered and buffer.text == self._offered
        if is_untouched and event.data.startswith("/") and buffer.document.is_cursor_at_the_end:
            buffer.save_to_undo_stack()
            buffer.text = self._offered = ""
        is_pasted = event.key_sequence[0].key == Keys.BracketedPaste
        self._kept.insert(buffer, event.data, is_pasted)


def _as_typed(key: KeyPress) -> str:
    """What a terminal sent for a key."""
    if key.key == Keys.BracketedPaste:
        return f"{PASTE_START}{key.data}{PASTE_END}"
    return key.data


def _bound_undo(buffer: Buffer) -> None:
    """Keep the newest states only: each is a copy of the line, and prompt_toolkit keeps all."""
    del buffer._undo_stack[:-_MOST_UNDO]
