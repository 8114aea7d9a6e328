"""The chosen draft length under simulated acceptance, against the best length in hindsight;
and what a step of so many rows takes, learnt from those that ran."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thinslice.engine.draft_length import DraftLength, MeasuredSeconds


@dataclass(frozen=True)
class LinearCost:
    """``base + per_row * rows`` seconds."""

    base: float
    per_row: float = 0.0

    def __call__(self, num_rows: int) -> float:
        return self.base + self.per_row * num_rows


# What MiMo-7B-Base's layer was measured to reach when it is used again (0.88, then 0.2), what a
# fine-tuned one reaches, a text that repeats itself, and one that nothing is known of.
MIMO, TUNED, COPY, NOISE = (0.88, 0.2, 0.1, 0.1), (0.8, 0.7, 0.65, 0.6), (0.98,) * 4, (0.05,) * 4
STREAMED, COMPUTED, BETWEEN = LinearCost(1.0, 0.001), LinearCost(0.01, 1.0), LinearCost(1.0, 0.2)


def num_accepted(acceptance: Sequence[float], length: int, rng: random.Random) -> int:
    """Drafts are accepted up to the first that is not."""
    for position in range(length):
        if rng.random() >= acceptance[position]:
            return position
    return length


def simulate(
    chooser: DraftLength, acceptance: Sequence[float], cost: LinearCost, steps: int, batch: int = 1
) -> tuple[float, list[int]]:
    """Tokens per second of so many steps, and the length of each."""
    rng = random.Random(7)
    tokens, seconds, lengths = 0, 0.0, []
    for _ in range(steps):
        length = chooser.choose(batch)
        outcomes = [(length, num_accepted(acceptance, length, rng)) for _ in range(batch)]
        spent = cost(batch * (length + 1))
        chooser.record(outcomes, spent)
        tokens += sum(accepted + 1 for _, accepted in outcomes)
        seconds += spent
        lengths.append(length)
    return tokens / seconds, lengths


def best_rate(acceptance: Sequence[float], cost: LinearCost, batch: int) -> tuple[float, int]:
    """By the true acceptance: the most tokens per second, and the length that brings it."""
    rates = []
    for length in range(len(acceptance) + 1):
        expected, product = 1.0, 1.0
        for share in acceptance[:length]:
            product *= share
            expected += product
        rates.append((batch * expected / cost(batch * (length + 1)), length))
    return max(rates)


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("cost", [STREAMED, COMPUTED, BETWEEN])
@pytest.mark.parametrize("acceptance", [MIMO, TUNED, COPY, NOISE])
def test_near_the_best_length_in_hindsight(
    acceptance: tuple[float, ...], cost: LinearCost, batch: int
) -> None:
    rate, lengths = simulate(DraftLength(4, cost), acceptance, cost, 4000, batch)
    best, length = best_rate(acceptance, cost, batch)
    assert rate > 0.93 * best, (length, [lengths.count(k) for k in range(5)])


def test_a_wrong_cost_is_seen() -> None:
    """The planted fault: rows thought free where arithmetic sets the pace."""
    rate, _ = simulate(DraftLength(4, STREAMED), NOISE, COMPUTED, 4000)
    assert rate < 0.5 * best_rate(NOISE, COMPUTED, 1)[0]


def test_off_where_drafts_lose_and_tried_again_rarely() -> None:
    chooser = DraftLength(4, BETWEEN)
    _, lengths = simulate(chooser, NOISE, BETWEEN, 6000)
    settled = lengths[500:]
    assert settled.count(0) > 0.97 * len(settled)
    assert settled.count(1) >= 16
    assert set(settled) == {0, 1}


def test_on_again_when_the_text_changes() -> None:
    chooser = DraftLength(4, BETWEEN)
    simulate(chooser, NOISE, BETWEEN, 1000)
    assert chooser.choose(1) == 0
    _, lengths = simulate(chooser, COPY, BETWEEN, 3000)
    assert min(lengths[-500:]) == 4


def test_more_sequences_draft_less_where_rows_cost() -> None:
    """A larger batch already uses what a sweep brings."""
    chooser = DraftLength(4, lambda rows: max(1.0, rows / 8))
    for _ in range(200):
        chooser.record([(4, num_accepted(TUNED, 4, random.Random(1)))], 1.0)
    lengths = [chooser.choose(batch) for batch in (1, 2, 4, 8)]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] > lengths[-1] == 0


def test_rows_that_run_anyway_count() -> None:
    """Beside a prompt chunk that fills the processor, a row of draft is no longer free."""
    chooser = DraftLength(2, lambda rows: max(1.0, rows / 8))
    for position in (0, 0, 0, 0, 1, 1):
        chooser.record([(2, position)], 1.0)
    assert chooser.choose(1) > 0
    assert chooser.choose(1, num_other_rows=64) == 0
    assert chooser.choose(0, num_other_rows=64) == 0


def test_drafting_has_its_own_price() -> None:
    free, dear = DraftLength(1, STREAMED), DraftLength(1, STREAMED, LinearCost(1.0))
    assert free.choose(1) == 1
    assert dear.choose(1) == 0


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), max_size=50))
def test_the_report_counts_what_was_recorded(steps: list[tuple[int, int]]) -> None:
    chooser = DraftLength(4, STREAMED)
    outcomes = [(drafted, min(drafted, accepted)) for drafted, accepted in steps]
    for outcome in outcomes:
        chooser.record([outcome], 0.5)
    report = chooser.report()
    assert report.num_drafted == sum(drafted for drafted, _ in outcomes)
    assert report.num_tokens == len(outcomes) + sum(accepted for _, accepted in outcomes)
    assert sum(report.accepted) == sum(accepted for _, accepted in outcomes)
    assert sum(report.steps) == len(outcomes)
    assert sum(report.seconds) == 0.5 * len(outcomes)
    for position in range(4):
        reached = [one for one in outcomes if one[0] > position and one[1] >= position]
        assert report.tried[position] == len(reached)
        assert 0.0 <= chooser.acceptance(position) <= 1.0


def measured(**seconds_of: float) -> MeasuredSeconds:
    """Each number of rows measured often enough to count."""
    seconds = MeasuredSeconds(unknown=7.0)
    for rows, value in seconds_of.items():
        for _ in range(3):
            seconds.record(int(rows.removeprefix("rows")), value)
    return seconds


def test_before_anything_was_measured_all_take_the_same() -> None:
    seconds = MeasuredSeconds(unknown=7.0)
    assert (seconds(1), seconds(500)) == (7.0, 7.0)
    seconds.record(4, 1.0)
    seconds.record(4, 1.0)
    assert seconds(4) == 7.0, "two are not enough"
    seconds.record(4, 1.0)
    assert seconds(4) == 1.0


def test_between_two_numbers_of_rows_it_is_on_the_line() -> None:
    seconds = measured(rows4=1.0, rows8=3.0)
    assert [seconds(rows) for rows in (4, 5, 6, 8)] == [1.0, 1.5, 2.0, 3.0]


def test_beyond_those_measured_it_hopes() -> None:
    seconds = measured(rows4=1.0)
    assert seconds(2) == 0.5
    assert seconds(8) == pytest.approx(1.08)


def test_one_slow_step_says_nothing_and_several_do() -> None:
    seconds = measured(rows2=1.0)
    seconds.record(2, 50.0)
    assert seconds(2) == 1.0
    for _ in range(9):
        seconds.record(2, 2.0)
    assert seconds(2) == 2.0, "what was long ago is forgotten"


def test_large_numbers_of_rows_count_together() -> None:
    seconds = MeasuredSeconds(unknown=7.0)
    for rows in (512, 530, 570):
        seconds.record(rows, 2.0)
    assert seconds(540) == 2.0


def test_what_counts_is_the_median_of_the_last_few() -> None:
    seconds = MeasuredSeconds(unknown=7.0)
    for one in (9.0, 1.0, 2.0):
        seconds.record(4, one)
    assert seconds(4) == 2.0
    seconds.record(4, 3.0)
    assert seconds(4) == 2.5
    for _ in range(9):
        seconds.record(4, 0.1)
    assert seconds(4) == 0.1
