"""What a step of so many rows takes, learnt from those that ran."""

import pytest

from thinslice.engine.measured_seconds import MeasuredSeconds


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
