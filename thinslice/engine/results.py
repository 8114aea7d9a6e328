"""What answers take while their caller holds them, and whether the plan has room for it."""

import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress

from thinslice.config import SamplingParams
from thinslice.engine.logprobs import Logprobs
from thinslice.errors import BusyError, RequestError
from thinslice.forks import fork_safe
from thinslice.plan.cost import CALLER_BYTES
from thinslice.plan.memory_plan import MemoryPlan
from thinslice.units import KIB, format_bytes

ANSWERS = "answers that are held or not read yet"
# A token id as Python keeps it in a list, and the text that it becomes as a rule: whole and in
# pieces, while a completion is put together.
_TEXT_BYTES_PER_TOKEN = 16
_BYTES_PER_ID = 40
_BYTES_PER_TOKEN = _BYTES_PER_ID + _TEXT_BYTES_PER_TOKEN
# What is promised at a time where more comes; a hundred answers that have just begun take little.
_MORE_BYTES = 4 * KIB
# A completion without tokens: its texts, its lists, its sequence and draws.
_BYTES_PER_COMPLETION = 8 * KIB
# What is promised to an answer before it is taken on: its first hundred tokens do not want room.
_FIRST_BYTES = 8 * KIB
BYTES_TO_BEGIN = _BYTES_PER_COMPLETION + _FIRST_BYTES
# What stays promised where less is in use than was.
_MOST_SPARE_BYTES = 16 * KIB
# Entries of a ledger that are added up at once.
_MOST_ENTRIES = 64


class ResultsRoom:
    """What a plan leaves to answers, and what of it is promised to calls that are under way."""

    def __init__(self, plan: MemoryPlan) -> None:
        self._plan = plan
        self._promised = 0
        self._released: deque[int] = deque()
        # A signal handler may ask for room in the middle of what follows, in the same thread.
        self._lock = fork_safe(threading.RLock())

    @contextmanager
    def holding(self) -> Iterator["Held"]:
        """Room that is asked for by and by, until the end of the ``with``."""
        held = Held(self)
        try:
            yield held
        finally:
            held.release()

    @contextmanager
    def held_for(self, asked: Sequence[tuple[int, SamplingParams]]) -> Iterator["Held"]:
        """Promise the room that these answers may take, until the end of the ``with``.

        Args:
            asked: the tokens of each prompt, and what is asked for it.

        Errors: RequestError for more than there is, that says what would fit; BusyError where it
        is promised to others now.
        """
        with self.holding() as held:
            self._promise(asked, held)
            yield held

    def take(self, num_bytes: int) -> bool:
        """Promise so many bytes; False, and nothing is, where there is no room."""
        with self._lock:
            # First: whoever asks in between knows of it.
            self._promised += num_bytes
            if self._left() < 0:
                self._promised -= num_bytes
                return False
            return True

    def release(self, num_bytes: int) -> None:
        """Give back what was promised. In a finaliser too: it waits for no lock."""
        self._released.append(num_bytes)

    @property
    def left_bytes(self) -> int:
        """What is promised to nobody."""
        with self._lock:
            return max(self._left(), 0)

    @property
    def most_bytes(self) -> int:
        """All that the plan leaves."""
        return _room(self._plan)

    def _left(self) -> int:
        """What is promised to nobody, less than nothing where that is too much."""
        with suppress(IndexError):
            while True:
                # In two lines: a handler that runs after the first finds nothing half done.
                num_bytes = self._released.popleft()
                self._promised -= num_bytes
        return _room(self._plan) - self._promised

    def _promise(self, asked: Sequence[tuple[int, SamplingParams]], held: "Held") -> None:
        num_bytes = sum(_bytes_of(self._plan, *one) for one in asked)
        num_tokens = sum(params.n * _most_tokens(self._plan, num, params) for num, params in asked)
        if held.take(num_bytes):
            held.allow(num_tokens * _TEXT_BYTES_PER_TOKEN)
            return
        num_completions = sum(params.n for _, params in asked)
        longest = max(_most_tokens(self._plan, *one) for one in asked)
        told = (
            f"{num_completions} completions of up to {longest} tokens may take "
            f"{format_bytes(num_bytes)} to hold, and the plan leaves "
            f"{format_bytes(self.left_bytes)}"
        )
        if num_bytes <= _room(self._plan):
            raise BusyError(f"{told} beside the answers that are held now: try again later")
        raise RequestError(
            f"{told}: set max_tokens, ask for fewer at a time, or take them one by one with "
            "complete_in_order"
        )


class Held:
    """Room promised to answers until they are let go, which grows with what comes of them.

    One thread takes and gives back, and another lets go in a finaliser, where it waits for no lock:
    what is promised stands in a ledger whose entries each go to one of them.
    """

    def __init__(self, room: ResultsRoom) -> None:
        self._room = room
        self._ledger: deque[int] = deque()
        self._is_released = False
        self._allowed = 0
        self._used = 0

    def take(self, num_bytes: int) -> bool:
        """Have so many bytes promised; False where there is no room."""
        is_taken = self._room.take(num_bytes)
        if is_taken:
            self._note(num_bytes)
        return is_taken

    def allow(self, num_bytes: int) -> None:
        """So much of what is promised may be used."""
        self._allowed += num_bytes

    def use(self, num_bytes: int, what: str) -> None:
        """Count what has come; where it is more than may be used, more is promised.

        Errors: as ``need``.
        """
        self.have(self._used + num_bytes, what)

    def have(self, num_bytes: int, what: str) -> None:
        """So much is in use, in all; what is promised grows with that and shrinks with it.

        Errors: as ``need``.
        """
        more = num_bytes - self._allowed
        if more > 0:
            self.need(more + _MORE_BYTES, what)
            self.allow(more + _MORE_BYTES)
        elif num_bytes < self._used and -more > _MOST_SPARE_BYTES:
            self._note(more)
            self._room.release(-more)
            self.allow(more)
        self._used = num_bytes

    def begin(self, count: int, what: str) -> None:
        """Have promised what so many answers take that are only begun. Errors: as ``need``."""
        self.need(count * BYTES_TO_BEGIN, what)
        self.allow(count * _FIRST_BYTES)

    def need_tokens(self, count: int) -> None:
        """Have promised what a prompt's tokens take. Errors: as ``need``."""
        self.need(count * _BYTES_PER_ID, "the tokens of prompts that wait")

    def need(self, num_bytes: int, what: str) -> None:
        """Have so many bytes promised.

        Errors: BusyError where the plan has no room for so much more of ``what``.
        """
        if not self.take(num_bytes):
            raise BusyError(
                f"{what} take {format_bytes(num_bytes)} more and the plan leaves "
                f"{format_bytes(self._room.left_bytes)}: ask for fewer at a time, for less of "
                "each, or again once other answers are done with"
            )

    def release(self) -> None:
        """Give all of it back, and what is taken later at once; in a finaliser too."""
        self._is_released = True
        self._room.release(self._drained())

    def _note(self, num_bytes: int) -> None:
        if len(self._ledger) >= _MOST_ENTRIES:
            num_bytes += self._drained()
        self._ledger.append(num_bytes)
        if self._is_released:
            self._room.release(self._drained())

    def _drained(self) -> int:
        total = 0
        with suppress(IndexError):
            while True:
                total += self._ledger.popleft()
        return total


def answer_bytes(num_tokens: int, texts: Iterable[str]) -> int:
    """What tokens and pieces of text of an answer take, without log-probabilities."""
    return _BYTES_PER_ID * num_tokens + sum(map(text_bytes, texts))


def text_bytes(text: str) -> int:
    """What a piece of text takes, whole and in pieces, without what Python adds to each object."""
    width = 1 if text.isascii() else 4 if max(text) > "\uffff" else 2
    return 2 * width * len(text)


def _most_tokens(plan: MemoryPlan, num_prompt: int, params: SamplingParams) -> int:
    return params.max_tokens or max(plan.context - num_prompt, 1)


def _bytes_of(plan: MemoryPlan, num_prompt: int, params: SamplingParams) -> int:
    """What the completions of one prompt may take."""
    per_token = _BYTES_PER_TOKEN
    if params.logprobs is not None:
        per_token += Logprobs.bytes_per_token(params.logprobs)
    return params.n * (_BYTES_PER_COMPLETION + _most_tokens(plan, num_prompt, params) * per_token)


def _room(plan: MemoryPlan) -> int:
    return max(plan.host.headroom_bytes, 0) + CALLER_BYTES
