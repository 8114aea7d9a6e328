"""Log-probabilities kept as arrays are the list that they stand for, in a tenth of the memory."""

import sys
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.engine.test_scheduler import small_plan
from thinslice.config import SamplingParams
from thinslice.engine.logprobs import Logprobs, TokenLogprobs
from thinslice.engine.results import ResultsRoom, text_bytes
from thinslice.errors import BusyError, RequestError
from thinslice.units import MIB

FLOATS = st.floats(allow_nan=False)


@st.composite
def token_lists(draw: st.DrawFn) -> list[TokenLogprobs]:
    num_top = draw(st.integers(0, 3))
    top = st.tuples(*[st.tuples(st.integers(0, 2**31 - 1), FLOATS)] * num_top)
    return draw(st.lists(st.builds(TokenLogprobs, FLOATS, FLOATS, top), max_size=8))


@given(token_lists(), st.slices(10), st.integers(0, 9), st.integers(1, 3))
def test_they_behave_as_the_list(
    tokens: list[TokenLogprobs], part: slice, length: int, at_a_time: int
) -> None:
    kept = Logprobs()
    for start in range(0, len(tokens), at_a_time):
        kept.extend(tokens[start : start + at_a_time])
    assert [*kept] == tokens
    assert len(kept) == len(tokens)
    assert kept == Logprobs(tokens)
    assert [*kept[part]] == tokens[part]
    assert [kept[place] for place in range(-len(tokens), len(tokens))] == tokens * 2
    with pytest.raises(IndexError):
        kept[len(tokens)]
    kept.truncate(length)
    assert [*kept] == tokens[:length]
    kept.extend(tokens)
    assert [*kept] == tokens[:length] + tokens


def test_a_token_takes_no_more_than_it_is_said_to() -> None:
    for num_top in (0, 1, 20):
        kept = Logprobs()
        token = TokenLogprobs(-1.5, -0.5, tuple((index, -float(index)) for index in range(num_top)))
        for _ in range(5000):
            kept.extend([token])
        num_bytes = sum(sys.getsizeof(part) for part in kept._parts)
        assert num_bytes <= 5000 * Logprobs.bytes_per_token(num_top) + 512


def test_answers_that_cannot_be_held_are_refused_before_the_first() -> None:
    plan = small_plan()
    few = [(1, SamplingParams(max_tokens=500, logprobs=20, n=4))] * 5
    room = ResultsRoom(plan)
    assert fits(room, few)
    told = r"400 completions of up to 500 tokens.*max_tokens"
    with pytest.raises(RequestError, match=told), room.held_for(few * 20):
        pass
    assert fits(room, [(1, SamplingParams(max_tokens=5, n=4))] * 100)
    roomy = replace(plan, pools=(replace(plan.host, budget_bytes=100 * MIB),))
    assert fits(ResultsRoom(roomy), few * 20)


def test_room_that_is_promised_to_one_call_is_not_promised_to_another() -> None:
    one = [(1, SamplingParams(max_tokens=500, logprobs=20))]
    room = ResultsRoom(small_plan())
    most = max(count for count in range(1, 400) if fits(room, one * count))
    assert 1 < most < 399
    with room.held_for(one):
        assert fits(room, one * (most - 1))
        assert not fits(room, one * most)
    assert fits(room, one * most)


def test_room_grows_with_long_texts_until_there_is_none_left() -> None:
    asked = [(1, SamplingParams(max_tokens=5000))]
    room = ResultsRoom(small_plan())
    before = max(count for count in range(1, 400) if fits(room, asked * count))
    with room.held_for(asked) as held:
        for word in (" answer", " слово", "日本", "é"):
            held.use(1250 * text_bytes(word), "the texts")
        assert fits(room, asked * (before - 1)), "texts of the usual length take what was promised"
        held.use(1000 * text_bytes("x" * 500), "the texts")
        assert not fits(room, asked * (before - 1))
        with pytest.raises(BusyError, match=r"the texts take .* more and the plan leaves"):
            held.use(10_000_000, "the texts")
    assert fits(room, asked * before)


def test_a_text_takes_what_python_keeps_it_in() -> None:
    for text in ("plain", "слово", "日本", "é", "😀 smile", ""):
        whole = text * 1000
        kept = sys.getsizeof(whole) - sys.getsizeof(text[:0])
        # One kind of string has a byte for each character beyond ASCII; the others are exact.
        most = 2 * kept + 4 if "é" not in text else 4 * kept
        assert 2 * kept - 200 <= text_bytes(whole) <= most


def fits(room: ResultsRoom, asked: list[tuple[int, SamplingParams]]) -> bool:
    try:
        with room.held_for(asked):
            return True
    except RequestError:
        return False
