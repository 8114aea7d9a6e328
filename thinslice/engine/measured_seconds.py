"""How long a step takes by its number of rows, learnt while it runs."""

from bisect import bisect_left
from collections import deque
from collections.abc import Collection

# A value is the median of the last few: one that the machine was busy in says nothing.
_NUM_KEPT, _NUM_NEEDED = 9, 3
# What each row beyond those measured is taken to cost, as a share of the whole: little, so that
# longer drafts are tried, and soon measured.
_ROW_SHARE = 0.02
_EXACT_ROWS = 16


class MeasuredSeconds:
    """Seconds by rows; between two numbers of rows that were measured, on the line between them.

    Beyond those measured it hopes for the best (fewer rows take their share, more take hardly
    longer), so that whoever chooses by it tries, and it learns.

    Args:
        unknown: what any number of rows takes before anything was measured.
    """

    def __init__(self, unknown: float) -> None:
        self._unknown = unknown
        self._recent: dict[int, deque[float]] = {}
        self._medians: dict[int, float] = {}
        self._known: list[int] = []

    def record(self, num_rows: int, seconds: float) -> None:
        """Learn from one step."""
        rows = _rounded(num_rows)
        recent = self._recent.setdefault(rows, deque(maxlen=_NUM_KEPT))
        recent.append(seconds)
        if len(recent) < _NUM_NEEDED:
            return
        self._medians[rows] = _median(recent)
        if len(self._known) < len(self._medians):
            self._known = sorted(self._medians)

    def __call__(self, num_rows: int) -> float:
        """Expected seconds of a step of so many rows."""
        if not self._known:
            return self._unknown
        rows, known = _rounded(num_rows), self._known
        place = bisect_left(known, rows)
        if place == len(known):
            return self._medians[known[-1]] * (1 + _ROW_SHARE * (rows - known[-1]))
        after = self._medians[known[place]]
        if known[place] == rows:
            return after
        if place == 0:
            return after * rows / known[0]
        before, start = self._medians[known[place - 1]], known[place - 1]
        return before + (after - before) * (rows - start) / (known[place] - start)


def _median(values: Collection[float]) -> float:
    """The one in the middle, of an even number halfway between two; the module statistics would
    bring in 0.8 MiB of others."""
    ordered, middle = sorted(values), len(values) // 2
    return (ordered[middle] + ordered[~middle]) / 2


def _rounded(num_rows: int) -> int:
    """Larger numbers in steps of about a tenth, so that each is met often."""
    if num_rows <= _EXACT_ROWS:
        return num_rows
    step = 1 << (num_rows.bit_length() - 4)
    return num_rows // step * step
