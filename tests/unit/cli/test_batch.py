"""A file of prompts: answers in order, each what it is alone; a run goes on where it was cut."""

import gc
import json
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.tiny_llm import write_model
from thinslice.cli.batch import Batch, _append, answer_all, answered_already
from thinslice.cli.prompt_file import PromptFile
from thinslice.config import SamplingParams
from thinslice.constraint import Constraint
from thinslice.engine.in_order import complete_in_order
from thinslice.engine.llm import LLM
from thinslice.engine.request import Completion
from thinslice.errors import BusyError, ConfigError, RequestError, StoreError
from thinslice.units import KIB

GREEDY = SamplingParams(temperature=0, max_tokens=6)
MESSAGES = [{"role": "system", "content": "Brief."}, {"role": "user", "content": "Hm?"}]
LINES = [
    '"Name a river."',
    json.dumps({"prompt": "Say hi.", "id": 7}),
    json.dumps({"messages": MESSAGES}),
    "{not json",
    json.dumps({"text": "no prompt"}),
    json.dumps({"messages": [1, 2]}),
    json.dumps({"prompt": "long " * 2000}),
    '" "',
    '"What is 2 + 2?"',
    json.dumps({"messages": MESSAGES, "tools": [{"function": {"name": "f"}}]}),
    json.dumps({"prompt": "Say hi.", "tools": [{"function": {"name": "f"}}]}),
    json.dumps({"prompt": "Say hi.", "messages": MESSAGES}),
    json.dumps({"id": "b", "prompt": "Say hi.", "max_tokens": 1, "n\n": 2}),
    json.dumps({"prompt": "Say hi.", "id": [1]}),
    json.dumps({"prompt": "Say hi.", **{f"x{place}": 1 for place in range(12)}}),
]


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    path = write_model(tmp_path_factory.mktemp("model") / "tiny.gguf")
    with LLM(str(path), memory="2GiB", context=256, max_num_seqs=2) as loaded:
        yield loaded


@pytest.fixture
def batch(tmp_path: Path) -> Batch:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(LINES) + "\n\n")
    out, dtypes = tmp_path / "out.jsonl", ("auto", "auto")
    return Batch("tiny", PromptFile(prompts), out, None, False, GREEDY, dtypes)


def records(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def without_seed(path: Path) -> list[dict[str, object]]:
    return [{key: one[key] for key in one if key != "seed"} for one in records(path)]


def test_every_line_is_answered_in_order_as_it_is_alone(llm: LLM, batch: Batch) -> None:
    assert answer_all(llm, batch) == RequestError.exit_code
    answers = records(batch.out)
    assert [one["index"] for one in answers] == [*range(len(LINES))]
    asked = {0: "Name a river.", 1: "Say hi.", 8: "What is 2 + 2?"}
    for index, text in asked.items():
        alone = llm.chat([{"role": "user", "content": text}], GREEDY)
        assert (answers[index]["text"], answers[index]["finish_reason"]) == (
            alone.text,
            alone.finish_reason,
        )
    assert answers[2]["text"] == llm.chat(MESSAGES, GREEDY).text
    errors = {index: str(one["error"]) for index, one in enumerate(answers) if "error" in one}
    assert set(errors) == {3, 4, 5, 6, 7, *range(9, 15)}
    assert "not JSON" in errors[3]
    assert "holds no prompt" in errors[4]
    assert "message 1 is 1" in errors[5]
    assert "context" in errors[6]
    assert "empty" in errors[7]
    assert "more than 256 tokens" in errors[9]
    assert "tools go with messages" in errors[10]
    assert "both prompt and messages" in errors[11]
    assert "not read in a line: max_tokens, n\\n;" in errors[12]
    assert "id is [1]" in errors[13]
    assert "x9 and 2 more;" in errors[14]
    assert {index: one["id"] for index, one in enumerate(answers) if "id" in one} == {1: 7, 12: "b"}


def test_a_byte_order_mark_is_no_part_of_a_prompt_and_a_suffix_may_have_capitals(
    llm: LLM, batch: Batch, tmp_path: Path
) -> None:
    answer_all(llm, batch)
    expected = [one["text"] for one in records(batch.out)[:3]]
    marked = tmp_path / "marked.JSONL"
    marked.write_bytes(b"\xef\xbb\xbf" + "\n".join(LINES[:3]).encode())
    other = replace(batch, prompts=PromptFile(marked), out=tmp_path / "marked-out.jsonl")
    assert answer_all(llm, other) == 0
    assert [one["text"] for one in records(other.out)] == expected


def test_a_run_that_was_cut_anywhere_goes_on_and_gives_the_same_file(
    llm: LLM, batch: Batch
) -> None:
    answer_all(llm, batch)
    whole, expected = batch.out.read_bytes(), without_seed(batch.out)
    for cut in (0, 1, len(whole) // 3, len(whole) // 2, len(whole) - 1, len(whole)):
        batch.out.write_bytes(whole[:cut])
        answer_all(llm, batch)
        assert without_seed(batch.out) == expected
        kept = whole[:cut].rpartition(b"\n")[0]
        assert batch.out.read_bytes().startswith(kept), "an answer was made anew"


def test_whether_all_answers_are_there_is_told_without_the_model(
    llm: LLM, batch: Batch, tmp_path: Path
) -> None:
    stored = replace(batch, model=str(write_model(tmp_path / "tiny.gguf")))
    stored.check()
    assert answered_already(stored) is None
    answer_all(llm, stored)
    # The same command ends as it did before: some of these prompts cannot be answered.
    assert answered_already(stored) == answer_all(llm, stored) == RequestError.exit_code
    with pytest.raises(ConfigError, match="other settings"):
        answered_already(replace(stored, raw=True))
    lines = stored.out.read_bytes().splitlines(keepends=True)
    stored.out.write_bytes(b"".join(lines[:-1]) + lines[-1][:-1])
    assert answered_already(stored) is None
    good = replace(
        stored, prompts=PromptFile(tmp_path / "good.jsonl"), out=tmp_path / "good-out.jsonl"
    )
    good.prompts.path.write_text(LINES[0])
    good.check()
    assert answer_all(llm, good) == 0
    assert answered_already(good) == 0


@pytest.mark.parametrize(
    "change",
    [
        {"model": "other"},
        {"system": "Be brief."},
        {"raw": True},
        {"sampling": replace(GREEDY, max_tokens=5)},
        {"dtypes": ("int8", "auto")},
    ],
)
def test_answers_of_other_settings_are_left_as_they_are(
    llm: LLM, batch: Batch, change: dict[str, object]
) -> None:
    answer_all(llm, batch)
    before = batch.out.read_bytes()
    with pytest.raises(ConfigError, match="from line 1 on"):
        answer_all(llm, replace(batch, **change))
    batch.prompts.path.write_text("\n".join([*LINES[:3], '"another"']))
    with pytest.raises(ConfigError, match="from line 4 on"):
        answer_all(llm, batch)
    assert batch.out.read_bytes() == before


@pytest.mark.parametrize("text", ["my own notes\n", "my own notes, with no newline", "[]\n"])
def test_a_file_that_holds_no_answers_is_left_as_it_is(batch: Batch, llm: LLM, text: str) -> None:
    batch.out.write_text(text)
    with pytest.raises(ConfigError, match="something else than answers; name another file"):
        answer_all(llm, batch)
    assert batch.out.read_text() == text


def test_answers_hang_on_what_the_model_advises(
    llm: LLM, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = replace(batch, sampling=SamplingParams(temperature=0, max_tokens=2))
    answer_all(llm, batch)
    before = batch.out.read_bytes()
    monkeypatch.setattr(llm, "sampling", {"temperature": 0.5})  # the user's own value holds
    answer_all(llm, batch)
    monkeypatch.setattr(llm, "sampling", {"repetition_penalty": 1.5})
    with pytest.raises(ConfigError, match="from line 1 on"):
        answer_all(llm, batch)
    assert batch.out.read_bytes() == before


def test_a_system_prompt_opens_each_conversation_that_has_none(llm: LLM, batch: Batch) -> None:
    batch.prompts.path.write_text("\n".join(LINES[:3]))
    answer_all(llm, replace(batch, system="Shout."))
    first, _, own = records(batch.out)
    shout = {"role": "system", "content": "Shout."}
    expected = llm.chat([shout, {"role": "user", "content": "Name a river."}], GREEDY)
    assert first["prompt_tokens"] == len(expected.prompt_token_ids)
    assert own["prompt_tokens"] == len(llm.chat(MESSAGES, GREEDY).prompt_token_ids)


def test_lines_of_a_plain_file_are_prompts_as_they_stand(
    llm: LLM, batch: Batch, tmp_path: Path
) -> None:
    plain = tmp_path / "prompts.txt"
    plain.write_text('"quoted"\nन\n', encoding="utf-8")
    assert answer_all(llm, replace(batch, prompts=PromptFile(plain), raw=True)) == 0
    counts = [one["prompt_tokens"] for one in records(batch.out)]
    assert counts == [len(llm.prepare(text).token_ids) for text in ('"quoted"', "न")]


def test_files_that_cannot_be_used_are_refused_before_a_model_is_loaded(batch: Batch) -> None:
    batch.check()
    empty = batch.prompts.path.with_name("empty.txt")
    empty.write_text("\n \n")
    with pytest.raises(RequestError, match="holds no prompt"):
        replace(batch, prompts=PromptFile(empty)).check()
    with pytest.raises(ConfigError, match="cannot read"):
        replace(batch, prompts=PromptFile(empty.with_name("none"))).check()
    with pytest.raises(ConfigError, match="cannot write"):
        replace(batch, out=empty.parent / "no" / "folder").check()
    with pytest.raises(ConfigError, match="the file of the prompts"):
        replace(batch, out=batch.prompts.path).check()


def test_a_place_that_keeps_no_answers_is_no_file_for_them(batch: Batch) -> None:
    with pytest.raises(ConfigError, match="is not a file"):
        replace(batch, out=Path("/dev/null")).check()


def test_a_full_disk_is_told_with_the_files_name() -> None:
    with (
        open("/dev/full", "wb", buffering=0) as file,
        pytest.raises(StoreError, match="cannot write /dev/full: the disk is full"),
    ):
        _append(file, {})


def test_few_prompts_are_read_ahead_and_leaving_early_leaves_nothing(llm: LLM) -> None:
    num_read = 0

    def prompts() -> Iterator[str]:
        nonlocal num_read
        for index in range(100):
            num_read += 1
            yield f"prompt {index}"

    answers = complete_in_order(llm, prompts(), GREEDY)
    for num_given in range(1, 11):
        assert isinstance(next(answers), Completion)
        assert num_read <= num_given + 2 * llm.plan.max_num_seqs
    answers.close()
    assert not llm.engine.has_work


def test_texts_that_are_too_long_are_in_memory_one_at_a_time(llm: LLM) -> None:
    def peak_of(count: int) -> int:
        texts = (f"{index} " * 300_000 for index in range(count))
        tracemalloc.start()
        try:
            for answer in complete_in_order(llm, texts, GREEDY):
                assert isinstance(answer, RequestError)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak_of(1)
    assert peak_of(20) < peak_of(1) + 500_000


def test_who_takes_the_answers_may_ask_for_more_meanwhile(llm: LLM) -> None:
    """The steps of other calls end some of the prompts."""
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    answers = []
    for answer in complete_in_order(llm, ["a b c"] * 12, params):
        answers.append(answer)
        llm.generate("d e f", replace(params, max_tokens=9))
    assert len(answers) == 12


def test_prompts_wait_where_the_plan_has_no_room_for_so_many_at_once(llm: LLM) -> None:
    """Each holds an answer's form while it runs, and more of it the longer it gets."""
    params = replace(GREEDY, max_tokens=200, constraint=Constraint.regex("[a-z]{150}"))
    room = llm.engine.results
    (alone,) = llm.generate(["prompt 0"], params)
    gc.collect()
    # For three as they begin, and for two as they end.
    taken = room.left_bytes - 900 * KIB
    assert room.take(taken)
    try:
        answers = [*complete_in_order(llm, [f"prompt {one % 2}" for one in range(9)], params)]
    finally:
        room.release(taken)
    found = [one.text for one in answers if isinstance(one, Completion) and one.error is None]
    assert len(found) == 9
    assert found[0] == alone.text


def test_a_prompt_that_finds_no_room_alone_is_told(llm: LLM) -> None:
    params = replace(GREEDY, constraint=Constraint.regex("[a-z]{150}"))
    llm.prepare("a", params)
    room = llm.engine.results
    taken = room.left_bytes - 100 * KIB
    assert room.take(taken)
    try:
        answers = [*complete_in_order(llm, ["a", "b"], params)]
    finally:
        room.release(taken)
    assert all(isinstance(one, BusyError) for one in answers)
