"""Answers that a test writes, in the place of a model's, behind the real server."""

import asyncio
import threading
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Any

from tests.servers import Running
from thinslice.config import SamplingParams
from thinslice.engine.logprobs import Logprobs
from thinslice.engine.request import Completion, Delta, TextChunk
from thinslice.text.messages import Conversation

# Stands between pieces of an answer where it waits until the test lets it go on.
WAIT = ("wait", "")
Step = tuple[str, str] | Exception


class Script:
    """What the server answers next; the test's own thread writes it.

    Attributes:
        steps: kinds and texts in order, WAIT, or an error that ends the answer.
        finish_reason: of the answer.
        asked: every conversation that came, with its parameters.
        num_left: answers that were left before their end.
    """

    def __init__(self, server: Running) -> None:
        self.steps: list[Step] = [("answer", "Hello.")]
        self.finish_reason = "stop"
        self.asked: list[tuple[list[dict[str, Any]], SamplingParams]] = []
        self.num_left = 0
        self.server = server
        self._go = threading.Semaphore(0)
        self.take_over()

    def take_over(self) -> None:
        """Answer in the engine's place."""
        self.server.served.engine.submit = self._submit  # type: ignore[method-assign,assignment]

    def says(self, text: str, reasoning: str = "") -> None:
        """Set an answer that comes in pieces of a few characters."""
        self.steps = [*_pieces("reasoning", reasoning), *_pieces("answer", text)]
        self.finish_reason = "stop"

    def go_on(self) -> None:
        """Let the answer that waits go on."""
        self._go.release()

    async def _submit(
        self, prompt: Any, params: SamplingParams, _scheduling: object = None
    ) -> "_Stream":
        assert isinstance(prompt, Conversation)
        self.asked.append(([*map(dict, prompt.messages)], params))
        return _Stream(self, [*self.steps], self.finish_reason)

    async def wait(self) -> None:
        while not self._go.acquire(blocking=False):
            await asyncio.sleep(0.005)


def _pieces(kind: str, text: str) -> list[Step]:
    size = max(7, len(text) // 200)
    return [(kind, text[at : at + size]) for at in range(0, len(text), size)]


class _Stream:
    def __init__(self, script: Script, steps: list[Step], finish_reason: str) -> None:
        self._script = script
        self._steps = steps
        self._finish_reason = finish_reason
        self._is_over = False
        self._said = {"answer": "", "reasoning": ""}

    async def __aenter__(self) -> "_Stream":
        return self

    async def __aexit__(
        self,
        _type: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        self._script.num_left += not self._is_over

    async def __aiter__(self) -> AsyncIterator[Delta]:
        for step in self._steps:
            if isinstance(step, Exception):
                yield Delta(0, [], [], Logprobs(), "error", step)
                return
            if step == WAIT:
                await self._script.wait()
                continue
            self._said[step[0]] += step[1]
            yield Delta(0, [TextChunk(*step)], [1], Logprobs(), None, None)
            await asyncio.sleep(0)
        self._is_over = True
        yield Delta(0, [], [], Logprobs(), self._finish_reason, None)

    @property
    def completions(self) -> list[Completion]:
        said = self._said
        ids = [1] * len(self._steps)
        return [Completion(said["answer"], said["reasoning"], [1], ids, "stop", 0, 0.1, 0.1)]
