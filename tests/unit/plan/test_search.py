"""How a plan grows into what its budget leaves, and what a streamed one is chosen by."""

from dataclasses import replace
from math import ceil

import pytest
from hypothesis import given

from tests.unit.plan.test_card import planned
from tests.unit.plan.test_choose import Planner
from tests.unit.plan.test_planner import SMOL, budgets, layout_for, try_plan, workloads
from thinslice.plan.case import Workload
from thinslice.plan.choose import request_bytes
from thinslice.plan.cost import kv_bytes_per_token, vocabulary_bytes
from thinslice.units import GIB, MIB


@given(budgets, workloads)
def test_blocks_fill_what_is_left_beside_the_answers(budget: int, workload: Workload) -> None:
    """All of the headroom but a quarter, or 16 MiB and what a form's vocabulary takes."""
    chosen = try_plan(budget, workload)
    if chosen is None:
        return
    one_block = 16 * kv_bytes_per_token(SMOL, chosen.kv_dtype, chosen.num_mtp_layers)
    one_sequence = ceil(chosen.context / 16)
    more = chosen.num_kv_blocks - one_sequence
    assert dict(chosen.parts)["kv cache"] == chosen.num_kv_blocks * one_block
    if chosen.streaming is not None:
        assert more == 0
        return
    headroom = chosen.headroom_bytes + more * one_block
    answers = 16 * MIB + (vocabulary_bytes(SMOL.vocab_size) if workload.forms == "auto" else 0)
    fitting = (headroom - min(headroom // 4, answers)) // one_block
    assert more == min(one_sequence * (workload.max_num_seqs - 1), fitting)


def test_a_cards_blocks_leave_nothing_to_answers_which_lie_elsewhere() -> None:
    chosen = planned(17 * GIB, 8 * GIB, max_num_seqs=64)
    assert chosen.streaming is None
    assert chosen.num_kv_blocks < 64 * ceil(chosen.context / 16)
    assert 0 <= chosen.pools[0].headroom_bytes < chosen.kv_block_bytes


def test_the_least_plan_holds_one_sequence_of_the_shortest_context() -> None:
    planner, too_little, enough = Planner(("small", "bfloat16")), 0, GIB
    while enough - too_little > 1:
        middle = (too_little + enough) // 2
        if planner.plan(middle) is None:
            too_little = middle
        else:
            enough = middle
    least = planner.plan(enough)
    assert least is not None
    assert (least.context, least.num_kv_blocks) == (256, 16)


def test_a_streamed_context_is_4096_at_most_without_being_asked_for() -> None:
    planner = Planner(("small", "float32"))
    streamed = [planner.plan(budget * MIB) for budget in range(300, 1000, 10)]
    contexts = {one.context for one in streamed if one is not None and one.streaming is not None}
    assert max(contexts) == 4096


@pytest.mark.parametrize(("layer_rows", "share_of_weights"), [(128, 8 / 10), (512, 0.0)])
def test_a_held_layer_is_read_from_memory_again_for_each_few_rows(
    layer_rows: int, share_of_weights: float
) -> None:
    """A tenth of what the disk would take; from 512 rows on arithmetic takes longer."""
    workload = Workload(dtype="bfloat16", context=1024)
    chosen = try_plan(300 * MIB, workload)
    assert chosen is not None
    assert chosen.streaming is not None
    layout = layout_for(workload)
    # With a budget for all of the weights nothing is left to read from disk.
    roomy = replace(chosen.pools[0], budget_bytes=64 * GIB)
    held = replace(
        chosen,
        pools=(roomy,),
        chunk=1024,
        streaming=replace(chosen.streaming, layer_rows=layer_rows),
    )
    kept = layout.sweep_bytes(chosen.streaming.slice_bytes).kept_bytes
    assert request_bytes(held, layout) == pytest.approx(share_of_weights * kept)
