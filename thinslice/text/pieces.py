"""Encode a text piece by piece: the tokens of the whole, in memory that does not grow with it.

The tokenizers library takes up to 930 bytes for a character (an emoji without a merge; Hindi 690,
a run of one letter 220), so that a long text is never given to it whole. What it does is done
here in the same order, each step on a stream of parts: added tokens are found, the text between
them is normalised, added tokens are found in what comes out, and the rest is split and merged.
Each part ends where the step cannot look across:

- a normaliser between characters that it never joins;
- a pre-tokenizer where no match can hold both neighbours (split_points.py) and its own output has
  a boundary;
- merges without a pre-tokenizer at any place that is verified: two encodings stand side by side
  as they are where the last tokens of one and the first of the other, encoded together, stay the
  same. A merge across the place would have to happen there too, for merges are done best first,
  and those of one part do not change another's.

Where a text has no such place within ``MAX_PART`` characters, it is refused.
"""

import base64
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import tokenizers
from tokenizers import AddedToken, models, normalizers

from thinslice.errors import CheckpointError
from thinslice.text import mergers
from thinslice.text.mergers import DEFAULT_SIZES, Sizes, state_of, too_long, whole
from thinslice.text.split_points import flat, normalises_alone

# White_Space of Unicode, as the library's own expressions have it.
_SPACE = "[\\t-\\r \\x85\\xa0\\u1680\\u2000-\\u200a\\u2028\\u2029\\u202f\\u205f\\u3000]"
_UNICODE_FORMS = ("NFC", "NFD", "NFKC", "NFKD")
_EACH_ALONE = ("Lowercase", "StripAccents", "Nmt", "ByteLevel")

# NFKC makes 18 characters of U+FDFA, and the byte alphabet 4 of one.
_MAX_GROWTH = 4096
# The most characters of one, in any version of Unicode so far.
_FIXED = {
    "NFC": 3,
    "NFD": 4,
    "NFKC": 18,
    "NFKD": 18,
    "Lowercase": 3,
    "BertNormalizer": 12,
    "ByteLevel": 4,
}

_EMPTY = json.loads(tokenizers.Tokenizer(models.BPE()).to_str())

# A part of a text, or the id of an added token found in it.
Item = str | int


class PieceEncoder:
    """Encodes for one tokenizer, without what it would put around a text.

    Peak extra memory: about 1 kB for each of ``sizes.part`` characters, at most of
    ``sizes.max_part``, and 40 bytes a token.
    """

    def __init__(self, backend: tokenizers.Tokenizer, sizes: Sizes = DEFAULT_SIZES) -> None:
        self._backend = backend
        self._sizes = sizes
        steps = list(flat(state_of(backend.normalizer), "normalizers"))
        self._normaliser = [(step, _normaliser_of(step)) for step in steps]
        self._growth = _growth_of(steps)
        _growth_of(flat(state_of(backend.pre_tokenizer), "pretokenizers"))
        added = backend.get_added_tokens_decoder()
        self._raw = _Finder.of({i: one for i, one in added.items() if not one.normalized})
        self._normalised = _Finder.of(
            {i: self._as_normalised(one) for i, one in added.items() if one.normalized}
        )
        self._is_whole = _needs_the_whole(added.values())
        self._before_merging, self._merger = mergers.merger_of(backend, sizes)

    def encode(self, text: str, limit: int | None = None) -> list[int]:
        """The tokens of a text; of a longer one than ``limit`` the first ones, at least one more.

        Errors: RequestError for a text with no place to cut it in.
        """
        if len(text) * self._growth <= self._sizes.part:
            return self._backend.encode(text, add_special_tokens=False).ids
        if self._is_whole:
            return self._backend.encode(self._whole([text]), add_special_tokens=False).ids
        ids: list[int] = []
        for piece in self._pieces(text):
            ids += piece
            if limit is not None and len(ids) > limit:
                break
        return ids

    def _pieces(self, text: str) -> Iterator[list[int]]:
        size = max(self._sizes.part // self._growth, 1)
        parts = (text[start : start + size] for start in range(0, len(text), size))
        is_first = True
        for section in _sections(self._found(self._raw, parts)):
            if isinstance(section, int):
                yield [section]
                is_first = False
                continue
            for inner in _sections(self._found(self._normalised, self._normalise(section))):
                if isinstance(inner, int):
                    yield [inner]
                else:
                    yield from self._merger.merge(self._before_merging(inner, is_first))
                is_first = False

    def _as_normalised(self, token: AddedToken) -> AddedToken:
        normalizer = self._backend.normalizer
        if normalizer is not None:
            content = normalizer.normalize_str(token.content)
            return AddedToken(content, lstrip=token.lstrip, rstrip=token.rstrip)
        return token

    def _found(self, finder: "_Finder | None", parts: Iterable[str]) -> Iterator[Item]:
        """Parts of the text and the added tokens in it, in order."""
        if finder is None:
            yield from parts
            return
        held, strips = "", False
        for part in parts:
            held += part
            if len(held) > finder.longest + self._sizes.max_part:
                raise too_long(self._sizes.max_part)
            items, held, strips = finder.split(held, strips, is_last=False)
            yield from items
        yield from finder.split(held, strips, is_last=True)[0]

    def _normalise(self, parts: Iterable[str]) -> Iterator[str]:
        for step, normaliser in self._normaliser:
            parts = self._step(step, normaliser.normalize_str, parts)
        return iter(parts)

    def _step(
        self, step: Mapping[str, Any], apply: Callable[[str], str], parts: Iterable[str]
    ) -> Iterator[str]:
        kind = step["type"]
        if kind == "Prepend":
            return _prepended(step["prepend"], parts)
        pattern = step.get("pattern", {}).get("String") if kind == "Replace" else None
        if kind in _EACH_ALONE or (pattern is not None and len(pattern) == 1):
            return (apply(part) for part in parts)
        if kind in _UNICODE_FORMS:
            return (apply(part) for part in self._recut(parts))
        return (apply(part) for part in [self._whole(parts)] if part)

    def _whole(self, parts: Iterable[str]) -> str:
        """Parts put together, for what is not done in parts."""
        return whole(parts, self._sizes.max_part // self._growth)

    def _recut(self, parts: Iterable[str]) -> Iterator[str]:
        """Cut a text anew, before characters that join none before them."""
        held = ""
        for part in parts:
            held += part
            place = next(
                (at for at in range(len(held) - 1, 0, -1) if normalises_alone(held[at])), 0
            )
            if place:
                yield held[:place]
                held = held[place:]
            elif len(held) > self._sizes.max_part:
                raise too_long(self._sizes.max_part)
        if held:
            yield held


def _needs_the_whole(added: Iterable[AddedToken]) -> bool:
    """Whether added tokens hang on more than the text they stand in: words beside them, or white
    space that two of them could claim."""
    tokens = list(added)
    strips = any(one.lstrip or one.rstrip for one in tokens)
    has_space = any(one.content != one.content.strip() for one in tokens)
    return any(one.single_word for one in tokens) or (strips and has_space)


def _normaliser_of(step: Any) -> normalizers.Normalizer:
    content = json.dumps({**_EMPTY, "normalizer": step})
    normalizer: normalizers.Normalizer | None = tokenizers.Tokenizer.from_str(content).normalizer
    assert normalizer is not None, step
    return normalizer


def _prepended(prefix: str, parts: Iterable[str]) -> Iterator[str]:
    is_first = True
    for part in parts:
        yield prefix + part if is_first and part else part
        is_first = is_first and not part


def _sections(items: Iterable[Item]) -> Iterator[Iterator[str] | int]:
    """Added tokens, and between them streams of text, each to be used up before the next."""
    iterator = iter(items)
    following: list[Item] = []

    def section(first: str) -> Iterator[str]:
        yield first
        for item in iterator:
            if isinstance(item, int):
                following.append(item)
                return
            yield item

    while True:
        item = following.pop() if following else next(iterator, None)
        if item is None:
            return
        yield item if isinstance(item, int) else section(item)


@dataclass(frozen=True)
class _Finder:
    """Finds some added tokens in a text, as the library does: first place, then longest."""

    pattern: re.Pattern[str]
    ids: dict[str, int]
    longest: int
    lstrip_ids: frozenset[int]
    rstrip_ids: frozenset[int]

    @classmethod
    def of(cls, tokens: dict[int, AddedToken]) -> "_Finder | None":
        tokens = {token_id: one for token_id, one in tokens.items() if one.content}
        if not tokens:
            return None
        by_length = sorted(tokens.values(), key=lambda one: -len(one.content))
        return cls(
            re.compile("|".join(re.escape(one.content) for one in by_length)),
            {one.content: token_id for token_id, one in tokens.items()},
            len(by_length[0].content),
            frozenset(token_id for token_id, one in tokens.items() if one.lstrip),
            frozenset(token_id for token_id, one in tokens.items() if one.rstrip),
        )

    def split(self, text: str, strips: bool, is_last: bool) -> tuple[list[Item], str, bool]:
        """What is sure of a part: its items, what must wait for more, and whether white space that
        follows belongs to the token before."""
        items: list[Item] = []
        start = _leading_space(text) if strips else 0
        strips = strips and start == len(text)
        sure = len(text) if is_last else max(len(text) - self.longest + 1, start)
        for match in self.pattern.finditer(text, start):
            if match.start() >= sure:
                break
            token_id = self.ids[match[0]]
            before = text[start : match.start()]
            if token_id in self.lstrip_ids:
                before = before[: _trailing_space(before)]
            items += [before, token_id] if before else [token_id]
            start = match.end()
            if token_id in self.rstrip_ids:
                start += _leading_space(text[start:])
                strips = start == len(text)
        sure = max(sure, start)
        if self.lstrip_ids and not is_last:
            sure = start + _trailing_space(text[start:sure])
        if sure > start:
            items.append(text[start:sure])
        return items, text[sure:], strips


def _leading_space(text: str) -> int:
    """How many characters of white space a text begins with."""
    match = re.match(f"{_SPACE}*", text)
    return 0 if match is None else match.end()


def _trailing_space(text: str) -> int:
    """Return where the trailing white space of a text begins."""
    return len(text) - _leading_space(text[::-1])


def _growth_of(steps: Iterable[Mapping[str, Any]]) -> int:
    """The most characters that a normaliser's or pre-tokenizer's steps make of one: what comes out
    before the merges is bounded too.

    Errors: CheckpointError beyond 4096.
    """
    product = 1
    for step in steps:
        product *= _step_growth(step)
        if product > _MAX_GROWTH:
            raise CheckpointError(
                f"the tokenizer's {step['type']} makes over {_MAX_GROWTH} characters of one; "
                "no known tokenizer does"
            )
    return product


def _step_growth(step: Mapping[str, Any]) -> int:
    kind = step["type"]
    if kind == "Replace":
        pattern, content = step["pattern"].get("String"), step["content"]
        # An expression may match the nothing between two characters.
        return -(-len(content) // len(pattern)) or 1 if pattern else 1 + len(content)
    if kind == "Prepend":
        return 1 + len(step["prepend"])
    if kind == "Precompiled":
        return _longest_replacement(base64.b64decode(step["precompiled_charsmap"]))
    return _FIXED.get(kind, 1)


def _longest_replacement(charsmap: bytes) -> int:
    """Source: SentencePiece, normalizer.cc: a trie behind its size, then texts that end in 0."""
    start = 4 + int.from_bytes(charsmap[:4], "little")
    return max((len(text) for text in charsmap[start:].split(b"\0")), default=1) or 1
