"""The drafter's K and V, kept in step with a sequence, against its whole text run at once."""

import random
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest

from tests.speculation import (
    Change,
    Run,
    Speculation,
    cached,
    empty_caches,
    from_scratch,
    load_small_mtp,
    unchanged,
)
from thinslice.engine.mtp_drafter import CertainRows, MTPDrafter
from thinslice.model.decoder import Decoder
from thinslice.model.weights import Weights
from tools.small_mtp_text import examples

pytestmark = pytest.mark.usefixtures("one_thread")
PROMPTS = [one.prompt_ids for one in islice(examples(random.Random(5), held_out=True), 4)]
# Steps long enough that drafts are accepted, and at the end of texts rejected too.
COUNT = 60


@pytest.fixture(scope="module")
def weights() -> Weights:
    return load_small_mtp()


def check_in_step(speculation: Speculation, run: Run) -> None:
    sequence, num_drafts = run.sequence, len(run.drafts)
    kept = cached(speculation.mtp_caches, run.blocks, sequence.num_computed)
    token_ids = sequence.tokens(0, sequence.num_computed + 1)
    expected, drafts = from_scratch(speculation.weights, token_ids, num_drafts)
    for one, other in zip(kept, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1.3e-6, atol=1e-5)
    assert run.drafts == drafts


def speculate(weights: Weights, num_drafts: int, change: Change = unchanged) -> Speculation:
    speculation = Speculation(weights, PROMPTS, num_drafts, change=change)
    speculation.generate(COUNT)
    return speculation


@pytest.mark.parametrize("num_drafts", [1, 3])
def test_k_and_v_kept_in_step_equal_those_of_the_whole_text(
    weights: Weights, num_drafts: int
) -> None:
    speculation = speculate(weights, num_drafts)
    for run in speculation.runs:
        assert 0 < run.num_accepted < run.num_drafted, "both outcomes must have come"
        check_in_step(speculation, run)


def test_a_prompt_in_chunks_leaves_what_it_leaves_at_once(weights: Weights) -> None:
    speculation = Speculation(weights, PROMPTS)
    while any(run.sequence.num_computed == 0 or not run.drafts for run in speculation.runs):
        speculation.step([run for run in speculation.runs if not run.drafts], chunk=7)
    for run in speculation.runs:
        assert run.sequence.num_computed == len(run.sequence.prompt_token_ids)
        check_in_step(speculation, run)


def test_drafts_do_not_depend_on_company(weights: Weights) -> None:
    together = speculate(weights, 2)
    for prompt, run in zip(PROMPTS, together.runs, strict=True):
        alone = Speculation(weights, [prompt], 2)
        (tokens,) = alone.generate(COUNT)
        assert tokens[:COUNT] == run.sequence.completion_token_ids[:COUNT]


def test_sequences_may_draft_different_lengths(weights: Weights) -> None:
    speculation = speculate(weights, 3)
    lengths = [3, 0, 1, 2]
    for run, length in zip(speculation.runs, lengths, strict=True):
        run.num_drafts = length
    speculation.step(speculation.runs)
    assert [len(run.drafts) for run in speculation.runs] == lengths
    for run in speculation.runs:
        check_in_step(speculation, run)


def tokens_of_rejected_drafts(rows: CertainRows, drafts: list[int]) -> CertainRows:
    """Pairs the rows with what was drafted, not with what was then said."""
    count = len(rows.next_token_ids)
    wrong = drafts + rows.next_token_ids[len(drafts) :]
    return replace(rows, next_token_ids=wrong[:count])


def one_position_late(rows: CertainRows, drafts: list[int]) -> CertainRows:
    return replace(rows, start=rows.start + 1)


def no_rows_of_accepted_drafts(rows: CertainRows, drafts: list[int]) -> CertainRows:
    """Only the last row is given; those of the accepted drafts before it are forgotten."""
    if not drafts:
        return rows
    last = len(rows.next_token_ids) - 1
    return replace(
        rows,
        start=rows.start + last,
        hidden_TD=rows.hidden_TD[last:],
        next_token_ids=rows.next_token_ids[last:],
    )


@pytest.mark.parametrize(
    "fault", [tokens_of_rejected_drafts, one_position_late, no_rows_of_accepted_drafts]
)
def test_faults_are_seen(weights: Weights, fault: Change) -> None:
    speculation = speculate(weights, 1, fault)
    for run in speculation.runs:
        with pytest.raises(AssertionError):
            check_in_step(speculation, run)


def test_a_layer_trained_on_normed_states_gets_them(weights: Weights) -> None:
    """FastMTP's setting: as if the states given had gone through the main model's norm."""
    decoder, blocks = Decoder(weights.shape), [0, 1, 2, 3]
    size = (5, weights.shape.hidden_size)
    hidden = np.random.default_rng(0).standard_normal(size, dtype=np.float32)
    kept = []
    for normed, states in ((True, hidden), (False, decoder.norm(hidden, weights)), (False, hidden)):
        (cache,) = empty_caches(weights.shape, 1, 1)
        drafter = MTPDrafter(decoder, weights, [cache], takes_normed_hidden=normed)
        drafter.propose([CertainRows(0, states, [1, 2, 3, 4, 5], blocks)])
        kept.append(cached(cache, blocks, 5)[0])
    assert np.array_equal(kept[0], kept[1])
    assert not np.allclose(kept[0], kept[2])
