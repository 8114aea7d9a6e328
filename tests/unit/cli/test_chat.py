"""A conversation's commands, with a model that answers from a script."""

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from thinslice.cli import chat
from thinslice.cli.chat import Chat, completions, read_turn
from thinslice.cli.conversation import Conversation
from thinslice.config import SamplingParams
from thinslice.engine.prompts import Prompt
from thinslice.engine.request import Completion, TextChunk
from thinslice.errors import CheckpointError, ContextError, RequestError
from thinslice.plan.memory_plan import MemoryPlan, Pool

PLAN = MemoryPlan((Pool("--memory", 1 << 30),), "float32", "float32", 64, 16, 1, 16, 4)


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
    longest_context = 128
    prediction = None
    device = None
    sampling: ClassVar = {"top_p": 0.8}

    def __init__(self, *scripts: list[TextChunk | type[BaseException]]) -> None:
        self.scripts = list(scripts)
        self.asked: list[list[dict[str, str]]] = []
        self.params: list[SamplingParams] = []

    def prepare(self, messages: list[dict[str, str]], _params: object) -> Prompt:
        """A token for each character."""
        rendered = "".join(message["content"] for message in messages)
        return Prompt([1] * len(rendered), rendered)

    def stream(
        self,
        messages: list[dict[str, str]],
        params: SamplingParams,
        progress: Callable[[int, int], None],
    ) -> ScriptedStream:
        num_tokens = len(self.prepare(messages, params).token_ids)
        if num_tokens >= self.plan.context:
            raise ContextError("too many tokens")
        self.asked.append(messages)
        self.params.append(params)
        return ScriptedStream(self.scripts.pop(0))


def talk(
    llm: Any,
    lines: list[str | type[BaseException]],
    system: str | None = None,
    offers: list[str] | None = None,
) -> Conversation:
    conversation = Conversation(llm, SamplingParams(), system)
    Chat(conversation).loop(reader(lines, offers))
    return conversation


def reader(
    lines: list[str | type[BaseException]], offers: list[str] | None = None
) -> Callable[[str, str], str]:
    rest = iter([*lines, EOFError])

    def read(prompt: str, offered: str) -> str:
        if offers is not None:
            offers.append(offered)
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
    assert errors.count("cannot write") == 1
    assert f"{tmp_path}: Is a directory" in errors
    assert "which file?" in errors
    assert list(tmp_path.iterdir()) == []
    assert not list(tmp_path.parent.glob(".*.part"))


def test_a_working_directory_that_is_gone_is_told_and_the_chat_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    talk(ScriptedLLM(), ["/save talk.json", "/load talk.json", f"/save {tmp_path}/talk.json"])
    assert capsys.readouterr().err.count("the working directory is gone") == 2
    assert (tmp_path / "talk.json").exists()


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


def raised(error: BaseException) -> Any:
    """A script whose stream raises an instance."""

    class Raising(ScriptedStream):
        def __iter__(self) -> Iterator[TextChunk]:
            raise error
            yield

    return Raising([])


CONTEXT = PLAN.context
LONG = "x" * (CONTEXT // 2 - 4)


def test_a_full_context_keeps_the_message_and_names_only_what_makes_room(
    capsys: pytest.CaptureFixture[str],
) -> None:
    offers: list[str] = []
    llm = ScriptedLLM(said("a"), said("b"), said("c"))
    talk(llm, [LONG, "y" * CONTEXT, LONG + "1234567", "/undo", LONG], offers=offers)
    errors = capsys.readouterr().err.splitlines()
    alone = next(line for line in errors if "the message is too long" in line)
    assert "/undo" not in alone
    assert "/reset" not in alone
    full = next(line for line in errors if "does not fit" in line)
    used = len(LONG) + 1
    assert f"the message does not fit behind {used} of {CONTEXT:,} tokens" in full
    assert full.endswith("/undo takes the last exchange back (/reset starts a new conversation)")
    assert "/compact" not in full, "there is one exchange, which /compact keeps"
    assert offers == ["", "", "y" * CONTEXT, LONG + "1234567", LONG, ""]
    assert llm.asked[1] == [{"role": "user", "content": LONG}]


def test_compact_drops_the_oldest_until_half_is_free(capsys: pytest.CaptureFixture[str]) -> None:
    piece = "z" * (CONTEXT // 8)
    llm = ScriptedLLM(*[said("")] * 7)
    messages = [str(number) + piece[1:] for number in range(6)]
    conversation = talk(llm, [*messages, "/compact", "/tokens"], system="s")
    kept = [m["content"][0] for m in conversation.messages if m["role"] == "user"]
    assert kept == ["3", "4", "5"]
    assert conversation.messages[0] == {"role": "system", "content": "s"}
    shown = capsys.readouterr()
    assert "dropped 3 exchanges, oldest first" in shown.err
    assert f"{3 * len(piece) + 1} of {CONTEXT} tokens" in shown.out


def test_slips_of_the_fingers_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    llm = ScriptedLLM(said("a"))
    mine = tmp_path / "mine.txt"
    mine.write_text("questions")
    typed = ["hello", "/undo 3", "/regen", "/set temprature 1", f"/save {mine}", "/reasoning"]
    talk(llm, [*typed, "/system Be brief.", "/reset"])
    told = capsys.readouterr().err
    assert "/undo takes nothing behind it" in told
    assert "unknown command /regen; did you mean /regenerate?" in told
    assert "no parameter temprature; did you mean temperature?" in told
    assert "mine.txt is not a saved conversation: not JSON; name another file" in told
    assert mine.read_text() == "questions"
    assert "the last answer has no reasoning" in told
    assert "begins; 1 exchange forgotten; the system prompt is 'Be brief.'" in told
    assert told.endswith("a new conversation begins\n")


def test_compact_and_undo_say_so_where_there_is_nothing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    talk(ScriptedLLM(), ["/compact", "/undo", "/regenerate"])
    errors = capsys.readouterr().err
    assert "nothing to drop" in errors
    assert "nothing to take back" in errors
    assert "no answer yet" in errors
    assert "/reset" not in errors


def test_an_error_of_the_model_does_not_end_the_chat(capsys: pytest.CaptureFixture[str]) -> None:
    offers: list[str] = []
    llm = ScriptedLLM(said("one"), said("unused"), said("two"))
    broken = raised(CheckpointError("the logits are not numbers"))
    streams = [ScriptedStream(said("one")), broken, ScriptedStream(said("two"))]
    llm.stream = lambda messages, params, progress: (  # type: ignore[method-assign]
        llm.asked.append(messages),
        streams.pop(0),
    )[1]
    talk(llm, ["first", "second", "third"], offers=offers)
    error = next(line for line in capsys.readouterr().err.splitlines() if "logits" in line)
    assert error == "error: the logits are not numbers"
    assert offers == ["", "", "second", ""]
    assert [m["content"] for m in llm.asked[2]] == ["first", "one", "third"]


def test_regenerate_replaces_the_answer_and_keeps_it_where_that_fails() -> None:
    llm = ScriptedLLM(said("old"), said("new"), [KeyboardInterrupt], said("end"))
    talk(llm, ["ask", "/regenerate", "/regenerate", "more"])
    assert llm.asked[1] == llm.asked[0]
    # The script's stopped stream has tokens, so that what came counts.
    assert llm.asked[3][1]["role"] == "assistant"


def test_regenerate_keeps_the_old_answer_after_an_error() -> None:
    llm = ScriptedLLM(said("old"))
    conversation = talk(llm, ["ask"])
    before = list(conversation.messages)
    llm.stream = lambda *_: raised(CheckpointError("bad"))  # type: ignore[method-assign]
    Chat(conversation).loop(reader(["/regenerate"]))
    assert conversation.messages == before


@pytest.mark.parametrize("word", ["/bye", "/exit", "/quit", "exit", "quit", " exit "])
def test_words_that_leave_are_not_sent(word: str) -> None:
    llm = ScriptedLLM(said("never"))
    talk(llm, [word, "hello"])
    assert llm.asked == []


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("/bye now", "/bye takes nothing behind it; /bye alone does it"),
        ("/exit please", "/exit takes nothing behind it"),
        ("/? undo", "/? takes nothing behind it"),
        ("/exti", "did you mean /exit?"),
        ("/load", "which file? write for example /load talk.json"),
        ("/save", "which file? write for example /save talk.json"),
    ],
)
def test_advice_is_about_the_command_that_was_typed(
    line: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    talk(ScriptedLLM(), [line])
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("text", ["exit the loop", "how do I quit vim?", "Exit strategy"])
def test_sentences_with_such_words_are_sent(text: str) -> None:
    llm = ScriptedLLM(said("sure"))
    talk(llm, [text])
    assert llm.asked[0][0]["content"] == text


def test_an_interrupt_outside_an_answer_does_not_end_the_chat(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    llm = ScriptedLLM(said("fine"))
    conversation = talk(llm, [])

    def interrupted(_: str) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(conversation, "save", interrupted)
    Chat(conversation).loop(reader(["/save x.json", "hello"]))
    assert len(llm.asked) == 1


def test_set_changes_what_the_next_answer_is_sampled_with(
    capsys: pytest.CaptureFixture[str],
) -> None:
    llm = ScriptedLLM(said("one"))
    lines = ["/set temperature 0.25", "/set max-tokens 7", "/set stop END.", "hi", "/set"]
    talk(llm, ["/set max-thinking-tokens 0", *lines])
    assert llm.params[0] == SamplingParams(
        temperature=0.25, max_tokens=7, max_thinking_tokens=0, stop=("END.",)
    )
    shown = capsys.readouterr().out
    for name in ("temperature", "top_p", "max_tokens", "seed", "stop_token_ids"):
        assert f"\n{name} " in "\n" + shown
    assert "logit_bias" not in shown


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/set temperature", "which value?"),
        ("/set temperature hot", "temperature is 'hot'; expected a number"),
        ("/set temperature -1", "expected 0.0..100.0"),
        ("/set temperature nan", "expected 0.0..100.0"),
        ("/set top_k 1.5", "expected a whole number"),
        ("/set ignore_eos perhaps", "expected on or off"),
        ("/set max_thinking_tokens 1.5", "expected a whole number"),
        ("/set max_thinking_seconds soon", "expected a number"),
        ("/set n 4", "there is no parameter n"),
        ("/set colour red", "there is no parameter colour"),
    ],
)
def test_set_refuses_what_is_no_parameter(
    line: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    llm = ScriptedLLM(said("one"))
    talk(llm, [line, "hi"])
    assert message in capsys.readouterr().err
    assert llm.params[0] == SamplingParams()


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("/set seed none", None),
        ("/set max_tokens none", None),
        ("/set max_thinking_tokens none", None),
        ("/set stop none", ()),
    ],
)
def test_set_none_takes_a_parameter_away(line: str, value: object) -> None:
    llm = ScriptedLLM(said("one"))
    name = line.split()[1]
    example = "x" if name == "stop" else "3"
    talk(llm, [f"/set {name} {example}", line, "hi"])
    assert getattr(llm.params[0], name) == value


def test_set_shows_the_values_in_use_and_none_goes_back_to_the_models(
    capsys: pytest.CaptureFixture[str],
) -> None:
    llm = ScriptedLLM(said("one"))
    shows = ["/set top_p 0.5", "/set temperature 1.5", "/set top_p none", "/set temperature none"]
    talk(llm, [*shows, "/set top_p", "hi"])
    shown = [line.split() for line in capsys.readouterr().out.splitlines() if line]
    values = [
        value
        for name, value in (line for line in shown if len(line) == 2)
        if name in ("top_p", "temperature")
    ]
    assert values == ["0.5", "1.5", "0.8", "0.6"]
    assert llm.params[0] == SamplingParams()


@pytest.mark.parametrize("typed", [["w" * CONTEXT], ["hi", "/undo"]])
def test_a_message_outside_the_conversation_is_not_saved(tmp_path: Path, typed: list[str]) -> None:
    file = tmp_path / "talk.json"
    offers: list[str] = []
    talk(ScriptedLLM(said("Hello.")), [*typed, f"/save {file}"], offers=offers)
    assert offers[-2] == typed[0], "it was not offered again"
    assert json.loads(file.read_text()) == {"messages": []}


def test_a_last_message_without_an_answer_is_offered(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "talk.json"
    file.write_text(json.dumps({"messages": [{"role": "user", "content": "Hm?"}]}))
    offers: list[str] = []
    conversation = talk(ScriptedLLM(), [f"/load {file}", "/exit"], offers=offers)
    assert conversation.messages == []
    assert offers == ["", "Hm?"]
    assert "talk.json; the last one has no answer" in capsys.readouterr().err


def test_completions_are_commands_and_names_of_parameters() -> None:
    assert {"/help", "/?", "/undo", "/set", "/bye", "/exit", "/quit"} <= set(completions("/"))
    assert "temperature" in list(completions("/set te"))
    assert list(completions("say /he")) == []
    assert list(completions("/set temperature ")) == []


def test_a_piped_line_longer_than_any_prompt_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.TextIOWrapper(io.BytesIO(b"x" * (chat._LONGEST_PIPED + 2)))
    monkeypatch.setattr(chat.sys, "stdin", stream)
    with pytest.raises(RequestError, match="MiB"):
        chat._plain_line("", "")


def test_the_exit_code_is_that_of_the_first_error() -> None:
    llm = ScriptedLLM([CheckpointError], said("fine"))
    chatting = Chat(Conversation(llm, SamplingParams(), None))
    chatting.loop(reader(["/helo", "one", "two"]))
    assert chatting.exit_code == RequestError.exit_code
    other = Chat(Conversation(ScriptedLLM([CheckpointError], said("fine")), SamplingParams(), None))
    other.loop(reader(["one", "two"]))
    assert other.exit_code == CheckpointError.exit_code
    third = Chat(Conversation(ScriptedLLM(said("fine")), SamplingParams(), None))
    third.loop(reader(["one"]))
    assert third.exit_code == 0


def test_a_fence_that_is_never_closed_is_told_and_nothing_is_sent() -> None:
    llm = ScriptedLLM()
    with pytest.raises(RequestError, match='""" at the end of a line; it was not sent'):
        talk(llm, ['"""', "Hi"])
    assert llm.asked == []


def test_an_answer_takes_the_room_there_is_where_more_was_asked_for() -> None:
    llm = ScriptedLLM(said("a" * 20), said("b"), said("c"))
    chatting = Chat(Conversation(llm, SamplingParams(max_tokens=30), None))
    chatting.loop(reader(["x" * 10, "y" * 14, "z" * 15]))
    # The context of 64 less 10; less 10 + 20 + 14; less that, 1 and 15.
    assert [params.max_tokens for params in llm.params] == [30, 20, 4]
