"""A trained model that thinks, within budgets: it is led to the end of its thought, and answers.

``pytest --long`` asks 200 prompts for each budget.
"""

import json
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.thinking import SMALL_THINKER, asked, held_out, last_number, load, num_reasoning, opened
from tests.warm_start import warm_thinslice
from thinslice import LLM, Completion, Conversation, RequestError, SamplingParams
from thinslice.engine.draft_length import DraftLength
from thinslice.text.reasoning import WRAP_UP

GREEDY = SamplingParams(temperature=0)
DRAWN = SamplingParams(temperature=0.7, seed=3)
BUDGETS = (16, 64, 256)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with load(draft="ngram") as model:
        yield model


@pytest.fixture(scope="module")
def plain() -> Iterator[LLM]:
    with load(draft="off") as model:
        yield model


@pytest.fixture(scope="module")
def opened_llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    with load(opened(tmp_path_factory.mktemp("opened")), draft="off") as model:
        yield model


def thought_of(done: Completion) -> str:
    return done.reasoning.removesuffix(WRAP_UP.rstrip("\n")).rstrip("\n")


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("params", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_a_thought_stays_within_its_budget_and_an_answer_follows(
    llm: LLM, budget: int, params: SamplingParams, is_long: bool
) -> None:
    examples = held_out(200 if is_long else 8)
    prompts = [asked(one) for one in examples]
    free = llm.generate(prompts, params)
    done = llm.generate(prompts, replace(params, max_thinking_tokens=budget))
    num_right = 0
    for before, after in zip(free, done, strict=True):
        assert after.num_reasoning == num_reasoning(after.token_ids) <= budget
        assert after.finish_reason == "stop"
        assert after.text
        assert before.reasoning.startswith(thought_of(after))
        assert after.is_thought_cut == (after.token_ids != before.token_ids)
        num_right += after.text == last_number(thought_of(after))
    assert num_right >= 0.75 * len(done)
    assert any(one.is_thought_cut for one in done)
    assert any(WRAP_UP.strip() in one.reasoning for one in done) == (budget == 256)


def test_drafts_and_streams_change_nothing(
    llm: LLM, plain: LLM, monkeypatch: pytest.MonkeyPatch, is_long: bool
) -> None:
    monkeypatch.setattr(DraftLength, "choose", lambda self, num, *_: self.max_length if num else 0)
    num_accepted = 0
    for index, example in enumerate(held_out(60 if is_long else 4, seed=1)):
        budget = BUDGETS[index % 3]
        params = replace((GREEDY, DRAWN)[index % 2], max_thinking_tokens=budget)
        whole = plain.chat(asked(example), params)
        stream = llm.stream(asked(example), params)
        chunks = list(stream)
        assert stream.completion.token_ids == whole.token_ids
        assert stream.completion.num_reasoning == whole.num_reasoning
        for kind, text in (("reasoning", whole.reasoning), ("answer", whole.text)):
            assert "".join(one.text for one in chunks if one.kind == kind) == text
        num_accepted += stream.completion.num_accepted
    assert num_accepted > 0


def test_the_log_probability_of_a_forced_token_is_the_models_own(plain: LLM) -> None:
    params = replace(GREEDY, max_thinking_tokens=16, logprobs=1)
    done = plain.chat(asked(held_out(1)[0]), params)
    forced = done.logprobs[done.num_reasoning - 1]
    assert forced.logprob < -1
    assert forced.drawn_logprob == 0.0
    scored = plain.engine.score([*done.prompt_token_ids, *done.token_ids])
    assert scored[-len(done.token_ids) + done.num_reasoning - 1].logprob == pytest.approx(
        forced.logprob, abs=1e-3
    )


@pytest.mark.parametrize("way", ["tokens", "seconds", "conversation"])
def test_no_thought_is_none(llm: LLM, opened_llm: LLM, way: str) -> None:
    for model in (llm, opened_llm):
        for example in held_out(3):
            conversation = Conversation(asked(example))
            params = GREEDY
            if way == "conversation":
                conversation = replace(conversation, enable_thinking=False)
            else:
                params = replace(GREEDY, **{f"max_thinking_{way}": 0})
            done = model.chat(conversation, params)
            assert (done.reasoning, done.num_reasoning, done.is_thought_cut) == ("", 0, False)
            assert "think" not in done.text
            assert done.text
            text = model.tokenizer.decode(done.prompt_token_ids)
            assert text.endswith("assistant\n<think>\n\n</think>\n\n")


@pytest.mark.parametrize("budget", [1, 4, 5, 16, 64, 256])
def test_a_thought_that_the_prompt_opens_counts_from_there(opened_llm: LLM, budget: int) -> None:
    for example in held_out(3):
        done = opened_llm.chat(asked(example), replace(GREEDY, max_thinking_tokens=budget))
        assert done.num_reasoning == num_reasoning(done.token_ids) <= budget
        assert done.text
        assert done.finish_reason == "stop"


def test_seconds_lead_a_thought_to_its_end_too(plain: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that goes on by a second each time it is read."""
    now = iter(range(1_000_000))
    monkeypatch.setattr(plain.engine, "clock", lambda: float(next(now)))
    example = max(held_out(20), key=lambda one: len(one.answer))
    done = plain.chat(asked(example), replace(GREEDY, max_thinking_seconds=60.0))
    assert done.is_thought_cut
    assert WRAP_UP.strip() in done.reasoning
    assert done.finish_reason == "stop"
    assert done.text
    longer = plain.chat(asked(example), replace(GREEDY, max_thinking_seconds=1e8))
    assert not longer.is_thought_cut


def test_a_budget_is_for_conversations(plain: LLM) -> None:
    with pytest.raises(RequestError, match="max_thinking_tokens is for conversations"):
        plain.generate("from 20", replace(GREEDY, max_thinking_tokens=16))


def test_several_answers_have_a_budget_each(plain: LLM) -> None:
    example = max(held_out(20), key=lambda one: len(one.answer))
    params = replace(DRAWN, n=3, temperature=1.5, max_thinking_tokens=64)
    done = plain.generate([asked(example)], params)
    assert len({tuple(one.token_ids) for one in done}) > 1
    assert all(one.num_reasoning <= 64 for one in done)


def test_the_answers_length_is_what_the_thought_leaves(plain: LLM) -> None:
    params = replace(GREEDY, max_thinking_tokens=64, max_tokens=30)
    done = plain.chat(asked(max(held_out(20), key=lambda one: len(one.answer))), params)
    assert (done.finish_reason, done.text, done.num_reasoning) == ("length", "", 30)


def command(*arguments: str, stdin: bytes = b"") -> "subprocess.CompletedProcess[bytes]":
    start = [*warm_thinslice(), arguments[0], str(SMALL_THINKER), "--memory", "400MiB"]
    more = ["--temperature", "0", *arguments[1:]]
    return subprocess.run([*start, *more], input=stdin, capture_output=True, check=False)


def test_run_tells_what_the_thought_took() -> None:
    bound = ("--max-thinking-tokens", "64", "moss: down from 90")
    done = command("run", "--json", *bound)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert 0 < report["reasoning_tokens"] <= 64
    assert report["is_thought_cut"]
    assert report["text"]
    shown = command("run", *bound).stderr.decode()
    assert f"thought led to its end at {report['reasoning_tokens']} tokens, " in shown
    refused = command("run", "--raw", *bound)
    assert refused.returncode == 5
    assert b"--max-thinking-tokens is for conversations" in refused.stderr


def test_chat_takes_a_budget_too() -> None:
    lines = b"moss: down from 90\n/set max_thinking_tokens 0\nmoss: down from 80\n"
    done = command("chat", "--max-thinking-tokens", "64", stdin=lines)
    assert done.returncode == 0, done.stderr
    first, second = (
        line for line in done.stderr.splitlines() if b" tokens, peak" in line or b"tokens/s" in line
    )
    assert b"thought led to its end at" in first
    assert b"thought" not in second


def test_the_files_are_small(tmp_path: Path) -> None:
    folder = opened(tmp_path)
    assert sum(path.stat().st_size for path in folder.iterdir()) < 1.5 * (1 << 20)
