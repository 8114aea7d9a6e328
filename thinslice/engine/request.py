"""Request: a sequence's tokens turned into text as they come."""

import time
from dataclasses import dataclass

from thinslice.engine.engine import Engine
from thinslice.engine.sequence import Sequence, Status
from thinslice.text.detokenizer import IncrementalDetokenizer
from thinslice.text.reasoning import ReasoningSplitter
from thinslice.text.stop_strings import StopStringMatcher
from thinslice.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class TextChunk:
    """A piece of a completion: ``kind`` is ``reasoning`` or ``answer``."""

    kind: str
    text: str


@dataclass(frozen=True)
class Completion:
    """A finished completion.

    Attributes:
        text: the answer; of a plain completion, all of it.
        reasoning: what stood between <think> tags, where the prompt was a chat.
        finish_reason: ``stop``, ``length`` or ``abort``.
        seed: draws the same text again.
        prefill_s, decode_s: seconds to the first token, and from there to the last.
    """

    text: str
    reasoning: str
    prompt_token_ids: list[int]
    token_ids: list[int]
    finish_reason: str
    seed: int
    prefill_s: float
    decode_s: float

    @property
    def decode_tokens_per_s(self) -> float:
        """Tokens per second after the first one; 0 where there was only one."""
        return (len(self.token_ids) - 1) / self.decode_s if self.decode_s > 0 else 0.0


class Request:
    """Follows one sequence: detokenizes, watches for stop strings, splits reasoning off."""

    def __init__(
        self,
        engine: Engine,
        sequence: Sequence,
        tokenizer: Tokenizer,
        splitter: ReasoningSplitter | None,
    ) -> None:
        self.engine = engine
        self.sequence = sequence
        self._detokenizer = IncrementalDetokenizer(tokenizer, continues_text=splitter is None)
        self._stops = StopStringMatcher(sequence.params.stop)
        self._splitter = splitter
        self._num_seen = 0
        self._texts: dict[str, list[str]] = {"reasoning": [], "answer": []}
        self._started_at = time.perf_counter()
        self._first_at = self._last_at = self._started_at

    @property
    def is_finished(self) -> bool:
        """Whether its sequence has ended."""
        return self.sequence.status is Status.FINISHED

    def advance(self) -> list[TextChunk]:
        """The text of the tokens that came since the last call.

        A stop string ends the sequence; text from it on is not given.
        """
        chunks: list[TextChunk] = []
        new_ids = self.sequence.completion_token_ids[self._num_seen :]
        if new_ids:
            self._last_at = time.perf_counter()
            self._first_at = self._last_at if self._num_seen == 0 else self._first_at
        for token_id in new_ids:
            self._num_seen += 1
            if not self._is_end_token(token_id):
                chunks += self._emit(self._stops.push(self._detokenizer.push(token_id)))
            if self._stops.matched is not None:
                self.engine.abort(self.sequence, "stop")
                self.sequence.finish_reason = "stop"
                break
        if self.is_finished:
            chunks += self._flush()
        return chunks

    def completion(self) -> Completion:
        """The whole of a finished request."""
        reason = self.sequence.finish_reason
        assert reason is not None, "the sequence has not ended"
        return Completion(
            text="".join(self._texts["answer"]),
            reasoning="".join(self._texts["reasoning"]),
            prompt_token_ids=self.sequence.prompt_token_ids,
            token_ids=self.sequence.completion_token_ids[: self._num_seen],
            finish_reason=reason,
            seed=self.sequence.generator.initial_seed(),
            prefill_s=self._first_at - self._started_at,
            decode_s=self._last_at - self._first_at,
        )

    def _is_end_token(self, token_id: int) -> bool:
        """Whether this is the token that ended the sequence, which is not part of its text."""
        is_last = self._num_seen == len(self.sequence.completion_token_ids)
        by_length = self.sequence.finish_reason != "stop"
        return is_last and self.is_finished and not by_length

    def _flush(self) -> list[TextChunk]:
        chunks: list[TextChunk] = []
        if self._stops.matched is None:
            chunks += self._emit(self._stops.push(self._detokenizer.finish()))
            chunks += self._emit(self._stops.finish())
        if self._splitter is not None:
            chunks += self._record(self._splitter.finish())
        return chunks

    def _emit(self, text: str) -> list[TextChunk]:
        if not text:
            return []
        if self._splitter is None:
            return self._record([("answer", text)])
        return self._record(self._splitter.push(text))

    def _record(self, pieces: list[tuple[str, str]]) -> list[TextChunk]:
        for kind, text in pieces:
            self._texts[kind].append(text)
        return [TextChunk(kind, text) for kind, text in pieces]
