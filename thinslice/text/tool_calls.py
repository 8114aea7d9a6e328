"""Tell calls of tools from text in a stream of text."""

import json
import re
from collections.abc import Callable, Iterable
from sys import getsizeof, intern

from thinslice.text.tool_styles import FENCE, FENCE_END, CallStyle

Piece = tuple[str, str]
# Of Llama's: what may stand before a call, and is no text then.
_PYTHON_TAG = "<|python_tag|>"
_SPACE = " \t\r\n"
# Of a list, in which the same character is always the same object.
_BYTES_PER_SIGN = 8


class CallSplitter:
    """Splits an answer's text into pieces of kind ``answer``, ``call`` and ``arguments``.

    A call's name comes whole; pieces of its arguments follow it, in sum the text of a JSON object,
    and at least one. What only looks like a call is text, and so is a call of anything else than
    the request's functions. White space between text and calls belongs to neither.

    Each character is looked at once as it comes, so that what is given does not depend on how the
    text is cut. What may become a call is held back; most is looked at once more when it is
    decided, so that time is linear in the text whatever a model writes.

    Args:
        names: of the functions that may be called.

    Attributes:
        head: while a call's arguments are not whole, the text before them, from the tag on;
            otherwise nothing.
    """

    def __init__(self, style: CallStyle, names: Iterable[str]) -> None:
        self._style = style
        self._names = frozenset(map(_without_halves, names))
        self._longest_name = max(map(len, self._names), default=0)
        keys = "|".join({"arguments", "parameters", style.arguments})
        name = r'\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*'
        self._header = re.compile(rf'{name}"(?:{keys})"\s*:\s*\{{', re.ASCII)
        self._separators = f"{_SPACE},;]{FENCE_END[0] if style.opening else ''}"
        self.head = ""
        self._said: list[tuple[str, list[str]]] = []
        # Characters that may still be of a call.
        self._held: list[str] = []
        self._state: Callable[[str], None] = self._text if style.begin else self._start
        self._tag = ""  # the beginning of a tag that held text ends in
        self._scan = _Scan()
        self._object_at = 0  # where in the held text an object begins
        self._is_header_past = self._is_list = False
        self._name = self._fence = ""
        self._has_called = False
        self._is_call = False  # whether the last object was one
        self._is_after_call = False

    @property
    def held_bytes(self) -> int:
        """What it takes to hold back what may become a call."""
        return _BYTES_PER_SIGN * len(self._held) + getsizeof(self.head)

    def push(self, text: str) -> list[Piece]:
        """The pieces that are sure now."""
        for sign in text:
            # One object for each character there is, not for each time that it is held.
            self._state(intern(sign))
        return self._taken()

    def finish(self) -> list[Piece]:
        """The rest, when no more text comes."""
        if self._state == self._between:
            is_none = self._is_call
        else:
            # White space behind a call is none of an answer.
            is_none = self._has_called and not "".join(self._held).strip(_SPACE)
        if not is_none:
            self._say_held()
        return self._taken()

    def _taken(self) -> list[Piece]:
        pieces = [(kind, "".join(parts)) for kind, parts in self._said]
        self._said = []
        return pieces

    def _say(self, kind: str, text: str) -> None:
        if kind == "call" or not self._said or self._said[-1][0] != kind:
            self._said.append((kind, []))
        self._said[-1][1].append(text)

    def _say_held(self) -> None:
        """What was held is text."""
        for sign in self._held:
            self._say("answer", sign)
        self._held, self._tag, self._is_after_call = [], "", False

    def _give_up(self, sign: str, tag: str = "") -> None:
        """What was held is text; the sign, and the beginning of a tag that it does not go on with,
        may begin another tag."""
        if tag:
            self._held = self._held[: -len(tag)]
        self._say_held()
        self._state = self._text
        for one in tag + sign:
            self._text(one)

    def _follow(self, tags: tuple[str, ...], sign: str) -> str | None:
        """The tag that the sign completes; none yet where that is empty, and none at all where it
        is None. No tag is the beginning of another."""
        tag = self._tag + sign
        if tag in tags:
            self._tag = ""
            return tag
        is_begun = any(one.startswith(tag) for one in tags)
        self._tag = tag if is_begun else ""
        return "" if is_begun else None

    # States. Each takes one character.

    def _start(self, sign: str) -> None:
        """Nothing but white space so far, in a style whose calls have no tag."""
        is_begun = bool(self._tag)
        found = self._follow((_PYTHON_TAG,), sign)
        if found is not None:
            self._held.append(sign)
            self._state = self._opened if found else self._start
        elif is_begun or sign not in f"{_SPACE}[{{":
            self._give_up(sign)
        elif sign in _SPACE:
            self._held.append(sign)
        else:
            self._state = self._opened
            self._opened(sign)

    def _text(self, sign: str) -> None:
        is_begun = bool(self._tag)
        found = self._follow((self._style.begin,), sign)
        if found is None and is_begun:  # no tag has its first sign once more
            self._say_held()
            found = self._follow((self._style.begin,), sign)
        if found is not None:
            self._held.append(sign)
            if found:
                self._state, self._is_list = self._opened, False
        elif sign not in _SPACE:
            self._held.append(sign)
            self._say_held()
        elif not self._is_after_call:
            self._held.append(sign)

    def _opened(self, sign: str) -> None:
        """Behind the tag that begins calls, or where a call without one may begin."""
        if self._style.opening:
            tag, is_space = self._tag, sign in _SPACE and not self._tag
            found = "" if is_space else self._follow((self._style.opening,), sign)
            if found is None:
                self._give_up(sign, tag)
                return
            self._held.append(sign)
            if found:
                self._state, self._name = self._named, ""
        elif sign == "{":
            self._open_object()
        elif sign in _SPACE or (sign == "[" and not self._is_list):
            self._held.append(sign)
            self._is_list = self._is_list or sign == "["
        else:
            self._give_up(sign)

    def _open_object(self) -> None:
        self._object_at, self._is_header_past = len(self._held), False
        self._held.append("{")
        self._scan = _Scan(depth=1)
        self._state = self._object

    def _object(self, sign: str) -> None:
        """In an object that may become a call."""
        self._held.append(sign)
        if self._scan.ends(sign):
            self._end_object(_call(self._object_text(), self._style))
        elif sign == "{" and self._scan.depth == 2 and not self._is_header_past:
            self._is_header_past = True
            header = self._header.fullmatch(self._object_text())
            name = None if header is None else _name(header[1])
            if name is not None:
                self._begin_call(name)

    def _object_text(self) -> str:
        return "".join(self._held[self._object_at :])

    def _end_object(self, call: tuple[str, str] | None) -> None:
        """An object has come whole, before it was known to be a call."""
        self._is_call = call is not None and call[0] in self._names
        self._state = self._text if call is None else self._between
        if call is None or not self._is_call:
            self._say_held()
            return
        self._held, self._has_called = [], True
        self._say("call", call[0])
        self._say("arguments", call[1])

    def _begin_call(self, name: str) -> None:
        """The arguments' first brace has come; it is the last sign that is held."""
        self._is_call = name in self._names
        if not self._is_call:
            self._say_held()
            self._state = self._no_call
            return
        self.head = "".join(self._held[:-1])
        self._held, self._has_called = [], True
        self._say("call", name)
        self._state, self._scan = self._arguments, _Scan()
        self._arguments("{")

    def _arguments(self, sign: str) -> None:
        self._say("arguments", sign)
        if self._scan.ends(sign):
            self._state = self._between if self._style.opening else self._tail
            self._scan, self.head = _Scan(depth=1), ""

    def _tail(self, sign: str) -> None:
        """Behind the arguments, in their call's object. Its last brace may be missing."""
        if sign == "}":
            self._held, self._state = [], self._between
        elif sign in _SPACE:
            self._held.append(sign)
        elif sign == ",":
            self._held.append(sign)
            self._state = self._next_member
        else:
            self._leave_object(sign)

    def _next_member(self, sign: str) -> None:
        """Behind a comma there: another member, or what follows on an object without its brace."""
        if sign == '"':
            self._scan.ends(sign)
            self._held.append(sign)
            self._state = self._key
        elif sign in _SPACE:
            self._held.append(sign)
        else:
            self._leave_object(sign)

    def _key(self, sign: str) -> None:
        """In the key of another member, which has no line's end in it."""
        if sign < " ":
            self._leave_object(sign)
            return
        self._scan.ends(sign)
        self._held.append(sign)
        if not self._scan.is_string:
            self._state = self._colon

    def _colon(self, sign: str) -> None:
        """Behind the key of another member."""
        if sign not in f"{_SPACE}:":
            self._leave_object(sign)
            return
        self._held.append(sign)
        if sign == ":":
            self._state = self._value

    def _value(self, sign: str) -> None:
        """In further members of a call's object, which say nothing here. Without its end they are
        text."""
        self._held.append(sign)
        if self._scan.ends(sign):
            self._held, self._state = [], self._between

    def _leave_object(self, sign: str) -> None:
        held, self._held, self._state = self._held, [], self._between
        for one in (*held, sign):
            self._state(one)

    def _no_call(self, sign: str) -> None:
        """In the arguments of something that is no function here."""
        self._say("answer", sign)
        if self._scan.ends(sign):
            self._state = self._between

    def _named(self, sign: str) -> None:
        """In a name that stands before its arguments."""
        if sign == "\n":
            self._state, self._fence = self._before_fence, ""
        elif len(self._name) < self._longest_name:
            self._name += sign
        else:
            self._give_up(sign)
            return
        self._held.append(sign)

    def _before_fence(self, sign: str) -> None:
        """Between a name and its arguments."""
        if sign == "{" and self._fence in ("", FENCE_END, FENCE):
            self._held.append(sign)
            self._scan = _Scan(depth=1)
            self._begin_call(self._name)
            return
        if sign not in _SPACE:
            self._fence += sign
            if not FENCE.startswith(self._fence):
                self._give_up(sign)
                return
        self._held.append(sign)

    def _between(self, sign: str) -> None:
        """Behind an object: further ones, the end of their list, or the tag that ends it.

        It belongs to the object before it, and is text where that is.
        """
        style, is_begun = self._style, bool(self._tag)
        found = self._follow((style.end, style.closing, style.opening), sign)
        if found is not None:
            self._held.append(sign)
            if found:
                self._tagged(found)
        elif not is_begun and sign == "{" and not style.opening:
            self._open_object()
        elif is_begun or sign not in self._separators:
            self._leave(sign)
        elif sign not in _SPACE or self._held or not self._is_call:
            self._held.append(sign)

    def _tagged(self, tag: str) -> None:
        """Behind a tag that has followed on an object."""
        if tag == self._style.opening:
            self._state, self._name = self._named, ""
            return
        if self._is_call:
            self._held = []
        self._say_held()
        if tag == self._style.end:
            self._state, self._is_after_call = self._text, self._is_call

    def _leave(self, sign: str) -> None:
        """Text follows on an object, or a tag that only begins like the one that was awaited."""
        held, self._held, self._tag = self._held, [], ""
        if self._is_call:
            ends = "]" * self._is_list, FENCE_END * bool(self._fence)
            end = next((one for one in ends if one and "".join(held).startswith(one)), "")
            held = held[len(end) :]  # of the list or the fence that the call stands in
        self._state, self._is_after_call = self._text, self._is_call
        for one in (*held, sign):
            self._state(one)


class _Scan:
    """Follows a JSON object to its end, by its braces: brackets in it are closed by then."""

    def __init__(self, depth: int = 0) -> None:
        self.depth = depth
        self.is_string = self._is_escaped = False

    def ends(self, sign: str) -> bool:
        """Whether the object ends with this sign, which follows on the last one."""
        if self._is_escaped:
            self._is_escaped = False
        elif self.is_string:
            self._is_escaped = sign == "\\"
            self.is_string = sign != '"'
        elif sign == '"':
            self.is_string = True
        elif sign == "{":
            self.depth += 1
        elif sign == "}":
            self.depth -= 1
            return self.depth <= 0
        return False


def _name(written: str) -> str | None:
    try:
        return _without_halves(json.loads(written))
    except ValueError:
        return None


def _without_halves(text: str) -> str:
    """The same with question marks for halves of characters that stand alone."""
    return text.encode(errors="replace").decode()


def _call(text: str, style: CallStyle) -> tuple[str, str] | None:
    """Name and arguments of the call that a whole object is; None where it is none."""
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
    try:
        written = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    except ValueError:  # numbers that JSON does not have
        return None
    return _without_halves(name), _without_halves(written)
