"""A prompt of /v1/completions on its way: scored where that is asked, and gone on with."""

from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from thinslice.config import SamplingParams, Scheduling
from thinslice.engine.async_engine import AsyncEngine
from thinslice.engine.async_stream import AsyncStream
from thinslice.engine.logprobs import Logprobs
from thinslice.engine.prompts import Prompt
from thinslice.engine.request import Completion, Delta
from thinslice.serve.answers import deltas, whole
from thinslice.serve.logprobs import TextOffsets, Told, completion_logprobs
from thinslice.serve.usage import usage_of
from thinslice.text.tokenizer import Tokenizer

# Tokens of a prompt in one event of a stream.
_PROMPT_PIECE = 64
Choice = dict[str, Any]


@dataclass(frozen=True)
class Asked:
    """What is asked for each prompt.

    Attributes:
        params: of its completions; of none where it is only scored.
        logprobs: likeliest tokens beside each; None where no log-probabilities are told.
    """

    params: SamplingParams
    scheduling: Scheduling
    logprobs: int | None
    is_echoed: bool
    is_completed: bool


@dataclass(frozen=True)
class AskedPrompt:
    """A prompt with its text, where that comes back.

    Attributes:
        num_silent: its first tokens, which stand before the text.
    """

    prepared: Prompt
    text: str
    num_silent: int


class PromptWork:
    """One prompt's way: scored where that is asked, then gone on with, which finds it cached."""

    def __init__(self, engine: AsyncEngine, place: int, asked: Asked, prompt: AskedPrompt) -> None:
        self._engine = engine
        self._first_index = place * asked.params.n
        self._asked = asked
        self._prompt = prompt
        # The plan's room for log-probabilities is taken for as long as these are held.
        self._scored: AsyncStream | None = None
        self._stream: AsyncStream | None = None
        self._found: list[Completion] = []

    async def begin(self) -> None:
        """Queue all of it. Errors: of all that it takes, as far as they can be known."""
        asked, prepared = self._asked, self._prompt.prepared
        token_ids = prepared.token_ids
        if asked.is_completed:
            self._engine.llm.engine.check_request(token_ids, asked.params)
        if asked.is_echoed and asked.logprobs is not None and len(token_ids) > 1:
            self._scored = await self._engine.score(
                token_ids, num_top=asked.logprobs, scheduling=asked.scheduling
            )
        if asked.is_completed:
            self._stream = await self._engine.submit(
                prepared, asked.params, asked.scheduling, after=self._scored
            )

    async def run(self) -> None:
        """To the end."""
        async with self._ending():
            if self._scored is not None:
                await whole(self._scored)
            if self._stream is not None:
                self._found = await whole(self._stream)

    def choices(self) -> Iterator[Choice]:
        """The whole choices, once it has run."""
        for index in range(self._asked.params.n):
            completion = self._found[index] if self._asked.is_completed else None
            yield {
                "index": self._first_index + index,
                "text": self._echo() + ("" if completion is None else completion.text),
                "logprobs": self._logprobs(completion),
                "finish_reason": "length" if completion is None else completion.finish_reason,
            }

    async def pieces(self) -> AsyncGenerator[Choice]:
        """The choices piece by piece: the prompt, where it comes back, before each completion."""
        async with self._ending():
            if self._scored is not None:
                await whole(self._scored)
            if self._asked.is_echoed:
                for index in range(self._asked.params.n):
                    for piece in self._echo_pieces(index):
                        yield piece
            if self._stream is None:
                return
            length = len(self._echo())
            offsets = [self._offsets(length) for _ in range(self._asked.params.n)]
            async with aclosing(deltas(self._stream)) as coming:
                async for delta in coming:
                    yield self._piece(delta, offsets[delta.index])
            self._found = self._stream.completions

    def usage(self) -> dict[str, Any]:
        """Its tokens. Those that only its own scoring has cached are not told as cached."""
        found, scored = self._found, self._scored
        if scored is not None:
            cached = scored.completions[0].num_cached
            found = [replace(one, num_cached=cached) for one in found]
        if found:
            return usage_of(found)
        token_ids = self._prompt.prepared.token_ids
        return usage_of([Completion("", "", token_ids, [], "length", 0, 0.0, 0.0)])

    @asynccontextmanager
    async def _ending(self) -> AsyncGenerator[None]:
        """What is left unfinished ends: the completions where their scoring goes wrong, too."""
        try:
            yield
        finally:
            for stream in (self._scored, self._stream):
                if stream is not None:
                    await stream.aclose()

    @property
    def _tokenizer(self) -> Tokenizer:
        return self._engine.llm.tokenizer

    def _echo(self) -> str:
        return self._prompt.text if self._asked.is_echoed else ""

    def _offsets(self, start: int) -> TextOffsets:
        return TextOffsets(self._tokenizer, start, is_beginning=False)

    def _echo_offsets(self) -> TextOffsets:
        return TextOffsets(self._tokenizer, 0, is_beginning=True)

    def _logprobs(self, completion: Completion | None) -> dict[str, Any] | None:
        """Of all tokens of a choice."""
        if self._asked.logprobs is None:
            return None
        num_prompt = len(self._prompt.prepared.token_ids) if self._asked.is_echoed else 0

        def tokens() -> Iterator[Told]:
            if num_prompt:
                yield from self._of_prompt()
            if completion is not None:
                yield from self._of_completion(completion.token_ids, completion.logprobs)

        def offsets() -> TextOffsets:
            return self._echo_offsets() if num_prompt else self._offsets(0)

        return {**completion_logprobs(self._tokenizer, tokens, offsets)}

    def _of_prompt(self) -> Iterator[Told]:
        token_ids, silent = self._prompt.prepared.token_ids, self._prompt.num_silent
        yield Told(token_ids[0], silent == 0, None)
        if self._scored is not None:
            logprobs = self._scored.completions[0].logprobs
            for place, one in enumerate(logprobs, 1):
                yield Told(token_ids[place], place >= silent, one)

    def _of_completion(self, token_ids: list[int], logprobs: Logprobs) -> Iterator[Told]:
        special = self._tokenizer.special_token_ids
        for token_id, one in zip(token_ids, logprobs, strict=True):
            yield Told(token_id, token_id not in special, one)

    def _echo_pieces(self, index: int) -> Iterator[Choice]:
        reason = None if self._asked.is_completed else "length"
        last = {"index": self._first_index + index, "text": "", "finish_reason": reason}
        if self._asked.logprobs is None:
            yield {**last, "text": self._echo(), "logprobs": None}
            return
        offsets = self._echo_offsets()
        tokens, count = self._of_prompt(), len(self._prompt.prepared.token_ids)
        for start in range(0, count, _PROMPT_PIECE):
            is_last = start + _PROMPT_PIECE >= count
            yield {
                **last,
                "text": self._echo() if start == 0 else "",
                "logprobs": self._at_once([*islice(tokens, _PROMPT_PIECE)], offsets),
                "finish_reason": reason if is_last else None,
            }

    def _piece(self, delta: Delta, offsets: TextOffsets) -> Choice:
        logprobs = None
        if self._asked.logprobs is not None:
            tokens = [*self._of_completion(delta.token_ids, delta.logprobs)]
            logprobs = self._at_once(tokens, offsets)
        return {
            "index": self._first_index + delta.index,
            "text": "".join(one.text for one in delta.chunks),
            "logprobs": logprobs,
            "finish_reason": delta.finish_reason,
        }

    def _at_once(self, tokens: list[Told], offsets: TextOffsets) -> dict[str, Any]:
        found = completion_logprobs(self._tokenizer, lambda: tokens, lambda: offsets)
        return {name: [*values] for name, values in found.items()}
