"""Tell calls of tools from text in a stream of text."""

import json
import re

from thinslice.text.tool_styles import CallStyle

Piece = tuple[str, str]
# Of Llama's: what may stand before a call, and is no text then.
_PYTHON_TAG = "<|python_tag|>"
_SPACE = " \t\r\n"


class CallSplitter:
    """Splits an answer's text into pieces of kind ``answer``, ``call`` and ``arguments``.

    A call's name comes whole; pieces of its arguments follow it, in sum the text of a JSON object,
    and at least one. What only looks like a call is text. White space between text and calls
    belongs to neither. What is given does not depend on how the text is cut into pieces; what may
    become a call is held back.

    Attributes:
        head: while a call's arguments are not whole, the text before them, from the tag on;
            otherwise nothing.
    """

    def __init__(self, style: CallStyle) -> None:
        self._style = style
        keys = "|".join({"arguments", "parameters", style.arguments})
        name = r'\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*'
        self._header = re.compile(rf'{name}"(?:{keys})"\s*:\s*(?=\{{)', re.ASCII)
        self._held = ""
        self._state = self._text if style.begin else self._start
        self._num_calls = 0
        self._is_after_call = False
        self._opening = ""  # what stood before the object that is held
        self.head = ""
        self._scan = _Scan()

    def push(self, text: str) -> list[Piece]:
        """The pieces that are sure now."""
        self._held += text
        return self._pieces(is_last=False)

    def finish(self) -> list[Piece]:
        """The rest, when no more text comes."""
        pieces = self._pieces(is_last=True)
        held, self._held = self._held, ""
        if self._state == self._object:
            pieces += self._answer(self._opening + held)
        elif self._state in (self._text, self._start) and not (self._num_calls and held.isspace()):
            # White space behind a call is none of an answer.
            pieces += self._answer(held)
        return pieces

    def _pieces(self, is_last: bool) -> list[Piece]:
        pieces: list[Piece] = []
        while (step := self._state(is_last)) is not None:
            pieces += step
        return pieces

    # Each state gives the pieces that it is sure of, or None where it needs more text.

    def _start(self, is_last: bool) -> list[Piece] | None:
        """Nothing but white space so far, in a style whose calls have no tag."""
        start = self._held.lstrip(_SPACE)
        rest = start.removeprefix(_PYTHON_TAG).lstrip(_SPACE)
        if rest[:1] in ("{", "["):
            self._open(self._held[: len(self._held) - len(rest)], rest)
            return []
        if _PYTHON_TAG.startswith(start) or (not rest and not is_last):
            return None
        self._state = self._text
        return []

    def _text(self, is_last: bool) -> list[Piece] | None:
        if self._is_after_call:
            self._held = self._held.lstrip(_SPACE)
            self._is_after_call = not self._held
        begin = self._style.begin
        place = self._held.find(begin) if begin else -1
        if place >= 0:
            text = self._held[:place].rstrip(_SPACE)
            self._opening = self._held[len(text) : place + len(begin)]
            self._held = self._held[place + len(begin) :]
            self._state = self._open_tag
            return self._answer(text)
        if is_last:
            return None
        sure = len(self._held) - _overlap(self._held, begin)
        sure = len(self._held[:sure].rstrip(_SPACE))
        text, self._held = self._held[:sure], self._held[sure:]
        return self._answer(text) or None

    def _open_tag(self, is_last: bool) -> list[Piece] | None:
        """Behind the tag that begins calls."""
        rest = self._held.lstrip(_SPACE)
        if rest[:1] in ("{", "["):
            self._open(self._opening + self._held[: len(self._held) - len(rest)], rest)
            return []
        if not rest and not is_last:
            return None
        return self._no_call()

    def _open(self, opening: str, rest: str) -> None:
        if rest.startswith("["):
            inner = rest[1:].lstrip(_SPACE)
            opening, rest = opening + rest[: len(rest) - len(inner)], inner
        self._opening, self._held = opening, rest
        self._state, self._scan = self._object, _Scan()

    def _object(self, is_last: bool) -> list[Piece] | None:
        """In an object that may become a call."""
        if not self._held:
            return None
        if not self._held.startswith("{"):
            if self._held[0] in _SPACE and self._opening.rstrip(_SPACE).endswith("["):
                self._opening += self._held[0]
                self._held = self._held[1:]
                return []
            return self._no_call()
        header = self._header.match(self._held)
        name = None if header is None else _name(header[1])
        if header is not None and name is not None:
            self.head = self._opening + self._held[: header.end()]
            self._held = self._held[header.end() :]
            self._state, self._scan = self._arguments, _Scan()
            self._num_calls += 1
            return [("call", name)]
        end = self._scan.end_of(self._held)
        if end is None:
            return None
        call = _call(self._held[:end], self._style)
        if call is None:
            return self._no_call()
        self._held = self._held[end:]
        self._state = self._between
        self._num_calls += 1
        return call

    def _arguments(self, is_last: bool) -> list[Piece] | None:
        if not self._held:
            return None
        end = self._scan.end_of(self._held, is_streamed=True)
        if end is None:
            text, self._held = self._held, ""
            return [("arguments", text)]
        text, self._held = self._held[:end], self._held[end:]
        self._state, self._scan, self.head = self._tail, _Scan(depth=1), ""
        return [("arguments", text)]

    def _tail(self, is_last: bool) -> list[Piece] | None:
        """Behind the arguments, in their call's object."""
        if not self._held:
            return None
        end = self._scan.end_of(self._held, is_streamed=True)
        self._held = "" if end is None else self._held[end:]
        if end is not None:
            self._state = self._between
        return []

    def _between(self, is_last: bool) -> list[Piece] | None:
        """Behind a call: further ones, the end of their list, or the tag that ends it."""
        rest = self._held.lstrip(f"{_SPACE},;]")
        end = self._style.end
        if end and rest.startswith(end):
            self._held = rest[len(end) :]
        elif rest.startswith("{"):
            self._open("", rest)
            return []
        elif end.startswith(rest):
            return None
        else:
            self._held = rest
        self._state, self._is_after_call = self._text, True
        return []

    def _no_call(self) -> list[Piece]:
        """What was held is text; another call may begin in it, but for the tag that was seen."""
        opening, self._opening = self._opening, ""
        self._state = self._text
        return self._answer(opening)

    def _answer(self, text: str) -> list[Piece]:
        return [("answer", text)] if text else []


class _Scan:
    """Where a JSON object ends, in text that comes in pieces."""

    def __init__(self, depth: int = 0) -> None:
        self._depth = depth
        self._place = 0
        self._is_string = self._is_escaped = False

    def end_of(self, text: str, is_streamed: bool = False) -> int | None:
        """The place behind the object's end, or None where it is not there yet.

        Args:
            text: all of the object so far, or where it is streamed, what follows on the last text.
        """
        start = 0 if is_streamed else self._place
        for place in range(start, len(text)):
            if self._ends(text[place]):
                return place + 1
        self._place = len(text)
        return None

    def _ends(self, sign: str) -> bool:
        if self._is_escaped:
            self._is_escaped = False
        elif self._is_string:
            self._is_escaped = sign == "\\"
            self._is_string = sign != '"'
        elif sign == '"':
            self._is_string = True
        elif sign in "{[":
            self._depth += 1
        elif sign in "}]":
            self._depth -= 1
            return self._depth <= 0
        return False


def _name(written: str) -> str | None:
    try:
        return _without_halves(json.loads(written))
    except ValueError:
        return None


def _without_halves(text: str) -> str:
    """The same with question marks for halves of characters that stand alone."""
    return text.encode(errors="replace").decode()


def _call(text: str, style: CallStyle) -> list[Piece] | None:
    """The call that a whole object is; None where it is none."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    name, arguments = found.get("name"), None
    for key in (style.arguments, "arguments", "parameters"):
        arguments = found.get(key) if arguments is None else arguments
    if isinstance(arguments, str):  # some models write them as text
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            return None
    if arguments is None and set(found) == {"name"} and style.begin:
        arguments = {}
    if not isinstance(name, str) or not isinstance(arguments, dict):
        return None
    written = json.dumps(arguments, ensure_ascii=False)
    return [("call", _without_halves(name)), ("arguments", _without_halves(written))]


def _overlap(text: str, tag: str) -> int:
    """Length of the longest end of the text that is a beginning of the tag."""
    for length in range(min(len(tag) - 1, len(text)), 0, -1):
        if text.endswith(tag[:length]):
            return length
    return 0
