"""What an engine can never serve, refused before it is queued; nothing is ever cut."""

from thinslice.config import MAX_LOGPROBS, SamplingParams
from thinslice.errors import ContextError, RequestError


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


def check_scored(
    token_ids: list[int], start: int, num_top: int, context: int, vocab_size: int
) -> None:
    """Errors: RequestError for a text longer than the context, an id outside the vocabulary, and
    where no token is to be scored."""
    if not 1 <= start < len(token_ids):
        raise RequestError(
            f"start is {start} for a text of {len(token_ids)} tokens; expected at least 1 and less "
            "than that, as each token is scored by those before it"
        )
    if len(token_ids) > context:
        raise ContextError(f"the text has {len(token_ids)} tokens and the context is {context}")
    if not 0 <= num_top <= MAX_LOGPROBS:
        raise RequestError(f"num_top is {num_top}; expected 0..{MAX_LOGPROBS}")
    _check_ids(token_ids, vocab_size)


def _check_ids(token_ids: list[int], vocab_size: int) -> None:
    for token_id in (min(token_ids), max(token_ids)):
        if not 0 <= token_id < vocab_size:
            raise RequestError(f"token id {token_id} is outside the vocabulary of {vocab_size}")


def max_positions(token_ids: list[int], params: SamplingParams, capacity: int) -> int:
    """The most positions that a prompt and its completion can come to hold."""
    return capacity if params.max_tokens is None else len(token_ids) + params.max_tokens
