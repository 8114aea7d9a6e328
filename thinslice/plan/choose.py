"""Which of the candidates is the plan: residency, context, slices and chunk. The rule stands here.

With ``--context`` the weights are resident where they fit beside it, and streamed elsewhere.
Without it the context is one of a model's ``context_sizes``, by the first of these that fits:

1. resident weights and the longest context, of at least USEFUL_CONTEXT;
2. streamed weights and a context of USEFUL_CONTEXT to 4096: the longest whose KV cache takes no
   more than half of what it and the pinned weights have together, or else the shortest;
3. resident weights and the longest context below USEFUL_CONTEXT, which no conversation fits in;
4. streamed weights and a context below it, as in 2.

So a larger budget never gives less context unless it makes the weights resident, and what a
longer ``--context`` gives is never faster.

Access to streamed weights is cyclic, so a fixed set of pinned slices saves exactly its share of the
reads, and no cache could save more. Slices, chunk and drafter of a streamed plan are those of the
quickest reference request: a prompt as long as the context and ANSWER_TOKENS of completion, in
bytes read. A prompt takes one sweep where all its rows are at work at once, or where a layer's
slices are held while the rows pass through it; else one for each chunk. More rows at once, a held
layer and larger slices take memory from pinned slices; the sum decides.

A prediction layer that drafts is resident, and so is the head then: each draft reads both. With
resident weights it drafts wherever a useful context fits beside it.
"""

from collections.abc import Iterator, Sequence

from thinslice.plan.candidates import (
    CHUNKS,
    LAYER_ROWS,
    SLICE_BYTES,
    resident,
    streamed,
    streamed_tokens,
    with_more_blocks,
)
from thinslice.plan.case import Case, Tokens
from thinslice.plan.memory_plan import MemoryPlan
from thinslice.plan.pinning import with_pinned_slices
from thinslice.plan.sweep_bytes import SweepBytes
from thinslice.units import KIB

# Below this a chat turn does not fit; a plan that could only offer less says so instead.
SMALLEST_CONTEXT = 256
# A question, some reasoning and an answer: for less, weights are not kept in memory.
USEFUL_CONTEXT = 1024
_STREAMED_CONTEXT = 4096
# A context cut for smaller chunks than these is not worth it, but for the shortest one.
_GOOD_CHUNKS = CHUNKS[:3]
# Completion of the reference request: a step of decoding weighs as much as one sweep of a prompt.
ANSWER_TOKENS = 256
# Sweeps that a completion takes where a prediction layer drafts, as a share of its tokens: MiMo's
# has three of four drafts accepted; with a margin for texts that are harder to guess.
_DRAFTED_SHARE = 0.8
# Reading from disk as many bytes as one more slice costs: 20 to 40 microseconds at 2 GB/s.
_SLICE_COST_BYTES = 64 * KIB
# How many times faster weights are read from memory.
_MEMORY_PER_DISK = 10


def context_sizes(longest: int) -> tuple[int, ...]:
    """Contexts to choose from, the longest first: the model's own, and four for each octave."""
    if longest <= SMALLEST_CONTEXT:
        return (longest,)
    sizes, octave = {longest}, SMALLEST_CONTEXT
    while octave < longest:
        sizes |= {size for size in range(octave, 2 * octave, octave // 4) if size < longest}
        octave *= 2
    return tuple(sorted(sizes, reverse=True))


def useful_context(longest: int) -> int:
    """USEFUL_CONTEXT, or all that a model has."""
    return min(USEFUL_CONTEXT, longest)


def best_plan(case: Case, budget_bytes: int) -> MemoryPlan | None:
    """The plan by the rule above, grown into what it leaves of the budget; None where none fits."""
    if budget_bytes < case.packing_floor_bytes:
        return None
    if (context := case.workload.context) is not None:
        return resident_plan(case, budget_bytes, (context,)) or streamed_plan(
            case, budget_bytes, context
        )
    sizes = context_sizes(case.shape.max_position_embeddings)
    least = useful_context(case.shape.max_position_embeddings)
    useful = [size for size in sizes if size >= least]
    short = [size for size in sizes if size < least]
    return (
        resident_plan(case, budget_bytes, useful)
        or _streamed_at_one_of(case, budget_bytes, useful)
        or resident_plan(case, budget_bytes, short)
        or _streamed_at_one_of(case, budget_bytes, short)
    )


def resident_plan(case: Case, budget_bytes: int, contexts: Sequence[int]) -> MemoryPlan | None:
    """Resident weights with the best drafter, the longest context and the largest chunk."""
    for variant in case.variants:
        for context in contexts:
            for chunk in CHUNKS if context == contexts[-1] else _GOOD_CHUNKS:
                candidate = resident(variant, budget_bytes, context, chunk)
                if candidate.headroom_bytes >= 0:
                    return with_more_blocks(variant, candidate)
    return None


def streamed_plan(case: Case, budget_bytes: int, context: int) -> MemoryPlan | None:
    """Streamed weights, as many slices pinned as fit: the quickest for the reference request."""
    sweeps = {size: case.layout.sweep_bytes(size) for size in SLICE_BYTES}
    fitting = [
        candidate
        for candidate in _streamed_candidates(case, budget_bytes, context, sweeps)
        if candidate.headroom_bytes >= 0
    ]
    if not fitting:
        return None
    # Of equals the first: larger slices, then fewer sweeps for a prompt.
    best = min(fitting, key=lambda candidate: request_bytes(candidate, sweeps))
    assert best.streaming is not None, "a streamed plan streams"
    return with_pinned_slices(best, sweeps[best.streaming.slice_bytes])


def request_bytes(candidate: MemoryPlan, sweeps: dict[int, SweepBytes]) -> float:
    """What the reference request reads from disk once the headroom holds pinned slices, and what it
    reads from memory once more for each few rows, as the bytes the disk would give meanwhile."""
    streaming = candidate.streaming
    assert streaming is not None, "a resident plan reads nothing"
    sweep = sweeps[streaming.slice_bytes]
    kept_bytes = sweep.kept_bytes
    # The more is pinned, the less of a layer is left to be held.
    unpinned = kept_bytes - sum(sweep.kept[streaming.num_slices - streaming.num_last_pinned :])
    held_bytes = dict(candidate.parts).get("held layer", 0)
    share = max(1 - candidate.headroom_bytes / max(unpinned - held_bytes, 1), 0.0)
    stored_bytes = sweep.stored_bytes + streaming.num_slices * _SLICE_COST_BYTES
    sweep_bytes = share * unpinned / kept_bytes * stored_bytes
    num_sweeps = -(-candidate.context // candidate.chunk)
    drafted = _DRAFTED_SHARE if candidate.num_mtp_layers else 1.0
    from_disk = (ANSWER_TOKENS * drafted + num_sweeps) * sweep_bytes
    layer_rows = streaming.layer_rows or LAYER_ROWS[0]
    if layer_rows >= LAYER_ROWS[0]:  # arithmetic takes longer than reading from memory
        return from_disk
    return from_disk + candidate.chunk / layer_rows * kept_bytes / _MEMORY_PER_DISK


def _streamed_candidates(
    case: Case, budget_bytes: int, context: int, sweeps: dict[int, SweepBytes]
) -> Iterator[MemoryPlan]:
    for size, sweep in sweeps.items():
        for variant in case.variants:
            for tokens in streamed_tokens(context):
                yield streamed(variant, budget_bytes, tokens, size, sweep)


def _streamed_at_one_of(
    case: Case, budget_bytes: int, contexts: Sequence[int]
) -> MemoryPlan | None:
    """Streamed weights with the longest context whose KV cache leaves half of the room to pinned
    weights, or else with the shortest."""
    allowed = [size for size in contexts if size <= _STREAMED_CONTEXT]
    floors = {size: _streamed_floor(case, size) for size in allowed}
    for size, least in floors.items():
        if least.peak_bytes + dict(least.parts)["kv cache"] <= budget_bytes:
            return streamed_plan(case, budget_bytes, size)
    return streamed_plan(case, budget_bytes, allowed[-1]) if allowed else None


def _streamed_floor(case: Case, context: int) -> MemoryPlan:
    variant, chunk = case.variants[-1], min(context, CHUNKS[-1])
    tokens = Tokens(context, chunk, chunk)
    floors = (
        streamed(variant, 0, tokens, size, case.layout.sweep_bytes(size)) for size in SLICE_BYTES
    )
    return min(floors, key=lambda candidate: candidate.peak_bytes)
