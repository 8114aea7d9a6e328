"""What answers take while their caller holds them, and whether the plan has room for it."""

from collections.abc import Iterable

from thinslice.config import SamplingParams
from thinslice.engine.logprobs import Logprobs
from thinslice.errors import RequestError
from thinslice.plan.cost import CALLER_BYTES
from thinslice.plan.memory_plan import MemoryPlan
from thinslice.units import format_bytes

# A token id as Python keeps it in a list, and the text that it becomes.
_BYTES_PER_TOKEN = 40 + 8
# A completion without tokens: its texts, its lists, its sequence and generator.
_BYTES_PER_COMPLETION = 8 * 1024


def check_results(plan: MemoryPlan, asked: Iterable[tuple[int, SamplingParams]]) -> None:
    """Refuse what could not be held when all of it is answered.

    Args:
        asked: the tokens of each prompt, and what is asked for it.

    Errors: RequestError that says what would fit.
    """
    held, num_completions, longest = 0, 0, 0
    for num_prompt, params in asked:
        num_tokens = params.max_tokens or max(plan.context - num_prompt, 1)
        per_token = _BYTES_PER_TOKEN
        if params.logprobs is not None:
            per_token += Logprobs.bytes_per_token(params.logprobs)
        held += params.n * (_BYTES_PER_COMPLETION + num_tokens * per_token)
        num_completions, longest = num_completions + params.n, max(longest, num_tokens)
    room = _room(plan)
    if held > room:
        raise RequestError(
            f"{num_completions} completions of up to {longest} tokens may take "
            f"{format_bytes(held)} to hold, and the plan leaves {format_bytes(room)}: set "
            "max_tokens, ask for fewer at a time, or take them one by one with "
            "complete_in_order"
        )


def _room(plan: MemoryPlan) -> int:
    headroom = plan.headroom_bytes if plan.device is None else plan.device.host_headroom_bytes
    return max(headroom, 0) + CALLER_BYTES
