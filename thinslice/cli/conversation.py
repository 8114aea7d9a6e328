"""A conversation: its messages, and what chat's commands do to them. It prints nothing."""

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from thinslice.cli.sampling_text import changed, described
from thinslice.config import SamplingParams
from thinslice.errors import ContextError, RequestError
from thinslice.store.files import publish, write_synced
from thinslice.units import counted

if TYPE_CHECKING:
    from thinslice.engine.llm import LLM
    from thinslice.engine.request import Completion
    from thinslice.text.messages import Message

_LARGEST_SAVE = 64 * 1024 * 1024
FULL_ADVICE = "(/reset starts a new conversation)"


class View(Protocol):
    """The display of an answer as it arrives."""

    def read_prompt(self, num_done: int, num_tokens: int) -> None:
        """So many of the prompt's tokens have been computed."""

    def add(self, kind: str, text: str) -> None:
        """The next piece, of the ``reasoning`` or the ``answer``."""


@dataclass(frozen=True)
class Answer:
    """What came of a message.

    Attributes:
        is_kept: whether the exchange is part of the conversation now; it is not where the answer
            was stopped before it began.
    """

    completion: "Completion"
    is_kept: bool


class Conversation:
    """The messages so far.

    Attributes:
        messages: a system prompt where there is one, then exchanges of user and assistant.
        unsent: a message that could not be answered, to be offered again.
        last_reasoning: the last answer's.
    """

    def __init__(self, llm: "LLM", sampling: SamplingParams, system: str | None) -> None:
        self.llm = llm
        self.sampling = sampling
        self.system = system
        self.messages: list[Message] = self._opening()
        self.unsent = ""
        self.last_reasoning = ""

    def ask(self, text: str, view: View) -> Answer:
        """Answer one message; Ctrl-C keeps what came so far.

        Errors: RequestError and whatever the model raises; the conversation stays as it was and
        the message is ``unsent``.
        """
        self.unsent = text
        messages: list[Message] = [*self.messages, {"role": "user", "content": text}]
        try:
            stream = self.llm.stream(messages, self._sampling_for(messages), view.read_prompt)
        except ContextError:
            raise self._context_error(text) from None
        chunks = iter(stream)
        try:
            for chunk in chunks:
                view.add(chunk.kind, chunk.text)
        except KeyboardInterrupt:
            chunks.close()
        completion = stream.completion
        is_kept = bool(completion.token_ids) or completion.finish_reason != "abort"
        if is_kept:
            self.unsent = ""
            self.last_reasoning = completion.reasoning
            self.messages = [*messages, {"role": "assistant", "content": completion.text}]
        return Answer(completion, is_kept)

    def regenerate(self, view: View) -> Answer:
        """Answer the last message anew. Errors: as ``ask``, with the old answer kept."""
        before = self.messages
        text = self._without_last_exchange("there is no answer yet that could be given anew")
        try:
            answer = self.ask(text, view)
        finally:
            self.unsent = ""
            if len(self.messages) < len(before):
                self.messages = before
        return answer

    def undo(self) -> str:
        """Take the last exchange back; its message is offered again."""
        self.unsent = self._without_last_exchange("there is nothing to take back")
        return f"took the last message and its answer back; {self.num_exchanges} left"

    def compact(self) -> str:
        """Drop the oldest exchanges until at most half of the context is used.

        The system prompt and the last exchange stay.
        """
        if self.num_exchanges < 2:
            raise RequestError("there is nothing to drop: /compact keeps the last exchange")
        half, num_dropped = self.llm.plan.context // 2, 0
        while self.num_exchanges > 1:
            if num_dropped and self.num_tokens() <= half:
                break
            first = len(self._opening_of(self.messages))
            del self.messages[first : first + 2]
            num_dropped += 1
        return f"dropped {counted(num_dropped, 'exchange')}, oldest first; {self.tokens()}"

    def reset(self) -> str:
        """Forget the conversation, keep the system prompt."""
        count, self.messages = self.num_exchanges, self._opening()
        forgotten = f"; {counted(count, 'exchange')} forgotten" if count else ""
        return f"a new conversation begins{forgotten}"

    def set_system(self, text: str) -> str:
        """Set the system prompt and start anew."""
        self.system = text
        return f"{self.reset()}; the system prompt is {text!r:.60}"

    def set_sampling(self, text: str) -> str:
        """Change one sampling parameter, as in ``temperature 0.2``; without text show all."""
        if text:
            self.sampling = changed(self.sampling, text, self.llm.sampling)
        return described(
            self.sampling.resolved(self.llm.sampling), text.split()[0] if text else None
        )

    def shown_reasoning(self) -> str:
        """The last answer's reasoning. Errors: RequestError where it had none."""
        if not self.last_reasoning:
            raise RequestError("the last answer has no reasoning")
        return self.last_reasoning

    def tokens(self) -> str:
        """How much of the context the conversation uses."""
        used, context = self.num_tokens(), self.llm.plan.context
        return f"{used:,} of {context:,} tokens of the context are used"

    def num_tokens(self) -> int:
        """Tokens of the conversation as the model reads it; the context's where it is full."""
        return self._num_tokens(self.messages)

    @property
    def num_exchanges(self) -> int:
        """Messages of the user, each with its answer."""
        return sum(message["role"] == "user" for message in self.messages)

    def fullness(self) -> str | None:
        """What to say once the context is full; None while it is not."""
        context = self.llm.plan.context
        if self.num_tokens() < context - 1:
            return None
        return f"the context is full ({context} of {context} tokens){self._room_advice()}"

    def save(self, file: str) -> str:
        """Write the conversation as JSON, whole or not at all; over a saved one, and no other."""
        path = _path(file, "/save")
        if path.exists():
            self._saved(path, "; name another file to save to")
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        text = json.dumps({"messages": self.messages}, ensure_ascii=False, indent=1)
        try:
            write_synced(part, text.encode())
            publish(part, path)
        except UnicodeEncodeError:
            raise RequestError("the conversation holds a character that is not Unicode") from None
        except OSError as error:
            part.unlink(missing_ok=True)
            raise RequestError(f"cannot write {path}: {error.strerror}") from None
        return f"{counted(len(self.messages), 'message')} written to {path}"

    def load(self, file: str) -> str:
        """Go on with a saved conversation; the present one stays where the file is no good.

        A message at its end that has no answer is ``unsent``.
        """
        path = _path(file, "/load")
        messages = self._saved(path)
        is_cut = bool(messages) and messages[-1]["role"] == "user"
        self.unsent = messages.pop()["content"] if is_cut else ""
        self.messages = messages
        opening = self._opening_of(messages)
        self.system = opening[0]["content"] if opening else None
        rest = "; the last one has no answer and is offered to be sent" if is_cut else ""
        return f"{counted(len(messages), 'message')} read from {path}{rest}"

    @staticmethod
    def _saved(path: Path, advice: str = "") -> list["Message"]:
        """The messages of a saved conversation. Errors: RequestError for any other file."""
        try:
            if path.stat().st_size > _LARGEST_SAVE:
                raise RequestError(f"{path} is over {_LARGEST_SAVE >> 20} MiB: not a conversation")
            saved = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise RequestError(f"cannot read {path}: {error.strerror}") from None
        except (ValueError, RecursionError):
            told = f"{path} is not a saved conversation: not JSON{advice}"
            raise RequestError(told) from None
        return _checked_messages(saved, path, advice)

    def _without_last_exchange(self, nothing: str) -> str:
        """Drop the last message of the user and what follows it; returns its text."""
        users = [at for at, message in enumerate(self.messages) if message["role"] == "user"]
        if not users:
            raise RequestError(nothing)
        text: str = self.messages[users[-1]]["content"]
        self.messages = self.messages[: users[-1]]
        return text

    def _context_error(self, text: str) -> RequestError:
        """Why a message does not fit, and what can be done about it here."""
        context = self.llm.plan.context
        alone: list[Message] = [*self._opening(), {"role": "user", "content": text}]
        if self._num_tokens(alone) >= context:
            larger = f", or start chat with --context up to {self.llm.longest_context}"
            return RequestError(
                f"the message is too long for the context of {context} tokens and was not sent; "
                f"shorten it{larger * (self.llm.longest_context > context)}"
            )
        used = self.num_tokens()
        why = f"the message does not fit behind {used:,} of {context:,} tokens of the context"
        if used >= context - 1:
            why = f"the context is full ({context} of {context} tokens)"
        return RequestError(f"{why}: the message was not sent{self._room_advice()}")

    def _room_advice(self) -> str:
        """The commands that make room, of those that can do something now."""
        compact = ", /compact drops the oldest ones" if self.num_exchanges > 1 else ""
        return f"; /undo takes the last exchange back{compact} {FULL_ADVICE}"

    def _sampling_for(self, messages: list["Message"]) -> SamplingParams:
        """An answer is as long as the context has room for, and at most as long as asked for."""
        most = self.sampling.max_tokens
        if most is None:
            return self.sampling
        room = self.llm.plan.context - self._num_tokens(messages)
        return replace(self.sampling, max_tokens=max(min(most, room), 1))

    def _num_tokens(self, messages: list["Message"]) -> int:
        if not messages:
            return 0
        context = self.llm.plan.context
        try:
            return min(len(self.llm.prepare(messages, self.sampling).token_ids), context)
        except ContextError:
            return context

    def _opening(self) -> list["Message"]:
        return [] if self.system is None else [{"role": "system", "content": self.system}]

    @staticmethod
    def _opening_of(messages: list["Message"]) -> list["Message"]:
        return messages[:1] if messages and messages[0]["role"] == "system" else []


def _path(file: str, command: str) -> Path:
    if not file or "\0" in file:
        raise RequestError(f"which file? write for example {command} talk.json")
    try:
        return Path(os.path.expanduser(file)).absolute()
    except FileNotFoundError:
        raise RequestError(
            f"the working directory is gone; write a whole path, for example {command} /tmp/a.json"
        ) from None


def _checked_messages(saved: object, path: Path, advice: str) -> list["Message"]:
    messages = saved.get("messages") if isinstance(saved, dict) else None
    if not isinstance(messages, list):
        raise RequestError(f"{path} is not a saved conversation: no list of messages{advice}")
    for message in messages:
        is_message = (
            isinstance(message, dict)
            and set(message) == {"role", "content"}
            and message["role"] in ("system", "user", "assistant")
            and isinstance(message["content"], str)
        )
        if not is_message:
            told = f"{path} is not a saved conversation: a message is malformed{advice}"
            raise RequestError(told)
    return messages
