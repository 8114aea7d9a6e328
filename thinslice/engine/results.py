"""What answers take while their caller holds them, and whether the plan has room for it."""

import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from thinslice.config import SamplingParams
from thinslice.engine.logprobs import Logprobs
from thinslice.errors import BusyError, RequestError
from thinslice.plan.cost import CALLER_BYTES
from thinslice.plan.memory_plan import MemoryPlan
from thinslice.units import KIB, format_bytes

# A token id as Python keeps it in a list, and the text that it becomes as a rule.
_TEXT_BYTES_PER_TOKEN = 8
_BYTES_PER_TOKEN = 40 + _TEXT_BYTES_PER_TOKEN
# What is promised at a time where texts are longer, and what Python takes for an empty one.
_MORE_BYTES, _EMPTY_BYTES = 64 * KIB, sys.getsizeof("")
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
    def held_for(self, asked: Sequence[tuple[int, SamplingParams]]) -> Iterator["Held"]:
        """Promise the room that these answers may take, until the end of the ``with``.

        Errors: as ``promise``.
        """
        held = Held(self, self.promise(asked))
        try:
            yield held
        finally:
            held.release()

    def promise(self, asked: Sequence[tuple[int, SamplingParams]]) -> Callable[[], None]:
        """Promise the room that these answers may take, until what is returned is called, once.

        That may be in a finaliser, at any time.

        Args:
            asked: the tokens of each prompt, and what is asked for it.

        Errors: RequestError for more than there is, that says what would fit; BusyError where it
        is promised to others now.
        """
        held = sum(_bytes_of(self._plan, *one) for one in asked)
        release, left = self.take(held)
        if release is not None:
            return release
        num_completions = sum(params.n for _, params in asked)
        longest = max(_most_tokens(self._plan, *one) for one in asked)
        told = (
            f"{num_completions} completions of up to {longest} tokens may take "
            f"{format_bytes(held)} to hold, and the plan leaves {format_bytes(left)}"
        )
        if held <= _room(self._plan):
            raise BusyError(f"{told} beside the answers that are held now: try again later")
        raise RequestError(
            f"{told}: set max_tokens, ask for fewer at a time, or take them one by one with "
            "complete_in_order"
        )

    def take(self, num_bytes: int) -> tuple[Callable[[], None] | None, int]:
        """Promise so many bytes; what gives them back, None where there is no room, and what was
        left."""
        with self._lock:
            while self._released:
                self._promised -= self._released.popleft()
            left = max(_room(self._plan) - self._promised, 0)
            if num_bytes > left:
                return None, left
            self._promised += num_bytes
        return partial(self._released.append, num_bytes), left


class Held:
    """Room promised to the answers of one call, which grows where their texts are long.

    A token has few characters as a rule, and in some vocabularies up to thousands.
    """

    def __init__(self, room: ResultsRoom, release: Callable[[], None]) -> None:
        self._room = room
        self._releases = [release]
        self._allowed = 0
        self._num_bytes = 0

    def note(self, num_tokens: int, texts: Iterable[str]) -> None:
        """Count new tokens and their text.

        Errors: RequestError for more text than the plan has room for.
        """
        self._allowed += num_tokens * _TEXT_BYTES_PER_TOKEN
        # Whole and in pieces, while a completion is put together.
        self._num_bytes += sum(2 * (sys.getsizeof(text) - _EMPTY_BYTES) for text in texts)
        if self._num_bytes <= self._allowed:
            return
        more = self._num_bytes - self._allowed + _MORE_BYTES
        release, left = self._room.take(more)
        if release is None:
            raise RequestError(
                f"the texts of these completions take {format_bytes(self._num_bytes)} by now and "
                f"the plan leaves {format_bytes(left)} more: ask for fewer at a time, or less "
                "of each"
            )
        self._releases.append(release)
        self._allowed += more

    def release(self) -> None:
        """Give all of it back."""
        for release in self._releases:
            release()


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
