"""Histograms count each value in its range."""

from thinslice.engine.metrics import Histogram


def test_a_value_counts_in_the_first_range_that_holds_it() -> None:
    histogram = Histogram((1.0, 3.0))
    for value in (0.5, 1.0, 2.0, 3.0, 7.0):
        histogram.observe(value)
    assert histogram.counts == [2, 2, 1]
    assert (histogram.count, histogram.total, histogram.mean) == (5, 13.5, 2.7)
    assert Histogram((1.0,)).mean == 0.0
