"""plan(): from a shape, a budget and a workload to the sizes that fit. Arithmetic only.

Weights are kept resident where they fit beside a useful context. Else they are streamed: a ring
of buffers, and as many slices pinned as the rest of the budget holds. Access is cyclic, so a fixed
set of pinned slices saves exactly its share of the reads, and no cache could save more.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain

from thinslice.errors import BudgetError, ConfigError
from thinslice.plan.cost import (
    DTYPE_BYTES,
    activation_bytes,
    kv_bytes_per_token,
    library_bytes,
    logits_bytes,
    model_parameters,
)
from thinslice.plan.memory_plan import MemoryPlan, StreamingPlan
from thinslice.plan.model_shape import ModelShape
from thinslice.plan.weight_slices import resident_vectors, sweep_numels
from thinslice.units import MIB, gib, size_option

BLOCK_SIZE = 16
_CHUNKS = (512, 256, 128, 64, 32, 16)
# A streamed prompt costs one sweep for each chunk, so larger ones pay for their memory.
_STREAMED_CHUNKS = (4096, 2048, 1024, *_CHUNKS)
_LARGEST_CHUNK_SHARE = 0.25
# Below this a chat turn does not fit; a plan that could only offer less says so instead.
_SMALLEST_CONTEXT = 256
# Without --context, weights are streamed rather than the context cut below this.
_USEFUL_CONTEXT = 1024
_STREAMED_CONTEXT = 4096
# The checkpoint reader's buffers while weights are read and converted.
LOADING_BYTES = 16 * MIB
# Weights in a slice: the largest hides a slice's fixed cost, smaller ones lower the floor.
_SLICE_WEIGHTS = (4 * MIB, MIB)
_NUM_BUFFERS = 3
# What a direct read of a slice at any offset takes more: a page on either side.
_ALIGNMENT_BYTES = 2 * 4096
# What a process holds before the model differs from one start to the next by about a MiB; a
# suggestion must still fit the next time.
_JITTER_BYTES = 4 * MIB
# Converting blocks to numbers holds float32 values and working copies of them.
_CONVERSION_BYTES_PER_WEIGHT = 16


@dataclass(frozen=True)
class Workload:
    """What is to be run.

    Attributes:
        context: tokens of prompt and completion together; None takes as many as fit.
        max_num_seqs: sequences that may run at once.
        dtype: ``bfloat16`` or ``float32``.
    """

    context: int | None = None
    max_num_seqs: int = 1
    dtype: str = "bfloat16"


@dataclass(frozen=True)
class WeightSource:
    """How weights lie on disk.

    Attributes:
        bytes_per_weight: of the matrix that takes most.
        is_converted: they are not of the dtype that is computed in.
    """

    bytes_per_weight: float
    is_converted: bool


@dataclass(frozen=True)
class _Case:
    """What a plan is made for."""

    shape: ModelShape
    source: WeightSource
    workload: Workload
    runtime_bytes: int

    @property
    def itemsize(self) -> int:
        return DTYPE_BYTES[self.workload.dtype]


def plan(
    shape: ModelShape,
    source: WeightSource,
    budget_bytes: int,
    workload: Workload,
    runtime_bytes: int,
) -> MemoryPlan:
    """Choose residency, slices, chunk, context and KV blocks so that the peak fits the budget.

    Args:
        runtime_bytes: what the process holds before the model is loaded, as measured.

    Errors: ConfigError for a context the model does not have; BudgetError where nothing fits,
    with the need by part and the single changes that would fit.
    """
    if workload.context is not None and not 0 < workload.context <= shape.max_position_embeddings:
        raise ConfigError(
            f"--context {workload.context} is out of range; "
            f"this model has 1..{shape.max_position_embeddings}"
        )
    case = _Case(shape, source, workload, runtime_bytes)
    chosen = _first_fit(case, budget_bytes)
    if chosen is None:
        raise _budget_error(case, budget_bytes)
    return chosen


def _first_fit(case: _Case, budget_bytes: int) -> MemoryPlan | None:
    """The first candidate that fits, grown into what it leaves of the budget."""
    candidates = chain(
        _resident_candidates(case, budget_bytes, _USEFUL_CONTEXT),
        _streamed_candidates(case, budget_bytes, _USEFUL_CONTEXT),
        _streamed_candidates(case, budget_bytes, _SMALLEST_CONTEXT),
        _resident_candidates(case, budget_bytes, _SMALLEST_CONTEXT),
    )
    chosen = next((one for one in candidates if one.headroom_bytes >= 0), None)
    if chosen is None or chosen.streaming is None:
        return chosen and _with_more_blocks(case, chosen)
    return _with_pinned_slices(case, chosen)


def _resident_candidates(case: _Case, budget_bytes: int, shortest: int) -> Iterator[MemoryPlan]:
    for chunk in _CHUNKS:
        for context in _contexts(case, case.shape.max_position_embeddings, shortest):
            yield _resident(case, budget_bytes, context, chunk)


def _streamed_candidates(case: _Case, budget_bytes: int, shortest: int) -> Iterator[MemoryPlan]:
    share = int(budget_bytes * _LARGEST_CHUNK_SHARE)
    for slice_weights in _SLICE_WEIGHTS:
        for chunk in _STREAMED_CHUNKS:
            for context in _contexts(case, _STREAMED_CONTEXT, shortest):
                candidate = _streamed(case, budget_bytes, context, chunk, slice_weights)
                if chunk == _CHUNKS[-1] or dict(candidate.parts)["activations"] <= share:
                    yield candidate


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
    weights = model_parameters(case.shape) * case.itemsize
    parts = _common_parts(case, context, chunk)
    parts["weights"] = weights
    parts["activations"] = max(parts["activations"], LOADING_BYTES)
    return _memory_plan(case, budget_bytes, context, chunk, parts)


def _streamed(
    case: _Case, budget_bytes: int, context: int, chunk: int, slice_weights: int
) -> MemoryPlan:
    """All matrices on disk, and room for one sequence of the whole context."""
    chunk = min(chunk, context)
    numels = sweep_numels(case.shape, slice_weights)
    largest = max(numels)
    buffer_bytes = -(-int(largest * case.source.bytes_per_weight) // 4096) * 4096
    streaming = StreamingPlan(
        slice_weights=slice_weights,
        num_slices=len(numels),
        num_pinned=0,
        num_buffers=_NUM_BUFFERS,
        buffer_bytes=buffer_bytes + _ALIGNMENT_BYTES,
    )
    ring = _NUM_BUFFERS * streaming.buffer_bytes
    if case.source.is_converted:
        ring += largest * (case.itemsize + _CONVERSION_BYTES_PER_WEIGHT)
    parts = _common_parts(case, context, chunk)
    parts["weights"] = resident_vectors(case.shape) * case.itemsize
    parts["weight ring"] = ring
    parts["activations"] = max(parts["activations"], LOADING_BYTES)
    chosen = _memory_plan(case, budget_bytes, context, chunk, parts)
    return replace(chosen, streaming=streaming)


def _common_parts(case: _Case, context: int, chunk: int) -> dict[str, int]:
    """The parts every plan has, in the order they are shown."""
    shape, itemsize = case.shape, case.itemsize
    num_positions = -(-context // BLOCK_SIZE) * BLOCK_SIZE
    rows = min(case.workload.max_num_seqs, chunk)
    running = activation_bytes(shape, chunk, context, itemsize)
    return {
        "runtime": case.runtime_bytes + library_bytes(shape, chunk, itemsize),
        "weights": 0,
        "kv cache": num_positions * kv_bytes_per_token(shape, itemsize),
        "activations": max(running, logits_bytes(shape, rows, itemsize)),
    }


def _memory_plan(
    case: _Case, budget_bytes: int, context: int, chunk: int, parts: dict[str, int]
) -> MemoryPlan:
    return MemoryPlan(
        budget_bytes=budget_bytes,
        dtype=case.workload.dtype,
        context=context,
        chunk=chunk,
        max_num_seqs=case.workload.max_num_seqs,
        block_size=BLOCK_SIZE,
        num_kv_blocks=-(-context // BLOCK_SIZE),
        parts=tuple(parts.items()),
    )


def _with_more_blocks(case: _Case, chosen: MemoryPlan) -> MemoryPlan:
    """The same plan with KV blocks for as many of its sequences as the headroom holds."""
    per_block = BLOCK_SIZE * kv_bytes_per_token(case.shape, case.itemsize)
    wanted = chosen.num_kv_blocks * (chosen.max_num_seqs - 1)
    extra = min(wanted, chosen.headroom_bytes // per_block)
    grown = _with_part(chosen, "kv cache", extra * per_block)
    return replace(grown, num_kv_blocks=chosen.num_kv_blocks + extra)


def _with_pinned_slices(case: _Case, chosen: MemoryPlan) -> MemoryPlan:
    """The same plan with as many slices resident as the headroom holds."""
    streaming = chosen.streaming
    assert streaming is not None, "nothing is streamed"
    numels = sweep_numels(case.shape, streaming.slice_weights)
    room = chosen.headroom_bytes // case.itemsize
    count = min(room * len(numels) // sum(numels), len(numels))
    # The average is a good guess; where the slices it picks are larger, a few less will do.
    while sum(numels[idx] for idx in replace(streaming, num_pinned=count).pinned()) > room:
        count -= 1
    pinned = replace(streaming, num_pinned=count)
    num_bytes = sum(numels[idx] for idx in pinned.pinned()) * case.itemsize
    return replace(_with_part(chosen, "weights", num_bytes), streaming=pinned)


def _with_part(chosen: MemoryPlan, part: str, extra_bytes: int) -> MemoryPlan:
    parts = tuple(
        (name, num_bytes + extra_bytes if name == part else num_bytes)
        for name, num_bytes in chosen.parts
    )
    return replace(chosen, parts=parts)


def _floor(case: _Case) -> MemoryPlan:
    """The plan that takes least, whatever the budget."""
    context = case.workload.context
    context = context or min(_SMALLEST_CONTEXT, case.shape.max_position_embeddings)
    floors = (
        _resident(case, 0, context, _CHUNKS[-1]),
        *(_streamed(case, 0, context, _CHUNKS[-1], size) for size in _SLICE_WEIGHTS),
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
    workload, room = case.workload, budget_bytes - _JITTER_BYTES
    if workload.context is not None:
        shorter = _first_fit(replace(case, workload=replace(workload, context=None)), room)
        if shorter is not None:
            yield f"--context {shorter.context}"
    if workload.dtype == "float32":
        smaller = replace(case, workload=replace(workload, dtype="bfloat16"))
        if _first_fit(smaller, room) is not None:
            yield "--dtype bfloat16"
    yield f"--memory {size_option(-(-(need.peak_bytes + _JITTER_BYTES) // MIB) * MIB)}"
