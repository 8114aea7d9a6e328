"""The rule: more memory is never worse in context and speed, and no neighbour is better in both."""

from dataclasses import replace
from itertools import pairwise
from math import ceil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.plan.test_planner import BF16, MIMO, Q4_1, RUNTIME, SMOL, layout_for
from tests.unit.plan.test_predict import MACHINE
from thinslice.errors import BudgetError
from thinslice.plan.case import Case, Tokens, Workload
from thinslice.plan.choose import ANSWER_TOKENS, context_sizes, request_bytes
from thinslice.plan.memory_plan import MemoryPlan
from thinslice.plan.model_shape import ModelShape
from thinslice.plan.planner import plan, residency
from thinslice.plan.predict import predict
from thinslice.plan.processor import Processor
from thinslice.plan.refusal import JITTER_BYTES
from thinslice.plan.search import SMALLEST_CHUNK, USEFUL_CONTEXT, candidate_of
from thinslice.plan.weight_layout import WeightLayout, stored_as
from thinslice.units import GIB, KIB, MIB

MIDDLE = replace(
    SMOL,
    vocab_size=151936,
    hidden_size=1024,
    intermediate_size=3072,
    num_hidden_layers=28,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=128,
    max_position_embeddings=40960,
)
SHORT = replace(SMOL, num_hidden_layers=4, max_position_embeddings=600)
SHAPES = {"small": SMOL, "middle": MIDDLE, "large": MIMO, "short": SHORT}
DTYPES = ("bfloat16", "float32", "int8", "int4")
LAYOUTS = {
    (name, dtype): layout_for(Workload(dtype=dtype), BF16 if shape is SMOL else stored, shape)
    for name, shape in SHAPES.items()
    for stored in [stored_as(shape, "BF16")]
    for dtype in DTYPES[:2]
}
for name, shape in SHAPES.items():
    for dtype in DTYPES[2:]:
        LAYOUTS[name, dtype] = layout_for(Workload(dtype=dtype), BF16, shape)
LAYOUTS["converted", "int4"] = layout_for(Workload(dtype="int4"), Q4_1)
SHAPES["converted"] = SMOL
models = st.sampled_from([key for key in LAYOUTS if key[0] != "large" or key[1] == "int4"])


class Planner:
    """Plans of one model, and what they are worth."""

    def __init__(self, model: tuple[str, str], **workload: object) -> None:
        self.shape: ModelShape = SHAPES[model[0]]
        self.layout: WeightLayout = LAYOUTS[model]
        self.workload = Workload(dtype=model[1], **workload)

    def plan(self, budget: int, context: int | None = None) -> MemoryPlan | None:
        workload = replace(self.workload, context=context)
        try:
            return plan(self.shape, self.layout, workload, Processor.of(budget, RUNTIME))
        except BudgetError:
            return None

    def speed(self, chosen: MemoryPlan) -> float:
        return predict(chosen, self.shape, self.layout, MACHINE).decode_tokens_per_s

    def request_bytes(self, chosen: MemoryPlan) -> float:
        """What a prompt as long as the context and its answer read, once the plan has grown."""
        if chosen.streaming is None:
            return 0
        pinned = set(chosen.streaming.pinned())
        sweep = self.layout.sweep_bytes(chosen.streaming.slice_bytes)
        streamed = [size for index, size in enumerate(sweep.stored) if index not in pinned]
        num_sweeps = ceil(chosen.context / chosen.chunk)
        share = 0.8 if chosen.num_mtp_layers else 1
        sweep_bytes = sum(streamed) + len(streamed) * 64 * KIB
        num_bytes = (ANSWER_TOKENS * share + num_sweeps) * sweep_bytes
        layer_rows = chosen.streaming.layer_rows or 512
        runs = chosen.chunk / layer_rows if layer_rows < 512 else 0
        return num_bytes + runs * sweep.kept_bytes / 10


def budgets_of(model: tuple[str, str]) -> st.SearchStrategy[int]:
    """From where little fits to where everything does."""
    most = 2 * LAYOUTS[model].kept_bytes + 2 * GIB
    return st.integers(RUNTIME, RUNTIME + most // 8) | st.integers(RUNTIME, RUNTIME + most)


# The largest slice that a plan may pin less than another of about the same size, whose slices are
# cut elsewhere, for each of the sweeps of a request.
SLICE_S = 8 * MIB * (ANSWER_TOKENS + 32)


@given(st.data(), models, st.sampled_from(["off", "auto", "ngram"]), st.integers(1, 16))
@settings(max_examples=20)
def test_a_larger_budget_is_never_worse_in_context_and_speed(
    data: st.DataObject, model: tuple[str, str], draft: str, max_num_seqs: int
) -> None:
    planner = Planner(model, draft=draft, max_num_seqs=max_num_seqs)
    budget = data.draw(budgets_of(model))
    smaller = planner.plan(budget)
    larger = planner.plan(budget + data.draw(st.integers(0, GIB) | st.integers(0, 32 * MIB)))
    if smaller is None:
        return
    assert larger is not None
    if larger.context < smaller.context:
        assert planner.speed(larger) > planner.speed(smaller)
        is_faster = smaller.streaming is not None and larger.streaming is None
        assert is_faster or larger.num_mtp_layers > smaller.num_mtp_layers


@given(st.data(), models, st.integers(1, 16))
@settings(max_examples=20)
def test_no_longer_context_is_faster_than_the_plan(
    data: st.DataObject, model: tuple[str, str], max_num_seqs: int
) -> None:
    """The chosen plan is on the Pareto front of all that ``--context`` gives at its budget."""
    planner = Planner(model, max_num_seqs=max_num_seqs)
    budget = data.draw(budgets_of(model))
    chosen = planner.plan(budget)
    if chosen is None:
        return
    assert planner.plan(budget, chosen.context) == chosen
    if chosen.context == planner.shape.max_position_embeddings:
        return
    longest = planner.shape.max_position_embeddings
    context = data.draw(st.integers(chosen.context + 1, longest))
    longer = planner.plan(budget, context)
    if longer is None:
        return
    assert planner.request_bytes(longer) >= planner.request_bytes(chosen) - SLICE_S
    if chosen.streaming is None:
        assert planner.speed(longer) <= planner.speed(chosen)
    else:
        assert longer.streaming is not None
        # Fewer sweeps for a prompt may cost decoding as much as they save of a request.
        num_sweeps = ceil(context / longer.chunk)
        slowest = planner.speed(longer) * (ANSWER_TOKENS + 1) / (ANSWER_TOKENS + num_sweeps)
        assert planner.speed(chosen) > slowest * 0.98


def test_slices_are_pinned_again_where_too_many_were_left_out() -> None:
    """The first guess was 19 MiB too low here, so that a longer context was quicker."""
    planner = Planner(("small", "bfloat16"))
    chosen = planner.plan(553_337_239, 4096)
    assert chosen is not None
    assert chosen.streaming is not None
    # What is pinned and what a layer holds go in steps of one slice each.
    assert chosen.headroom_bytes < 2 * chosen.streaming.slice_bytes


def test_slices_that_are_more_and_smaller_are_not_taken_for_fewer_and_larger() -> None:
    """40 slices in places of small ones were pinned with 33 MB more than 32 slices were."""
    planner = Planner(("large", "int4"), draft="auto")
    smaller, larger = (planner.plan(budget, 1) for budget in (531_000_000, 576_345_178))
    assert smaller is not None
    assert larger is not None
    assert dict(larger.parts)["weights"] > dict(smaller.parts)["weights"] + 20 * MIB
    assert planner.request_bytes(larger) < planner.request_bytes(smaller)


@given(st.data(), models, st.integers(1, 4096))
@settings(max_examples=20)
def test_a_request_of_one_context_never_takes_longer_with_more_memory(
    data: st.DataObject, model: tuple[str, str], context: int
) -> None:
    planner = Planner(model, draft="auto")
    context = min(context, planner.shape.max_position_embeddings)
    budget = data.draw(budgets_of(model))
    smaller = planner.plan(budget, context)
    larger = planner.plan(budget + data.draw(st.integers(0, GIB)), context)
    if smaller is None:
        return
    assert larger is not None
    assert planner.request_bytes(larger) <= planner.request_bytes(smaller) + SLICE_S
    assert larger.streaming is None or smaller.streaming is not None
    assert larger.num_kv_blocks >= smaller.num_kv_blocks


@given(st.data(), models)
@settings(max_examples=20)
def test_what_keeps_weights_in_memory_does_so_and_less_does_not(
    data: st.DataObject, model: tuple[str, str]
) -> None:
    planner = Planner(model, draft="auto")
    longest = planner.shape.max_position_embeddings
    asked = data.draw(st.none() | st.integers(1, longest))
    budget = data.draw(budgets_of(model))
    workload = replace(planner.workload, context=asked)
    found = residency(planner.shape, planner.layout, workload, Processor.of(budget, RUNTIME))
    at_least = planner.plan(found.memory_bytes, asked)
    assert at_least is not None
    assert at_least.streaming is None
    assert at_least.context >= found.memory_context
    less = planner.plan(found.memory_bytes - 6 * MIB, asked)
    is_short = less is not None and less.context < USEFUL_CONTEXT
    assert less is None or less.streaming is not None or (asked is None and is_short)
    if found.context is None:
        return
    kept = planner.plan(budget - 3 * MIB, found.context)
    assert kept is not None
    assert kept.streaming is None
    if found.context + 16 <= longest:
        per_token = dict(kept.parts)["kv cache"] / kept.num_kv_blocks / 16
        longer = found.context + 16 + ceil(5 * MIB / per_token)
        if longer <= longest:
            other = planner.plan(budget, longer)
            assert other is None or other.streaming is not None


@pytest.mark.parametrize("name", ["small", "short"])
def test_the_longest_context_beside_resident_weights_is_exact(name: str) -> None:
    """A byte less, and it is a block shorter; a model's own is not cut to whole blocks."""
    shape, layout = SHAPES[name], LAYOUTS[name, "int4"]
    workload, longest = Workload(dtype="int4"), shape.max_position_embeddings
    case = Case(shape, layout, workload, Processor.of(GIB, RUNTIME)).variants[-1]

    def found(budget: int) -> int | None:
        return residency(shape, layout, workload, Processor.of(budget, RUNTIME)).context

    def least(context: int) -> int:
        tokens = Tokens.at_once(context, SMALLEST_CHUNK)
        return candidate_of(case, tokens).peak_bytes + JITTER_BYTES

    assert found(least(256) - 1) is None
    for context in (256, 272, 512):
        assert found(least(context)) == context
        assert found(least(context + 16) - 1) == context
    assert found(least(longest)) == found(16 * GIB) == longest
    assert found(least(longest) - 1) == (longest - 1) // 16 * 16


@pytest.mark.parametrize("size", [4096, 2048, 1024 + 256])
def test_a_streamed_context_leaves_half_of_the_room_to_weights_exactly(size: int) -> None:
    planner = Planner(("middle", "bfloat16"), draft="off")
    processor = Processor.of(GIB, RUNTIME)
    case = Case(planner.shape, planner.layout, planner.workload, processor).variants[-1]
    tokens = Tokens.at_once(size, SMALLEST_CHUNK)
    tried = [candidate_of(case, tokens, one) for one in processor.slice_sizes]
    least = min(tried, key=lambda one: one.peak_bytes)
    budget = least.peak_bytes + least.pools[0].part("kv cache")
    found, shorter = planner.plan(budget), planner.plan(budget - 1)
    assert found is not None
    assert shorter is not None
    assert found.streaming is not None
    sizes = context_sizes(40960)
    assert (found.context, shorter.context) == (size, sizes[sizes.index(size) + 1])


def test_a_model_of_a_short_context_has_all_of_it_beside_resident_weights() -> None:
    shape = replace(SHORT, max_position_embeddings=100)
    processor, workload = Processor.of(GIB, RUNTIME), Workload(dtype="int4")
    assert residency(shape, LAYOUTS["short", "int4"], workload, processor).context == 100


@pytest.mark.parametrize("layer_rows", [1024, 512, 128])
@pytest.mark.parametrize("headroom", [0, 40 * MIB, 4 * GIB])
def test_what_the_reference_request_reads(layer_rows: int, headroom: int) -> None:
    """What is not pinned once for each token of the answer and each chunk of the prompt, and 64 KiB
    more for each slice; of a layer that is held, a tenth for each few rows."""
    shape, layout = SHAPES["middle"], LAYOUTS["middle", "int8"]
    case = Case(shape, layout, Workload(dtype="int8"), Processor.of(GIB, RUNTIME)).variants[-1]
    tokens = replace(Tokens.at_once(1024, 1024), layer_rows=layer_rows)
    candidate = candidate_of(case, tokens, MIB)
    (pool,) = candidate.pools
    pool = replace(pool, budget_bytes=pool.peak_bytes + headroom)
    candidate = replace(candidate, pools=(pool,))
    sweep = layout.sweep_bytes(MIB)
    held = pool.part("held layer")
    assert (held > 0) == (layer_rows < 1024)
    share = max(1 - headroom / (sweep.kept_bytes - held), 0)
    once = share * (sweep.stored_bytes + len(sweep.kept) * 64 * KIB)
    again = 1024 / 128 * sweep.kept_bytes / 10 if layer_rows == 128 else 0
    assert request_bytes(candidate, layout) == pytest.approx((256 + 1) * once + again)


@pytest.mark.parametrize("longest", [1, 100, 256, 257, 600, 2048, 8192, 40960, 131072])
def test_contexts_to_choose_from_are_round_and_lie_close(longest: int) -> None:
    sizes = context_sizes(longest)
    assert sizes[0] == longest
    assert sizes[-1] == min(longest, 256)
    assert all(size % 64 == 0 for size in sizes[1:])
    assert all(size <= 1.25 * less for size, less in pairwise(sizes))


def test_contexts_to_choose_from_are_four_for_each_octave() -> None:
    assert context_sizes(1100) == (1100, 1024, 896, 768, 640, 512, 448, 384, 320, 256)
    assert context_sizes(1024) == (1024, 896, 768, 640, 512, 448, 384, 320, 256)


def test_a_short_context_beside_resident_weights_gives_way_to_a_useful_one() -> None:
    """Where the weights fit beside a few hundred tokens only, they are streamed."""
    planner = Planner(("small", "int4"), draft="auto")
    sizes = [planner.plan(budget * MIB) for budget in range(280, 400, 5)]
    kinds = [
        (one.streaming is not None, one.context >= USEFUL_CONTEXT)
        for one in sizes
        if one is not None
    ]
    assert list(dict.fromkeys(kinds)) == [(True, False), (True, True), (False, True)]
