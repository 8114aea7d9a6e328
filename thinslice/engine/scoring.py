"""Scores: how likely tokens are that are given, from logits that come a tile at a time.

Logits of all rows of a chunk over a whole vocabulary would take more than the model's layers. Here
a tile is a few rows over the whole vocabulary or, where the head streams by, all rows over a slice
of it; of each row a sum, a logit and the likeliest tokens are kept.
"""

from collections.abc import Sequence as Rows
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from thinslice.engine.logprobs import Logprobs
from thinslice.engine.sampler import NO_NUMBERS, descending_keys, of_keys
from thinslice.engine.scheduler import ScheduledTokens
from thinslice.errors import CheckpointError
from thinslice.kernels.arrays import Floats

Keys = NDArray[np.int64]


class Scores:
    """The scores of one step.

    Args:
        scheduled: what runs in it.
        most_rows: whole rows of logits that there is room for.

    Memory: 24 bytes for each row that is scored, and 8 for each of the likeliest tokens of it;
    while a tile is taken, 24 V.
    """

    def __init__(self, scheduled: Rows[ScheduledTokens], vocab_size: int, most_rows: int) -> None:
        self._vocab_size = vocab_size
        self.most_rows = most_rows
        self._counts = [tokens.num_scored for tokens in scheduled]
        self._targets = np.array([one for each in scheduled for one in _targets(each)], np.int64)
        self._num_top = [
            0 if one.sequence.scored is None else one.sequence.scored.num_top for one in scheduled
        ]
        num_rows = len(self._targets)
        self._max = np.full(num_rows, -np.inf)
        self._sum = np.zeros(num_rows)
        self._logit = np.zeros(num_rows)
        most = max(self._num_top, default=0)
        self._top: Keys = np.full((num_rows, most), np.iinfo(np.int64).max)

    def add(self, first_row: int, first_id: int, logits_TV: Floats) -> None:
        """Take the logits of a tile: of rows from ``first_row`` on and ids from ``first_id`` on.

        The tiles of a row come in the order of ids, and none comes twice.
        """
        # No more of it at a time than one row over the whole vocabulary.
        step = max(self._vocab_size // logits_TV.shape[1], 1)
        for start in range(0, len(logits_TV), step):
            piece = logits_TV[start : start + step]
            rows = slice(first_row + start, first_row + start + len(piece))
            self._add_up(rows, piece)
            self._note_targets(rows, first_id, piece)
            self._note_top(rows, first_id, piece)

    def results(self) -> list[Logprobs | CheckpointError]:
        """Of each that was scheduled, the log-probabilities of its rows' next tokens, or an error
        where logits are not numbers."""
        stops = accumulate(self._counts)
        return [
            self._result(slice(stop - count, stop), num_top)
            for count, stop, num_top in zip(self._counts, stops, self._num_top, strict=True)
        ]

    def _add_up(self, rows: slice, logits: Floats) -> None:
        largest = np.maximum(self._max[rows], logits.max(axis=1))
        with np.errstate(invalid="ignore"):  # what is no number is told by results
            shifted = logits.astype(np.float64)
            shifted -= largest[:, None]
            np.exp(shifted, out=shifted)
            before = self._sum[rows] * np.exp(self._max[rows] - largest)
        self._sum[rows] = before + shifted.sum(axis=1)
        self._max[rows] = largest

    def _note_targets(self, rows: slice, first_id: int, logits: Floats) -> None:
        places = self._targets[rows] - first_id
        (here,) = np.nonzero((places >= 0) & (places < logits.shape[1]))
        self._logit[rows.start + here] = logits[here, places[here]]

    def _note_top(self, rows: slice, first_id: int, logits: Floats) -> None:
        most = self._top.shape[1]
        if most == 0:
            return
        keys = descending_keys(logits, first_id)
        if most < keys.shape[1]:
            keys.partition(most - 1, axis=1)
            keys = keys[:, :most]
        both = np.concatenate([self._top[rows], keys], axis=1)
        both.sort(axis=1)
        self._top[rows] = both[:, :most]

    def _result(self, rows: slice, num_top: int) -> Logprobs | CheckpointError:
        # As in sampler.token_logprobs: first the largest logit is taken away, then the sum.
        with np.errstate(invalid="ignore", divide="ignore"):
            largest, sums = self._max[rows], np.log(self._sum[rows])
            chosen = (self._logit[rows] - largest) - sums
        if not np.isfinite(sums).all() or np.isnan(chosen).any():
            return CheckpointError(NO_NUMBERS)
        logits, token_ids = of_keys(self._top[rows, :num_top])
        values = (logits.astype(np.float64) - largest[:, None]) - sums[:, None]
        return Logprobs.of_rows(chosen, token_ids, values)


def _targets(tokens: ScheduledTokens) -> list[int]:
    """The token after each of the rows that are scored."""
    sequence = tokens.sequence
    stop = sequence.num_computed + tokens.count + 1
    return sequence.tokens(stop - tokens.num_scored, stop)
