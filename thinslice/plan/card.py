"""Card: the parts of a plan where a CUDA card computes, in two pools, and what it tries in order.

Weights are resident on the card where they fit beside a useful context. Else they are streamed
through a ring of buffers there: from host memory, which holds as many slices as its budget has room
for, and the others from disk. The order of worth is as in choose.py: access is cyclic, so a fixed
set of slices in the faster place saves exactly its share of the copies.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Self

from thinslice.errors import ConfigError
from thinslice.plan.case import Case, Platform, Tokens
from thinslice.plan.cost import (
    CALLER_BYTES,
    LOADING_BYTES,
    layer_bytes,
    logits_bytes,
    ngram_index_bytes,
)
from thinslice.plan.kernel_limits import (
    ATTENTION_SPLIT,
    DEVICE_ALIGNMENT,
    MOST_SINGLE_ROWS,
    PIECE_BYTES,
)
from thinslice.plan.memory_plan import DevicePlan, DraftPlan, MemoryPlan, Pool, StreamingPlan
from thinslice.plan.pinning import aligned, most_by_halving, spread_bytes
from thinslice.plan.search import (
    BLOCK_SIZE,
    SMALLEST_CHUNK,
    SMALLEST_CONTEXT,
    STREAMED_CONTEXT,
    USEFUL_CONTEXT,
    candidate_of,
    kv_cache_bytes,
)
from thinslice.plan.sweep_bytes import SweepBytes
from thinslice.units import KIB, MIB

_CHUNKS = (2048, 1024, 512, 256, 128, 64, 32, SMALLEST_CHUNK)
_LARGEST_CHUNK_SHARE = 0.25
_NUM_STAGING = 6
_PAGE = 4096
# Torch's allocator takes memory in blocks of 2 and 20 MiB and does not fill each; cuBLAS works in
# 32 MiB of it. An allowance, not measured on a card yet.
_ALLOCATOR_BYTES = 96 * MIB
# Room for what Triton's compiler comes to hold in the process: 135 MiB after fourteen kernels,
# 3.7.1 compiling for sm_90 on a machine without a card.
_COMPILER_BYTES = 256 * MIB
# More than any matrix has: slices of so many bytes are whole matrices.
_WHOLE = 1 << 62


@dataclass(frozen=True)
class Card(Platform):
    """A CUDA card, whose own memory is the first pool and that of the process the second.

    Attributes:
        name: of the card, as a user names it.
    """

    name: str = "cuda"
    slice_sizes = (32 * MIB, 8 * MIB, 2 * MIB, 512 * KIB)
    num_buffers = 4
    alignment = DEVICE_ALIGNMENT
    has_int8_cache = False

    @classmethod
    def of(
        cls, name: str, card_bytes: int, context_bytes: int, host_bytes: int, runtime_bytes: int
    ) -> Self:
        """Plan in two budgets.

        Args:
            card_bytes: the budget of the card's memory.
            context_bytes: what its driver and libraries hold of that, as measured.
            host_bytes: the budget of the process.
            runtime_bytes: what it holds before the model is loaded, as measured.
        """
        of_card = Pool("--memory", card_bytes, (("context", context_bytes),), f"of {name}")
        of_host = Pool("--host-memory", host_bytes, (("runtime", runtime_bytes),), f"beside {name}")
        return cls((of_card, of_host), name)

    @property
    def device(self) -> DevicePlan:
        return DevicePlan(self.name)

    def check(self, case: Case) -> None:
        workload = case.workload
        if workload.draft == "mtp":
            raise ConfigError(f"--draft mtp does not run on {self.name}; --draft ngram does")
        if workload.mtp_hidden != "pre-norm":
            raise ConfigError(
                f"--mtp-hidden has no effect: no prediction layer drafts on {self.name}"
            )
        if workload.kv_dtype == "int8":
            raise ConfigError(f"--kv-dtype int8 does not run on {self.name}; bfloat16 does")
        if workload.draft == "ngram" and self.drafts(case) == (None,):
            raise ConfigError(
                f"--draft ngram: with {workload.max_num_seqs} sequences {self.name} has no "
                f"rows for drafts; --sequences {MOST_SINGLE_ROWS // 2} has"
            )

    def drafts(self, case: Case) -> tuple[DraftPlan | None, ...]:
        """Drafts as long as all sequences' rows together are multiplied one by one: beyond that a
        row has other bits, and a text would depend on the drafts."""
        workload = case.workload
        length = min(workload.draft_length, MOST_SINGLE_ROWS // workload.max_num_seqs - 1)
        if workload.draft == "off" or length <= 0:
            return (None,)
        return (DraftPlan(uses_ngram=True, num_mtp_layers=0, length=length),)

    def candidates(self, case: Case) -> Iterator[MemoryPlan]:
        """Resident with a useful context, streamed, then the same with less than that."""
        (case,) = case.variants
        yield from self._tried(case, None, USEFUL_CONTEXT)
        for shortest in (USEFUL_CONTEXT, SMALLEST_CONTEXT):
            for size in self.slice_sizes:
                yield from self._tried(case, size, shortest)
        yield from self._tried(case, None, SMALLEST_CONTEXT)

    def _tried(self, case: Case, slice_bytes: int | None, shortest: int) -> Iterator[MemoryPlan]:
        """The largest chunk that leaves most of the card to others, then the longest context."""
        longest = case.shape.max_position_embeddings if slice_bytes is None else STREAMED_CONTEXT
        share = int(self.pools[0].budget_bytes * _LARGEST_CHUNK_SHARE)
        for chunk in _CHUNKS:
            for context in _contexts(case, longest, shortest):
                candidate = candidate_of(case, Tokens.at_once(context, chunk), slice_bytes)
                is_small = candidate.pools[0].part("activations") <= share
                if (is_small or chunk == _CHUNKS[-1]) and _may_fit_host(case, candidate):
                    yield candidate

    def buffer_bytes(self, sweep: SweepBytes) -> int:
        return aligned(max(sweep.kept), self.alignment)

    def most_slices(self, sizes: Sequence[int], room: int, beside: Callable[[int], int]) -> int:
        return most_by_halving(sizes, room, beside)

    def pools_of(
        self, case: Case, tokens: Tokens, streaming: StreamingPlan | None
    ) -> tuple[Pool, ...]:
        shape, context, chunk = case.shape, tokens.context, tokens.chunk
        card = {
            "weights": case.layout.vector_bytes,
            "kv cache": kv_cache_bytes(case, context),
            "activations": _activation_bytes(case, context, chunk),
            "allocator": _ALLOCATOR_BYTES,
        }
        if streaming is None:
            matrices = case.layout.sweep_bytes(_WHOLE).kept
            card["weights"] += sum(aligned(num_bytes, self.alignment) for num_bytes in matrices)
        else:
            card["weight ring"] = streaming.num_buffers * streaming.buffer_bytes
        # Rows of the embedding, logits and their sorting.
        sampling = logits_bytes(shape, _num_logits_rows(case, chunk))
        sampling += 2 * chunk * shape.hidden_size * 4
        host = {
            "runtime": CALLER_BYTES + _COMPILER_BYTES,
            "weights": 0,
            "activations": max(sampling, LOADING_BYTES + PIECE_BYTES),
            **case.reserved_parts(context),
        }
        if case.draft is not None:
            host["drafting"] = case.workload.max_num_seqs * ngram_index_bytes(context)
        return self.pools[0].with_more(card), self.pools[1].with_more(host)

    def on_host(self, case: Case, chosen: MemoryPlan) -> MemoryPlan:
        """Slices that are not on the card, as many as fit, then blocks of the KV cache."""
        if chosen.streaming is not None:
            chosen = self._with_locked_slices(case, chosen, chosen.streaming)
        return _with_spilled_blocks(chosen)

    def _with_locked_slices(
        self, case: Case, chosen: MemoryPlan, streaming: StreamingPlan
    ) -> MemoryPlan:
        sweep = case.layout.sweep_bytes(streaming.slice_bytes)
        pinned, room = frozenset(streaming.pinned()), chosen.host.headroom_bytes
        sizes = [
            aligned(num_bytes, self.alignment)
            for place, num_bytes in enumerate(sweep.kept)
            if place not in pinned
        ]
        device = replace(self.device, num_locked=len(sizes))
        more = {"weights": sum(sizes)}
        if sum(sizes) > max(room, 0) and not _must_lock(sweep):
            staging_bytes = _staging_bytes(sweep)
            more["staging"] = _NUM_STAGING * staging_bytes
            count = self.most_slices(sizes, max(room - more["staging"], 0), lambda count: 0)
            more["weights"] = spread_bytes(sizes, count)
            device = replace(
                device,
                num_locked=count,
                num_staging=_NUM_STAGING,
                staging_bytes=staging_bytes,
            )
        return replace(chosen.with_more(1, more), device=device)


def _contexts(case: Case, longest: int, shortest: int) -> Iterator[int]:
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


def _must_lock(sweep: SweepBytes) -> bool:
    """Whether no slice may stay on disk: what is converted on the way is converted once, as it
    cannot be copied as it lies there."""
    return sweep.converting > 0


def _staging_bytes(sweep: SweepBytes) -> int:
    return aligned(sweep.largest_stored + _PAGE, _PAGE)


def _may_fit_host(case: Case, candidate: MemoryPlan) -> bool:
    """Whether the host has room for what it takes if the card's headroom is filled to the last byte
    with slices: where it has not, there is no need to know which."""
    if candidate.streaming is None:
        return True
    sweep = case.layout.sweep_bytes(candidate.streaming.slice_bytes)
    least_bytes = sweep.kept_bytes - candidate.headroom_bytes
    if not _must_lock(sweep):
        least_bytes = min(least_bytes, _NUM_STAGING * _staging_bytes(sweep))
    return least_bytes <= candidate.host.headroom_bytes


def _num_logits_rows(case: Case, chunk: int) -> int:
    per_sequence = 1 if case.draft is None else 1 + case.draft.length
    return min(case.workload.max_num_seqs * per_sequence, chunk)


def _activation_bytes(case: Case, context: int, chunk: int) -> int:
    """The most of what one layer and the head hold on the card beside weights and KV cache.

    Norms and rotary embedding work in float32, one sequence's K and V of ``context`` positions are
    gathered from their blocks, and the causal mask of a chunk stands as booleans and as numbers.
    Rows attended with one by one leave something for each part of their positions.
    """
    shape, itemsize = case.shape, 2 if case.workload.dtype == "bfloat16" else 4
    throughout, heads, feed_forward = layer_bytes(shape, chunk, case.ffn_block, itemsize)
    norm = 2 * chunk * shape.hidden_size * 4
    gathered = 2 * 2 * context * shape.kv_size * itemsize
    mask = chunk * context * (1 + itemsize)
    attention = heads + 3 * chunk * (shape.q_size + shape.kv_size) * 4 + gathered + mask
    num_rows = min(chunk, case.workload.max_num_seqs * MOST_SINGLE_ROWS)
    num_parts = -(-context // ATTENTION_SPLIT)
    split = num_rows * num_parts * shape.num_attention_heads * (shape.head_dim + 2) * 4
    running = split + throughout + max(norm, attention, feed_forward)
    logits = _num_logits_rows(case, chunk) * shape.vocab_size * (itemsize + 4)
    # With the rows of the residual stream that the head takes, before and after the norm.
    return max(running, logits + 3 * chunk * shape.hidden_size * itemsize)


def _with_spilled_blocks(chosen: MemoryPlan) -> MemoryPlan:
    """Room for what sequences need beside the card's blocks, where host memory has it once all
    weights lie there or on the card; no more than as much again, as it is locked from the start.
    """
    device, block_bytes = chosen.device, chosen.kv_block_bytes
    assert device is not None, "a plan for no device"
    wanted = -(-chosen.context // BLOCK_SIZE) * chosen.max_num_seqs - chosen.num_kv_blocks
    count = min(wanted, chosen.num_kv_blocks, chosen.host.headroom_bytes // block_bytes)
    if device.num_staging or count <= 0:
        return chosen
    spilled = chosen.with_more(1, {"spilled kv": count * block_bytes})
    return replace(spilled, device=replace(device, num_spilled_blocks=count))
