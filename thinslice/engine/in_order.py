"""Many prompts answered at once, in their order, with few of them in memory."""

from collections import deque
from collections.abc import Iterable, Iterator

from thinslice.config import SamplingParams
from thinslice.engine.llm import LLM
from thinslice.engine.request import Completion, Request
from thinslice.errors import RequestError
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

    Memory: twice ``max_num_seqs`` prompts and their completions.
    Errors: CheckpointError where weights cannot be read.
    """
    source = iter(prompts)
    waiting: deque[Request | RequestError] = deque()
    unfinished: dict[int, Request] = {}
    is_read = False
    try:
        while waiting or not is_read:
            while len(waiting) < 2 * llm.plan.max_num_seqs and not is_read:
                prompt = next(source, None)
                is_read = prompt is None
                if prompt is not None:
                    waiting.append(_requested(llm, prompt, params, unfinished))
            while waiting and (answer := _settled(waiting[0], unfinished)) is not None:
                waiting.popleft()
                yield answer
            if unfinished:
                _step(llm, unfinished)
    finally:
        for request in unfinished.values():
            request.engine.abort(request.sequence)


def _requested(
    llm: LLM,
    prompt: Prompt | RequestError,
    params: SamplingParams,
    unfinished: dict[int, Request],
) -> Request | RequestError:
    if isinstance(prompt, RequestError):
        return prompt
    try:
        request = llm.add_requests(llm.prepare(prompt, params.constraint), params)[0]
    except RequestError as error:
        return error
    unfinished[request.sequence.seq_id] = request
    return request


def _settled(
    one: Request | RequestError, unfinished: dict[int, Request]
) -> Completion | RequestError | None:
    """What is given for a prompt; None while its answer is not whole."""
    if isinstance(one, RequestError):
        return one
    return None if one.sequence.seq_id in unfinished else one.completion()


def _step(llm: LLM, unfinished: dict[int, Request]) -> None:
    llm.engine.step()
    # Of other threads' steps as well, and of those of whoever takes the answers.
    for seq_id, request in [*unfinished.items()]:
        if request.has_news:
            request.advance()
        if request.is_told:
            del unfinished[seq_id]
