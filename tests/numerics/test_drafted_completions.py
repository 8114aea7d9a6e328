"""Completions with drafts are those without: stop strings, log-probabilities, samples, aborts."""

import random
from collections import Counter
from dataclasses import replace
from itertools import islice

import pytest

from tests.speculation import SMALL_MTP
from tests.tiny_llm import beside
from thinslice import LLM, SamplingParams
from thinslice.engine.draft_length import DraftLength
from thinslice.engine.request import Completion
from thinslice.engine.sampler import Sampled
from thinslice.units import GIB
from tools.small_mtp_text import examples

pytestmark = pytest.mark.usefixtures("one_thread", "full_length")
PROMPTS = [one.prompt + "\n" for one in islice(examples(random.Random(4), held_out=True), 12)]
GREEDY = SamplingParams(temperature=0, max_tokens=64)


@pytest.fixture
def full_length(monkeypatch: pytest.MonkeyPatch) -> None:
    def choose(self: DraftLength, num_drafting: int, num_other_rows: int = 0) -> int:
        return self.max_length if num_drafting else 0

    monkeypatch.setattr(DraftLength, "choose", choose)


def load(draft: str, dtype: str) -> LLM:
    return LLM(
        str(SMALL_MTP),
        memory=beside(GIB),
        dtype=dtype,
        context=320,
        draft=draft,
        draft_length=5,
    )


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def plain(request: pytest.FixtureRequest) -> LLM:
    return load("off", request.param)


def with_drafts(plain: LLM) -> LLM:
    return load("mtp", plain.plan.dtype)


def both(plain: LLM, params: SamplingParams) -> tuple[list[Completion], list[Completion]]:
    drafting = with_drafts(plain)
    done = drafting.generate(PROMPTS, params)
    assert drafting.engine.metrics.accepted_tokens > 50
    assert drafting.engine.metrics.requests == Counter(one.finish_reason for one in done)
    drafting.engine.scheduler.blocks.check()
    assert drafting.engine.scheduler.blocks.num_free == drafting.plan.num_kv_blocks
    return plain.generate(PROMPTS, params), done


def test_a_stop_string_among_accepted_drafts_ends_the_text_where_it_would(plain: LLM) -> None:
    """Each a text of several tokens that comes in the middle of a step's."""
    without, done = both(plain, replace(GREEDY, stop=("+1", " 1", "ar", "=")))
    assert sum(one.finish_reason == "stop" for one in done) > 5
    for one, other in zip(without, done, strict=True):
        assert (one.text, one.reasoning) == (other.text, other.reasoning)
        assert (one.token_ids, one.finish_reason) == (other.token_ids, other.finish_reason)


def test_drafted_tokens_have_the_log_probabilities_they_would(plain: LLM) -> None:
    without, done = both(plain, replace(GREEDY, logprobs=2))
    for one, other in zip(without, done, strict=True):
        assert one.token_ids == other.token_ids
        assert len(other.logprobs) == len(other.token_ids)
        assert [*one.logprobs] == [*other.logprobs]


def test_texts_are_scored_beside_drafts(plain: LLM) -> None:
    llm = with_drafts(plain)
    texts = [llm.prepare(prompt).token_ids for prompt in PROMPTS[:6]]
    completions = [llm.engine.add_request(text, GREEDY) for text in texts]
    scored = [llm.engine.add_scored(text) for text in texts]
    while llm.engine.has_work:
        llm.engine.step()
        llm.engine.scheduler.blocks.check()
    assert llm.engine.metrics.accepted_tokens > 20
    for text, completion, sequence in zip(texts, completions, scored, strict=True):
        assert [*sequence.logprobs] == [*plain.engine.score(text)]
        done = plain.engine.add_request(text, GREEDY)
        while plain.engine.has_work:
            plain.engine.step()
        assert completion.completion_token_ids == done.completion_token_ids


def test_log_probabilities_of_another_row_would_be_seen(
    plain: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Sampled.__init__

    def shifted(self: Sampled, token_ids: list[int], logprobs: list[object]) -> None:
        original(self, token_ids, _Repeating())  # type: ignore[arg-type]

    monkeypatch.setattr(Sampled, "__init__", shifted)
    with pytest.raises(AssertionError):
        test_drafted_tokens_have_the_log_probabilities_they_would(plain)


class _Repeating(list):  # type: ignore[type-arg]
    """Whatever is added, it keeps the first."""

    def append(self, value: object) -> None:
        super().append(self[0] if self else value)


def test_samples_of_one_prompt_are_those_without_drafts(plain: LLM) -> None:
    params = SamplingParams(temperature=2.0, top_p=1.0, seed=7, n=3, max_tokens=48)
    without, done = both(plain, params)
    assert [one.token_ids for one in without] == [one.token_ids for one in done]
    assert len({tuple(one.token_ids) for one in done}) > len(PROMPTS)


def test_who_is_aborted_with_drafts_in_hand_leaves_nothing_behind(plain: LLM) -> None:
    llm = with_drafts(plain)
    kept, gone = (llm.engine.add_request(llm.prepare(p).token_ids, GREEDY) for p in PROMPTS[:2])
    while not gone.draft_token_ids:
        llm.engine.step()
    llm.engine.abort(gone)
    while llm.engine.has_work:
        llm.engine.step()
        llm.engine.scheduler.blocks.check()
    assert kept.completion_token_ids == plain.generate(PROMPTS[:1], GREEDY)[0].token_ids
    assert llm.engine.scheduler.blocks.num_free == llm.plan.num_kv_blocks
