"""Candidate plans: the sizes that are tried, and what each takes part by part. No choosing here."""

from collections.abc import Iterator
from dataclasses import replace

from thinslice.plan.case import Case, Tokens, held_parts
from thinslice.plan.cost import (
    CALLER_BYTES,
    PREDICTION_ROWS,
    activation_bytes,
    library_bytes,
    logits_bytes,
    ngram_index_bytes,
    prediction_activation_bytes,
    whole_stream_bytes,
)
from thinslice.plan.memory_plan import MemoryPlan, StreamingPlan
from thinslice.plan.pinning import weight_parts
from thinslice.plan.sweep_bytes import SweepBytes
from thinslice.units import KIB, MIB

BLOCK_SIZE = 16
# Tokens in flight, with the weights in memory and streamed: where a prompt takes several sweeps,
# one for each chunk, larger ones pay for their memory.
CHUNKS = (512, 256, 128, 64, 32, 16)
_STREAMED_CHUNKS = (32768, 16384, 8192, 4096, 2048, 1024, *CHUNKS)
# Rows a layer takes at a time while its slices are held: enough that products are bound by
# arithmetic and not by reading the layer from memory once more for each run of rows.
LAYER_ROWS = (512, 128)
# What the checkpoint reader works in while weights are read: a MiB of them, and what dequantising
# that takes.
LOADING_BYTES = 4 * MIB
# Left to answers while their caller holds them, of what more sequences would take.
RESULTS_BYTES = 16 * MIB
# Bytes of a slice: the largest hides a slice's fixed cost, smaller ones leave more for pinning.
SLICE_BYTES = (8 * MIB, 2 * MIB, 512 * KIB)
_NUM_BUFFERS = 6
# What a direct read of a slice at any offset takes more: a page on either side.
_ALIGNMENT_BYTES = 2 * 4096


def streamed_tokens(context: int) -> Iterator[Tokens]:
    """The ways of a streamed prompt: all rows at once, layer by layer, in chunks."""
    whole = Tokens(context, context, context)
    yield whole
    for layer_rows in LAYER_ROWS:
        if layer_rows < context:
            yield replace(whole, layer_rows=layer_rows)
    for chunk in _STREAMED_CHUNKS:
        if chunk < context:
            yield Tokens(context, chunk, chunk)


def resident(case: Case, budget_bytes: int, context: int, chunk: int) -> MemoryPlan:
    """All weights in memory, and room for one sequence of the whole context."""
    chunk = min(chunk, context)
    tokens = Tokens(context, chunk, chunk)
    parts = _common_parts(case, tokens)
    parts["weights"] = case.layout.kept_bytes
    return _memory_plan(case, budget_bytes, tokens, parts)


def streamed(
    case: Case, budget_bytes: int, tokens: Tokens, slice_bytes: int, sweep: SweepBytes
) -> MemoryPlan:
    """All matrices on disk but those that draft, and room for one sequence of the whole context.

    Args:
        sweep: what the slices of a sweep take when they have at most ``slice_bytes``.
    """
    num_last = len(case.layout.head.ranges(slice_bytes)) if case.num_mtp_layers else 0
    streaming = StreamingPlan(
        slice_bytes=slice_bytes,
        num_slices=len(sweep.kept),
        num_pinned=num_last,
        num_last_pinned=num_last,
        num_buffers=_NUM_BUFFERS,
        buffer_bytes=-(-sweep.largest_stored // 4096) * 4096 + _ALIGNMENT_BYTES,
        layer_rows=tokens.layer_rows if tokens.layer_rows < tokens.chunk else None,
    )
    parts = _common_parts(case, tokens)
    parts["weight ring"] = _NUM_BUFFERS * streaming.buffer_bytes + sweep.converting
    parts |= weight_parts(streaming, sweep)
    parts["weights"] += case.layout.vector_bytes
    return replace(_memory_plan(case, budget_bytes, tokens, parts), streaming=streaming)


def floor(case: Case, context: int) -> MemoryPlan:
    """The plan of this context that takes least, whatever the budget."""
    case, chunk = case.variants[-1], min(context, CHUNKS[-1])
    tokens = Tokens(context, chunk, chunk)
    sweeps = ((size, case.layout.sweep_bytes(size)) for size in SLICE_BYTES)
    floors = (
        resident(case, 0, context, chunk),
        *(streamed(case, 0, tokens, size, sweep) for size, sweep in sweeps),
    )
    return min(floors, key=lambda candidate: candidate.peak_bytes)


def with_more_blocks(case: Case, chosen: MemoryPlan) -> MemoryPlan:
    """Add KV blocks for as many sequences as the headroom holds; a part of it
    is left to what answers take."""
    per_block = BLOCK_SIZE * replace(case, draft=chosen.draft).kv_bytes_per_token
    wanted = chosen.num_kv_blocks * (chosen.max_num_seqs - 1)
    results = min(chosen.headroom_bytes // 4, RESULTS_BYTES)
    extra = min(wanted, (chosen.headroom_bytes - results) // per_block)
    parts = dict(chosen.parts)
    parts["kv cache"] += extra * per_block
    return replace(chosen, num_kv_blocks=chosen.num_kv_blocks + extra, parts=tuple(parts.items()))


def _common_parts(case: Case, tokens: Tokens) -> dict[str, int]:
    """The parts every plan has, in the order they are shown."""
    shape, how, chunk = case.shape, case.how, tokens.chunk
    num_positions = -(-tokens.context // BLOCK_SIZE) * BLOCK_SIZE
    num_rows = tokens.layer_rows
    if case.num_mtp_layers:
        num_rows = max(num_rows, min(chunk, PREDICTION_ROWS))
    running = activation_bytes(shape, num_rows, how)
    if tokens.layer_rows < chunk:
        running += whole_stream_bytes(shape, chunk)
    # The residual stream is alive while the head runs, and so are the rows of it that the head
    # takes, which are all where a text is scored.
    num_logits = min(case.workload.max_num_seqs, chunk)
    heading = logits_bytes(shape, num_logits)
    heading += 2 * chunk * shape.hidden_size * 4
    held = held_parts(case.runtime_bytes, case.workload)
    held["runtime"] += CALLER_BYTES + library_bytes(shape, how)
    return {
        **held,
        "weights": 0,
        "kv cache": num_positions * case.kv_bytes_per_token,
        "activations": max(running, heading, LOADING_BYTES),
        **_drafting_part(case, tokens.context, chunk),
    }


def _drafting_part(case: Case, context: int, chunk: int) -> dict[str, int]:
    """What drafting adds, beside a prediction layer's K and V: n-gram indexes, logits of the rows
    behind drafts, the prediction layers and what they work on."""
    draft, shape = case.draft, case.shape
    if draft is None:
        return {}
    num_seqs = min(case.workload.max_num_seqs, chunk)
    num_rows = min(num_seqs * (1 + draft.length), chunk)
    one, all_rows = (logits_bytes(shape, rows) for rows in (num_seqs, num_rows))
    num_bytes = all_rows - one
    if draft.uses_ngram:
        num_bytes += num_seqs * ngram_index_bytes(context)
    if draft.num_mtp_layers:
        num_bytes += case.layout.prediction_bytes
        num_bytes += prediction_activation_bytes(shape, chunk, num_seqs)
    return {"drafting": num_bytes}


def _memory_plan(
    case: Case, budget_bytes: int, tokens: Tokens, parts: dict[str, int]
) -> MemoryPlan:
    return MemoryPlan(
        budget_bytes=budget_bytes,
        dtype=case.workload.dtype,
        kv_dtype=case.kv_dtype,
        context=tokens.context,
        chunk=tokens.chunk,
        max_num_seqs=case.workload.max_num_seqs,
        block_size=BLOCK_SIZE,
        num_kv_blocks=-(-tokens.context // BLOCK_SIZE),
        parts=tuple(parts.items()),
        draft=case.draft,
    )
