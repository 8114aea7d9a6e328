"""Split a stream of normalised text and merge it into tokens, part by part, exactly.

Where a part may end hangs on the pre-tokenizer; ``merger_of`` chooses. The proofs are in pieces.py.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import tokenizers
from tokenizers import models

from thinslice.errors import RequestError
from thinslice.text.split_points import cut_test, flat

# 1.9 MiB at 930 bytes for a character.
PART = 2 * 1024
# Characters either side of a place where two encodings must stand as they are.
_REACH = 64
# Places tried before a text is refused; the first one mostly holds.
_MAX_TRIES = 256


@dataclass(frozen=True)
class Sizes:
    """Characters worked on at a time, and at most where no earlier place is safe (8 MiB)."""

    part: int = PART
    max_part: int = 4 * PART


DEFAULT_SIZES = Sizes()


class Merger(Protocol):
    """Turns the text between two added tokens into ids."""

    def merge(self, parts: Iterable[str]) -> Iterator[list[int]]:
        """The ids of a text that comes in parts."""


Prepare = Callable[[Iterable[str], bool], Iterable[str]]


def merger_of(backend: tokenizers.Tokenizer, sizes: Sizes) -> tuple[Prepare, Merger]:
    """What must be done to a text first (given whether it is the whole text's first), and what
    merges it."""
    steps = list(flat(state_of(backend.pre_tokenizer), "pretokenizers"))
    if len(steps) == 1 and steps[0]["type"] == "Metaspace":
        return _metaspace(backend.model, steps[0], sizes)
    bare = tokenizers.Tokenizer(backend.model)
    if backend.pre_tokenizer is not None:
        bare.pre_tokenizer = backend.pre_tokenizer
    is_unsplit = all(
        step["type"] == "ByteLevel" and not step["use_regex"] and not step["add_prefix_space"]
        for step in steps
    )
    if is_unsplit:
        return _unchanged, _unsplit(bare, sizes)
    return _unchanged, AtSplits(bare, sizes, cut_test(steps))


def state_of(component: Any) -> Any:
    """A component of a tokenizer as tokenizer.json has it."""
    return None if component is None else json.loads(component.__getstate__())


def whole(parts: Iterable[str], most: int) -> str:
    """Parts put together, for what is not done in parts.

    Errors: RequestError where that is too much.
    """
    held = ""
    for part in parts:
        held += part
        if len(held) > most:
            raise too_long(most)
    return held


def too_long(most: int) -> RequestError:
    """The error for a text without a place to cut it in."""
    return RequestError(
        f"the prompt has over {most} characters in a row that this model's tokenizer "
        "takes as one word; break them up"
    )


@dataclass(frozen=True)
class AtSplits:
    """Ends a part where the pre-tokenizer splits and cannot look across; None: nowhere."""

    backend: tokenizers.Tokenizer
    sizes: Sizes
    is_apart: Callable[[str, str], bool] | None

    def merge(self, parts: Iterable[str]) -> Iterator[list[int]]:
        """The ids of a text that comes in parts."""
        held, wanted = "", self.sizes.part
        for part in parts:
            held += part
            while len(held) >= wanted:
                place, ids = self._cut(held[:wanted])
                if place:
                    yield ids
                    held, wanted = held[place:], self.sizes.part
                elif wanted >= self.sizes.max_part:
                    raise too_long(self.sizes.max_part)
                else:
                    wanted *= 2
        if held:
            yield self.backend.encode(held, add_special_tokens=False).ids

    def _cut(self, text: str) -> tuple[int, list[int]]:
        """The last safe place in a text that goes on, and the ids before it; 0 for none.

        The piece behind the place ends before the text does, so that it is one for certain.
        """
        if self.is_apart is None:
            return 0, []
        encoding = self.backend.encode(text, add_special_tokens=False)
        words, offsets, ids = encoding.word_ids, encoding.offsets, encoding.ids
        last_word = words[-1] if words else None
        for index in range(len(words) - 1, 0, -1):
            place = offsets[index][0]
            if words[index] in (words[index - 1], last_word) or offsets[index - 1][1] != place:
                continue
            if self.is_apart(text[place - 1], text[place]):
                return place, ids[:index]
        return 0, []


@dataclass(frozen=True)
class _Encoded:
    """Ids and the characters they stand for; the library makes such lists anew at each use."""

    ids: list[int]
    offsets: list[tuple[int, int]]


@dataclass(frozen=True)
class AtMerges:
    """Ends a part between two tokens that stay as they are when encoded together."""

    backend: tokenizers.Tokenizer
    sizes: Sizes

    def merge(self, parts: Iterable[str]) -> Iterator[list[int]]:
        """The ids of a text that comes in parts."""
        held, size = "", self.sizes.part
        here: _Encoded | None = None
        for part in parts:
            held += part
            while len(held) >= 2 * size:
                here = here or self._encode(held[:size])
                place, ids, here = self._cut(held, here)
                yield ids
                held = held[place:]
        while len(held) > size:
            here = here or self._encode(held[:size])
            place, ids, here = self._cut(held, here)
            yield ids
            held = held[place:]
        if held:
            yield self._encode(held).ids

    def _encode(self, text: str) -> _Encoded:
        encoding = self.backend.encode(text, add_special_tokens=False)
        return _Encoded(encoding.ids, encoding.offsets)

    def _cut(self, text: str, here: _Encoded) -> tuple[int, list[int], _Encoded]:
        """A place that holds, the ids before it, and the encoding of the part behind it.

        Args:
            here: of the text's first part.
        """
        places = [
            (index, here.offsets[index][0])
            for index in range(len(here.ids) - 1, 0, -1)
            if here.offsets[index - 1][1] <= here.offsets[index][0]
        ]
        far_enough = [one for one in places if one[1] <= max(self.sizes.part - _REACH, 1)]
        for index, place in (far_enough or places)[:_MAX_TRIES]:
            behind = self._encode(text[place : place + self.sizes.part])
            if self._stands(text, here, index, behind):
                return place, here.ids[:index], behind
        raise too_long(self.sizes.max_part)

    def _stands(self, text: str, here: _Encoded, index: int, behind: _Encoded) -> bool:
        """Whether no merge goes across a place when what is on either side is encoded together."""
        place = here.offsets[index][0]
        start = index - 1
        while start > 0 and (
            place - here.offsets[start][0] < _REACH
            or here.offsets[start - 1][1] > here.offsets[start][0]
        ):
            start -= 1
        end, offsets = 1, behind.offsets
        while end < len(offsets) and (
            offsets[end - 1][1] < _REACH or offsets[end - 1][1] > offsets[end][0]
        ):
            end += 1
        joined = self._encode(text[here.offsets[start][0] : place + offsets[end - 1][1]])
        return joined.ids == here.ids[start:index] + behind.ids[:end]


def _unsplit(bare: tokenizers.Tokenizer, sizes: Sizes) -> Merger:
    model = bare.model
    assert isinstance(model, models.BPE)
    has_affixes = model.continuing_subword_prefix or model.end_of_word_suffix
    if has_affixes or model.ignore_merges:
        # A word's ends, and a word that is a token as a whole, are not known from a part of it.
        return AtSplits(bare, sizes, None)
    return AtMerges(bare, sizes)


def _unchanged(parts: Iterable[str], is_first: bool) -> Iterable[str]:
    return parts


def _metaspace(
    model: models.Model, step: Mapping[str, Any], sizes: Sizes
) -> tuple[Prepare, Merger]:
    """SentencePiece's spaces: each is a character of its own, and one may be put before a text."""
    space, scheme = step["replacement"], step["prepend_scheme"]

    def prepare(parts: Iterable[str], is_first: bool) -> Iterator[str]:
        is_wanted = scheme == "always" or (scheme == "first" and is_first)
        for part in parts:
            replaced = part.replace(" ", space)
            if is_wanted and part:
                replaced = replaced if replaced.startswith(space) else space + replaced
                is_wanted = False
            yield replaced

    bare = tokenizers.Tokenizer(model)
    if not step["split"]:
        return prepare, _unsplit(bare, sizes)
    bare.pre_tokenizer = tokenizers.pre_tokenizers.Split(space, behavior="merged_with_next")
    return prepare, AtSplits(bare, sizes, lambda _, right: right == space)
