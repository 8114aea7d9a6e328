"""A thought ends within its budget: by any tokens, with drafts and without, after what goes wrong.

The vocabulary of 64 has the tags whole, in parts and beside other text, and parts of characters.
"""

import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engines import run_all, tiny_engine
from tests.unit.engine.test_interrupts import Interruption, always_drafting  # noqa: F401
from thinslice.config import SamplingParams
from thinslice.engine import thought_budget
from thinslice.engine.drafting import Drafting
from thinslice.engine.engine import Engine
from thinslice.engine.processors import LogitsProcessor
from thinslice.engine.sequence import Sequence
from thinslice.engine.thought_budget import Allowance, ThoughtBudget, ThoughtTokens
from thinslice.errors import RequestError
from thinslice.plan.memory_plan import DraftPlan
from thinslice.text.reasoning import Phase, Thought

pytestmark = pytest.mark.usefixtures("one_thread", "short_wrap_up")
WHOLE = [b"<think>", b"</think>", b"</think>\n\n", b"<", b"/", b">", b"think", b"</", b"think>"]
PARTS = [b"\xf0", b"\x9f", b"\x99", b"\x82", b"\xc3", b"\xa9", b"\n", b" ", b"", b"\xf0\x9f"]
LETTERS = [bytes([one]) for one in range(ord("a"), ord("z") + 1)]
VOCAB = [b"", b"", *WHOLE, *PARTS, *LETTERS]
VOCAB += [b"%d" % number for number in range(64 - len(VOCAB))]
EOS = 1
INSIDE, BEFORE = Thought(Phase.INSIDE), Thought(Phase.BEFORE)
PROMPT = [3, 9, 27, 3, 9, 27, 3, 9]
DRAWN = SamplingParams(temperature=1.5, seed=5, max_tokens=30, ignore_eos=True)


@pytest.fixture(autouse=True)
def short_wrap_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thought_budget, "WRAP_UP", "\nso\n")


@dataclass
class StandIn:
    """A tokenizer of VOCAB; it writes a tag as one token, or letter by letter."""

    has_tags: bool = True
    vocab_size: int = 64

    def shown_bytes(self, token_id: int) -> bytes:
        return VOCAB[token_id]

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        data, ids = text.encode(), []
        known = VOCAB if self.has_tags else [*LETTERS, b"<", b">", b"/", b"\n"]
        while data:
            token = max((one for one in known if one and data.startswith(one)), key=len)
            ids.append(VOCAB.index(token))
            data = data[len(token) :]
        return ids


def tags(*, has_tags: bool = True) -> ThoughtTokens:
    return ThoughtTokens(cast("Any", StandIn(has_tags)))


def budget(
    most: int | None,
    start: Thought = INSIDE,
    *,
    has_tags: bool = True,
    seconds: float | None = None,
) -> ThoughtBudget:
    allowance = Allowance(most, seconds, lambda: 0.0)
    return ThoughtBudget(tags(has_tags=has_tags), start, allowance)


def thought_of(start: Thought, token_ids: list[int]) -> Thought:
    for token_id in token_ids:
        start = start.after(VOCAB[token_id])
    return start


def written(processor: LogitsProcessor, wishes: list[int]) -> list[int]:
    """What is written where a model wants these tokens, one after the other."""
    sequence = SimpleNamespace(prompt_token_ids=[], completion_token_ids=[])
    for wish in wishes:
        row = np.zeros(64, np.float32)
        row[wish] = 1.0
        row = processor(row, sequence, [])
        sequence.completion_token_ids.append(int(row.argmax()))
    return sequence.completion_token_ids


A, END, LED = VOCAB.index(b"a"), VOCAB.index(b"</think>\n\n"), len("\nso\n") + 1


def test_near_its_end_a_thought_is_led_to_it_and_the_answer_is_free() -> None:
    token_ids = written(budget(20), [A] * 30)
    free = 20 - LED - 3  # three for a character that may begin at any time
    assert token_ids == [A] * free + list(tags().ending.token_ids) + [A] * (30 - free - LED)


def test_a_wrap_up_takes_at_most_half_of_the_budget() -> None:
    assert written(budget(2 * LED - 1), [A] * 12)[5:7] == [END, A]
    assert written(budget(2 * LED), [A] * 12)[2:7] == list(tags().ending.token_ids)


@pytest.mark.parametrize("most", [1, 2, 3, 4])
def test_the_smallest_budgets_close_at_once(most: int) -> None:
    assert written(budget(most), [A] * 3) == [END, A, A]


def test_a_model_that_closes_by_itself_is_left_alone() -> None:
    wishes = [A, A, VOCAB.index(b"</think>\n\n"), A, A, A, A, A, A, A, A, A]
    processor = budget(9)
    assert written(processor, wishes) == wishes
    assert not processor.has_cut(len(wishes))


def test_it_tells_from_where_on_it_was_forced() -> None:
    processor = budget(20)
    written(processor, [A] * 30)
    assert [processor.has_cut(length) for length in (12, 13)] == [False, True]


def test_an_empty_line_of_the_answer_follows_and_is_not_of_the_thought() -> None:
    token_ids = written(budget(20, has_tags=False), [A] * 30)
    text = b"".join(VOCAB[one] for one in token_ids)
    assert text.index(b"</think>\n\na") + len(b"</think>") == 17
    assert thought_of(INSIDE, token_ids).num_tokens == 17


def test_a_character_is_not_cut_in_two() -> None:
    smile = [VOCAB.index(bytes([one])) for one in "🙂".encode()]
    for shift in range(4):
        token_ids = written(budget(20), [A] * shift + smile * 10)
        text = b"".join(VOCAB[one] for one in token_ids)
        thought = text[: text.index(b"\nso\n")]
        assert thought.decode().strip("a🙂") == ""
        assert thought_of(INSIDE, token_ids).num_tokens <= 20


def test_a_thought_for_which_there_is_no_room_is_not_opened() -> None:
    for has_tags, least in ((True, 2), (False, 16)):
        opening = tags(has_tags=has_tags).opening
        wishes = [*opening, *[A] * 10]
        assert written(budget(0, BEFORE, has_tags=has_tags), wishes) != wishes
        # Of a tag in parts it is the last that opens it.
        closed = written(budget(least, BEFORE, has_tags=has_tags), [*opening, *[A] * 20])
        assert thought_of(BEFORE, closed).num_tokens >= len(opening) + 1
        assert thought_of(BEFORE, closed).phase is Phase.BEHIND


def test_a_row_that_is_not_changed_is_given_back_and_none_is_written_over() -> None:
    sequence = SimpleNamespace(prompt_token_ids=[], completion_token_ids=[A])
    row = np.zeros(64, np.float32)
    assert budget(50)(row, sequence, []) is row
    assert budget(3)(row, SimpleNamespace(completion_token_ids=[]), []) is not row
    assert budget(0, BEFORE)(row, SimpleNamespace(completion_token_ids=[]), []) is not row
    assert not row.any()


@settings(max_examples=300, deadline=None)
@given(
    most=st.integers(0, 24),
    is_open=st.booleans(),
    has_tags=st.booleans(),
    wishes=st.lists(st.integers(0, 63), min_size=30, max_size=40),
    drafted=st.integers(0, 5),
)
def test_no_tokens_take_a_thought_past_its_budget(
    most: int, is_open: bool, has_tags: bool, wishes: list[int], drafted: int
) -> None:
    """Whatever a model wants to write; and a row behind accepted drafts is that without drafts."""
    start = INSIDE if is_open else BEFORE
    least = tags(has_tags=has_tags).least(start)
    if is_open and most < least:
        most = least  # the prompt ends in a closed thought then
    token_ids = written(budget(most, start, has_tags=has_tags), wishes)
    thought = thought_of(start, token_ids)
    assert thought.num_tokens <= most
    assert not is_open or thought.phase is Phase.BEHIND
    place = len(token_ids) - 6
    sequence = SimpleNamespace(completion_token_ids=token_ids[:place])
    row = np.arange(64, dtype=np.float32)
    accepted = token_ids[place : place + drafted]
    ahead = budget(most, start, has_tags=has_tags)(row, sequence, accepted)
    sequence.completion_token_ids = token_ids[: place + drafted]
    plain = budget(most, start, has_tags=has_tags)(row, sequence, [])
    assert np.array_equal(ahead, plain)


def test_a_completion_that_got_shorter_is_followed_anew() -> None:
    processor, wishes = budget(12), [A] * 20
    expected = written(processor, wishes)
    assert written(processor, wishes) == expected
    row = np.zeros(64, np.float32)
    for length in (15, 8, 3, 9, 0, 14):
        sequence = SimpleNamespace(completion_token_ids=expected[:length])
        again = processor(row, sequence, [])
        assert np.array_equal(again, budget(12)(row, sequence, []))


@dataclass
class Clock:
    """Seconds that a test sets."""

    now: float = 0.0

    def __call__(self) -> float:
        return self.now


def timed(clock: Clock, seconds: float, most: int | None = None) -> ThoughtBudget:
    return ThoughtBudget(tags(), INSIDE, Allowance(most, seconds, clock))


def test_time_that_is_over_leads_a_thought_to_its_end() -> None:
    clock = Clock(100.0)
    processor = timed(clock, 2.0)
    sequence = SimpleNamespace(prompt_token_ids=[], completion_token_ids=[])
    for count in range(20):
        clock.now = 100.0 + count / 2
        row = np.zeros(64, np.float32)
        row[A] = 1.0
        sequence.completion_token_ids.append(int(processor(row, sequence, []).argmax()))
    assert sequence.completion_token_ids == [A] * 4 + list(tags().ending.token_ids) + [A] * 11
    assert processor.has_cut(5)
    assert not processor.has_cut(4)


def test_time_is_looked_at_again_where_a_step_was_undone() -> None:
    clock = Clock()
    processor, row = timed(clock, 1.0), np.zeros(64, np.float32)
    late = SimpleNamespace(completion_token_ids=[A] * 3)
    assert processor(row, late, []) is row
    clock.now = 5.0
    assert int(processor(row, late, [A, A]).argmax()) == tags().ending.token_ids[0]
    # Two tokens fewer than were there when the time was over.
    assert int(processor(row, late, []).argmax()) == tags().ending.token_ids[0]
    late.completion_token_ids.append(tags().ending.token_ids[0])
    assert int(processor(row, late, []).argmax()) == tags().ending.token_ids[1]


def test_time_waits_for_the_rest_of_a_character_and_no_longer() -> None:
    clock = Clock(0.0)
    processor, row = timed(clock, 1.0), np.zeros(64, np.float32)
    start = VOCAB.index(b"\xf0")
    sequence = SimpleNamespace(completion_token_ids=[start])
    processor(row, SimpleNamespace(completion_token_ids=[]), [])
    clock.now = 9.0
    for _ in range(3):
        assert processor(row, sequence, []) is row
        sequence.completion_token_ids.append(start)
    assert int(processor(row, sequence, []).argmax()) == tags().ending.token_ids[0]


def test_a_tokenizer_that_cannot_write_the_tag_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StandIn, "encode", lambda *_, **__: [A])
    with pytest.raises(RequestError, match="cannot write </think>"):
        tags()


@dataclass
class Case:
    """A request of an engine, and what makes its budget."""

    prompt: list[int]
    params: SamplingParams
    most: int
    start: Thought
    has_tags: bool
    made: list[ThoughtBudget] = field(default_factory=list)

    def add(self, engine: Engine) -> list[Sequence]:
        return engine.add_samples(self.prompt, self.params, processors=self._processors)

    def _processors(self) -> tuple[LogitsProcessor, ...]:
        return (budget(self.most, self.start, has_tags=self.has_tags),)


def cases(rng: random.Random) -> Iterator[Case]:
    while True:
        has_tags, is_open = rng.random() < 0.7, rng.random() < 0.7
        start = INSIDE if is_open else BEFORE
        least = tags(has_tags=has_tags).least(start)
        most = rng.randrange(least, least + 16)
        params = replace(DRAWN, seed=rng.randrange(99), temperature=rng.choice([0, 1.0, 2.0]))
        prompt = [*PROMPT[: rng.randrange(3, 9)], rng.randrange(2, 64)]
        yield Case(prompt, replace(params, n=rng.randrange(1, 3)), most, start, has_tags)


def drafting_engine(num_kv_blocks: int) -> Engine:
    engine = tiny_engine(num_kv_blocks=num_kv_blocks, max_num_seqs=4)
    engine.drafting = Drafting(DraftPlan(uses_ngram=True, num_mtp_layers=0, length=3), None)
    return engine


def alone(case: Case) -> list[list[int]]:
    engine = tiny_engine()
    sequences = case.add(engine)
    run_all(engine)
    return [sequence.completion_token_ids for sequence in sequences]


def check(case: Case, sequences: list[Sequence], expected: list[list[int]]) -> None:
    assert [sequence.completion_token_ids for sequence in sequences] == expected
    for token_ids in expected:
        assert thought_of(case.start, token_ids).num_tokens <= case.most


@pytest.mark.usefixtures("always_drafting")
def test_drafts_company_and_preemption_change_no_token(is_long: bool) -> None:
    rng = random.Random(7)
    accepted = preempted = 0
    for _ in range(40 if is_long else 5):
        asked = [next(cases(rng)) for _ in range(5)]
        engine = drafting_engine(num_kv_blocks=26)
        groups = [case.add(engine) for case in asked]
        run_all(engine)
        for case, sequences in zip(asked, groups, strict=True):
            check(case, sequences, alone(case))
        accepted += engine.metrics.accepted_tokens
        preempted += engine.metrics.preemptions
    assert accepted > 0
    assert preempted > 0


@pytest.mark.usefixtures("always_drafting")
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_an_interrupt_changes_no_token(error: type[BaseException], is_long: bool) -> None:
    rng = random.Random(3)
    asked = [next(cases(rng)) for _ in range(3)]
    expected = [alone(case) for case in asked]
    counting = Interruption()
    _run(asked, expected, counting)
    places = rng.sample(range(1, len(counting.lines) + 1), 400 if is_long else 40)
    for at in places:
        _run(asked, expected, Interruption(at, error))


def _run(asked: list[Case], expected: list[list[list[int]]], interruption: Interruption) -> None:
    """Steps with one interruption; memory that runs out in sampling ends that sequence alone."""
    engine = drafting_engine(num_kv_blocks=40)
    groups = [case.add(engine) for case in asked]
    before = sys.gettrace()
    while engine.has_work:
        sys.settrace(interruption)
        try:
            engine.step()
        except (KeyboardInterrupt, MemoryError):
            assert interruption.is_over
        finally:
            sys.settrace(before)
    for case, sequences, wanted in zip(asked, groups, expected, strict=True):
        for sequence, token_ids in zip(sequences, wanted, strict=True):
            got = sequence.completion_token_ids
            is_cut = isinstance(sequence.error, MemoryError)
            assert got == (token_ids[: len(got)] if is_cut else token_ids), interruption.place
            assert thought_of(case.start, got).num_tokens <= case.most
