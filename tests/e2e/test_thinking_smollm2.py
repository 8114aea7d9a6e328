"""Thinking budgets where a tag is several tokens: SmolLM2 with a template that opens a thought."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.tiny_llm import TEMPLATE, beside
from thinslice import LLM, SamplingParams
from thinslice.engine.draft_length import DraftLength
from thinslice.engine.thought_budget import ThoughtTokens
from thinslice.text.chat_template import ChatTemplate
from thinslice.text.reasoning import WRAP_UP
from thinslice.units import MIB

OPENING = TEMPLATE.replace("assistant\n", "assistant\n<think>\n")
DRAWN = SamplingParams(temperature=0.8, seed=5)
QUESTIONS = ("Why is the sky blue? Write emoji too.", "Write a story about a fox and a crow.")


@pytest.fixture(scope="module")
def llm(smollm2_path: Path) -> Iterator[LLM]:
    with LLM(str(smollm2_path), memory=beside(400 * MIB), context=1024, draft="ngram") as model:
        model.tokenizer.__dict__["chat_template"] = ChatTemplate(OPENING)
        yield model


def test_tags_are_several_tokens(llm: LLM) -> None:
    tags = ThoughtTokens(llm.tokenizer)
    assert min(len(tags.opening), tags.closing.num_inside) > 1
    assert len(tags.openers) > 1
    assert not tags.are_tokens
    assert llm.thinks  # by its template


@pytest.mark.parametrize("budget", [4, 16, 64, 100])
def test_a_thought_ends_within_its_budget(
    llm: LLM, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrap_up = ThoughtTokens(llm.tokenizer).ending.num_inside
    params = replace(DRAWN, max_thinking_tokens=budget, max_tokens=budget + 24)
    asked = [[{"role": "user", "content": question}] for question in QUESTIONS]
    plain = llm.generate(asked, params)
    monkeypatch.setattr(DraftLength, "choose", lambda self, num, *_: self.max_length if num else 0)
    drafted = llm.generate(asked, params)
    for before, after in zip(plain, drafted, strict=True):
        assert before.token_ids == after.token_ids
        assert 0 < after.num_reasoning <= budget
        assert after.is_thought_cut
        assert after.reasoning.endswith(WRAP_UP.strip()) == (2 * wrap_up <= budget)
        assert after.text
        text = llm.tokenizer.decode(after.token_ids[: after.num_reasoning])
        assert text.endswith("</think>")
        assert "�" not in text
