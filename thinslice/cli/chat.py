"""thinslice chat: a conversation on a terminal."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from thinslice.cli.answer_view import AnswerView
from thinslice.cli.console import (
    note,
    out,
    plain_table,
    print_error,
    print_table,
    show_text,
    silence_notes,
    write,
)
from thinslice.cli.conversation import Answer, Conversation
from thinslice.cli.options import Load, Quiet, Sampling
from thinslice.cli.run import load_model, summary, system_prompt
from thinslice.cli.sampling_text import NAMES
from thinslice.config import EngineSettings, SamplingParams
from thinslice.errors import RequestError, ThinsliceError
from thinslice.store.names import nearest_names
from thinslice.units import MIB

if TYPE_CHECKING:
    from thinslice.cli.terminal import Terminal

_HELP = {
    "/help or /?": "this list",
    "/undo": "take the last message and its answer back",
    "/regenerate": "answer the last message anew",
    "/compact": "make room: drop the oldest exchanges until half of the context is free",
    "/tokens": "how much of the context the conversation uses",
    "/set NAME VALUE": "change a sampling parameter; /set alone shows them all",
    "/system TEXT": "set the system prompt and start anew; without TEXT an empty one",
    "/reset": "forget the conversation, keep the system prompt",
    "/save FILE": "write the conversation as JSON",
    "/load FILE": "go on with a saved conversation",
    "/reasoning": "show the last answer's reasoning in full",
    "/bye": "leave (also /exit, /quit, exit, quit, Ctrl-D)",
    "Ctrl-C": "stop an answer",
    "Tab": "complete a command",
    '""" ... """': "a text of several lines",
}
_MORE_HELP = (
    "What you type during an answer is offered as your next messages, one by one: Enter sends "
    "each, Ctrl-C drops all. A long text is shown as a mark; Backspace removes it."
)
_LEAVE = ("/bye", "/exit", "/quit", "exit", "quit")
_FENCE = '"""'
# The prompt of a line between fences.
_INSIDE = "... "
# Bytes of a piped line, and characters between fences.
_LONGEST_PIPED = 8 * MIB
# Reads one line behind a prompt, with a text offered to begin with.
ReadLine = Callable[[str, str | None], str]


def chat(
    model: str,
    /,
    *,
    system: str | None = None,
    load: Load = EngineSettings(),  # noqa: B008
    sampling: Sampling = SamplingParams(),  # noqa: B008
    quiet: Quiet = False,
) -> int:
    """Hold a conversation; /help lists its commands.

    Piped lines are messages too; where one could not be answered, the exit code is that of the
    first such error. What is typed on a terminal is kept across starts in thinslice/chat-history
    where the system keeps a user's state, or in THINSLICE_HOME, readable by the user alone.

    Args:
        model: Name of the model.
        system: System prompt. An empty one is given to the model as such; without this option the
            prompt that its makers recommend holds, or the model's own default.
        quiet: Print only answers and errors, no notes and no progress.
    """
    silence_notes(quiet)
    with ExitStack() as stack:
        # Before the model is loaded: what the editor holds then counts in the plan.
        is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
        terminal, read_line = _on_terminal(stack) if is_terminal else (None, _plain_line)
        llm = load_model(model, replace(load, max_num_seqs=1))
        if terminal is not None:
            terminal.loaded()
        if llm.template is None:
            raise RequestError("this model has no chat template; use thinslice run --raw")
        note(f"{model}: {llm.plan.summary()}" + ("; /help for commands" if is_terminal else ""))
        talk = Chat(Conversation(llm, sampling, system_prompt(model, system)))
        talk.loop(read_line)
        return 0 if is_terminal else talk.exit_code


class Chat:
    """What a typed line does: a command, or a message for the model.

    Attributes:
        exit_code: of the first error; 0 where there was none.
    """

    def __init__(self, conversation: Conversation) -> None:
        self.conversation = conversation
        # What the next line begins with; None for nothing of what was offered before either.
        self.offered: str | None = ""
        self.exit_code = 0
        self.commands: dict[str, Callable[[str], None]] = {
            "/help": lambda _: _show_help(),
            "/?": lambda _: _show_help(),
            "/undo": lambda _: self._undo(),
            "/regenerate": lambda _: self._show(conversation.regenerate),
            "/compact": lambda _: note(conversation.compact()),
            "/tokens": lambda _: show_text(conversation.tokens()),
            "/set": lambda text: out.print(conversation.set_sampling(text)),
            "/system": lambda text: note(conversation.set_system(text)),
            "/reset": lambda _: note(conversation.reset()),
            "/save": lambda file: note(conversation.save(file)),
            "/load": self._load,
            "/reasoning": lambda _: write(f"{conversation.shown_reasoning()}\n", dim=True),
        }

    def loop(self, read_line: ReadLine) -> None:
        """Read and answer until the input ends or the user leaves."""
        while True:
            offered, self.offered = self.offered, ""
            try:
                text = read_turn(read_line, offered).strip()
                if text in _LEAVE:
                    return
                if text:
                    self._turn(text)
            except KeyboardInterrupt:
                continue
            except EOFError:
                return

    def _turn(self, text: str) -> None:
        name, _, rest = text.partition(" ")
        try:
            if name in _COMMANDS and name not in _TAKING_TEXT and rest.strip():
                raise RequestError(f"{name} takes nothing behind it; {name} alone does it")
            if name in self.commands:
                self.commands[name](rest.strip())
            elif name.startswith("/") and name.count("/") == 1 and "\n" not in name:
                near = nearest_names(name, _COMMANDS)
                guess = f"; did you mean {near[0]}?" if near else ";"
                raise RequestError(f"unknown command {name}{guess} /help lists the commands")
            else:
                self._show(lambda view: self.conversation.ask(text, view))
        except ThinsliceError as error:
            self.exit_code = self.exit_code or error.exit_code
            print_error(str(error))

    def _show(self, answered: Callable[[AnswerView], Answer]) -> None:
        """Show an answer as it comes, then what there is to say about it."""
        view = AnswerView()
        try:
            answer = answered(view)
        except KeyboardInterrupt:
            answer = None
        except ThinsliceError:
            self.offered = self.conversation.unsent
            raise
        finally:
            with interrupts_ignored():
                view.close()
        if answer is None or not answer.is_kept:
            note("stopped before the answer began; the message is not part of the conversation")
            self.offered = self.conversation.unsent
            return
        completion = answer.completion
        if completion.finish_reason == "length":
            note(self.conversation.fullness() or _cut_short(completion.text))
        stopped = "stopped; " if completion.finish_reason == "abort" else ""
        note(stopped + summary(self.conversation.llm, completion))

    def _undo(self) -> None:
        note(self.conversation.undo())
        self.offered = self.conversation.unsent

    def _load(self, file: str) -> None:
        note(self.conversation.load(file))
        self.offered = self.conversation.unsent or None


def read_turn(read_line: ReadLine, offered: str | None = "") -> str:
    """One message: a line, or the lines between two fences of three quotes.

    Errors: EOFError at the end of the input, RequestError where that is between two fences.
    """
    line = read_line(">>> ", offered)
    if not line.lstrip().startswith(_FENCE):
        return line
    lines = [line.lstrip().removeprefix(_FENCE)]
    num_characters = 0
    while not lines[-1].rstrip().endswith(_FENCE):
        try:
            lines.append(read_line(_INSIDE, ""))
        except EOFError:
            told = f"the text that {_FENCE} opened has no {_FENCE} at the end of a line"
            raise RequestError(f"{told}; it was not sent") from None
        num_characters += len(lines[-1])
        if num_characters > _LONGEST_PIPED:
            raise RequestError(f"a message of over {_LONGEST_PIPED >> 20} MiB is no prompt")
    lines[-1] = lines[-1].rstrip().removesuffix(_FENCE)
    return "\n".join(lines)


def completions(before: str) -> Iterator[str]:
    """The words that may follow a line so far: commands, and the names that /set takes."""
    if before.startswith("/set ") and before.count(" ") == 1:
        yield from NAMES
    elif before.startswith("/") and " " not in before:
        yield from _COMMANDS


_TAKING_TEXT = ("/set", "/system", "/save", "/load")
_COMMANDS = tuple(
    sorted({word.split()[0] for word in (*_HELP, *_LEAVE, "/?") if word.startswith("/")})
)


def _show_help() -> None:
    table = plain_table()
    table.columns[0].no_wrap = True
    for key, text in _HELP.items():
        table.add_row(key, text)
    print_table(table)
    show_text(_MORE_HELP)


@contextmanager
def interrupts_ignored() -> Iterator[None]:
    """For a few lines that have to be run to their end whatever the user presses."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _on_terminal(stack: ExitStack) -> tuple["Terminal", ReadLine]:
    """Take the terminal until the stack is unwound; returns it and what reads lines from it."""
    from thinslice.cli.chat_history import ChatHistory, history_path
    from thinslice.cli.line_editor import LineEditor
    from thinslice.cli.terminal import Terminal
    from thinslice.cli.typed_ahead import TypedAhead

    history = ChatHistory(history_path(os.environ), _LEAVE)
    terminal = stack.enter_context(Terminal(sys.stdin.fileno()))
    typed_ahead = TypedAhead(terminal)
    editor = LineEditor(terminal, history, completions)
    told: list[str] = []

    def read_line(prompt: str, offered: str | None) -> str:
        if history.trouble is not None and not told:
            told.append(history.trouble)
            note(f"what you type is not kept across starts: {history.trouble}")
        text, closing = "", _FENCE if prompt == _INSIDE else None
        try:
            text = editor.read(prompt, typed_ahead.next(offered, closing))
        except KeyboardInterrupt:
            typed_ahead.drop()
            raise
        except EOFError:
            if prompt != _INSIDE:
                raise
            note(f"the text that {_FENCE} opened was dropped")
            raise KeyboardInterrupt from None
        except RequestError as error:  # more than a message can be
            print_error(str(error))
        if editor.replaced:
            typed_ahead.put_back(editor.replaced)
        return text

    return terminal, read_line


def _plain_line(_prompt: str, _offered: str | None) -> str:
    """A line of standard input that is no terminal."""
    data = sys.stdin.buffer.readline(_LONGEST_PIPED + 1)
    if not data:
        raise EOFError
    if len(data) > _LONGEST_PIPED:
        raise RequestError(f"a line of over {_LONGEST_PIPED >> 20} MiB is no prompt")
    try:
        return data.decode().rstrip("\r\n")
    except UnicodeDecodeError:
        raise RequestError("standard input is not UTF-8") from None


def _cut_short(text: str) -> str:
    if not text:
        return "no answer yet: the thought took all of it; /set max_tokens or max_thinking_tokens"
    return "the answer reached its maximum length; /set max_tokens higher, or none, for longer ones"
