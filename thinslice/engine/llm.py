"""LLM: a model by name, ready to complete prompts inside a budget."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import TypedDict, TypeVar, Unpack

from thinslice.closing import Closing
from thinslice.config import (
    DEFAULT_SCHEDULING,
    DeviceName,
    Draft,
    Dtype,
    EngineSettings,
    KvDtype,
    MtpHidden,
    SamplingParams,
    Scheduling,
)
from thinslice.engine.engine import CLOSED, Engine
from thinslice.engine.grammar import Grammar, Grammars
from thinslice.engine.load import Progress, load_engine
from thinslice.engine.prepare import Prepared, prepare
from thinslice.engine.processors import LogitsProcessor
from thinslice.engine.prompts import Prompt, render
from thinslice.engine.request import Completion, Request
from thinslice.engine.results import Held, text_bytes
from thinslice.engine.signature import check_settings, errors_in_python, with_settings
from thinslice.engine.stream import Stream
from thinslice.engine.thought_budget import Allowance, ThoughtBudget, ThoughtTokens
from thinslice.errors import ContextError, RequestError, shown
from thinslice.memory.give_back import give_back
from thinslice.text.chat_template import ChatTemplate
from thinslice.text.lark import grammar_of
from thinslice.text.messages import Conversation, Message, for_template
from thinslice.text.reasoning import beginning_behind
from thinslice.text.thought import Thought
from thinslice.text.tool_use import ToolUse, for_tools, tool_use

_Given = TypeVar("_Given", SamplingParams, Scheduling)


class Settings(TypedDict, total=False):
    """The fields of EngineSettings, as keyword arguments of LLM."""

    memory: str | int | None
    device: DeviceName
    host_memory: str | int | None
    context: int | None
    dtype: Dtype
    kv_dtype: KvDtype
    draft: Draft
    draft_length: int
    mtp_hidden: MtpHidden
    offline: bool
    max_num_seqs: int
    reserve: str | int
    reserve_per_token: int


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
            _check_progress(progress)
            prepared = prepare(model, EngineSettings(**settings), progress)
            self.plan, self.tokenizer = prepared.plan, prepared.tokenizer
            self.notes, self.sampling = prepared.notes, prepared.checkpoint.sampling
            self.longest_context = prepared.checkpoint.shape.max_position_embeddings
            self.device = prepared.device
            self.prediction = prepared.prediction
            self.is_prediction_busy = prepared.is_prediction_busy
            self._engine: Engine | None = _loaded(prepared, progress)
            self._grammars = Grammars(self.tokenizer, self._engine.results)

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
            self._grammars.let_go()
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
        _check_progress(progress)
        params_of = _for_each("params", params, len(asked), checked_params)
        scheduling_of = _for_each("scheduling", scheduling, len(asked), checked_scheduling)
        requests: list[Request] = []
        try:
            prepared = [self.prepare(*one) for one in zip(asked, params_of, strict=True)]
            lengths = [len(prompt.token_ids) for prompt in prepared]
            with self.engine.results.held_for([*zip(lengths, params_of, strict=True)]) as held:
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

        Errors: RequestError as ``generate`` and ``chat``, at once and not on iteration.
        """
        params = checked_params(params)
        if params.n != 1:
            raise RequestError(f"n is {params.n}; a stream gives one completion, generate several")
        _check_progress(progress)
        request = self.add_requests(self.prepare(prompt, params), params, scheduling)[0]
        return Stream(request, progress)

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
        params = checked_params(params)
        if isinstance(prompt, str):
            if not prompt:
                raise RequestError("the prompt is empty")
            return self.prepare_tokens(self._encode(prompt, is_plain=True), params)
        asked, template = for_template(prompt), self._used_template
        tools, shown_to_it = tool_use(asked, template), for_tools(asked, template)
        most = params.most_thinking_tokens
        rendered, is_thoughtless = render(template, shown_to_it, most, lambda: self._tags)
        return Prompt(
            self._encode(rendered, is_plain=False),
            rendered,
            is_thoughtless,
            self._grammar(params, tools, rendered),
            tools,
        )

    def prepare_tokens(self, token_ids: list[int], params: SamplingParams) -> Prompt:
        """A plain prompt whose tokens are known. Errors: as ``prepare``."""
        params.check_plain()
        return Prompt(token_ids, None, grammar=self._grammar(params, None, None))

    def rendered(self, conversation: Conversation, *, add_generation_prompt: bool = True) -> str:
        """A conversation, as ``for_template`` gives it, in the model's chat template.

        Errors: RequestError as ``ChatTemplate.render``, and for a model without a template.
        """
        template = self._used_template
        shown_to_it = for_tools(conversation, template)
        return template.render(
            shown_to_it.messages,
            tools=shown_to_it.tools,
            add_generation_prompt=add_generation_prompt,
        )

    @property
    def _used_template(self) -> ChatTemplate:
        """Errors: RequestError where there is none."""
        if self.template is None:
            raise RequestError(
                "this model has no (or an empty) chat template; give it a plain prompt instead "
                "(run --raw)"
            )
        return self.template

    def _grammar(
        self, params: SamplingParams, tools: ToolUse | None, rendered: str | None
    ) -> Grammar | None:
        """What an answer has to be of; None where it is free."""
        if params.constraint is None and not (tools is not None and tools.is_required):
            return None
        if params.ignore_eos:
            raise RequestError("ignore_eos goes on past the end, and required calls end the answer")
        beginning = "none" if rendered is None else beginning_behind(rendered, self.thinks)
        return self._grammars.compiled(grammar_of(params.constraint, tools, beginning))

    def add_requests(
        self, prompt: Prompt, params: SamplingParams, scheduling: Scheduling | None = None
    ) -> list[Request]:
        """Queue a prompt's ``params.n`` completions, sampled as the model advises where the user
        says nothing.

        Errors: RequestError where they can never be served.
        """
        engine, requests = self.engine, list[Request]()
        params = params.resolved(self.sampling)
        stop_ids = self.tokenizer.stop_ids(params.stop)
        for token_id in params.stop_token_ids:
            if not 0 <= token_id < self.tokenizer.vocab_size:
                raise RequestError(
                    f"stop token id {token_id} is outside the model's vocabulary of "
                    f"{self.tokenizer.vocab_size}"
                )
        if stop_ids:
            params = replace(params, stop_token_ids=tuple({*params.stop_token_ids, *stop_ids}))
        scheduling = checked_scheduling(scheduling)
        if params.constraint is not None and prompt.grammar is None:
            raise RequestError("the prompt was prepared without the constraint of its parameters")
        sequences = engine.add_samples(
            prompt.token_ids,
            params,
            scheduling=scheduling,
            processors=self._processors(prompt, params),
        )
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
        template = self.template
        return template is not None and (template.writes_thoughts or self._tags.are_tokens)

    @cached_property
    def _tags(self) -> ThoughtTokens:
        return ThoughtTokens(self.tokenizer)

    def _processors(
        self, prompt: Prompt, params: SamplingParams
    ) -> Callable[[], tuple[LogitsProcessor, ...]]:
        """What makes the processors of one completion: what follows its grammar, then the budget of
        its thought, where it has them. So no bias makes a token possible that neither allows."""
        makers: list[Callable[[], LogitsProcessor]] = []
        if prompt.grammar is not None:
            makers.append(prompt.grammar.follower)
        most, seconds = params.most_thinking_tokens, params.max_thinking_seconds
        if prompt.is_thoughtless:
            most = 0
        if most is not None or seconds is not None:
            allowance = Allowance(most, seconds, self.engine.clock)
            start = Thought.behind(prompt.rendered)
            makers.append(partial(ThoughtBudget, self._tags, start, allowance))
        return lambda: tuple(make() for make in makers)

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

    def _encode(self, text: str, is_plain: bool) -> list[int]:
        """Tokens of a prompt, no further than one past the context."""
        context = self.plan.context
        # A chat template writes the special tokens itself.
        ids = self.tokenizer.encode(text, add_special_tokens=is_plain, limit=context)
        if len(ids) > context:
            templated = "" if is_plain else " with its chat template"
            more = f"; a context of up to {self.longest_context} is possible"
            raise ContextError(
                f"the prompt has {len(text)} characters{templated}, which are more than {context} "
                f"tokens, and the context is {context}; at most {context - 1} leave room for an "
                f"answer{more * (self.longest_context > context)}"
            )
        return ids


# For help() and editors: what ``settings`` may be.
LLM.__signature__ = with_settings(LLM.__init__)  # type: ignore[attr-defined]


def _loaded(prepared: Prepared, progress: Progress | None) -> Engine:
    """The engine of a prepared model, which holds its reservation from then on.

    Errors: CheckpointError from reading the weights.
    """
    plan, reservation = prepared.plan, prepared.reservation
    end_ids = prepared.tokenizer.special.eos_token_ids
    try:
        engine = load_engine(prepared.checkpoint, plan, end_ids, progress, prepared.device)
    except BaseException:
        reservation.release()
        raise
    on_host = [] if prepared.device is not None else engine.runner.kv_caches
    reservation.taken([rows for cache in on_host for rows in (cache.k, cache.v)])
    engine.reservation = reservation
    return engine


def _for_each(
    name: str, given: object, count: int, checked: Callable[[object], _Given]
) -> list[_Given]:
    """One for each prompt, of one for all or a list."""
    if not isinstance(given, list | tuple):
        return [checked(given)] * count
    if len(given) != count:
        raise RequestError(f"{len(given)} {name} for {count} prompts; give one for each, or one")
    return [checked(one) for one in given]


def _check_progress(progress: object) -> None:
    if progress is not None and not callable(progress):
        raise RequestError(f"progress is {shown(progress)}; expected a function")


def checked_params(params: object) -> SamplingParams:
    """The same, or the defaults for None. Errors: RequestError for anything else."""
    params = SamplingParams() if params is None else params
    if not isinstance(params, SamplingParams):
        raise RequestError(f"params is {shown(params)}; expected SamplingParams(...)")
    return params


def checked_scheduling(scheduling: object) -> Scheduling:
    """None is a Scheduling without values. Errors: RequestError for anything else."""
    scheduling = DEFAULT_SCHEDULING if scheduling is None else scheduling
    if not isinstance(scheduling, Scheduling):
        raise RequestError(f"scheduling is {shown(scheduling)}; expected Scheduling(...)")
    return scheduling
