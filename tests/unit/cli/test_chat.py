"""A conversation's commands, with a model that answers from a script."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from thinslice.cli.chat import Conversation, read_turn
from thinslice.config import SamplingParams
from thinslice.engine.request import Completion, TextChunk
from thinslice.plan.memory_plan import MemoryPlan

PLAN = MemoryPlan(1 << 30, "float32", "float32", 64, 16, 1, 16, 4, ())


class ScriptedStream:
    def __init__(self, pieces: list[TextChunk | type[BaseException]]) -> None:
        self.pieces = pieces
        self.texts = {"reasoning": "", "answer": ""}
        self.finish_reason = "abort"

    def __iter__(self) -> Iterator[TextChunk]:
        for piece in self.pieces:
            if not isinstance(piece, TextChunk):
                raise piece
            self.texts[piece.kind] += piece.text
            yield piece
        self.finish_reason = "stop"

    @property
    def completion(self) -> Completion:
        return Completion(
            text=self.texts["answer"],
            reasoning=self.texts["reasoning"],
            prompt_token_ids=[1],
            token_ids=[1, 2],
            finish_reason=self.finish_reason,
            seed=0,
            prefill_s=0.1,
            decode_s=0.1,
        )


class ScriptedLLM:
    """Answers each message with the next script; remembers what it was asked."""

    plan = PLAN
    prediction = None
    device = None

    def __init__(self, *scripts: list[TextChunk | type[BaseException]]) -> None:
        self.scripts = list(scripts)
        self.asked: list[list[dict[str, str]]] = []

    def stream(self, messages: list[dict[str, str]], params: SamplingParams) -> ScriptedStream:
        self.asked.append(messages)
        return ScriptedStream(self.scripts.pop(0))


def talk(llm: Any, lines: list[str | type[BaseException]], system: str | None = None) -> Any:
    conversation = Conversation(llm, SamplingParams(), system)
    conversation.loop(reader(lines))
    return conversation


def reader(lines: list[str | type[BaseException]]) -> Callable[[str], str]:
    rest = iter([*lines, EOFError])

    def read(prompt: str) -> str:
        line = next(rest)
        if not isinstance(line, str):
            raise line
        return line

    return read


def said(text: str) -> list[TextChunk | type[BaseException]]:
    return [TextChunk("answer", text)]


def test_the_history_grows_and_reset_forgets_all_but_the_system_prompt() -> None:
    llm = ScriptedLLM(said("one"), said("two"), said("three"))
    talk(llm, ["first", "second", "/reset", "third", "/exit", "never"], system="be brief")
    system = {"role": "system", "content": "be brief"}
    assert llm.asked[1] == [
        system,
        {"role": "user", "content": "first"},
        {"role": "assistant", "content": "one"},
        {"role": "user", "content": "second"},
    ]
    assert llm.asked[2] == [system, {"role": "user", "content": "third"}]
    assert len(llm.asked) == 3


def test_reasoning_is_kept_out_of_the_history_and_shown_on_demand(
    capsys: pytest.CaptureFixture[str],
) -> None:
    llm = ScriptedLLM([TextChunk("reasoning", "hm, hm"), *said("Four.")], said("ok"))
    talk(llm, ["2+2?", "again", "/exit"])
    assert llm.asked[1][1] == {"role": "assistant", "content": "Four."}
    assert "hm, hm" not in capsys.readouterr().out


def test_an_empty_system_prompt_is_a_message() -> None:
    llm = ScriptedLLM(said("a"), said("b"))
    talk(llm, ["/system", "hi", "/system You are terse.", "hi"])
    assert llm.asked[0][0] == {"role": "system", "content": ""}
    assert llm.asked[1][0] == {"role": "system", "content": "You are terse."}


def test_an_interrupt_stops_the_answer_and_keeps_what_came() -> None:
    llm = ScriptedLLM([*said("so far"), KeyboardInterrupt], said("next"))
    talk(llm, ["go", KeyboardInterrupt, "on"])
    assert llm.asked[1][1] == {"role": "assistant", "content": "so far"}


def test_a_conversation_is_saved_and_loaded(tmp_path: Path) -> None:
    file = str(tmp_path / "talk.json")
    talk(ScriptedLLM(said("one")), ["first", f"/save {file}"], system="s")
    assert [path.name for path in tmp_path.iterdir()] == ["talk.json"]
    llm = ScriptedLLM(said("two"))
    conversation = talk(llm, [f"/load {file}", "second"])
    assert [m["content"] for m in llm.asked[0]] == ["s", "first", "one", "second"]
    assert conversation.system == "s"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not json", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[]", "no list of messages"),
        (b'{"messages": [{"role": "user"}]}', "a message is malformed"),
        (b'{"messages": [{"role": "root", "content": "x"}]}', "a message is malformed"),
        (None, "cannot read"),
    ],
)
def test_a_bad_file_leaves_the_conversation_as_it_is(
    content: bytes | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "talk.json"
    if content is not None:
        file.write_bytes(content)
    llm = ScriptedLLM(said("one"), said("two"))
    talk(llm, ["first", f"/load {file}", "second"])
    assert message in capsys.readouterr().err
    assert len(llm.asked[1]) == 3


def test_save_to_a_place_that_cannot_be_written_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    talk(ScriptedLLM(), [f"/save {tmp_path}/none/talk.json", f"/save {tmp_path}", "/save"])
    errors = capsys.readouterr().err
    assert errors.count("cannot write") == 2
    assert "which file?" in errors
    assert list(tmp_path.iterdir()) == []
    assert not list(tmp_path.parent.glob(".*.part"))


def test_unknown_commands_are_named_and_paths_are_text(
    capsys: pytest.CaptureFixture[str],
) -> None:
    llm = ScriptedLLM(said("it is a path"))
    talk(llm, ["/helo", "/usr/bin is what?"])
    assert "unknown command /helo" in capsys.readouterr().err
    assert llm.asked[0][0]["content"] == "/usr/bin is what?"


@pytest.mark.parametrize(
    ("lines", "text"),
    [
        (["one line"], "one line"),
        (['"""', "a", "b", '"""'], "\na\nb\n"),
        (['"""a', 'b"""'], "a\nb"),
        (['"""a"""'], "a"),
        (['  """a', "", 'b """ '], "a\n\nb "),
    ],
)
def test_fences_hold_several_lines(lines: list[str], text: str) -> None:
    assert read_turn(reader(lines)) == text


def test_saved_json_is_plain(tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    talk(ScriptedLLM(said("চার")), ["২+২?", f"/save {file}"])
    assert json.loads(file.read_text())["messages"][1]["content"] == "চার"
    assert "চার" in file.read_text()
