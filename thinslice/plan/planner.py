"""plan(): from a shape, a budget and a workload to the sizes that fit. Arithmetic only.

Weights are kept resident where they fit beside a useful context. Else they are streamed: a ring
of buffers, and as many slices pinned as the rest of the budget holds. Access is cyclic, so a fixed
set of pinned slices saves exactly its share of the reads, and no cache could save more.

A streamed prompt as long as the context goes through in one sweep wherever that fits: all its rows
at once, or through each layer a few at a time while the layer's slices are held. Of these two the
one is taken that leaves more slices pinned. To hold a layer costs a generated token at most that
layer's share of the reads. Where neither fits, a prompt takes one sweep for each chunk.

A prediction layer that drafts is resident, and so is the head then: each draft reads both. The head
costs nothing by that, as any pinned slice saves its share of a sweep; the layer costs a few percent
of the reads where weights are streamed. Left to choose, a plan drafts with the layer where it need
take no smaller slices for it, nor a smaller chunk than its context lets it have. A context that was
not asked for may be the shorter for it, but for a useful one.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain, product

from thinslice.errors import BudgetError, ConfigError
from thinslice.plan.cost import (
    PREDICTION_KERNEL_BYTES,
    PREDICTION_ROWS,
    Computation,
    activation_bytes,
    kv_bytes_per_token,
    library_bytes,
    logits_bytes,
    ngram_index_bytes,
    prediction_activation_bytes,
    whole_stream_bytes,
)
from thinslice.plan.memory_plan import DraftPlan, MemoryPlan, StreamingPlan
from thinslice.plan.model_shape import ModelShape
from thinslice.plan.pinning import weight_parts, with_pinned_slices
from thinslice.plan.weight_layout import SweepBytes, WeightLayout
from thinslice.units import KIB, MIB, gib, size_option

BLOCK_SIZE = 16
_CHUNKS = (512, 256, 128, 64, 32, 16)
# Where a prompt takes several sweeps, one for each chunk, larger ones pay for their memory.
_STREAMED_CHUNKS = (32768, 16384, 8192, 4096, 2048, 1024, *_CHUNKS)
# Rows a layer takes at a time while its slices are held: enough that products are bound by
# arithmetic and not by reading the layer from memory once more for each run of rows.
_LAYER_ROWS = (512, 128)
# Below this a chat turn does not fit; a plan that could only offer less says so instead.
_SMALLEST_CONTEXT = 256
# Without --context, weights are streamed rather than the context cut below this.
_USEFUL_CONTEXT = 1024
_STREAMED_CONTEXT = 4096
# The checkpoint reader's buffers while weights are read and converted.
LOADING_BYTES = 16 * MIB
# What packed rows take while torch computes with them as numbers, a piece at a time.
UNPACKING_BYTES = 16 * MIB
# Bytes of a slice: the largest hides a slice's fixed cost, smaller ones lower the floor.
_SLICE_BYTES = (8 * MIB, 2 * MIB, 512 * KIB)
_NUM_BUFFERS = 6
# What a direct read of a slice at any offset takes more: a page on either side.
_ALIGNMENT_BYTES = 2 * 4096
_DTYPES = ("float32", "bfloat16", "int8", "int4")
# What a process holds before the model differs from one start to the next by about a MiB; a
# suggestion must still fit the next time.
JITTER_BYTES = 4 * MIB


@dataclass(frozen=True)
class Workload:
    """What is to be run.

    Attributes:
        context: tokens of prompt and completion together; None takes as many as fit.
        max_num_seqs: sequences that may run at once.
        dtype: what to compute the weights with: bfloat16, float32, int8 or int4.
        kv_dtype: of the KV cache: bfloat16, float32 or int8; None takes what suits ``dtype``.
        is_native: the compiled kernels run, where ``dtype`` has them.
        num_threads: they run on.
        can_change_dtype: the model's files can be had with other weights: they are not packed.
        draft: who drafts: auto, ngram, mtp or off.
        draft_length: the most drafts for a sequence in a step.
        mtp_hidden: what a prediction layer takes of the model; see DraftPlan.
    """

    context: int | None = None
    max_num_seqs: int = 1
    dtype: str = "bfloat16"
    kv_dtype: str | None = None
    is_native: bool = True
    num_threads: int = 2
    can_change_dtype: bool = True
    draft: str = "off"
    draft_length: int = 8
    mtp_hidden: str = "pre-norm"


@dataclass(frozen=True)
class _Tokens:
    """Positions of a sequence, tokens in flight, and how many of them a layer takes at a time."""

    context: int
    chunk: int
    layer_rows: int


@dataclass(frozen=True)
class _Case:
    """What a plan is made for; ``draft`` is one of those that the workload leaves open."""

    shape: ModelShape
    layout: WeightLayout
    workload: Workload
    runtime_bytes: int
    draft: DraftPlan | None = None

    @property
    def variants(self) -> "tuple[_Case, ...]":
        """The same case with each of the drafters to choose from, the better one first."""
        wanted, length = self.workload.draft, self.workload.draft_length
        if wanted == "off":
            return (self,)
        hidden = self.workload.mtp_hidden
        count = self.shape.num_nextn_predict_layers
        drafts = [DraftPlan(wanted != "mtp", count * (wanted == "mtp"), length, mtp_hidden=hidden)]
        if wanted == "auto" and self.layout.prediction:
            drafts.insert(0, replace(drafts[0], num_mtp_layers=count))
        return tuple(replace(self, draft=draft) for draft in drafts)

    @property
    def num_mtp_layers(self) -> int:
        """Prediction layers that draft."""
        return 0 if self.draft is None else self.draft.num_mtp_layers

    @property
    def how(self) -> Computation:
        is_packed = self.workload.dtype not in ("bfloat16", "float32")
        block = next(m.rows for m in self.layout.layers[0] if m.name.endswith("gate_proj.weight"))
        return Computation(
            itemsize=2 if self.workload.dtype == "bfloat16" else 4,
            ffn_block=block,
            is_native=self.workload.is_native,
            is_packed=is_packed and self.workload.is_native,
            num_threads=self.workload.num_threads,
        )

    @property
    def kv_dtype(self) -> str:
        default = "float32" if self.workload.dtype == "float32" else "bfloat16"
        return self.workload.kv_dtype or default

    @property
    def kv_bytes_per_token(self) -> int:
        return kv_bytes_per_token(self.shape, self.kv_dtype, self.num_mtp_layers)


def plan(
    shape: ModelShape,
    layout: WeightLayout,
    budget_bytes: int,
    workload: Workload,
    runtime_bytes: int,
) -> MemoryPlan:
    """Choose residency, slices, chunk, context and KV blocks so that the peak fits the budget.

    Args:
        runtime_bytes: what the process holds before the model is loaded, as measured.

    Errors: ConfigError for a context or a prediction layer that the model does not have;
    BudgetError where nothing fits, with the need by part and the single changes that would fit.
    """
    if workload.context is not None and not 0 < workload.context <= shape.max_position_embeddings:
        raise ConfigError(
            f"--context {workload.context} is out of range; "
            f"this model has 1..{shape.max_position_embeddings}"
        )
    if workload.draft == "mtp" and not layout.prediction:
        raise ConfigError(
            "--draft mtp: this model has no multi-token-prediction layer; --draft ngram needs none"
        )
    case = _Case(shape, layout, workload, runtime_bytes)
    chosen = _first_fit(case, budget_bytes)
    if chosen is None:
        raise _budget_error(case, budget_bytes)
    return chosen


def _first_fit(case: _Case, budget_bytes: int) -> MemoryPlan | None:
    """The first candidate that fits, grown into what it leaves of the budget.

    Of several that serve as well, the one that keeps most slices resident.
    """
    candidates = chain(
        _resident_candidates(case, budget_bytes, _USEFUL_CONTEXT),
        _streamed_candidates(case, budget_bytes, _USEFUL_CONTEXT),
        _streamed_candidates(case, budget_bytes, _SMALLEST_CONTEXT),
        _resident_candidates(case, budget_bytes, _SMALLEST_CONTEXT),
    )
    for choice in candidates:
        grown = [_grown(case, one) for one in choice if one.headroom_bytes >= 0]
        if grown:
            return max(grown, key=lambda one: one.streaming.num_pinned if one.streaming else 0)
    return None


def _grown(case: _Case, chosen: MemoryPlan) -> MemoryPlan:
    if chosen.streaming is None:
        return _with_more_blocks(replace(case, draft=chosen.draft), chosen)
    return with_pinned_slices(chosen, case.layout.sweep_bytes(chosen.streaming.slice_bytes))


def _resident_candidates(
    case: _Case, budget_bytes: int, shortest: int
) -> Iterator[tuple[MemoryPlan, ...]]:
    for chunk, one in product(_CHUNKS, case.variants):
        for context in _contexts(case, case.shape.max_position_embeddings, shortest):
            yield (_resident(one, budget_bytes, context, chunk),)


def _streamed_candidates(
    case: _Case, budget_bytes: int, shortest: int
) -> Iterator[tuple[MemoryPlan, ...]]:
    contexts = [*_contexts(case, _STREAMED_CONTEXT, shortest)]
    for slice_bytes in _SLICE_BYTES:
        slices = (slice_bytes, case.layout.sweep_bytes(slice_bytes))
        for layer_rows, one, context in product(_LAYER_ROWS, case.variants, contexts):
            whole = _Tokens(context, context, context)
            by_layer = replace(whole, layer_rows=min(layer_rows, context))
            # Of two that are equal the first is taken, and none is held for rows that are all.
            choices = dict.fromkeys((whole, by_layer))
            yield tuple(_streamed(one, budget_bytes, tokens, slices) for tokens in choices)
        for chunk, one, context in product(_STREAMED_CHUNKS, case.variants, contexts):
            if chunk < context:
                tokens = _Tokens(context, chunk, chunk)
                yield (_streamed(one, budget_bytes, tokens, slices),)


def _contexts(case: _Case, longest: int, shortest: int) -> Iterator[int]:
    """Contexts to try, largest first: the one asked for, or ``longest`` and its fractions."""
    if case.workload.context is not None:
        yield case.workload.context
        return
    context = min(longest, case.shape.max_position_embeddings)
    shortest = min(shortest, context)
    while context > shortest:
        yield context
        context = context * 3 // 4 // BLOCK_SIZE * BLOCK_SIZE
    yield shortest


def _resident(case: _Case, budget_bytes: int, context: int, chunk: int) -> MemoryPlan:
    """All weights in memory, and room for one sequence of the whole context."""
    chunk = min(chunk, context)
    tokens = _Tokens(context, chunk, chunk)
    parts = _common_parts(case, tokens)
    parts["weights"] = case.layout.kept_bytes
    return _memory_plan(case, budget_bytes, tokens, parts)


def _streamed(
    case: _Case, budget_bytes: int, tokens: _Tokens, slices: tuple[int, SweepBytes]
) -> MemoryPlan:
    """All matrices on disk but those that draft, and room for one sequence of the whole context.

    Args:
        slices: the most bytes in a slice, and what the slices of a sweep take.
    """
    slice_bytes, sweep = slices
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
    chosen = _memory_plan(case, budget_bytes, tokens, parts)
    return replace(chosen, streaming=streaming)


def _common_parts(case: _Case, tokens: _Tokens) -> dict[str, int]:
    """The parts every plan has, in the order they are shown."""
    shape, how, chunk = case.shape, case.how, tokens.chunk
    num_positions = -(-tokens.context // BLOCK_SIZE) * BLOCK_SIZE
    num_rows = tokens.layer_rows
    if case.num_mtp_layers:
        num_rows = max(num_rows, min(chunk, PREDICTION_ROWS))
    running = activation_bytes(shape, num_rows, tokens.context, how)
    if not how.is_packed and case.workload.dtype in ("int8", "int4"):
        running += UNPACKING_BYTES
    if tokens.layer_rows < chunk:
        running += whole_stream_bytes(shape, chunk, how)
    # The residual stream is alive while the head runs.
    num_logits = min(case.workload.max_num_seqs, chunk)
    heading = logits_bytes(shape, num_logits, how.itemsize)
    heading += chunk * shape.hidden_size * how.itemsize
    return {
        "runtime": case.runtime_bytes + library_bytes(shape, num_rows, how),
        "weights": 0,
        "kv cache": num_positions * case.kv_bytes_per_token,
        "activations": max(running, heading, LOADING_BYTES),
        **_drafting_part(case, tokens.context, chunk),
    }


def _drafting_part(case: _Case, context: int, chunk: int) -> dict[str, int]:
    """What drafting adds, beside a prediction layer's K and V: n-gram indexes, logits of the rows
    behind drafts, the prediction layers and what they work on."""
    draft, shape, how = case.draft, case.shape, case.how
    if draft is None:
        return {}
    num_seqs = min(case.workload.max_num_seqs, chunk)
    num_rows = min(num_seqs * (1 + draft.length), chunk)
    one, all_rows = (logits_bytes(shape, rows, how.itemsize) for rows in (num_seqs, num_rows))
    num_bytes = all_rows - one
    if draft.uses_ngram:
        num_bytes += num_seqs * ngram_index_bytes(context)
    if draft.num_mtp_layers:
        num_bytes += case.layout.prediction_bytes
        num_bytes += prediction_activation_bytes(shape, chunk, num_seqs, how)
        if case.workload.dtype == "bfloat16":
            num_bytes += PREDICTION_KERNEL_BYTES
    return {"drafting": num_bytes}


def _memory_plan(
    case: _Case, budget_bytes: int, tokens: _Tokens, parts: dict[str, int]
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


def _with_more_blocks(case: _Case, chosen: MemoryPlan) -> MemoryPlan:
    """The same plan with KV blocks for as many of its sequences as the headroom holds."""
    per_block = BLOCK_SIZE * case.kv_bytes_per_token
    wanted = chosen.num_kv_blocks * (chosen.max_num_seqs - 1)
    extra = min(wanted, chosen.headroom_bytes // per_block)
    parts = dict(chosen.parts)
    parts["kv cache"] += extra * per_block
    return replace(chosen, num_kv_blocks=chosen.num_kv_blocks + extra, parts=tuple(parts.items()))


def _floor(case: _Case) -> MemoryPlan:
    """The plan that takes least, whatever the budget."""
    context = case.workload.context
    context = context or min(_SMALLEST_CONTEXT, case.shape.max_position_embeddings)
    case, chunk = case.variants[-1], min(context, _CHUNKS[-1])
    tokens = _Tokens(context, chunk, chunk)
    floors = (
        _resident(case, 0, context, chunk),
        *(
            _streamed(case, 0, tokens, (size, case.layout.sweep_bytes(size)))
            for size in _SLICE_BYTES
        ),
    )
    return min(floors, key=lambda candidate: candidate.peak_bytes)


def _budget_error(case: _Case, budget_bytes: int) -> BudgetError:
    need = _floor(case)
    lines = [
        f"no plan fits --memory {size_option(budget_bytes)} at --context {need.context}",
        f"  needs {gib(need.peak_bytes)} GiB: {need.describe_parts()}",
        "  any one of these fits:",
        *(f"    {change}" for change in _suggestions(case, budget_bytes, need)),
    ]
    return BudgetError("\n".join(lines))


def _suggestions(case: _Case, budget_bytes: int, need: MemoryPlan) -> Iterator[str]:
    """Single changes that fit, each the planner run again with that one change."""
    workload, room = case.workload, budget_bytes - JITTER_BYTES
    if workload.context is not None:
        shorter = _first_fit(replace(case, workload=replace(workload, context=None)), room)
        if shorter is not None:
            yield f"--context {shorter.context}"
    if workload.is_native and case.kv_dtype != "int8":
        smaller_cache = replace(case, workload=replace(workload, kv_dtype="int8"))
        if _first_fit(smaller_cache, room) is not None:
            yield "--kv-dtype int8"
    for dtype in _smaller_dtypes(workload):
        smaller = _with_dtype(case, dtype)
        if smaller is not None and _first_fit(smaller, room) is not None:
            yield f"--dtype {dtype}"
            break
    if workload.draft != "off":
        undrafted = replace(case, workload=replace(workload, draft="off"))
        if _first_fit(undrafted, room) is not None:
            yield "--draft off"
    yield f"--memory {suggested_size(need.peak_bytes)}"


def suggested_size(need_bytes: int) -> str:
    """A budget that fits a need, as an option has it, also the next time."""
    return size_option(-(-(need_bytes + JITTER_BYTES) // MIB) * MIB)


def _smaller_dtypes(workload: Workload) -> tuple[str, ...]:
    """What takes less, the least change first."""
    return _DTYPES[_DTYPES.index(workload.dtype) + 1 :] if workload.can_change_dtype else ()


def _with_dtype(case: _Case, dtype: str) -> _Case | None:
    """The same case with other weights; None where the model cannot have them."""
    workload = replace(case.workload, dtype=dtype)
    try:
        layout = case.layout.converted_to(case.shape, dtype)
    except ConfigError:
        return None
    return replace(case, workload=workload, layout=layout)
