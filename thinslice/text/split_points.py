"""Where a tokenizer's pre-tokenizer can be cut: between which kinds of characters nothing reaches.

A text may be encoded in two parts where no regular expression can take, or look at, a character
on either side together. That is read off the expressions themselves: the ways in which one of
their characters follows another (Glushkov's construction) say which neighbours a match can hold.
What is not understood is never cut. Whether there is a boundary at such a place is for the
tokenizer's own output to say (pieces.py).
"""

import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

# Letter, Mark, Number, Punctuation or symbol, space, line break, other White space, Other.
_ALL = frozenset("LMNPsrwo")
_WHITE = frozenset("srw")
_PROPERTIES = {"L": "L", "M": "M", "N": "N", "P": "P", "S": "P", "Z": "srw"}
Kinds = frozenset[str]
# What a set must hold to hold all of a kind, so that without it none is left.
_WHOLE_KINDS = (
    *((kind, {r"\s"}) for kind in "srw"),
    ("s", {" "}),
    ("r", {r"\r", r"\n"}),
    *((kind, {rf"\p{{{kind}}}"}) for kind in "LMN"),
    ("P", {r"\p{P}", r"\p{S}"}),
)

# Source: tokenizers, pre_tokenizers/byte_level.rs, which is openai/gpt-2's.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


class _UnknownError(Exception):
    """A pattern with something that is not understood here."""


@lru_cache(maxsize=4096)
def kind_of(character: str) -> str:
    """One of the eight kinds; ``o`` where versions of Unicode may differ about it."""
    if character == " ":
        return "s"
    if character in "\r\n":
        return "r"
    if character.isspace():
        # Information separators are white space to Python and to nobody else.
        return "o" if "\x1c" <= character <= "\x1f" else "w"
    category = unicodedata.category(character)
    return _PROPERTIES[category[0]] if category[0] in "LMNPS" else "o"


@dataclass
class _Part:
    """A part of a pattern: which of its places can come first and last, and if it may be empty."""

    first: set[int]
    last: set[int]
    is_empty: bool


@dataclass
class _Parser:
    """Reads a regular expression as Oniguruma and Rust write them; collects its neighbours."""

    pattern: str
    at: int = 0
    places: list[Kinds] = field(default_factory=list)
    pairs: set[tuple[int, int]] = field(default_factory=set)

    def neighbours(self) -> set[tuple[str, str]]:
        """Every two kinds that can stand side by side in a match."""
        self._alternatives()
        if self.at != len(self.pattern):
            raise _UnknownError
        return {
            (left, right)
            for one, other in self.pairs
            for left in self.places[one]
            for right in self.places[other]
        }

    def _peek(self, text: str) -> bool:
        return self.pattern.startswith(text, self.at)

    def _take(self) -> str:
        if self.at >= len(self.pattern):
            raise _UnknownError
        self.at += 1
        return self.pattern[self.at - 1]

    def _alternatives(self) -> _Part:
        whole = self._sequence()
        while self._peek("|"):
            self._take()
            other = self._sequence()
            whole = _Part(
                whole.first | other.first, whole.last | other.last, whole.is_empty or other.is_empty
            )
        return whole

    def _sequence(self) -> _Part:
        whole = _Part(set(), set(), is_empty=True)
        while self.at < len(self.pattern) and not self._peek("|") and not self._peek(")"):
            part = self._repeated(self._atom())
            self._join(whole.last, part.first)
            whole = _Part(
                whole.first | part.first if whole.is_empty else whole.first,
                part.last | whole.last if part.is_empty else part.last,
                whole.is_empty and part.is_empty,
            )
        return whole

    def _join(self, lasts: set[int], firsts: set[int]) -> None:
        self.pairs |= {(last, first) for last in lasts for first in firsts}

    def _repeated(self, part: _Part) -> _Part:
        count = re.compile(r"[*+?]|\{\d+(,\d*)?\}").match(self.pattern, self.at)
        if count is None:
            return part
        self.at = count.end()
        is_again = self._peek("+")  # possessive, or once more by another syntax
        if is_again or self._peek("?"):
            self._take()
        if is_again or count[0] != "?":
            self._join(part.last, part.first)
        may_be_none = count[0] in "*?" or count[0].startswith("{0")
        return _Part(part.first, part.last, part.is_empty or may_be_none)

    def _atom(self) -> _Part:
        if self._peek(r"(?!\S)"):
            # The end of a text and white space are the same to it.
            self.at += len(r"(?!\S)")
            return _Part(set(), set(), is_empty=True)
        if self._peek("("):
            return self._group()
        self.places.append(self._character())
        place = len(self.places) - 1
        return _Part({place}, {place}, is_empty=False)

    def _group(self) -> _Part:
        opening = re.compile(r"\((\?(i:|:|>))?(?!\?)").match(self.pattern, self.at)
        if opening is None:
            raise _UnknownError
        self.at = opening.end()
        part = self._alternatives()
        if self._take() != ")":
            raise _UnknownError
        return part

    def _character(self) -> Kinds:
        character = self._take()
        if character == "[":
            return self._set()
        if character == "\\":
            return self._escape()
        if character in "^$.*+?{}()":
            raise _UnknownError
        return frozenset(kind_of(character))

    def _escape(self) -> Kinds:
        character = self._take()
        simple: Mapping[str, Kinds] = {
            "s": _WHITE | {"o"},
            "S": _ALL - _WHITE,
            "d": frozenset("N"),
            "r": frozenset("r"),
            "n": frozenset("r"),
            "t": frozenset("w"),
        }
        if character in simple:
            return simple[character]
        if character in "pP":
            name = re.compile(r"\{(\^?)(\w+)\}").match(self.pattern, self.at)
            if name is None or name[2][0] not in _PROPERTIES or len(name[2]) > 2:
                raise _UnknownError
            self.at = name.end()
            kinds = frozenset(_PROPERTIES[name[2][0]]) | {"o"}
            if character == "P" or name[1]:
                # Half of the letters left out may leave the other half.
                return _ALL - kinds | {"o"} if len(name[2]) == 1 else _ALL
            return kinds
        if character.isalnum():
            raise _UnknownError
        return frozenset(kind_of(character))

    def _set(self) -> Kinds:
        is_negated = self._peek("^")
        self.at += is_negated
        kinds: set[str] = set()
        members: set[str] = set()
        while not self._peek("]") or not members:
            if self._peek("[") or self._peek("&&"):
                raise _UnknownError
            start = self.at
            one = self._character_of_set()
            if self._peek("-") and not self._peek("-]"):
                one = self._range(start)
            kinds |= one
            members.add(self.pattern[start : self.at])
        self._take()
        if not is_negated:
            return frozenset(kinds)
        return _ALL - {kind for kind, whole in _WHOLE_KINDS if whole <= members}

    def _character_of_set(self) -> Kinds:
        character = self._take()
        if character == "\\":
            return self._escape()
        return frozenset(kind_of(character))

    def _range(self, start: int) -> Kinds:
        """The kinds of a range such as a-z, whose first end stands at ``start``."""
        low = self.pattern[start : self.at]
        self._take()
        high = self._take()
        if len(low) != 1 or high == "\\" or not low <= high:
            raise _UnknownError
        return frozenset(kind_of(chr(code)) for code in range(ord(low), ord(high) + 1)) | {"o"}


def _neighbours(step: Mapping[str, Any]) -> set[tuple[str, str]]:
    """The kinds that a step of a pre-tokenizer can look at together."""
    kind = step.get("type")
    if kind == "ByteLevel":
        # A space put before a text that has none must be put before no other part.
        first = {(left, right) for left in _ALL for right in _ALL if right != "s"}
        needless = first if step.get("add_prefix_space", True) else set()
        return needless | (_Parser(GPT2).neighbours() if step.get("use_regex", True) else set())
    if kind == "Digits":
        return set() if step["individual_digits"] else {("N", "N"), ("N", "o"), ("o", "N")}
    if kind == "Punctuation" and step["behavior"] == "Isolated":
        return set()
    if kind == "Split" and step["behavior"] == "Isolated":
        pattern = step["pattern"]
        text = pattern["Regex"] if "Regex" in pattern else re.escape(pattern["String"])
        return _Parser(text).neighbours()
    raise _UnknownError


def cut_test(steps: list[Mapping[str, Any]]) -> Callable[[str, str], bool] | None:
    """Whether a text may be cut between two characters, by the steps of a pre-tokenizer.

    None where nothing is known of a step, so that no place is safe.
    """
    try:
        together = {pair for step in steps for pair in _neighbours(step)}
    except (_UnknownError, KeyError, RecursionError):
        return None

    def is_apart(left: str, right: str) -> bool:
        kinds = kind_of(left), kind_of(right)
        return "o" not in kinds and kinds not in together

    return is_apart


def normalises_alone(character: str) -> bool:
    """Whether Unicode normalisation never joins this character with one before it.

    A mark joins a letter, and vowels of Hangul join consonants; both also where a compatibility
    form stands for them.
    """
    first = unicodedata.normalize("NFKD", character)[0]
    if kind_of(character) == "o" or kind_of(first) in "Mo":
        return False
    return unicodedata.combining(first) == 0 and not 0x1100 <= ord(first) <= 0x11FF


def flat(component: Any, key: str) -> Iterator[Mapping[str, Any]]:
    """The steps of a normaliser or pre-tokenizer, in order, sequences laid open."""
    if component is None:
        return
    if component.get("type") == "Sequence":
        for step in component[key]:
            yield from flat(step, key)
    else:
        yield component
