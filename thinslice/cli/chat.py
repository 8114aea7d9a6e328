"""thinslice chat: a conversation on a terminal."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from thinslice.cli.chat_view import AnswerView
from thinslice.cli.console import note, out, print_error, write
from thinslice.cli.options import Load, LoadOptions, Sampling
from thinslice.cli.run import load_model, summary, system_prompt, warn_if_cut
from thinslice.config import SamplingParams
from thinslice.errors import RequestError, ThinsliceError
from thinslice.store.files import publish, write_synced

if TYPE_CHECKING:
    from thinslice.engine.llm import LLM, Message

_HELP = """\
/help              this list
/reset             forget the conversation, keep the system prompt
/system TEXT       set the system prompt and start anew; without TEXT an empty one
/save FILE         write the conversation as JSON
/load FILE         go on with a saved conversation
/reasoning         show the last answer's reasoning in full
/exit              leave (also Ctrl-D)
Ctrl-C stops an answer. A line of three quotes (\"\"\") starts and ends a text of several lines."""
_FENCE = '"""'
_LARGEST_SAVE = 64 * 1024 * 1024


def chat(
    model: str,
    /,
    *,
    system: str | None = None,
    load: Load = LoadOptions(),  # noqa: B008
    sampling: Sampling = SamplingParams(),  # noqa: B008
) -> None:
    """Hold a conversation; /help lists its commands.

    Args:
        model: Name of the model.
        system: System prompt. An empty one is given to the model as such; without this option the
            prompt that its makers recommend holds, or the model's own default.
    """
    llm = load_model(model, load)
    if llm.template is None:
        raise RequestError("this model has no chat template; use thinslice run --raw")
    note(f"{model}: {llm.plan.summary()}; /help for commands")
    Conversation(llm, sampling, system_prompt(model, system)).loop(_line_reader())


class Conversation:
    """The messages so far, and what a typed line does to them."""

    def __init__(self, llm: "LLM", sampling: SamplingParams, system: str | None) -> None:
        self.llm = llm
        self.sampling = sampling
        self.system = system
        self.messages: list[Message] = self._opening()
        self.last_reasoning = ""
        self.commands: dict[str, Callable[[str], None]] = {
            "/help": lambda _: out.print(_HELP),
            "/reset": lambda _: self.reset(),
            "/system": self.set_system,
            "/save": self.save,
            "/load": self.load,
            "/reasoning": lambda _: write(self.last_reasoning + "\n", dim=True),
        }

    def loop(self, read_line: Callable[[str], str]) -> None:
        """Read and answer until the input ends or /exit."""
        while True:
            try:
                text = read_turn(read_line).strip()
            except KeyboardInterrupt:
                continue
            except EOFError:
                return
            if text in ("/exit", "/quit"):
                return
            if text:
                self._turn(text)

    def reset(self) -> None:
        """Forget the conversation, keep the system prompt."""
        self.messages = self._opening()

    def set_system(self, text: str) -> None:
        """Set the system prompt and start anew."""
        self.system = text
        self.reset()

    def save(self, file: str) -> None:
        """Write the conversation as JSON, whole or not at all."""
        path = _path(file)
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        text = json.dumps({"messages": self.messages}, ensure_ascii=False, indent=1)
        try:
            write_synced(part, text.encode())
            publish(part, path)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise RequestError(f"cannot write {path}: {error.strerror}") from None
        note(f"{len(self.messages)} messages written to {path}")

    def load(self, file: str) -> None:
        """Go on with a saved conversation; the present one stays where the file is no good."""
        path = _path(file)
        try:
            if path.stat().st_size > _LARGEST_SAVE:
                raise RequestError(f"{path} is over {_LARGEST_SAVE >> 20} MiB: not a conversation")
            saved = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise RequestError(f"cannot read {path}: {error.strerror}") from None
        except (ValueError, RecursionError):
            raise RequestError(f"{path} is not a saved conversation: not JSON") from None
        self.messages = _checked_messages(saved, path)
        first = self.messages[0] if self.messages else None
        self.system = first["content"] if first and first["role"] == "system" else None
        note(f"{len(self.messages)} messages read from {path}")

    def answer(self, text: str) -> None:
        """Answer one message; Ctrl-C keeps what came so far."""
        messages: list[Message] = [*self.messages, {"role": "user", "content": text}]
        view = AnswerView()
        stream = self.llm.stream(messages, self.sampling)
        chunks = iter(stream)
        try:
            for chunk in chunks:
                view.add(chunk.kind, chunk.text)
        except KeyboardInterrupt:
            chunks.close()
        view.close()
        completion = stream.completion
        self.last_reasoning = completion.reasoning
        self.messages = [*messages, {"role": "assistant", "content": completion.text}]
        warn_if_cut(completion)
        stopped = "stopped; " if completion.finish_reason == "abort" else ""
        note(stopped + summary(self.llm, completion))

    def _turn(self, text: str) -> None:
        name, _, rest = text.partition(" ")
        try:
            if name in self.commands:
                self.commands[name](rest.strip())
            elif name.startswith("/") and name.count("/") == 1:
                raise RequestError(f"unknown command {name}; /help lists the commands")
            else:
                self.answer(text)
        except ThinsliceError as error:
            print_error(f"{error} (/reset starts a new conversation)")

    def _opening(self) -> list["Message"]:
        return [] if self.system is None else [{"role": "system", "content": self.system}]


def read_turn(read_line: Callable[[str], str]) -> str:
    """One message: a line, or the lines between two fences of three quotes."""
    line = read_line(">>> ")
    if not line.lstrip().startswith(_FENCE):
        return line
    lines = [line.lstrip().removeprefix(_FENCE)]
    while not lines[-1].rstrip().endswith(_FENCE):
        lines.append(read_line("... "))
    lines[-1] = lines[-1].rstrip().removesuffix(_FENCE)
    return "\n".join(lines)


def _line_reader() -> Callable[[str], str]:
    """Reads lines with editing and history on a terminal, plainly from a pipe."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return lambda _: _plain_line()
    from prompt_toolkit import PromptSession

    session: PromptSession[str] = PromptSession()
    return session.prompt


def _plain_line() -> str:
    data = sys.stdin.buffer.readline()
    if not data:
        raise EOFError
    try:
        return data.decode().rstrip("\r\n")
    except UnicodeDecodeError:
        raise RequestError("standard input is not UTF-8") from None


def _path(file: str) -> Path:
    if not file or "\0" in file:
        raise RequestError("which file? write for example /save talk.json")
    return Path(file).expanduser().absolute()


def _checked_messages(saved: object, path: Path) -> list["Message"]:
    messages = saved.get("messages") if isinstance(saved, dict) else None
    if not isinstance(messages, list):
        raise RequestError(f"{path} is not a saved conversation: no list of messages")
    for message in messages:
        is_message = (
            isinstance(message, dict)
            and set(message) == {"role", "content"}
            and message["role"] in ("system", "user", "assistant")
            and isinstance(message["content"], str)
        )
        if not is_message:
            raise RequestError(f"{path} is not a saved conversation: a message is malformed")
    return messages
