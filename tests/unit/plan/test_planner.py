"""The planner: the peak fits, more memory is never worse, every suggestion fits."""

import re
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thinslice.errors import BudgetError, ConfigError
from thinslice.plan.case import Workload
from thinslice.plan.cost import vocabulary_bytes
from thinslice.plan.memory_plan import DraftPlan, MemoryPlan
from thinslice.plan.model_shape import ModelShape
from thinslice.plan.planner import plan
from thinslice.plan.processor import Processor
from thinslice.plan.search import BLOCK_SIZE
from thinslice.plan.tensors import Room, tensors_of
from thinslice.plan.weight_layout import (
    Stored,
    StoredMatrix,
    WeightLayout,
    layout_of,
    packed_layout,
    stored_as,
)
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
BF16 = stored_as(SMOL, "BF16")
Q4_1 = {name: StoredMatrix("Q4_1", entry.row_bytes * 5 // 16) for name, entry in BF16.items()}
LARGE_BF16 = layout_of(LARGE, stored_as(LARGE, "BF16"), "bfloat16")
budgets = st.integers(min_value=1 * MIB, max_value=8 * GIB)
workloads = st.builds(
    Workload,
    context=st.none() | st.integers(1, 8192),
    max_num_seqs=st.integers(1, 64),
    dtype=st.sampled_from(["bfloat16", "float32", "int8", "int4"]),
    kv_dtype=st.sampled_from([None, "bfloat16", "int8"]),
    draft=st.sampled_from(["off", "off", "auto", "ngram"]),
    reserve_bytes=st.sampled_from([0, 64 * MIB]),
    reserve_per_token=st.integers(0, 256),
    forms=st.sampled_from(["auto", "reserved", "off"]),
)


# Made once: a layout keeps the sizes of its slices.
LAYOUTS: dict[tuple[object, ...], WeightLayout] = {}


def layout_for(workload: Workload, stored: Stored = BF16, shape: ModelShape = SMOL) -> WeightLayout:
    """A float model's layout, or that of the packed one where the workload asks for it."""
    key = (workload.dtype, id(stored), shape)
    if key not in LAYOUTS:
        is_packed = stored is BF16 and workload.dtype in ("int4", "int8")
        LAYOUTS[key] = (
            packed_layout(shape, workload.dtype)
            if is_packed
            else layout_of(shape, stored, workload.dtype)
        )
    return LAYOUTS[key]


def try_plan(budget: int, workload: Workload, stored: Stored = BF16) -> MemoryPlan | None:
    try:
        return plan(SMOL, layout_for(workload, stored), workload, Processor.of(budget, RUNTIME))
    except BudgetError:
        return None


@given(budgets, workloads, st.sampled_from([BF16, Q4_1]))
def test_the_planned_peak_fits_and_holds_the_context(
    budget: int, workload: Workload, stored: Stored
) -> None:
    chosen = try_plan(budget, workload, stored)
    if chosen is None:
        return
    assert chosen.peak_bytes <= budget
    assert chosen.peak_bytes == sum(num_bytes for _, num_bytes in chosen.parts)
    assert all(num_bytes >= 0 for _, num_bytes in chosen.parts)
    assert workload.context in (None, chosen.context)
    assert 0 < chosen.context <= SMOL.max_position_embeddings
    assert chosen.num_kv_blocks * BLOCK_SIZE >= chosen.context
    reserved = workload.reserve_bytes + workload.reserve_per_token * chosen.context
    assert dict(chosen.parts).get("reserved", 0) == reserved
    forms = vocabulary_bytes(SMOL.vocab_size) if workload.forms == "reserved" else 0
    assert dict(chosen.parts).get("forms", 0) == forms


def test_room_for_forms_is_refused_or_left_out_by_what_is_suggested() -> None:
    workload = Workload(512, dtype="bfloat16", forms="reserved")
    shapes = SMOL, layout_for(workload), workload
    with pytest.raises(BudgetError, match=r"forms 27\.\d\d MiB") as refused:
        plan(*shapes, Processor.of(RUNTIME + 40 * MIB, RUNTIME))
    assert "    --forms off" in str(refused.value)
    without = plan(
        *shapes[:2], replace(workload, forms="off"), Processor.of(RUNTIME + 40 * MIB, RUNTIME)
    )
    assert "forms" not in dict(without.parts)


@given(budgets, st.integers(1, 8192), st.sampled_from([BF16, Q4_1]))
def test_a_held_layer_is_counted(budget: int, context: int, stored: Stored) -> None:
    """As many bytes as the layer that streams most has; a prompt then takes one sweep."""
    workload = Workload(context, dtype="bfloat16" if stored is BF16 else "int4")
    chosen = try_plan(budget, workload, stored)
    if chosen is None or chosen.streaming is None:
        return
    streaming = chosen.streaming
    if streaming.layer_rows is None:
        assert "held layer" not in dict(chosen.parts)
        return
    assert streaming.layer_rows < chosen.chunk == context
    pinned = set(streaming.pinned())
    held = [0] * SMOL.num_hidden_layers
    for index, one in enumerate(layout_for(workload, stored).slices(streaming.slice_bytes)):
        if index not in pinned and ".layers." in one.matrix.name:
            held[int(one.matrix.name.split(".")[2])] += one.kept_bytes
    assert dict(chosen.parts)["held layer"] == max(held)


def test_a_long_prompt_takes_one_sweep_where_a_layer_can_be_held() -> None:
    """A short one goes through at once, and no layer is held for it. Where no layer can be held, a
    long one goes through in chunks."""
    long = plan(LARGE, LARGE_BF16, Workload(16384), Processor.of(8 * GIB, RUNTIME))
    assert (long.chunk, long.streaming.layer_rows) == (16384, 512)
    assert long.describe_chunk() == "16384 tokens, through each layer 512 at a time"
    short = plan(LARGE, LARGE_BF16, Workload(512), Processor.of(8 * GIB, RUNTIME))
    assert (short.chunk, short.streaming.layer_rows) == (512, None)
    assert short.describe_chunk() == "512 tokens"
    tight = plan(LARGE, LARGE_BF16, Workload(4800), Processor.of(2 * GIB, RUNTIME))
    assert tight.chunk < 4800
    assert tight.streaming.layer_rows is None


@given(budgets, st.integers(1, 64))
def test_pinned_slices_are_spread_and_counted(budget: int, max_num_seqs: int) -> None:
    chosen = try_plan(budget, Workload(256, max_num_seqs))
    if chosen is None or chosen.streaming is None:
        return
    streaming = chosen.streaming
    slices = layout_for(Workload()).slices(streaming.slice_bytes)
    places = streaming.pinned()
    resident = set(places)
    pinned = [index in resident for index in range(len(slices))]
    assert len(set(places)) == len(places)
    assert len(slices) == streaming.num_slices
    assert sum(pinned) == streaming.num_pinned
    for start in range(0, len(pinned) - 20, 7):
        share = sum(pinned[start : start + 20]) / 20
        assert abs(share - streaming.num_pinned / len(pinned)) <= 0.1, "pinned slices crowd"


@pytest.mark.parametrize("shape", [SMOL, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "int4"])
@pytest.mark.parametrize("size", [100_000, 4 * MIB, 1 << 40])
def test_slices_cover_every_matrix_once_in_the_order_of_use(
    shape: ModelShape, dtype: str, size: int
) -> None:
    layout = layout_for(Workload(dtype=dtype), stored_as(shape, "BF16"), shape)
    if dtype != "bfloat16":
        layout = packed_layout(shape, dtype)
    slices, sweep = layout.slices(size), layout.sweep_bytes(size)
    assert [one.kept_bytes for one in slices] == sweep.kept
    assert [one.stored_bytes for one in slices] == sweep.stored
    assert max(sweep.stored) == sweep.largest_stored
    numel = sum((one.stop - one.start) * one.matrix.columns for one in slices)
    embedding = 0 if shape.tie_word_embeddings else shape.vocab_size * shape.hidden_size
    every = sum(tensor.numel for tensor in tensors_of(shape))
    assert numel + layout.vector_bytes // 4 + embedding == every
    for one, following in pairwise(slices):
        is_next = following.matrix.name != one.matrix.name and following.start == 0
        assert is_next or following.start == one.stop
    of_layer = [s.matrix.name.split(".")[-2] for s in slices if ".layers.0." in s.matrix.name]
    order = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert list(dict.fromkeys(of_layer)) == order


def test_packed_weights_take_the_bits_they_promise() -> None:
    for dtype, bits in (("int4", 4.5), ("int8", 8.5)):
        layout = packed_layout(LARGE, dtype)
        layers = sum(m.kept_bytes(m.rows) for layer in layout.layers for m in layer)
        numel = sum(m.rows * m.columns for layer in layout.layers for m in layer)
        assert 8 * layers / numel == pytest.approx(bits, rel=1e-3)
        assert layout.head.kept == "int8"
        assert layout.embedding is None


@given(budgets, workloads)
def test_every_suggestion_fits(budget: int, workload: Workload) -> None:
    try:
        plan(SMOL, layout_for(workload), workload, Processor.of(budget, RUNTIME))
    except BudgetError as error:
        suggestions = re.findall(r"^    --([\w-]+) (\S+)$", str(error), re.MULTILINE)
        assert suggestions
        for option, value in suggestions:
            changed, room = workload, budget
            if option == "memory":
                room = parse_bytes(value)
            elif option == "context":
                changed = replace(workload, context=int(value))
            elif option == "kv-dtype":
                changed = replace(workload, kv_dtype=value)
            elif option == "draft":
                changed = replace(workload, draft=value)
            else:
                changed = replace(workload, dtype=value)
            assert try_plan(room, changed) is not None


def test_the_error_names_the_need_by_part() -> None:
    workload = Workload(context=8192, dtype="float32")
    processor = Processor.of(300 * MIB, RUNTIME).with_tokenizer(30 * MIB)
    with pytest.raises(BudgetError) as caught:
        plan(SMOL, layout_for(workload), workload, processor)
    first, second, *rest = str(caught.value).splitlines()
    assert first == "no plan fits --memory 300MiB at --context 8192"
    assert second.startswith("  needs 6")
    assert re.search(
        r"MiB: runtime 2[23]\d\.\d\d MiB, tokenizer 30\.00 MiB, weights \d+\.\d\d KiB, "
        r"kv cache 360.00 MiB, ",
        second,
    )
    assert rest[0] == "  any one of these fits:"


@given(workloads)
def test_the_suggested_memory_is_the_floor(workload: Workload) -> None:
    with pytest.raises(BudgetError) as caught:
        plan(SMOL, layout_for(workload), workload, Processor.of(MIB, RUNTIME))
    floor = parse_bytes(str(caught.value).split("--memory ")[-1])
    assert try_plan(floor, workload) is not None
    assert try_plan(floor - 6 * MIB, workload) is None


def test_weights_are_streamed_where_they_do_not_fit() -> None:
    assert try_plan(GIB, Workload()).streaming is None
    small = try_plan(440 * MIB, Workload())
    assert small.streaming is not None
    assert dict(small.parts)["weight ring"] > 0
    with pytest.raises(BudgetError):
        plan(LARGE, LARGE_BF16, Workload(), Processor.of(300 * MIB, RUNTIME))
    large = plan(LARGE, LARGE_BF16, Workload(), Processor.of(4 * GIB, RUNTIME))
    assert large.streaming is not None
    assert large.streaming.num_pinned > 0


def test_a_context_the_model_does_not_have_is_refused() -> None:
    for context in (0, -1, 8193):
        with pytest.raises(ConfigError, match=r"this model has 1\.\.8192"):
            plan(
                SMOL, layout_for(Workload()), Workload(context=context), Processor.of(GIB, RUNTIME)
            )


def test_a_32b_model_is_planned_without_its_weights() -> None:
    chosen = plan(LARGE, LARGE_BF16, Workload(), Processor.of(80 * GIB, RUNTIME))
    assert dict(chosen.parts)["weights"] > 60 * GIB


MIMO = replace(
    SMOL,
    architecture="MiMoForCausalLM",
    vocab_size=151680,
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=36,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    max_position_embeddings=32768,
    tie_word_embeddings=False,
    attention_bias=True,
    num_nextn_predict_layers=1,
)
MIMO_INT4 = packed_layout(MIMO, "int4")


def mimo_plan(budget: str, draft: str = "auto") -> MemoryPlan:
    workload = Workload(dtype="int4", draft=draft)
    return plan(MIMO, MIMO_INT4, workload, Processor.of(parse_bytes(budget), RUNTIME))


def test_a_prediction_layer_is_whole_and_in_int8() -> None:
    numel = sum(matrix.rows * matrix.columns for matrix in MIMO_INT4.prediction)
    every = [tensor for tensor in tensors_of(MIMO) if tensor.room is Room.PREDICTION]
    assert numel + MIMO_INT4.prediction_vector_bytes // 4 == sum(one.numel for one in every)
    assert {matrix.kept for matrix in MIMO_INT4.prediction} == {"int8"}
    assert not {matrix.name for matrix in MIMO_INT4.prediction} & {
        matrix.name for matrix in MIMO_INT4.sweep
    }
    assert MIMO_INT4.prediction_bytes / numel == pytest.approx(8.5 / 8, rel=1e-2)


@pytest.mark.parametrize("budget", ["2GiB", "8GiB"])
def test_drafting_is_counted(budget: str) -> None:
    without, chosen = mimo_plan(budget, "off"), mimo_plan(budget)
    assert chosen.draft == DraftPlan(uses_ngram=True, num_mtp_layers=1, length=8)
    assert dict(chosen.parts)["drafting"] > MIMO_INT4.prediction_bytes
    assert chosen.peak_bytes <= parse_bytes(budget)
    assert "drafting" not in dict(without.parts)
    per_token = [dict(one.parts)["kv cache"] / one.num_kv_blocks for one in (without, chosen)]
    assert per_token[1] / per_token[0] == pytest.approx(37 / 36)


def test_the_head_is_pinned_where_a_prediction_layer_drafts() -> None:
    streaming = mimo_plan("2GiB").streaming
    assert streaming is not None
    slices = MIMO_INT4.slices(streaming.slice_bytes)
    pinned = set(streaming.pinned())
    assert len(pinned) == streaming.num_pinned
    head = {index for index, one in enumerate(slices) if one.matrix is MIMO_INT4.head}
    assert head <= pinned
    assert len(head) == streaming.num_last_pinned < streaming.num_pinned


def test_a_budget_without_room_for_the_head_drafts_by_ngrams_alone() -> None:
    chosen = mimo_plan("1GiB")
    assert chosen.draft == DraftPlan(uses_ngram=True, num_mtp_layers=0, length=8)
    assert chosen.streaming is not None
    assert chosen.streaming.num_last_pinned == 0
    with pytest.raises(BudgetError, match="--draft off"):
        mimo_plan("1GiB", "mtp")


def test_a_prediction_layer_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match="no multi-token-prediction layer; --draft ngram"):
        plan(SMOL, layout_for(Workload()), Workload(draft="mtp"), Processor.of(GIB, RUNTIME))
