"""The sizes that fit a budget of device memory and one of host memory: arithmetic alone.

Weights are resident on the device where they fit beside a useful context. Else they are streamed
through a ring of buffers there: from host memory, which holds as many slices as its budget has room
for, and the others from disk. The order of worth is as in planner.py: access is cyclic, so a fixed
set of slices in the faster place saves exactly its share of the copies.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain

from thinslice.plan.candidates import BLOCK_SIZE, LOADING_BYTES
from thinslice.plan.case import Workload, held_parts
from thinslice.plan.cost import (
    CALLER_BYTES,
    kv_bytes_per_token,
    logits_bytes,
    ngram_index_bytes,
)
from thinslice.plan.device_cost import activation_bytes
from thinslice.plan.kernel_limits import (
    ATTENTION_SPLIT,
    DEVICE_ALIGNMENT,
    MOST_SINGLE_ROWS,
    PIECE_BYTES,
)
from thinslice.plan.memory_plan import DevicePlan, DraftPlan, MemoryPlan, StreamingPlan
from thinslice.plan.model_shape import ModelShape
from thinslice.plan.sweep_bytes import SweepBytes
from thinslice.plan.tensors import Role
from thinslice.plan.weight_layout import WeightLayout
from thinslice.units import KIB, MIB

_CHUNKS = (2048, 1024, 512, 256, 128, 64, 32, 16)
_SMALLEST_CONTEXT = 256
_USEFUL_CONTEXT = 1024
_STREAMED_CONTEXT = 4096
_LARGEST_CHUNK_SHARE = 0.25
_SLICE_BYTES = (32 * MIB, 8 * MIB, 2 * MIB, 512 * KIB)
_NUM_BUFFERS = 4
_NUM_STAGING = 6
_PAGE = 4096
# Torch's allocator takes memory in blocks of 2 and 20 MiB and does not fill each; cuBLAS works in
# 32 MiB of it. An allowance, not measured on a card yet.
_ALLOCATOR_BYTES = 96 * MIB
# Room for what Triton's compiler comes to hold in the process: 135 MiB after fourteen kernels,
# 3.7.1 compiling for sm_90 on a machine without a card.
_COMPILER_BYTES = 256 * MIB

# The most bytes in a slice, and what the slices of a sweep take.
_Slices = tuple[int, SweepBytes]


@dataclass(frozen=True)
class DeviceLimits:
    """What there is.

    Attributes:
        name: of the device, as a user names it.
        device_bytes: the budget of its memory.
        context_bytes: what its driver and libraries hold of that, as measured.
        host_bytes: the budget of the process on the host.
        runtime_bytes: what the process holds there before the model is loaded, as measured.
    """

    name: str
    device_bytes: int
    context_bytes: int
    host_bytes: int
    runtime_bytes: int


@dataclass(frozen=True)
class DeviceCase:
    """A model, the budgets, and what is asked for: all that a plan for a device is made of."""

    shape: ModelShape
    layout: WeightLayout
    limits: DeviceLimits
    workload: Workload
    draft: DraftPlan | None

    @cached_property
    def kept_bytes(self) -> int:
        """Bytes of all matrices on the device."""
        return sum(_aligned(matrix.kept_bytes(matrix.rows)) for matrix in self.layout.sweep)

    @property
    def kv_dtype(self) -> str:
        default = "float32" if self.workload.dtype == "float32" else "bfloat16"
        return self.workload.kv_dtype or default

    @property
    def itemsize(self) -> int:
        """Bytes of an activation."""
        return 2 if self.workload.dtype == "bfloat16" else 4

    @property
    def ffn_block(self) -> int:
        """Features of the feed-forward that exist at once."""
        layer = self.layout.layers[0]
        return next(m.rows for m in layer if m.tensor.role is Role.GATE)


def best_on_device(case: DeviceCase) -> MemoryPlan | None:
    """Choose residency, slices, chunk, context and KV blocks so that both peaks fit their budgets.

    Where nothing else fits the host, what takes least there; None where that does not fit either.
    """
    sizes = [(size, case.layout.sweep_bytes(size)) for size in _SLICE_BYTES]
    groups = chain(
        [_candidates(case, None, _USEFUL_CONTEXT)],
        (_candidates(case, size, _USEFUL_CONTEXT) for size in sizes),
        (_candidates(case, size, _SMALLEST_CONTEXT) for size in sizes),
        [_candidates(case, None, _SMALLEST_CONTEXT)],
    )
    for candidate in chain.from_iterable(groups):
        if candidate.headroom_bytes < 0:
            continue
        chosen = _with_spilled_blocks(case, _with_more(case, candidate))
        assert chosen.device is not None, "a plan for no device"
        if chosen.device.host_headroom_bytes >= 0:
            return chosen
    least = least_on_host(case)
    if least is None or least.device is None or least.device.host_headroom_bytes < 0:
        return None
    return least


def _candidates(case: DeviceCase, slices: _Slices | None, shortest: int) -> Iterator[MemoryPlan]:
    """Plans to try, the best first; all weights on the device where there are no slices."""
    limit = case.shape.max_position_embeddings if slices is None else _STREAMED_CONTEXT
    share = int(case.limits.device_bytes * _LARGEST_CHUNK_SHARE)
    for chunk in _CHUNKS:
        for context in _contexts(case, limit, shortest):
            candidate = _plan(case, slices, context, chunk)
            if chunk == _CHUNKS[-1] or dict(candidate.parts)["activations"] <= share:
                yield candidate


def _contexts(case: DeviceCase, longest: int, shortest: int) -> Iterator[int]:
    """The context asked for, or ``longest`` and its fractions."""
    if case.workload.context is not None:
        yield case.workload.context
        return
    context = min(longest, case.shape.max_position_embeddings)
    shortest = min(shortest, context)
    while context > shortest:
        yield context
        context = context * 3 // 4 // BLOCK_SIZE * BLOCK_SIZE
    yield shortest


def _plan(case: DeviceCase, slices: _Slices | None, context: int, chunk: int) -> MemoryPlan:
    """Room for one sequence of the whole context; streamed, with no slice on the device yet."""
    chunk = min(chunk, context)
    shape, layout, workload = case.shape, case.layout, case.workload
    num_blocks = -(-context // BLOCK_SIZE)
    parts = {
        "context": case.limits.context_bytes,
        "weights": layout.vector_bytes,
        "kv cache": num_blocks * BLOCK_SIZE * kv_bytes_per_token(shape, case.kv_dtype),
        "activations": _activations(case, context, chunk),
        "allocator": _ALLOCATOR_BYTES,
    }
    streaming = None
    if slices is None:
        parts["weights"] += case.kept_bytes
    else:
        slice_bytes, kept = slices[0], slices[1].kept
        streaming = StreamingPlan(
            slice_bytes=slice_bytes,
            num_slices=len(kept),
            num_pinned=0,
            num_buffers=_NUM_BUFFERS,
            buffer_bytes=_aligned(max(kept)),
        )
        parts["weight ring"] = _NUM_BUFFERS * streaming.buffer_bytes
    limits = case.limits
    return MemoryPlan(
        budget_bytes=limits.device_bytes,
        dtype=workload.dtype,
        kv_dtype=case.kv_dtype,
        context=context,
        chunk=chunk,
        max_num_seqs=workload.max_num_seqs,
        block_size=BLOCK_SIZE,
        num_kv_blocks=num_blocks,
        parts=tuple(parts.items()),
        streaming=streaming,
        draft=case.draft,
        device=DevicePlan(limits.name, limits.host_bytes, _host_parts(case, context, chunk)),
    )


def _num_logits_rows(case: DeviceCase, chunk: int) -> int:
    per_sequence = 1 if case.draft is None else 1 + case.draft.length
    return min(case.workload.max_num_seqs * per_sequence, chunk)


def _activations(case: DeviceCase, context: int, chunk: int) -> int:
    """On the device: one layer's, what rows attended with one by one leave for each part of their
    positions, and the logits."""
    shape, itemsize = case.shape, case.itemsize
    num_rows = min(chunk, case.workload.max_num_seqs * MOST_SINGLE_ROWS)
    num_parts = -(-context // ATTENTION_SPLIT)
    split = num_rows * num_parts * shape.num_attention_heads * (shape.head_dim + 2) * 4
    running = split + activation_bytes(
        shape, chunk, context, itemsize=itemsize, ffn_block=case.ffn_block
    )
    logits = _num_logits_rows(case, chunk) * shape.vocab_size * (itemsize + 4)
    # With the rows of the residual stream that the head takes, before and after the norm.
    return max(running, logits + 3 * chunk * shape.hidden_size * itemsize)


def _host_parts(case: DeviceCase, context: int, chunk: int) -> tuple[tuple[str, int], ...]:
    """On the host, without weights: rows of the embedding, logits and their sorting."""
    shape, num_rows = case.shape, _num_logits_rows(case, chunk)
    sampling = logits_bytes(shape, num_rows) + 2 * chunk * shape.hidden_size * 4
    held = held_parts(case.limits.runtime_bytes, case.workload)
    held["runtime"] += CALLER_BYTES + _COMPILER_BYTES
    parts = {
        **held,
        "weights": 0,
        "activations": max(sampling, LOADING_BYTES + PIECE_BYTES),
    }
    if case.draft is not None:
        parts["drafting"] = case.workload.max_num_seqs * ngram_index_bytes(context)
    return tuple(parts.items())


def _with_more(case: DeviceCase, chosen: MemoryPlan) -> MemoryPlan:
    """Use the headroom for KV blocks, or for slices in faster places."""
    if chosen.streaming is not None:
        return _with_slices(case, chosen, chosen.streaming)
    per_block = BLOCK_SIZE * kv_bytes_per_token(case.shape, case.kv_dtype)
    wanted = chosen.num_kv_blocks * (chosen.max_num_seqs - 1)
    extra = min(wanted, chosen.headroom_bytes // per_block)
    parts = _with(chosen.parts, "kv cache", extra * per_block)
    return replace(chosen, parts=parts, num_kv_blocks=chosen.num_kv_blocks + extra)


def _with_slices(case: DeviceCase, chosen: MemoryPlan, streaming: StreamingPlan) -> MemoryPlan:
    """Slices resident on the device, then of the others those in host memory."""
    sweep = case.layout.sweep_bytes(streaming.slice_bytes)
    kept = [_aligned(num_bytes) for num_bytes in sweep.kept]

    def resident(count: int) -> int:
        return sum(kept[idx] for idx in replace(streaming, num_pinned=count).pinned())

    count = _most(resident, len(kept), chosen.headroom_bytes)
    streaming = replace(streaming, num_pinned=count)
    pinned = frozenset(streaming.pinned())
    chosen = replace(
        chosen, streaming=streaming, parts=_with(chosen.parts, "weights", resident(count))
    )
    streamed = [idx for idx in range(len(kept)) if idx not in pinned]
    host = chosen.device
    assert host is not None, "a plan for no device"

    def locked(count: int) -> int:
        return sum(kept[idx] for idx in replace(host, num_locked=count).locked(streamed))

    # What is converted on the way is converted once: it cannot be copied as it lies on disk.
    must_lock = any(matrix.is_converted for matrix in case.layout.sweep)
    if not streamed or must_lock or locked(len(streamed)) <= host.host_headroom_bytes:
        return _on_host(chosen, len(streamed), locked(len(streamed)), (0, 0))
    staging_bytes = -(-(sweep.largest_stored + _PAGE) // _PAGE) * _PAGE
    room = host.host_headroom_bytes - _NUM_STAGING * staging_bytes
    count = _most(locked, len(streamed), max(room, 0))
    return _on_host(chosen, count, locked(count), (_NUM_STAGING, staging_bytes))


def _with_spilled_blocks(case: DeviceCase, chosen: MemoryPlan) -> MemoryPlan:
    """Room for what sequences need beside the device's blocks, where host memory has it once all
    weights lie there or on the device; no more than as much again, as it is locked from the start.
    """
    host = chosen.device
    assert host is not None, "a plan for no device"
    if host.num_staging:
        return chosen
    per_block = BLOCK_SIZE * kv_bytes_per_token(case.shape, case.kv_dtype)
    wanted = -(-chosen.context // BLOCK_SIZE) * chosen.max_num_seqs - chosen.num_kv_blocks
    count = min(wanted, chosen.num_kv_blocks, host.host_headroom_bytes // per_block)
    if count <= 0:
        return chosen
    parts = (*host.host_parts, ("spilled kv", count * per_block))
    return replace(chosen, device=replace(host, host_parts=parts, num_spilled_blocks=count))


def _on_host(
    chosen: MemoryPlan, num_locked: int, locked_bytes: int, staging: tuple[int, int]
) -> MemoryPlan:
    host = chosen.device
    assert host is not None, "a plan for no device"
    parts = _with(host.host_parts, "weights", locked_bytes)
    if staging[0]:
        parts = (*parts, ("staging", staging[0] * staging[1]))
    device = replace(
        host,
        host_parts=parts,
        num_locked=num_locked,
        num_staging=staging[0],
        staging_bytes=staging[1],
    )
    return replace(chosen, device=device)


def _most(size_of: Callable[[int], int], largest: int, room: int) -> int:
    """The largest count whose size fits."""
    low, high = 0, largest
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if size_of(middle) <= room else (low, middle - 1)
    return low


def _with(
    parts: tuple[tuple[str, int], ...], part: str, extra_bytes: int
) -> tuple[tuple[str, int], ...]:
    return tuple((name, size + extra_bytes if name == part else size) for name, size in parts)


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // DEVICE_ALIGNMENT) * DEVICE_ALIGNMENT


def floors(case: DeviceCase) -> list[MemoryPlan]:
    """The plans that take least, whatever the budgets."""
    context = case.workload.context
    context = context or min(_SMALLEST_CONTEXT, case.shape.max_position_embeddings)
    sizes = (None, *((size, case.layout.sweep_bytes(size)) for size in _SLICE_BYTES))
    return [_plan(case, size, context, _CHUNKS[-1]) for size in sizes]


def least_on_host(case: DeviceCase) -> MemoryPlan | None:
    """Return the plan that takes least on the host, of those that fit the device."""
    grown = [_with_more(case, one) for one in floors(case) if one.headroom_bytes >= 0]
    sized = [(one.device.host_peak_bytes, one) for one in grown if one.device is not None]
    return min(sized, key=lambda pair: pair[0], default=(0, None))[1]
