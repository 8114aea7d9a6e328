"""How many tokens a request took."""

from collections.abc import Sequence
from typing import Any

from thinslice.engine.request import Completion


def usage_of(completions: Sequence[Completion]) -> dict[str, Any]:
    """The usage of a prompt's completions: the prompt is counted once."""
    prompt = len(completions[0].prompt_token_ids)
    count = sum(len(one.token_ids) for one in completions)
    cached = min(one.num_cached for one in completions)
    reasoning = sum(one.num_reasoning for one in completions)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": count,
        "total_tokens": prompt + count,
        "prompt_tokens_details": {"cached_tokens": cached},
        "completion_tokens_details": {"reasoning_tokens": reasoning},
    }


def responses_usage(completion: Completion) -> dict[str, Any]:
    """The usage of an answer under the names of ``/v1/responses``."""
    usage = usage_of([completion])
    return {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": {**usage["prompt_tokens_details"], "cache_write_tokens": 0},
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": usage["completion_tokens_details"],
        "total_tokens": usage["total_tokens"],
    }


def added_up(usages: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The usage of several prompts."""
    return {
        name: added_up([one[name] for one in usages])
        if isinstance(value, dict)
        else sum(one[name] for one in usages)
        for name, value in usages[0].items()
    }
