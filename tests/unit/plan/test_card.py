"""Plans for a device: both peaks within their budgets, and what moves where as budgets shrink."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.checkpoints import tiny_config
from thinslice.errors import BudgetError, ConfigError
from thinslice.plan.card import Card
from thinslice.plan.case import Workload
from thinslice.plan.device_predict import DeviceProfile, predict_on_device
from thinslice.plan.kernel_limits import MOST_SINGLE_ROWS
from thinslice.plan.memory_plan import MemoryPlan
from thinslice.plan.planner import plan
from thinslice.plan.shape_from_config import shape_from_config
from thinslice.plan.weight_layout import layout_of, stored_as
from thinslice.units import GIB, MIB, parse_bytes

MIMO = shape_from_config(
    tiny_config(
        "MiMoForCausalLM",
        vocab_size=151680,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=32768,
    )
)
BF16 = layout_of(MIMO, stored_as(MIMO, "BF16"), "bfloat16")
PROFILE = DeviceProfile(25e9, 2e12, 500e12)


def planned(device_bytes: int, host_bytes: int, **workload: object) -> MemoryPlan:
    card = Card.of("cuda", device_bytes, 500 * MIB, host_bytes, 400 * MIB)
    return plan(MIMO, BF16, Workload(**workload), card)


def tokens_per_s(chosen: MemoryPlan) -> float:
    return predict_on_device(chosen, MIMO, BF16, PROFILE, 2e9).decode_tokens_per_s


def test_places_fill_from_the_fastest() -> None:
    resident = planned(24 * GIB, 8 * GIB, max_num_seqs=4)
    assert resident.streaming is None
    assert resident.num_kv_blocks > resident.context // resident.block_size
    from_host = planned(6 * GIB, 20 * GIB)
    assert from_host.streaming is not None
    assert from_host.streaming.num_pinned > 0
    num_streamed = from_host.streaming.num_slices - from_host.streaming.num_pinned
    assert (from_host.device.num_locked, from_host.device.num_staging) == (num_streamed, 0)
    from_disk = planned(6 * GIB, 8 * GIB)
    assert 0 < from_disk.device.num_locked < num_streamed
    assert from_disk.device.num_staging > 0
    assert tokens_per_s(resident) > tokens_per_s(from_host) > tokens_per_s(from_disk)


def test_host_memory_that_is_left_holds_blocks_of_the_kv_cache() -> None:
    alone = planned(6 * GIB, 20 * GIB)
    assert alone.device.num_spilled_blocks == 0
    streamed = planned(6 * GIB, 20 * GIB, max_num_seqs=4)
    # No more than the device holds, though four sequences could use it.
    assert streamed.device.num_spilled_blocks == streamed.num_kv_blocks
    two = planned(6 * GIB, 20 * GIB, max_num_seqs=2)
    whole = two.context // two.block_size
    assert two.num_kv_blocks + two.device.num_spilled_blocks == 2 * whole
    num_bytes = streamed.host.part("spilled kv")
    assert num_bytes == streamed.device.num_spilled_blocks * dict(streamed.parts)["kv cache"] // (
        streamed.num_kv_blocks
    )
    # Weights go first.
    assert planned(6 * GIB, 8 * GIB, max_num_seqs=4).device.num_spilled_blocks == 0


def test_the_tokenizer_is_a_part_of_what_the_host_holds() -> None:
    alone = planned(6 * GIB, 20 * GIB)
    card = Card.of("cuda", 6 * GIB, 500 * MIB, 20 * GIB, 400 * MIB).with_tokenizer(40 * MIB)
    parted = plan(MIMO, BF16, Workload(), card)
    assert parted.host.part("tokenizer") == 40 * MIB
    assert parted.host.part("runtime") + 40 * MIB == alone.host.part("runtime")
    assert parted.host.peak_bytes == alone.host.peak_bytes


@settings(max_examples=25)
@given(st.integers(900 * MIB, 30 * GIB), st.integers(700 * MIB, 30 * GIB), st.integers(1, 8))
def test_both_peaks_are_within_their_budgets(device: int, host: int, num_seqs: int) -> None:
    try:
        chosen = planned(device, host, max_num_seqs=num_seqs)
    except BudgetError:
        return
    assert chosen.peak_bytes <= device
    assert chosen.host.peak_bytes <= host
    if chosen.streaming is not None:
        pinned = chosen.streaming.pinned()
        streamed = sorted(set(range(chosen.streaming.num_slices)) - set(pinned))
        locked = chosen.device.locked(streamed)
        assert len(set(locked)) == chosen.device.num_locked
        assert set(locked) <= set(streamed)
        # More of either never makes it slower, unless it goes to the context, the chunk or slices.
        for more in ((2 * device, host), (device, 2 * host)):
            larger = planned(*more, max_num_seqs=num_seqs)
            if larger.streaming is None or sizes(larger) == sizes(chosen):
                assert tokens_per_s(larger) >= tokens_per_s(chosen)


def sizes(chosen: MemoryPlan) -> tuple[int, int, int]:
    assert chosen.streaming is not None
    return chosen.context, chosen.chunk, chosen.streaming.slice_bytes


@pytest.mark.parametrize(
    ("device", "host", "text"), [(GIB // 2, 8 * GIB, "--memory"), (GIB, GIB // 4, "--host-memory")]
)
def test_below_the_floor_what_is_named_fits(device: int, host: int, text: str) -> None:
    with pytest.raises(BudgetError, match=f"no plan fits {text}") as caught:
        planned(device, host)
    size = int(str(caught.value).rpartition(f"{text} ")[2].removesuffix("MiB")) * MIB
    fits = (size, host) if text == "--memory" else (device, size)
    assert planned(*fits).headroom_bytes >= 0
    assert "context 500.00 MiB" in str(caught.value) or "runtime" in str(caught.value)


def suggestions(error: BudgetError) -> list[str]:
    lines = str(error).partition("any one of these fits:\n")[2].splitlines()
    return [line.strip() for line in lines]


@pytest.mark.parametrize(
    ("device", "host", "context", "options"),
    [
        (3 * GIB // 2, 8 * GIB, 8192, {"--context", "--memory"}),
        (6 * GIB, GIB // 2, 8192, {"--host-memory"}),
        (GIB // 2, GIB // 4, None, set()),
    ],
)
def test_each_suggestion_fits(
    device: int, host: int, context: int | None, options: set[str]
) -> None:
    with pytest.raises(BudgetError) as caught:
        planned(device, host, context=context, max_num_seqs=1)
    found = suggestions(caught.value)
    assert options <= {one.split()[0] for one in found}
    for option, value in (one.split() for one in found):
        given = {"device_bytes": device, "host_bytes": host, "context": context, "draft": "auto"}
        if option == "--context":
            given["context"] = int(value)
        elif option == "--draft":
            given["draft"] = value
        else:
            given["device_bytes" if option == "--memory" else "host_bytes"] = parse_bytes(value)
        assert planned(**given, max_num_seqs=1).headroom_bytes >= 0, option
    if not found:
        assert "no single change fits" in str(caught.value)


def test_other_weights_are_tried_of_a_model_with_a_prediction_layer() -> None:
    """The layer runs on no card, but its weights are among those that are converted."""
    assert MIMO.num_nextn_predict_layers > 0
    layout = layout_of(MIMO, stored_as(MIMO, "F32"), "float32")
    card = Card.of("cuda", 6 * GIB, 500 * MIB, GIB // 2, 400 * MIB)
    with pytest.raises(BudgetError, match="no plan fits --host-memory") as caught:
        plan(MIMO, layout, Workload(dtype="float32"), card)
    assert suggestions(caught.value)


@pytest.mark.parametrize(("num_seqs", "length"), [(1, 8), (2, 7), (5, 2), (8, 1), (9, 0)])
def test_no_more_is_drafted_than_is_multiplied_row_by_row(num_seqs: int, length: int) -> None:
    """Longer batches have other bits, and then drafts would show in the text."""
    chosen = planned(24 * GIB, 20 * GIB, max_num_seqs=num_seqs, draft="auto", draft_length=8)
    assert (chosen.draft.length if chosen.draft else 0) == length
    assert num_seqs * (1 + length) <= MOST_SINGLE_ROWS
    if not length:
        with pytest.raises(ConfigError, match="--sequences 8"):
            planned(24 * GIB, 20 * GIB, max_num_seqs=num_seqs, draft="ngram")


def test_a_shorter_context_is_taken_where_host_memory_is_short() -> None:
    """Rather than the shortest of all; with more memory it is longer, or gives way to a larger
    chunk."""
    layout = layout_of(MIMO, stored_as(MIMO, "F16"), "bfloat16")

    def sizes(host: int) -> tuple[int, int]:
        card = Card.of("cuda", 6 * GIB, 500 * MIB, host, 400 * MIB)
        chosen = plan(MIMO, layout, Workload(), card)
        return chosen.context, chosen.chunk

    every = [sizes(host * 64 * MIB) for host in range(134, 152)]
    for (context, chunk), (next_context, next_chunk) in pairwise(every):
        assert next_context >= context or next_chunk > chunk
    assert len({context for context, _ in every}) > 3


def test_converted_matrices_stay_in_memory() -> None:
    """Half-precision floats become bfloat16 once: no slice of them comes from disk."""
    layout = layout_of(MIMO, stored_as(MIMO, "F16"), "bfloat16")
    card = Card.of("cuda", 6 * GIB, 500 * MIB, 20 * GIB, 400 * MIB)
    chosen = plan(MIMO, layout, Workload(), card)
    assert chosen.device.num_staging == 0
    card = Card.of("cuda", 6 * GIB, 500 * MIB, 8 * GIB, 400 * MIB)
    with pytest.raises(BudgetError, match="thinslice pack"):
        plan(MIMO, layout, Workload(), card)
