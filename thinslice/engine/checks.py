"""What an engine can never serve, refused before it is queued; nothing is ever cut.

A step runs for many: what would fail in one ends the requests of all. So what is asked is checked
in its types too.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from thinslice.config import MAX_LOGPROBS, SamplingParams
from thinslice.engine.sequence import Scored
from thinslice.errors import ContextError, RequestError, shown

# Whose ints may be numpy's.
TokenIds = list[int] | tuple[int, ...] | NDArray[np.integer]


def checked_ids(token_ids: object) -> list[int]:
    """Token ids as a list of Python's ints; such a list is given back as it is.

    Errors: RequestError for what is no list, tuple or array of one dimension of ints.
    """
    ids = token_ids
    if isinstance(ids, np.ndarray) and ids.dtype.kind in "iu":
        ids = ids.tolist()
    if isinstance(ids, list | tuple):
        kinds = set(map(type, ids))
        if kinds <= {int}:
            return ids if isinstance(ids, list) else [*ids]
        if all(map(_is_int, kinds)):
            return [int(one) for one in ids]
    raise RequestError(f"token ids are {shown(token_ids)}; expected a list or an array of ints")


def check_prompt(
    token_ids: list[int], params: SamplingParams, context: int, vocab_size: int
) -> None:
    """Errors: RequestError for an empty prompt, an id outside the vocabulary, or a prompt and
    completion longer than the context."""
    num_prompt = len(token_ids)
    if num_prompt == 0:
        raise RequestError("the prompt is empty; give at least one token")
    if num_prompt >= context:
        raise ContextError(
            f"the prompt has {num_prompt} tokens and the context is {context}; "
            f"at most {context - 1} leave room for an answer"
        )
    if params.max_tokens is not None and num_prompt + params.max_tokens > context:
        raise ContextError(
            f"a prompt of {num_prompt} tokens and max_tokens {params.max_tokens} exceed the "
            f"context of {context}; max_tokens {context - num_prompt} fits"
        )
    _check_ids(token_ids, vocab_size)
    for token_id in dict(params.logit_bias):
        if token_id >= vocab_size:
            raise RequestError(
                f"logit_bias: token id {token_id} is outside the vocabulary of {vocab_size}"
            )


def checked_scored(
    token_ids: list[int], start: object, num_top: object, context: int, vocab_size: int
) -> Scored:
    """What is asked of a text that is scored.

    Errors: RequestError for a text longer than the context, an id outside the vocabulary, what is
    no number, and where no token is to be scored.
    """
    start, num_top = _checked_int("start", start), _checked_int("num_top", num_top)
    if not 1 <= start < len(token_ids):
        raise RequestError(
            f"start is {shown(start)} for a text of {len(token_ids)} tokens; expected at least 1 "
            "and less than that, as each token is scored by those before it"
        )
    if len(token_ids) > context:
        raise ContextError(f"the text has {len(token_ids)} tokens and the context is {context}")
    if not 0 <= num_top <= MAX_LOGPROBS:
        raise RequestError(f"num_top is {shown(num_top)}; expected 0..{MAX_LOGPROBS}")
    _check_ids(token_ids, vocab_size)
    return Scored(start, num_top)


def _checked_int(name: str, given: Any) -> int:
    """Errors: RequestError for what is no int, of Python or numpy."""
    if not _is_int(type(given)):
        raise RequestError(f"{name} is {shown(given)}; expected an int")
    return int(given)


def _is_int(kind: type) -> bool:
    return issubclass(kind, int | np.integer) and not issubclass(kind, bool | np.timedelta64)


def _check_ids(token_ids: list[int], vocab_size: int) -> None:
    for token_id in (min(token_ids), max(token_ids)):
        if not 0 <= token_id < vocab_size:
            raise RequestError(
                f"token id {shown(token_id)} is outside the vocabulary of {vocab_size}"
            )


def max_positions(token_ids: list[int], params: SamplingParams, capacity: int) -> int:
    """The most positions that a prompt and its completion can come to hold."""
    return capacity if params.max_tokens is None else len(token_ids) + params.max_tokens
