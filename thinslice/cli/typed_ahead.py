"""What was typed while the model loaded or answered: offered one message after the other."""

import re

from thinslice.cli.console import note
from thinslice.cli.terminal import MOST_AHEAD_BYTES, PASTE_END, PASTE_START, Terminal

# Up to the Enter that would have sent it, or to the end; one inside a paste is text.
_MESSAGE = re.compile(
    r"(?:\x1b\[200~.*?(?:\x1b\[201~|\Z)|[^\r\n\x1b]+|\x1b)*(?:\r\n|\r|\n|\Z)",
    re.DOTALL,
)
# Keys and answers of the terminal: CSI and SS3 sequences, and Alt with a key.
_ESCAPE = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|O.|.)?", re.DOTALL)
_ERASE_LINE = "\x15"
_ERASE = ("\x7f", "\b")


class TypedAhead:
    """The messages that were typed ahead on a terminal, in their order."""

    def __init__(self, terminal: Terminal) -> None:
        self._terminal = terminal
        self._keys = ""
        self._held = ""
        self._is_typed = False

    def next(self, offered: str | None, closing: str | None = None) -> str:
        """What the next line begins with: the text offered, or else the first message.

        Nothing typed ahead is ever sent by itself. Messages behind the first wait for their turn.
        What a command took the place of comes again; one that was offered gives way to another, and
        with None offered to nothing. Where a text of several lines is open, all lines up to one
        that ends with what closes it are one text.
        """
        if offered is None:
            self._held = ""
        keys = (self._keys + self._terminal.take_ahead()).encode()
        self._keys = keys[:MOST_AHEAD_BYTES].decode("utf-8", "ignore")
        dropped = self._terminal.take_num_dropped() + len(keys[MOST_AHEAD_BYTES:])
        if dropped:
            note(f"{dropped:,} bytes typed meanwhile were too many and are not kept")
        offered, self._held = offered or self._held, ""
        self._is_typed = not offered
        if offered:
            return offered
        text = ""
        while self._keys and not text:
            text = self._message() if closing is None else self._lines(closing)
        if text:
            behind = " and what follows it" if typed_text(self._keys) else ""
            note(f"typed meanwhile; Enter sends it, Ctrl-C drops it{behind}:")
        return text

    def _message(self) -> str:
        """The first message, which may be empty."""
        found = _MESSAGE.match(self._keys)
        assert found is not None, "an expression that matches anything"
        self._keys = self._keys[found.end() :]
        return typed_text(found[0])

    def _lines(self, closing: str) -> str:
        """The messages up to one that ends so, or to the last, as lines."""
        lines = [self._message()]
        while self._keys and not lines[-1].rstrip().endswith(closing):
            lines.append(self._message())
        return "\n".join(lines)

    def put_back(self, text: str) -> None:
        """Keep what the last line began with: a command has taken its place."""
        if self._is_typed:
            self._keys = f"{PASTE_START}{text}{PASTE_END}\r{self._keys}"
        else:
            self._held = text

    def drop(self) -> None:
        """Forget them."""
        self._keys, self._held = "", ""


def typed_text(keys: str) -> str:
    """The text that keys stand for, as a terminal that edits lines would give it.

    Escape sequences are left out, and erased characters; lines stay lines.
    """
    kept: list[str] = []
    for character in _ESCAPE.sub("", keys.replace("\r\n", "\n").replace("\r", "\n")):
        if character in _ERASE:
            if kept and kept[-1] != "\n":
                kept.pop()
        elif character == _ERASE_LINE:
            while kept and kept[-1] != "\n":
                kept.pop()
        elif character in "\n\t" or character >= " ":
            kept.append(character)
    return "".join(kept).strip("\n")
