"""A packed batch against its definition, token by token."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from thinslice.model.batch import ForwardBatch, TokenRun, pack

BLOCK_SIZE = 4


@st.composite
def runs(draw: st.DrawFn) -> list[TokenRun]:
    """Up to five runs, each in blocks of its own, with a block or two to spare."""
    free = list(range(200))
    drawn = []
    for _ in range(draw(st.integers(1, 5))):
        first, count = draw(st.integers(0, 30)), draw(st.integers(1, 40))
        num_blocks = -(-(first + count) // BLOCK_SIZE) + draw(st.integers(0, 2))
        blocks = [free.pop(draw(st.integers(0, len(free) - 1))) for _ in range(num_blocks)]
        token_ids = draw(st.lists(st.integers(0, 99), min_size=count, max_size=count))
        drawn.append(TokenRun(token_ids, first, blocks))
    return drawn


def assert_is_batch_of(batch: ForwardBatch, drawn: list[TokenRun]) -> None:
    row = 0
    tables = batch.sequences.block_tables.tolist()
    for run, span, table in zip(drawn, batch.sequences.spans, tables, strict=True):
        used = run.blocks[: -(-run.stop // BLOCK_SIZE)]
        assert (span.start, span.num_positions) == (row, run.stop)
        assert table[: len(used)] == used
        for position, token_id in enumerate(run.token_ids, start=run.first):
            slot = run.blocks[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE
            assert int(batch.token_ids_T[row]) == token_id
            assert int(batch.positions_T[row]) == position
            assert int(batch.slots_T[row]) == slot
            row += 1
        assert span.stop == row
    assert row == len(batch.token_ids_T)


@given(runs())
def test_a_batch_holds_each_run_in_its_place(drawn: list[TokenRun]) -> None:
    batch = pack(drawn, BLOCK_SIZE)
    assert_is_batch_of(batch, drawn)
    assert batch.slots_T.dtype == batch.positions_T.dtype == batch.token_ids_T.dtype == np.int64
    for part in vars(batch.sequences).values():
        assert not isinstance(part, np.ndarray) or part.dtype == np.int32


@given(runs(), st.integers(1, 50))
def test_its_parts_are_the_batches_of_what_they_hold(drawn: list[TokenRun], max_rows: int) -> None:
    """A run that is cut is as two runs one after the other."""
    row = 0
    for rows, part in pack(drawn, BLOCK_SIZE).parts(max_rows):
        assert rows.start == row
        assert 0 < rows.stop - rows.start <= max_rows
        assert_is_batch_of(part, cut_runs(drawn, rows))
        row = rows.stop
    assert row == sum(len(run.token_ids) for run in drawn)


def cut_runs(drawn: list[TokenRun], rows: slice) -> list[TokenRun]:
    """What of these runs lies in some rows."""
    cut, row = [], 0
    for run in drawn:
        start, stop = max(rows.start - row, 0), min(rows.stop - row, len(run.token_ids))
        if start < stop:
            cut.append(TokenRun(run.token_ids[start:stop], run.first + start, run.blocks))
        row += len(run.token_ids)
    return cut


def test_a_planted_fault_is_seen() -> None:
    drawn = [TokenRun([1, 2, 3], 2, [5, 7]), TokenRun([4], 0, [6])]
    batch = pack(drawn, BLOCK_SIZE)
    batch.slots_T[1] += 1
    with pytest.raises(AssertionError):
        assert_is_batch_of(batch, drawn)
