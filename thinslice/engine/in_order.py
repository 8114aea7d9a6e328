"""Many prompts answered at once, in their order, with few of them in memory."""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from thinslice.config import SamplingParams
from thinslice.engine.llm import LLM
from thinslice.engine.request import Completion, Request
from thinslice.errors import BusyError, RequestError
from thinslice.text.messages import Conversation, Message

Prompt = str | list[Message] | Conversation


def complete_in_order(
    llm: LLM, prompts: Iterable[Prompt | RequestError], params: SamplingParams
) -> Iterator[Completion | RequestError]:
    """Answer prompts as ``LLM.generate`` does, but read and give them one by one.

    Twice as many are in memory as run at once, so that the batch stays full while an early answer
    takes long.

    Args:
        prompts: an error in a prompt's place is passed on, as is that of a prompt that is refused.
        params: for each of them; ``n`` is 1.

    Where the plan has no room for what so many hold, prompts wait for others, and one whose answer
    found none in the middle begins anew.

    Memory: twice ``max_num_seqs`` prompts and their completions.
    Errors: CheckpointError where weights cannot be read.
    """
    source = iter(prompts)
    queue = _Queue(llm, params)
    is_read = False
    try:
        while queue.waiting or not is_read:
            while len(queue.waiting) < 2 * llm.plan.max_num_seqs and not is_read:
                prompt = None  # not held while the next is read
                prompt = next(source, None)
                is_read = prompt is None
                if prompt is not None:
                    queue.waiting.append(_Work(prompt))
                    # At once: a text that is too long is let go of before the next is read.
                    queue.begin()
            queue.begin()
            while queue.waiting and (answer := queue.waiting[0].answer) is not None:
                queue.waiting.popleft()
                yield answer
            if queue.unfinished:
                queue.step()
    finally:
        for request in [one.request for one in queue.unfinished if one.request is not None]:
            request.engine.abort(request.sequence)


@dataclass(eq=False)
class _Work:
    """A prompt, and what has become of it.

    Attributes:
        request: while it is unfinished.
        answer: once it is whole. The request, and the room that it holds, is let go of then.
    """

    prompt: Prompt | RequestError
    request: Request | None = None
    answer: Completion | RequestError | None = None


class _Queue:
    """Prompts in their order, of which as many are begun as there is room for.

    Attributes:
        waiting: those whose answers have not been given.
        unfinished: those of them that run, or wait for a place among those that do.
    """

    def __init__(self, llm: LLM, params: SamplingParams) -> None:
        self._llm = llm
        self._params = params
        self._most = 2 * llm.plan.max_num_seqs
        self.waiting: deque[_Work] = deque()
        self.unfinished: list[_Work] = []

    def begin(self) -> None:
        """Begin what has not been, the first first."""
        for work in self.waiting:
            if work.request is not None or work.answer is not None:
                continue
            if len(self.unfinished) >= self._most:
                return
            try:
                work.request = self._request(work.prompt)
                self.unfinished.append(work)
            except BusyError as error:
                if self.unfinished:
                    self._most = len(self.unfinished)
                    return
                work.answer = error
            except RequestError as error:
                # Its frames, and those of what it came of, would keep the text.
                error.__traceback__ = error.__context__ = None
                work.prompt = work.answer = error

    def step(self) -> None:
        """Run a step, also where others have run it."""
        self._llm.engine.step()
        count = len(self.unfinished)
        for work in [*self.unfinished]:
            request = work.request
            assert request is not None, "it is unfinished"
            # Of other threads' steps as well, and of those of whoever takes the answers.
            if request.has_news:
                request.advance()
            if request.is_told:
                self._end(work, request, count)

    def _end(self, work: _Work, request: Request, count: int) -> None:
        """End one of so many that ran; it begins anew where fewer may find room."""
        self.unfinished.remove(work)
        work.request = None
        if isinstance(request.sequence.error, BusyError) and count > 1:
            self._most = min(self._most, count - 1)
        else:
            work.answer = request.completion()

    def _request(self, prompt: Prompt | RequestError) -> Request:
        """Errors: RequestError."""
        if isinstance(prompt, RequestError):
            raise prompt
        prepared = self._llm.prepare(prompt, self._params)
        return self._llm.add_requests(prepared, self._params)[0]
