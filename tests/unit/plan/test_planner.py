"""The planner: the peak fits, more memory is never worse, every suggestion fits."""

import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thinslice.errors import BudgetError, ConfigError
from thinslice.plan.memory_plan import MemoryPlan
from thinslice.plan.model_shape import ModelShape
from thinslice.plan.planner import BLOCK_SIZE, Workload, plan, smallest_budget
from thinslice.units import GIB, MIB, parse_bytes

SMOL = ModelShape(
    architecture="LlamaForCausalLM",
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    head_dim=64,
    rms_norm_eps=1e-5,
    rope_theta=100000.0,
    max_position_embeddings=8192,
    tie_word_embeddings=True,
)
LARGE = replace(
    SMOL,
    vocab_size=152064,
    hidden_size=5120,
    intermediate_size=27648,
    num_hidden_layers=64,
    num_attention_heads=40,
    num_key_value_heads=8,
    head_dim=128,
    max_position_embeddings=40960,
    tie_word_embeddings=False,
)
RUNTIME = 250 * MIB
budgets = st.integers(min_value=1 * MIB, max_value=8 * GIB)
workloads = st.builds(
    Workload,
    context=st.none() | st.integers(1, 8192),
    max_num_seqs=st.integers(1, 64),
    dtype=st.sampled_from(["bfloat16", "float32"]),
)


def try_plan(budget: int, workload: Workload) -> MemoryPlan | None:
    try:
        return plan(SMOL, budget, workload, RUNTIME)
    except BudgetError:
        return None


@given(budgets, workloads)
def test_the_planned_peak_fits_and_holds_the_context(budget: int, workload: Workload) -> None:
    chosen = try_plan(budget, workload)
    if chosen is None:
        return
    assert chosen.peak_bytes <= budget
    assert chosen.peak_bytes == sum(num_bytes for _, num_bytes in chosen.parts)
    assert all(num_bytes >= 0 for _, num_bytes in chosen.parts)
    assert workload.context in (None, chosen.context)
    assert 0 < chosen.context <= SMOL.max_position_embeddings
    assert chosen.num_kv_blocks * BLOCK_SIZE >= chosen.context


@given(budgets, st.integers(0, 4 * GIB), workloads)
def test_a_larger_budget_is_never_worse(budget: int, more: int, workload: Workload) -> None:
    smaller, larger = try_plan(budget, workload), try_plan(budget + more, workload)
    if smaller is None:
        return
    assert larger is not None
    assert (larger.chunk, larger.context) >= (smaller.chunk, smaller.context)
    if workload.context is not None:
        assert larger.num_kv_blocks >= smaller.num_kv_blocks


@given(budgets, workloads)
def test_every_suggestion_fits(budget: int, workload: Workload) -> None:
    try:
        plan(SMOL, budget, workload, RUNTIME)
    except BudgetError as error:
        suggestions = re.findall(r"^    --(\w+) (\S+)$", str(error), re.MULTILINE)
        assert suggestions
        for option, value in suggestions:
            changed, room = workload, budget
            if option == "memory":
                room = parse_bytes(value)
            elif option == "context":
                changed = replace(workload, context=int(value))
            else:
                changed = replace(workload, dtype=value)
            assert plan(SMOL, room, changed, RUNTIME).peak_bytes <= room


def test_the_error_names_the_need_by_part() -> None:
    with pytest.raises(BudgetError) as caught:
        plan(SMOL, 300 * MIB, Workload(context=8192, dtype="float32"), RUNTIME)
    first, second, *rest = str(caught.value).splitlines()
    assert first == "no plan fits --memory 300MiB at --context 8192"
    assert second.startswith("  needs 1.16 GiB: runtime 0.28, weights 0.50, kv cache 0.35, act")
    assert rest[0] == "  any one of these fits:"


@given(workloads)
def test_one_mib_below_the_smallest_budget_nothing_fits(workload: Workload) -> None:
    floor = smallest_budget(SMOL, workload, RUNTIME)
    assert try_plan(floor, workload) is not None
    assert try_plan(floor - MIB, workload) is None


def test_a_context_the_model_does_not_have_is_refused() -> None:
    for context in (0, -1, 8193):
        with pytest.raises(ConfigError, match=r"this model has 1\.\.8192"):
            plan(SMOL, GIB, Workload(context=context), RUNTIME)


def test_a_32b_model_is_planned_without_its_weights() -> None:
    chosen = plan(LARGE, 80 * GIB, Workload(), RUNTIME)
    assert dict(chosen.parts)["weights"] > 60 * GIB
