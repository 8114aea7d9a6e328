"""LLM: a model by name, ready to complete prompts inside a budget."""

from collections.abc import Generator, Sequence
from typing import TypedDict, Unpack

from thinslice.checkpoint.open import open_checkpoint
from thinslice.config import EngineSettings, SamplingParams
from thinslice.engine.load import Progress, load_engine
from thinslice.engine.planning import Model, known_profile, plan_model, predict_speed
from thinslice.engine.request import Completion, Request, TextChunk
from thinslice.errors import RequestError
from thinslice.plan.predict import Prediction
from thinslice.store.store import Store
from thinslice.text.chat_template import ChatTemplate
from thinslice.text.reasoning import ReasoningSplitter
from thinslice.text.tokenizer import Tokenizer, load_tokenizer

Message = dict[str, str]
# Characters; the longest tokens of the supported vocabularies are runs of 128 spaces.
_LONGEST_TOKEN = 256


class Settings(TypedDict, total=False):
    """The fields of EngineSettings, as keyword arguments of LLM."""

    memory: str | int | None
    context: int | None
    dtype: str
    kv_dtype: str
    max_num_seqs: int
    offline: bool


class Stream:
    """A completion as it comes: iterate for TextChunks, then read ``completion``.

    Leaving the iteration early ends the completion and frees its blocks.
    """

    def __init__(self, request: Request) -> None:
        self._request = request

    def __iter__(self) -> Generator[TextChunk, None, None]:
        request = self._request
        try:
            # Another stream's steps may have brought this one forward, or to its end.
            yield from request.advance()
            while not request.is_finished:
                request.engine.step()
                yield from request.advance()
        finally:
            request.engine.abort(request.sequence)

    @property
    def completion(self) -> Completion:
        """The whole completion so far; final once the iteration has ended."""
        return self._request.completion()


class LLM:
    """A loaded model.

    ``LLM("smollm2", memory="1GiB").chat([{"role": "user", "content": "Hello"}]).text``

    Args:
        model: a name, a folder, a .gguf file, or a model of the Hugging Face Hub; fetched into
            the store where it is not there yet.
        progress: called with what is under way, how much is done, and how much there is.
        settings: the fields of EngineSettings.

    Errors: ConfigError, StoreError, CheckpointError, BudgetError, each before anything large is
    allocated.
    """

    def __init__(
        self, model: str, *, progress: Progress | None = None, **settings: Unpack[Settings]
    ) -> None:
        engine_settings = EngineSettings(**settings)
        store = Store()
        checkpoint = open_checkpoint(store.ensure(model, progress, offline=engine_settings.offline))
        self.tokenizer: Tokenizer = load_tokenizer(checkpoint)
        self.template: ChatTemplate | None = self.tokenizer.chat_template
        planned = Model.of(checkpoint)
        self.plan = plan_model(planned, engine_settings)
        profile = known_profile(store.root, checkpoint.files[0].parent)
        self.prediction: Prediction | None = None
        if profile is not None:
            self.prediction = predict_speed(planned, self.plan, profile)
        end_ids = self.tokenizer.special.eos_token_ids
        self.engine = load_engine(checkpoint, self.plan, end_ids, progress)

    def generate(
        self, prompts: str | Sequence[str], params: SamplingParams | None = None
    ) -> list[Completion]:
        """Complete each prompt as it stands, several at a time; results in the prompts' order.

        Errors: RequestError where a prompt is empty or does not fit the context.
        """
        texts = [prompts] if isinstance(prompts, str) else prompts
        requests: list[Request] = []
        try:
            requests += (self._request(text, params or SamplingParams()) for text in texts)
            while any(not request.is_finished for request in requests):
                self.engine.step()
                for request in requests:
                    request.advance()
        finally:
            for request in requests:
                self.engine.abort(request.sequence)
        return [request.completion() for request in requests]

    def chat(self, messages: Sequence[Message], params: SamplingParams | None = None) -> Completion:
        """Answer a conversation; ``reasoning`` and ``text`` are apart.

        Errors: RequestError as ``generate``, and where the model has no chat template.
        """
        stream = Stream(self._chat_request(messages, params or SamplingParams()))
        for _ in stream:
            pass
        return stream.completion

    def stream(
        self, prompt: str | Sequence[Message], params: SamplingParams | None = None
    ) -> Stream:
        """Complete a prompt, or answer a conversation, piece by piece.

        Errors: RequestError as ``generate`` and ``chat``, at once and not on iteration.
        """
        params = params or SamplingParams()
        if isinstance(prompt, str):
            return Stream(self._request(prompt, params))
        return Stream(self._chat_request(prompt, params))

    def _request(self, text: str, params: SamplingParams) -> Request:
        if not text:
            raise RequestError("the prompt is empty")
        self._check_length(text)
        token_ids = self.tokenizer.encode(text, add_special_tokens=True)
        sequence = self.engine.add_request(token_ids, params)
        return Request(self.engine, sequence, self.tokenizer, None)

    def _chat_request(self, messages: Sequence[Message], params: SamplingParams) -> Request:
        if self.template is None:
            raise RequestError("this model has no chat template; give it a plain prompt instead")
        _check_messages(messages)
        rendered = self.template.render(messages)
        self._check_length(rendered)
        # The template writes the special tokens itself.
        token_ids = self.tokenizer.encode(rendered, add_special_tokens=False)
        sequence = self.engine.add_request(token_ids, params)
        return Request(self.engine, sequence, self.tokenizer, ReasoningSplitter(rendered))

    def _check_length(self, text: str) -> None:
        """Refuse what cannot fit before it is encoded, which takes many times the text's memory."""
        most = self.plan.context * _LONGEST_TOKEN
        if len(text) > most:
            raise RequestError(
                f"the prompt has {len(text)} characters, too many for a context of "
                f"{self.plan.context} tokens"
            )


def _check_messages(messages: Sequence[Message]) -> None:
    is_list = isinstance(messages, list | tuple) and len(messages) > 0
    if not is_list or not all(_is_message(message) for message in messages):
        raise RequestError(
            'a conversation is a list of messages such as {"role": "user", "content": "Hello"}'
        )


def _is_message(message: object) -> bool:
    return isinstance(message, dict) and all(
        isinstance(message.get(field), str) for field in ("role", "content")
    )
