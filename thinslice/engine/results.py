"""What answers take while their caller holds them, and whether the plan has room for it."""

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from thinslice.config import SamplingParams
from thinslice.engine.logprobs import Logprobs
from thinslice.errors import BusyError, RequestError
from thinslice.plan.cost import CALLER_BYTES
from thinslice.plan.memory_plan import MemoryPlan
from thinslice.units import format_bytes

# A token id as Python keeps it in a list, and the text that it becomes.
_BYTES_PER_TOKEN = 40 + 8
# A completion without tokens: its texts, its lists, its sequence and generator.
_BYTES_PER_COMPLETION = 8 * 1024


class ResultsRoom:
    """What a plan leaves to answers, and what of it is promised to calls that are under way."""

    def __init__(self, plan: MemoryPlan) -> None:
        self._plan = plan
        self._promised = 0
        self._released: deque[int] = deque()
        self._lock = threading.Lock()

    @contextmanager
    def held_for(self, asked: Sequence[tuple[int, SamplingParams]]) -> Iterator[None]:
        """Promise the room that these answers may take, until the end of the ``with``.

        Errors: as ``promise``.
        """
        release = self.promise(asked)
        try:
            yield
        finally:
            release()

    def promise(self, asked: Sequence[tuple[int, SamplingParams]]) -> Callable[[], None]:
        """Promise the room that these answers may take, until what is returned is called, once.

        That may be in a finaliser, at any time.

        Args:
            asked: the tokens of each prompt, and what is asked for it.

        Errors: RequestError for more than there is, that says what would fit; BusyError where it
        is promised to others now.
        """
        held = sum(_bytes_of(self._plan, *one) for one in asked)
        with self._lock:
            while self._released:
                self._promised -= self._released.popleft()
            room = _room(self._plan)
            left = max(room - self._promised, 0)
            if held <= left:
                self._promised += held
                return partial(self._released.append, held)
        num_completions = sum(params.n for _, params in asked)
        longest = max(_most_tokens(self._plan, *one) for one in asked)
        told = (
            f"{num_completions} completions of up to {longest} tokens may take "
            f"{format_bytes(held)} to hold, and the plan leaves {format_bytes(left)}"
        )
        if held <= room:
            raise BusyError(f"{told} beside the answers that are held now: try again later")
        raise RequestError(
            f"{told}: set max_tokens, ask for fewer at a time, or take them one by one with "
            "complete_in_order"
        )


def _most_tokens(plan: MemoryPlan, num_prompt: int, params: SamplingParams) -> int:
    return params.max_tokens or max(plan.context - num_prompt, 1)


def _bytes_of(plan: MemoryPlan, num_prompt: int, params: SamplingParams) -> int:
    """What the completions of one prompt may take."""
    per_token = _BYTES_PER_TOKEN
    if params.logprobs is not None:
        per_token += Logprobs.bytes_per_token(params.logprobs)
    return params.n * (_BYTES_PER_COMPLETION + _most_tokens(plan, num_prompt, params) * per_token)


def _room(plan: MemoryPlan) -> int:
    headroom = plan.headroom_bytes if plan.device is None else plan.device.host_headroom_bytes
    return max(headroom, 0) + CALLER_BYTES
