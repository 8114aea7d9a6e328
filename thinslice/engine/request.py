"""Request: a sequence's tokens turned into text as they come."""

from dataclasses import dataclass, field, replace

from thinslice.engine.contained import Contained
from thinslice.engine.engine import Engine
from thinslice.engine.logprobs import Logprobs
from thinslice.engine.prompts import Prompt
from thinslice.engine.results import ANSWERS, answer_bytes
from thinslice.engine.sequence import Sequence, Status
from thinslice.engine.thought_budget import ThoughtBudget
from thinslice.text.incremental import IncrementalDetokenizer, StopStringMatcher
from thinslice.text.reasoning import ReasoningSplitter
from thinslice.text.tokenizer import Tokenizer
from thinslice.text.tool_calls import CallSplitter

# Characters up to which pieces of text are joined; without a bound a long one is copied each time.
_LONG_TEXT = 1024


@dataclass(frozen=True)
class ToolCall:
    """A call of a tool: its name, and its arguments as the text of a JSON object.

    Arguments that the model has not written to their end, or not well, are given as they are.
    """

    name: str
    arguments: str


@dataclass(frozen=True)
class TextChunk:
    """A piece of a completion.

    ``kind`` is ``reasoning`` or ``answer``, and where there are tools ``call``, a name that a call
    of a tool begins with, or ``arguments``, of the last call.
    """

    kind: str
    text: str


@dataclass(frozen=True)
class Delta:
    """What has come of one completion since the last time.

    Attributes:
        index: which of a prompt's ``n`` completions.
        chunks: text that is sure; perhaps none, as a character or a stop string may be unfinished.
        token_ids: the new tokens, whose text may come later.
        logprobs: of these tokens, where they were asked for.
        finish_reason: set on the last one.
        error: what went wrong where the reason is ``error``.
    """

    index: int
    chunks: list[TextChunk]
    token_ids: list[int]
    logprobs: Logprobs
    finish_reason: str | None
    error: Exception | None

    def to_hold(self, num_top: int | None) -> tuple[int, str]:
        """What it takes of memory, in bytes, and a name for that.

        Args:
            num_top: likeliest tokens beside each, None without log-probabilities.
        """
        num_bytes = answer_bytes(len(self.token_ids), (one.text for one in self.chunks))
        if num_top is None or self.finish_reason is not None:
            return num_bytes, ANSWERS
        num_bytes += Logprobs.bytes_per_token(num_top) * len(self.token_ids)
        return num_bytes, "log-probabilities that are held"

    def followed_by(self, later: "Delta") -> "Delta":
        """Both as one, in the lists of this one: what an object for each token takes is saved."""
        for chunk in later.chunks:
            _append(self.chunks, chunk)
        self.token_ids.extend(later.token_ids)
        self.logprobs.extend(later.logprobs)
        return replace(self, finish_reason=later.finish_reason, error=later.error)


@dataclass(frozen=True)
class Completion:
    """A completion, or what there is of it so far.

    Attributes:
        text: the answer; of a plain completion, all of it.
        reasoning: what stood between <think> tags, where the prompt was a chat.
        tool_calls: where the conversation had tools; their text is not in ``text``.
        finish_reason: ``stop``, ``length``, ``abort``, ``deadline`` or ``error``; None before the
            end.
        seed: draws the same text again.
        prefill_s, decode_s: seconds to the first token, and from there to the last.
        index: which of a prompt's ``n`` completions.
        num_cached: prompt tokens that were found in the prefix cache.
        num_drafted, num_accepted: tokens that were guessed and run, and those that were right.
        num_reasoning: tokens of the reasoning, those that bear its tags among them; tags of the
            prompt are not.
        is_thought_cut: whether a budget ended the reasoning.
        stop_string: that ended it; None where something else did.
        logprobs: of each token, where they were asked for.
        error: what went wrong where the reason is ``error``.
    """

    text: str
    reasoning: str
    prompt_token_ids: list[int]
    token_ids: list[int]
    finish_reason: str | None
    seed: int
    prefill_s: float
    decode_s: float
    index: int = 0
    tool_calls: list[ToolCall] = field(default_factory=list)
    num_cached: int = 0
    num_drafted: int = 0
    num_accepted: int = 0
    num_reasoning: int = 0
    is_thought_cut: bool = False
    stop_string: str | None = None
    logprobs: Logprobs = field(default_factory=Logprobs)
    error: Exception | None = None

    @property
    def decode_tokens_per_s(self) -> float:
        """Tokens per second after the first one; 0 where there was only one."""
        return (len(self.token_ids) - 1) / self.decode_s if self.decode_s > 0 else 0.0


class Request:
    """Follows one sequence: detokenizes, watches for stop strings, splits reasoning off.

    What goes wrong in that ends this sequence alone, with the reason ``error``. A sequence whose
    request nobody holds any more is aborted.

    Attributes:
        is_told: whether ``advance`` has given the end.
    """

    def __init__(
        self,
        engine: Engine,
        sequence: Sequence,
        tokenizer: Tokenizer,
        prompt: Prompt,
        index: int = 0,
    ) -> None:
        self.engine = engine
        self.sequence = sequence
        self.index = index
        is_plain = prompt.rendered is None
        self._detokenizer = IncrementalDetokenizer(tokenizer, continues_text=is_plain)
        self._stops = StopStringMatcher(sequence.params.stop)
        self._splitter = None
        if prompt.rendered is not None and not prompt.is_held_whole:
            self._splitter = ReasoningSplitter(prompt.rendered)
        tools = prompt.tools
        self._calls = None if tools is None else CallSplitter(tools.style, tools.names)
        self._num_seen = 0
        self._thought = prompt.thought
        self._tokenizer = tokenizer
        self.is_told = False
        self._chunks: list[TextChunk] = []
        self._kept: list[TextChunk] = []  # of a call, until it is whole

    def __del__(self) -> None:
        sequence = getattr(self, "sequence", None)  # none where its making was interrupted
        if sequence is not None and sequence.status is not Status.FINISHED:
            self.engine.let_go(sequence)

    @property
    def has_news(self) -> bool:
        """Whether the sequence has ended or has tokens that ``advance`` has not returned yet."""
        num_tokens = len(self.sequence.completion_token_ids)
        return not self.is_told and (self.is_finished or self._num_seen < num_tokens)

    @property
    def is_finished(self) -> bool:
        """Whether the sequence has ended."""
        return self.sequence.status is Status.FINISHED

    @property
    def held_bytes(self) -> int:
        """What is held back of the text: it may become a call, or a call may become text."""
        calls = 0 if self._calls is None else self._calls.held_bytes
        return calls + answer_bytes(0, (one.text for one in self._kept))

    def advance(self) -> Delta:
        """What has come since the last call; not to be called where ``is_told``.

        A stop string ends the sequence; text from it on is not given.
        """
        with self.engine.lock:
            return self._advance()

    def completion(self) -> Completion:
        """The whole of a finished request, or what ``advance`` has given so far."""
        sequence, first_at = self.sequence, self.sequence.first_token_at
        return Completion(
            text=self._text_of("answer"),
            reasoning=self._text_of("reasoning"),
            prompt_token_ids=sequence.prompt_token_ids,
            token_ids=sequence.completion_token_ids[: self._num_seen],
            finish_reason=sequence.finish_reason,
            seed=sequence.draws.seed,
            prefill_s=0.0 if first_at is None else first_at - sequence.arrived_at,
            decode_s=0.0 if first_at is None else sequence.last_token_at - first_at,
            index=self.index,
            tool_calls=self._tool_calls(),
            num_cached=sequence.num_cached,
            num_drafted=sequence.num_drafted,
            num_accepted=sequence.num_accepted,
            num_reasoning=self._thought.num_tokens,
            is_thought_cut=self._is_thought_cut(),
            stop_string=self._stops.matched,
            logprobs=sequence.logprobs[: self._num_seen],
            error=sequence.error,
        )

    def _advance(self) -> Delta:
        start, chunks = self._num_seen, list[TextChunk]()
        with Contained() as trouble:
            chunks += self._new_text()
        if trouble.error is not None:
            self.engine.end(self.sequence, "error", trouble.error)
            self.is_told = True
        sequence = self.sequence
        return Delta(
            index=self.index,
            chunks=chunks,
            token_ids=sequence.completion_token_ids[start : self._num_seen],
            logprobs=sequence.logprobs[start : self._num_seen],
            finish_reason=sequence.finish_reason if self.is_told else None,
            error=sequence.error if self.is_told else None,
        )

    def _new_text(self) -> list[TextChunk]:
        chunks: list[TextChunk] = []
        # Before its tokens are looked at: a signal handler that runs steps may bring more of them.
        is_finished = self.is_finished
        for token_id in self.sequence.completion_token_ids[self._num_seen :]:
            self._num_seen += 1
            self._thought = self._thought.after(self._tokenizer.shown_bytes(token_id))
            if not self._is_end_token():
                chunks += self._emit(self._stops.push(self._detokenizer.push(token_id)))
            if self._stops.matched is not None:
                if self.sequence.error is None:
                    self.engine.end(self.sequence, "stop")
                is_finished = True
                break
        if is_finished:
            chunks += self._flush()
        self.is_told = is_finished
        return chunks

    def _is_thought_cut(self) -> bool:
        budgets = (one for one in self.sequence.processors if isinstance(one, ThoughtBudget))
        return any(one.has_cut(self._num_seen) for one in budgets)

    def _is_end_token(self) -> bool:
        """Whether the last token seen ended the sequence and is not part of its text."""
        is_last = self._num_seen == len(self.sequence.completion_token_ids)
        return is_last and self.sequence.finish_reason == "stop"

    def _flush(self) -> list[TextChunk]:
        chunks: list[TextChunk] = []
        if self._stops.matched is None:
            chunks += self._emit(self._stops.push(self._detokenizer.finish()))
            chunks += self._emit(self._stops.finish())
        if self._splitter is not None:
            chunks += self._record(self._splitter.finish())
        if self._calls is not None:
            chunks += self._record_calls(self._calls.finish())
            chunks += self._half_call(self._calls)
        return chunks

    def _half_call(self, calls: CallSplitter) -> list[TextChunk]:
        """What was kept of a call: where a stop string cut it, it is none, and is text."""
        chunks, self._kept = self._kept, []
        if chunks and self._stops.matched is not None:
            written = "".join(one.text for one in chunks if one.kind == "arguments")
            chunks = [TextChunk("answer", calls.head + written)]
        for chunk in chunks:
            _append(self._chunks, chunk)
        return chunks

    def _emit(self, text: str) -> list[TextChunk]:
        if not text:
            return []
        if self._splitter is None:
            return self._record([("answer", text)])
        return self._record(self._splitter.push(text))

    def _record(self, pieces: list[tuple[str, str]]) -> list[TextChunk]:
        """Keep pieces of the text; of an answer that may have calls, apart from these."""
        if self._calls is None:
            return self._record_calls(pieces)
        told: list[tuple[str, str]] = []
        for kind, text in pieces:
            told += self._calls.push(text) if kind == "answer" else [(kind, text)]
        return self._record_calls(told)

    def _record_calls(self, pieces: list[tuple[str, str]]) -> list[TextChunk]:
        chunks = [TextChunk(kind, text) for kind, text in pieces]
        if self._calls is not None and self.sequence.params.stop:
            chunks = self._sure(chunks, is_half=bool(self._calls.head))
        for chunk in chunks:
            _append(self._chunks, chunk)
        return chunks

    def _sure(self, chunks: list[TextChunk], *, is_half: bool) -> list[TextChunk]:
        """What no stop string can make another thing of: a call is kept until it is whole."""
        for chunk in chunks:
            _append(self._kept, chunk)
        sure, self._kept = self._kept, []
        if is_half:
            place = max(place for place, one in enumerate(sure) if one.kind == "call")
            sure, self._kept = sure[:place], sure[place:]
        return sure

    def _tool_calls(self) -> list[ToolCall]:
        calls: list[ToolCall] = []
        for chunk in self._chunks:
            if chunk.kind == "call":
                calls.append(ToolCall(chunk.text, ""))
            elif chunk.kind == "arguments":
                calls[-1] = ToolCall(calls[-1].name, calls[-1].arguments + chunk.text)
        return calls

    def _text_of(self, kind: str) -> str:
        return "".join(chunk.text for chunk in self._chunks if chunk.kind == kind)


def _append(chunks: list[TextChunk], chunk: TextChunk) -> None:
    """Add a piece of text, as part of the last one where that is short and of its kind."""
    last = chunks[-1] if chunks else None
    if last is not None and last.kind == chunk.kind and len(last.text) < _LONG_TEXT:
        chunks[-1] = TextChunk(chunk.kind, last.text + chunk.text)
    else:
        chunks.append(chunk)
