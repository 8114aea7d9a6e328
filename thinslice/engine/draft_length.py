"""How many tokens to draft: as many as make the most progress per second by what was measured.

A step in which ``b`` sequences draft ``k`` tokens each runs ``b (k + 1)`` rows through the model
and brings ``b (1 + a_1 + a_1 a_2 + ... + a_1 ... a_k)`` tokens, where ``a_i`` is how often draft i
is accepted once those before it are. Where the weights are streamed, or where memory sets the pace,
rows cost little and drafts pay; where arithmetic does, each row costs its share and they may not.
"""

from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

# Rows of a step to its seconds.
Seconds = Callable[[int], float]

# An acceptance is the mean of the first trials, and follows the last twenty or so from then on.
_SMALLEST_WEIGHT = 0.05
# What stands in for the first trials: somewhat less than what MiMo's layer is reported to reach.
_PRIOR_ACCEPTANCE, _PRIOR_TRIALS = 0.7, 4
# One draft more than the best is tried for a few steps now and then, since acceptance changes with
# the text; the more rarely, the longer that has changed nothing.
_PROBE_STEPS = 16
_FIRST_GAP, _LARGEST_GAP = 240, 3840
# Measured seconds are the median of the last few: one that the machine was busy in says nothing.
_NUM_KEPT, _NUM_NEEDED = 9, 3
# What each row beyond those measured is taken to cost, as a share of the whole: little, so that
# longer drafts are tried, and soon measured.
_ROW_SHARE = 0.02
_EXACT_ROWS = 16


class MeasuredSeconds:
    """Seconds by rows, learnt while steps run; between two numbers of rows that were measured, on
    the line between them.

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


@dataclass(frozen=True)
class DraftReport:
    """What drafting did.

    Attributes:
        steps, seconds: of each draft length 0, 1, 2, ...: the steps that had it as their longest,
            and what those took.
        tried, accepted: of the first, second, ... draft: how often it was verified, all before it
            being accepted, and how often it was accepted.
        num_drafted: all drafts, those behind a rejected one too.
        num_tokens: all tokens the steps brought.
    """

    steps: tuple[int, ...]
    seconds: tuple[float, ...]
    tried: tuple[int, ...]
    accepted: tuple[int, ...]
    num_drafted: int
    num_tokens: int


def _nothing(num_rows: int) -> float:
    """What takes no time."""
    return 0.0


class DraftLength:
    """Chooses the draft length of each step and learns from what became of it.

    Args:
        max_length: the most drafts for a sequence in a step; choices are 0 to this.
        sweep_seconds: of a step of so many rows through the model.
        draft_seconds: of drafting one more token for each of so many sequences; nothing for
            prompt lookup.
        start_seconds: of what comes before the first draft, for so many sequences.
    """

    def __init__(
        self,
        max_length: int,
        sweep_seconds: Seconds,
        draft_seconds: Seconds = _nothing,
        start_seconds: Seconds = _nothing,
    ) -> None:
        self.max_length = max_length
        self._sweep_seconds = sweep_seconds
        self._draft_seconds = draft_seconds
        self._start_seconds = start_seconds
        self._acceptance = [_PRIOR_ACCEPTANCE] * max_length
        self._tried = [0] * max_length
        self._accepted = [0] * max_length
        self._steps = [0] * (max_length + 1)
        self._seconds = [0.0] * (max_length + 1)
        self._num_drafted = self._num_tokens = 0
        self._best = 0
        self._gap, self._steps_to_probe = _FIRST_GAP, _FIRST_GAP

    def choose(self, num_drafting: int, num_other_rows: int = 0) -> int:
        """How many tokens each of ``num_drafting`` sequences should draft in the next step.

        ``num_other_rows`` run beside them: prompt chunks, and sequences that cannot draft.
        """
        if num_drafting == 0:
            return 0
        lengths = range(self.max_length + 1)
        best = max(lengths, key=lambda k: self.progress(k, num_drafting, num_other_rows))
        if best != self._best:
            is_probe_over = self._steps_to_probe <= 0
            self._best, self._gap = best, _FIRST_GAP
            if is_probe_over or self._steps_to_probe > _FIRST_GAP:
                self._steps_to_probe = _FIRST_GAP
        is_probe = self._steps_to_probe <= 0
        return min(best + is_probe, self.max_length)

    def progress(self, length: int, num_drafting: int, num_other_rows: int = 0) -> float:
        """Expected rows of progress per second: tokens emitted, and other rows run."""
        tokens, all_accepted = 1.0, 1.0
        for position in range(length):
            all_accepted *= self.acceptance(position)
            tokens += all_accepted
        seconds = self._sweep_seconds(num_other_rows + num_drafting * (length + 1))
        if length > 0:
            seconds += self._start_seconds(num_drafting)
            seconds += length * self._draft_seconds(num_drafting)
        return (num_other_rows + num_drafting * tokens) / seconds

    def acceptance(self, position: int) -> float:
        """How often the draft at a position (from 0) is accepted once those before it are.

        One that was never tried counts as the one before it.
        """
        while position > 0 and self._tried[position] == 0:
            position -= 1
        return self._acceptance[position]

    def record(self, outcomes: Iterable[tuple[int, int]], seconds: float) -> None:
        """Learn from a step: for each of its sequences the tokens drafted and those accepted."""
        longest = 0
        for num_drafted, num_accepted in outcomes:
            longest = max(longest, num_drafted)
            self._num_drafted += num_drafted
            self._num_tokens += num_accepted + 1
            for position in range(min(num_accepted + 1, num_drafted)):
                self._learn(position, position < num_accepted)
        self._steps[longest] += 1
        self._seconds[longest] += seconds
        self._steps_to_probe -= 1
        if self._steps_to_probe <= -_PROBE_STEPS:
            self._gap = min(2 * self._gap, _LARGEST_GAP)
            self._steps_to_probe = self._gap

    def report(self) -> DraftReport:
        """What drafting did so far."""
        return DraftReport(
            steps=tuple(self._steps),
            seconds=tuple(self._seconds),
            tried=tuple(self._tried),
            accepted=tuple(self._accepted),
            num_drafted=self._num_drafted,
            num_tokens=self._num_tokens,
        )

    def _learn(self, position: int, is_accepted: bool) -> None:
        before = self.acceptance(position)
        self._tried[position] += 1
        self._accepted[position] += is_accepted
        weight = max(1.0 / (self._tried[position] + _PRIOR_TRIALS), _SMALLEST_WEIGHT)
        self._acceptance[position] = before + weight * (is_accepted - before)


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
