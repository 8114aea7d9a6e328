"""best_plan(): the first candidate whose peaks fit, grown into what it leaves of the budgets.

Which candidates there are, in which order and with which parts, is the platform's.
"""

from dataclasses import replace

from thinslice.plan.case import Case, Tokens
from thinslice.plan.cost import vocabulary_bytes
from thinslice.plan.memory_plan import MemoryPlan, StreamingPlan
from thinslice.plan.pinning import with_pinned_slices
from thinslice.units import MIB

BLOCK_SIZE = 16
# The fewest tokens in flight.
SMALLEST_CHUNK = 16
# Below this a chat turn does not fit; a plan that could only offer less says so instead.
SMALLEST_CONTEXT = 256
# A question, some reasoning and an answer: for less, weights are not kept in memory.
USEFUL_CONTEXT = 1024
# Without --context, streamed weights get no longer one.
STREAMED_CONTEXT = 4096
# Left to answers while their caller holds them, of what more sequences would take; and, where it is
# no part of its own, as much as the vocabulary of answers of a given form takes.
RESULTS_BYTES = 16 * MIB


def best_plan(case: Case) -> MemoryPlan | None:
    """The first candidate that fits, grown; None where none does."""
    for candidate in case.platform.candidates(case):
        if candidate.fits:
            chosen = grown(case, candidate)
            if chosen.fits:
                return chosen
    return None


def candidate_of(case: Case, tokens: Tokens, slice_bytes: int | None = None) -> MemoryPlan:
    """A plan with room for one sequence of the whole context.

    Args:
        slice_bytes: the most bytes of a slice; all are streamed but the head's where a prediction
            layer drafts. None keeps all weights resident.
    """
    platform, streaming = case.platform, None
    if slice_bytes is not None:
        sweep = case.layout.sweep_bytes(slice_bytes)
        num_last = len(case.layout.head.ranges(slice_bytes)) if case.num_mtp_layers else 0
        streaming = StreamingPlan(
            slice_bytes=slice_bytes,
            num_slices=len(sweep.kept),
            num_pinned=num_last,
            num_last_pinned=num_last,
            num_buffers=platform.num_buffers,
            buffer_bytes=platform.buffer_bytes(sweep),
            layer_rows=tokens.layer_rows if tokens.layer_rows < tokens.chunk else None,
        )
    return MemoryPlan(
        pools=platform.pools_of(case, tokens, streaming),
        dtype=case.workload.dtype,
        kv_dtype=case.kv_dtype,
        context=tokens.context,
        chunk=tokens.chunk,
        max_num_seqs=case.workload.max_num_seqs,
        block_size=BLOCK_SIZE,
        num_kv_blocks=-(-tokens.context // BLOCK_SIZE),
        streaming=streaming,
        draft=case.draft,
        device=platform.device,
    )


def kv_cache_bytes(case: Case, context: int) -> int:
    """The KV cache of one sequence, in whole blocks."""
    return -(-context // BLOCK_SIZE) * BLOCK_SIZE * case.kv_bytes_per_token


def floors(case: Case, context: int | None = None) -> list[MemoryPlan]:
    """The plans that take least, whatever the budgets: resident, then for each size of slices.

    Args:
        context: None takes the one asked for, or the shortest that is planned without being asked.
    """
    shortest = min(SMALLEST_CONTEXT, case.shape.max_position_embeddings)
    tokens = Tokens.at_once(context or case.workload.context or shortest, SMALLEST_CHUNK)
    sizes = (None, *case.platform.slice_sizes)
    return [candidate_of(case.variants[-1], tokens, size) for size in sizes]


def grown(case: Case, chosen: MemoryPlan) -> MemoryPlan:
    """Use the headroom for KV blocks, or for slices in faster places where weights are streamed."""
    if chosen.streaming is None:
        chosen = _with_more_blocks(case, chosen)
    else:
        chosen = with_pinned_slices(case, chosen)
    return case.platform.on_host(case, chosen)


def _with_more_blocks(case: Case, chosen: MemoryPlan) -> MemoryPlan:
    """Add KV blocks for as many sequences as the headroom holds; where answers lie in the same
    memory, a part of it is left to them."""
    wanted = chosen.num_kv_blocks * (chosen.max_num_seqs - 1)
    is_shared = len(chosen.pools) == 1
    wanted_results = RESULTS_BYTES
    if case.workload.forms == "auto":
        wanted_results += vocabulary_bytes(case.shape.vocab_size)
    results = min(chosen.headroom_bytes // 4, wanted_results) if is_shared else 0
    extra = min(wanted, (chosen.headroom_bytes - results) // chosen.kv_block_bytes)
    larger = chosen.with_more(0, {"kv cache": extra * chosen.kv_block_bytes})
    return replace(larger, num_kv_blocks=chosen.num_kv_blocks + extra)
