"""LLM: a model by name, ready to complete prompts inside a budget."""

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Unpack

from thinslice.closing import Closing
from thinslice.config import EngineSettings, SamplingParams, Scheduling
from thinslice.engine.arguments import (
    Settings,
    check_progress,
    check_settings,
    checked_params,
    checked_scheduling,
    errors_in_python,
    for_each,
    with_settings,
)
from thinslice.engine.checks import TokenIds, checked_ids
from thinslice.engine.engine import CLOSED, Engine
from thinslice.engine.grammar import Grammars
from thinslice.engine.load import load_prepared
from thinslice.engine.prepare import prepare
from thinslice.engine.prompts import Prompt, Prompts
from thinslice.engine.request import Completion, Request
from thinslice.engine.results import ANSWERS, Held, text_bytes
from thinslice.engine.sequence import Sequence as EngineSequence
from thinslice.engine.stream import Stream
from thinslice.errors import RequestError, shown
from thinslice.process import give_back
from thinslice.store.progress import Progress
from thinslice.text.chat_template import ChatTemplate
from thinslice.text.messages import Conversation, Message, for_template


class LLM(Closing):
    """A loaded model.

    ``LLM("smollm2", memory="1GiB").chat([{"role": "user", "content": "Hello"}]).text``

    Args:
        model: a name, a folder, a .gguf file, or a model of the Hugging Face Hub; fetched into
            the store where it is not there yet.
        progress: called with what is under way, how much is done, and how much there is.
        settings: the fields of EngineSettings.

    Attributes:
        longest_context: the most tokens that the model was made for.
        device: that it lies on; None where the processor computes.
        notes: what its user should know of the model's files, one line each.
        sampling: the sampling parameters that the model's files advise, by name, which hold where
            SamplingParams give none.
        prediction: how fast it will be; None where the machine was never measured.
        is_prediction_busy: other programs computed while the machine was measured.

    Errors: ConfigError, StoreError, CheckpointError, BudgetError, each before anything large is
    allocated.
    """

    def __init__(
        self, model: str, *, progress: Progress | None = None, **settings: Unpack[Settings]
    ) -> None:
        check_settings(settings)
        if not isinstance(model, str):
            raise TypeError(f"model is {shown(model)}; expected a name or a path, as text")
        with errors_in_python():
            check_progress(progress)
            asked = EngineSettings(**settings)
            prepared = prepare(model, asked, progress)
            self.plan, self.tokenizer = prepared.plan, prepared.tokenizer
            self.notes, self.sampling = prepared.notes, prepared.checkpoint.sampling
            self.longest_context = prepared.checkpoint.shape.max_position_embeddings
            self.device = prepared.device
            self.prediction = prepared.prediction
            self.is_prediction_busy = prepared.is_prediction_busy
            self._engine: Engine | None = load_prepared(prepared, progress)
            reserved, results = self.plan.host.part("forms"), self._engine.results
            has_forms = asked.forms != "off"
            grammars = Grammars(self.tokenizer, results, reserved) if has_forms else None
            context = self.plan.context
            self._prompts = Prompts(self.tokenizer, context, self.longest_context, grammars)

    @property
    def engine(self) -> Engine:
        """What runs it. Errors: RequestError once the model is closed."""
        if self._engine is None:
            raise RequestError(CLOSED)
        return self._engine

    @property
    def template(self) -> ChatTemplate | None:
        """The model's chat template; None for a model without one, or with an empty one.

        Errors: CheckpointError for one that cannot be used.
        """
        return self.tokenizer.chat_template

    def close(self) -> None:
        """Let weights, KV cache, threads and files go; nothing runs after that.

        What is under way, in streams and in other threads, ends with a RequestError.

        Also at the end of ``with LLM(...) as llm``.
        """
        if self._engine is not None:
            self._engine.close()
            self._engine = None
            self._prompts.close()
            give_back()

    def generate(
        self,
        prompts: str | Sequence[str | Sequence[Message] | Conversation],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        progress: Callable[[int, int], None] | None = None,
        scheduling: Scheduling | Sequence[Scheduling] | None = None,
    ) -> list[Completion]:
        """Complete texts as they stand and answer conversations, several at a time.

        Args:
            params, scheduling: for all prompts, or one for each.
            progress: called with the number of completions that are finished, and of all.

        Returns the completions in the prompts' order, ``params.n`` for each prompt. Where one goes
        wrong, its reason is ``error`` and the others are what they would be.
        Errors: RequestError where a prompt is empty or does not fit the context, and where the plan
        has no room to hold all completions; CheckpointError where weights cannot be read.
        """
        asked = [prompts] if isinstance(prompts, str) else prompts
        if not isinstance(asked, list | tuple):
            raise RequestError(f"prompts is {shown(asked)}; expected a text or a list")
        check_progress(progress)
        params_of = for_each("params", params, len(asked), checked_params)
        scheduling_of = for_each("scheduling", scheduling, len(asked), checked_scheduling)
        requests: list[Request] = []
        results, prepared = self.engine.results, list[Prompt]()
        try:
            with results.holding() as of_prompts:
                for one in zip(asked, params_of, strict=True):
                    prepared.append(self.prepare(*one))
                    self._hold_tokens(prepared[-1], of_prompts, is_first=len(prepared) == 1)
                lengths = [len(prompt.token_ids) for prompt in prepared]
                with results.held_for([*zip(lengths, params_of, strict=True)]) as held:
                    for queued in zip(prepared, params_of, scheduling_of, strict=True):
                        requests += self.add_requests(*queued)
                    self._run(requests, held, progress)
        finally:
            for request in requests:
                request.engine.abort(request.sequence)
        return [request.completion() for request in requests]

    def chat(
        self,
        messages: Sequence[Message] | Conversation,
        params: SamplingParams | None = None,
        scheduling: Scheduling | None = None,
    ) -> Completion:
        """Answer a conversation; ``reasoning`` and ``text`` are apart.

        Args:
            scheduling: how it stands beside other requests.

        Errors: RequestError as ``generate``, and where the model has no chat template.
        """
        stream = self.stream(for_template(messages), params, scheduling=scheduling)
        for _ in stream:
            pass
        return stream.completion

    def stream(
        self,
        prompt: str | Sequence[Message] | Conversation,
        params: SamplingParams | None = None,
        progress: Callable[[int, int], None] | None = None,
        scheduling: Scheduling | None = None,
    ) -> Stream:
        """Complete a prompt, or answer a conversation, piece by piece.

        Args:
            progress: called after each step before the first token, with the number of prompt
                tokens that have been computed, and of all.
            scheduling: how it stands beside other requests.

        Errors: RequestError as ``generate`` and ``chat``, at once and not on iteration; BusyError
        where other streams leave no room.
        """
        params = checked_params(params)
        if params.n != 1:
            raise RequestError(f"n is {params.n}; a stream gives one completion, generate several")
        check_progress(progress)
        prepared, held = self.prepare(prompt, params), Held(self.engine.results)
        try:
            held.begin(1, ANSWERS)
            self._hold_tokens(prepared, held)
            stream = Stream(self.add_requests(prepared, params, scheduling)[0], held, progress)
        except BaseException:
            held.release()
            raise
        weakref.finalize(stream, held.release).atexit = False
        return stream

    def prepare(
        self,
        prompt: str | Sequence[Message] | Conversation,
        params: SamplingParams | None = None,
    ) -> Prompt:
        """The tokens of a text, or of a conversation rendered by the model's template; with the
        grammar of what the params' constraint and the conversation's tools ask of the answer.

        Safe in any thread.

        Args:
            params: those that it is going to be answered with; a prompt may end in a thought that
                is closed where they leave no room for one.

        Errors: RequestError as ``generate``, where the model has no chat template, and where no
        grammar can be made; ConfigError where the library for grammars is missing.
        """
        return self._prompts.prompt(prompt, checked_params(params))

    def prepare_tokens(self, token_ids: TokenIds, params: SamplingParams | None = None) -> Prompt:
        """A plain prompt whose tokens are known: a list or an array of ints.

        Errors: as ``prepare``.
        """
        return self._prompts.of_tokens(checked_ids(token_ids), checked_params(params))

    def count_tokens(
        self,
        prompt: str | Sequence[Message] | Conversation,
        params: SamplingParams | None = None,
    ) -> int:
        """How many tokens ``prepare`` makes of a prompt; no grammar is made for that.

        Errors: as ``prepare``, but for those of grammars.
        """
        return self._prompts.count(prompt, checked_params(params))

    def rendered(self, conversation: Conversation, *, add_generation_prompt: bool = True) -> str:
        """A conversation, as ``for_template`` gives it, in the model's chat template.

        Errors: RequestError as ``ChatTemplate.render``, and for a model without a template.
        """
        return self._prompts.rendered(conversation, add_generation_prompt=add_generation_prompt)

    def add_requests(
        self, prompt: Prompt, params: SamplingParams, scheduling: Scheduling | None = None
    ) -> list[Request]:
        """Queue a prompt's ``params.n`` completions, sampled as the model advises where the user
        says nothing.

        Errors: as ``new_sequences``.
        """
        return self.queue(prompt, self.new_sequences(prompt, params, scheduling))

    def new_sequences(
        self, prompt: Prompt, params: SamplingParams, scheduling: Scheduling | None = None
    ) -> list[EngineSequence]:
        """The sequences of a prompt's completions, for ``queue``. The room that following their
        form takes is theirs from now on. Safe in any thread.

        Errors: RequestError where they can never be served; BusyError where the plan has no room
        for what follows their form.
        """
        params = checked_params(params).resolved(self.sampling)
        stop_ids = self.tokenizer.stop_ids(params.stop)
        for token_id in params.stop_token_ids:
            if not 0 <= token_id < self.tokenizer.vocab_size:
                raise RequestError(
                    f"stop token id {token_id} is outside the model's vocabulary of "
                    f"{self.tokenizer.vocab_size}"
                )
        if stop_ids:
            params = replace(params, stop_token_ids=tuple({*params.stop_token_ids, *stop_ids}))
        if params.constraint is not None and prompt.grammar is None:
            raise RequestError("the prompt was prepared without the constraint of its parameters")
        if prompt.grammar is not None:
            prompt.grammar.check_count(params.n)
        processors = self._prompts.processors(prompt, params, self.engine.clock)
        return self.engine.new_samples(prompt.token_ids, params, scheduling, processors)

    def queue(self, prompt: Prompt, sequences: list[EngineSequence]) -> list[Request]:
        """Queue the sequences that ``new_sequences`` gave for a prompt."""
        engine, requests = self.engine, list[Request]()
        engine.add(sequences)
        try:
            for index, sequence in enumerate(sequences):
                requests.append(Request(engine, sequence, self.tokenizer, prompt, index))
        except BaseException:
            for sequence in sequences:
                engine.abort(sequence)
            raise
        return requests

    @property
    def thinks(self) -> bool:
        """Whether the model is known to think: by its chat template, or by tokens for the tags."""
        return self._prompts.thinks

    def replace_weights(self, tensors: Mapping[str, object]) -> None:
        """Put other numbers in the place of some weights, between requests.

        Prefixes that were cached before are not used again.

        Args:
            tensors: by their Hugging Face names, as a state dict has them, in any type of floats
                and on any device; they are copied and rounded to what the model computes in. A head
                that is the embedding may stand beside it, and prediction layers that draft nothing
                here are passed over.

        Errors: ConfigError for a model whose weights are packed or streamed, and for tensors that
        do not fit, with nothing replaced; BusyError while requests are under way.
        """
        self.engine.replace_weights(tensors)

    def _hold_tokens(self, prompt: Prompt, held: Held, *, is_first: bool = True) -> None:
        """Promise what a prompt's tokens take. Those of one that is alone are in every plan.

        Errors: BusyError where the plan has no room for them.
        """
        if self.engine.scheduler.has_work or not is_first:
            held.need_tokens(len(prompt.token_ids))

    def _run(
        self,
        requests: list[Request],
        held: Held,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        """Step until all are finished."""
        unfinished = requests
        while unfinished:
            self.engine.step()
            # Of another thread's steps as well, and not of those of a stream.
            for request in unfinished:
                if request.has_news:
                    delta = request.advance()
                    num_bytes = sum(text_bytes(chunk.text) for chunk in delta.chunks)
                    held.use(num_bytes, "the texts of these completions")
            num_before = len(unfinished)
            unfinished = [request for request in unfinished if not request.is_told]
            if progress is not None and len(unfinished) < num_before:
                progress(len(requests) - len(unfinished), len(requests))


# For help() and editors: what ``settings`` may be.
LLM.__signature__ = with_settings(LLM.__init__)  # type: ignore[attr-defined]
