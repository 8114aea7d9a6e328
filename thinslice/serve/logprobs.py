"""Log-probabilities in the forms of OpenAI's API."""

import codecs
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from thinslice.engine.logprobs import TokenLogprobs
from thinslice.serve.lazy_json import Lazily
from thinslice.text.tokenizer import Tokenizer

# JSON has no infinity. OpenAI's API gives this for a token that cannot come.
_LEAST = -9999.0


def chat_logprobs(
    tokenizer: Tokenizer, token_ids: Sequence[int], logprobs: Iterable[TokenLogprobs]
) -> Iterator[dict[str, Any]]:
    """The entries of ``logprobs.content`` of a chat, one for each token."""
    for token_id, one in zip(token_ids, logprobs, strict=True):
        entry = _entry(tokenizer, token_id, one.logprob)
        yield {**entry, "top_logprobs": [_entry(tokenizer, *pair) for pair in one.top]}


def _entry(tokenizer: Tokenizer, token_id: int, logprob: float) -> dict[str, Any]:
    content = tokenizer.token_bytes(token_id)
    token = content.decode(errors="replace")
    return {"token": token, "logprob": max(logprob, _LEAST), "bytes": list(content)}


@dataclass(frozen=True)
class Told:
    """A token with its log-probabilities.

    Attributes:
        is_text: whether it is part of the text.
        logprobs: None for the first of a prompt, which nothing precedes.
    """

    token_id: int
    is_text: bool
    logprobs: TokenLogprobs | None


class TextOffsets:
    """Where in a text each token begins, in characters; a token that goes on with a character
    begins where that does.

    Args:
        start: characters before the first token.
        is_beginning: whether a space that decoding drops at a beginning is not in the text.
    """

    def __init__(self, tokenizer: Tokenizer, start: int, *, is_beginning: bool) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._is_at_start = is_beginning and tokenizer.strips_leading_space
        self._offset = start

    def next(self, told: Told) -> int:
        """The offset of the next token."""
        content = self._tokenizer.token_bytes(told.token_id) if told.is_text else b""
        if content and content[0] & 0xC0 != 0x80:  # a character begins, and ends one before it
            self._offset += len(self._decoder.decode(b"", final=True))
        offset = self._offset
        if content:
            text = self._decoder.decode(content)
            is_dropped = self._is_at_start and text.startswith(" ")
            self._is_at_start &= not text
            self._offset += len(text) - is_dropped
        return offset


def completion_logprobs(
    tokenizer: Tokenizer,
    tokens: Callable[[], Iterable[Told]],
    offsets: Callable[[], TextOffsets],
) -> dict[str, Lazily]:
    """The ``logprobs`` of a completion: four lists with an entry for each token.

    Args:
        tokens, offsets: called for each of the lists that needs them.
    """

    def places() -> Iterator[int]:
        found = offsets()
        return (found.next(told) for told in tokens())

    return {
        "tokens": Lazily(lambda: (_text(tokenizer, told.token_id) for told in tokens())),
        "token_logprobs": Lazily(
            lambda: (None if one.logprobs is None else _least(one.logprobs) for one in tokens())
        ),
        "top_logprobs": Lazily(lambda: (_top(tokenizer, told) for told in tokens())),
        "text_offset": Lazily(places),
    }


def _least(logprobs: TokenLogprobs) -> float:
    return max(logprobs.logprob, _LEAST)


def _top(tokenizer: Tokenizer, told: Told) -> dict[str, float] | None:
    """The likeliest by their texts, and the token itself, as OpenAI's API has them."""
    if told.logprobs is None:
        return None
    # Two tokens may have one text: the likelier stands, which comes first.
    pairs = reversed(told.logprobs.top)
    top = {_text(tokenizer, other): max(value, _LEAST) for other, value in pairs}
    top.setdefault(_text(tokenizer, told.token_id), _least(told.logprobs))
    return top


def _text(tokenizer: Tokenizer, token_id: int) -> str:
    return tokenizer.token_bytes(token_id).decode(errors="replace")
