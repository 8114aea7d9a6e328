"""Log-probabilities in the forms of OpenAI's API."""

from collections.abc import Iterable, Sequence
from typing import Any

from thinslice.engine.logprobs import TokenLogprobs
from thinslice.text.tokenizer import Tokenizer

# JSON has no infinity. OpenAI's API gives this for a token that cannot come.
_LEAST = -9999.0


def chat_logprobs(
    tokenizer: Tokenizer, token_ids: Sequence[int], logprobs: Iterable[TokenLogprobs]
) -> list[dict[str, Any]]:
    """The entries of ``logprobs.content`` of a chat, one for each token."""
    return [
        {
            **_entry(tokenizer, token_id, one.logprob),
            "top_logprobs": [_entry(tokenizer, *pair) for pair in one.top],
        }
        for token_id, one in zip(token_ids, logprobs, strict=True)
    ]


def _entry(tokenizer: Tokenizer, token_id: int, logprob: float) -> dict[str, Any]:
    content = tokenizer.token_bytes(token_id)
    token = content.decode(errors="replace")
    return {"token": token, "logprob": max(logprob, _LEAST), "bytes": list(content)}


def completion_logprobs(
    tokenizer: Tokenizer,
    token_ids: Sequence[int],
    logprobs: Iterable[TokenLogprobs],
    offset: int,
) -> dict[str, Any]:
    """The ``logprobs`` of a completion: four lists with an entry for each token.

    Args:
        offset: characters of text before the first of these tokens.
    """
    tokens, offsets, values, tops = (
        list[str](),
        list[int](),
        list[float](),
        list[dict[str, float]](),
    )
    for token_id, one in zip(token_ids, logprobs, strict=True):
        text = _text(tokenizer, token_id)
        tokens.append(text)
        offsets.append(offset)
        values.append(max(one.logprob, _LEAST))
        # Two tokens may have one text: the likelier stands, which comes first.
        top = {_text(tokenizer, other): max(value, _LEAST) for other, value in reversed(one.top)}
        tops.append(top)
        offset += len(text)
    return {
        "tokens": tokens,
        "token_logprobs": values,
        "top_logprobs": tops,
        "text_offset": offsets,
    }


def _text(tokenizer: Tokenizer, token_id: int) -> str:
    return tokenizer.token_bytes(token_id).decode(errors="replace")
