"""What a processor tries, in order: residency, context, slices and chunk. The rule stands here.

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
from dataclasses import replace

from thinslice.plan.case import Case, Tokens
from thinslice.plan.memory_plan import MemoryPlan
from thinslice.plan.search import (
    SMALLEST_CHUNK,
    SMALLEST_CONTEXT,
    STREAMED_CONTEXT,
    USEFUL_CONTEXT,
    candidate_of,
    floors,
)
from thinslice.plan.weight_layout import WeightLayout
from thinslice.units import KIB

# Tokens in flight, with the weights in memory and streamed: where a prompt takes several sweeps,
# one for each chunk, larger ones pay for their memory.
_CHUNKS = (512, 256, 128, 64, 32, SMALLEST_CHUNK)
_STREAMED_CHUNKS = (32768, 16384, 8192, 4096, 2048, 1024, *_CHUNKS)
# A context cut for smaller chunks than these is not worth it, but for the shortest one.
_GOOD_CHUNKS = _CHUNKS[:3]
# Rows a layer takes at a time while its slices are held: enough that products are bound by
# arithmetic and not by reading the layer from memory once more for each run of rows.
_LAYER_ROWS = (512, 128)
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
    sizes, octave = {longest}, SMALLEST_CONTEXT
    while octave < longest:
        sizes |= {*range(octave, min(2 * octave, longest), octave // 4)}
        octave *= 2
    return tuple(sorted(sizes, reverse=True))


def useful_context(longest: int) -> int:
    """USEFUL_CONTEXT, or all that a model has."""
    return min(USEFUL_CONTEXT, longest)


def candidates(case: Case) -> Iterator[MemoryPlan]:
    """Plans by the rule above, the best first."""
    if (context := case.workload.context) is not None:
        yield from resident(case, (context,))
        yield from _quickest(case, context)
        return
    sizes = context_sizes(case.shape.max_position_embeddings)
    least = useful_context(case.shape.max_position_embeddings)
    useful = [size for size in sizes if size >= least]
    for contexts in (useful, sizes[len(useful) :]):
        yield from resident(case, contexts)
        yield from _streamed(case, contexts)


def resident(case: Case, contexts: Sequence[int]) -> Iterator[MemoryPlan]:
    """Resident weights with the best drafter, the longest context and the largest chunk."""
    for variant in case.variants:
        for context in contexts:
            for chunk in _CHUNKS if context == contexts[-1] else _GOOD_CHUNKS:
                yield candidate_of(variant, Tokens.at_once(context, chunk))


def _streamed(case: Case, contexts: Sequence[int]) -> Iterator[MemoryPlan]:
    """Streamed weights with the longest context whose KV cache leaves half of the room to pinned
    weights, or else with the shortest."""
    allowed = [size for size in contexts if size <= STREAMED_CONTEXT]
    for size in allowed:
        least = min(floors(case, size)[1:], key=lambda candidate: candidate.peak_bytes)
        if least.pools[0].part("kv cache") <= least.headroom_bytes:
            yield from _quickest(case, size)
            return
    if allowed:
        yield from _quickest(case, allowed[-1])


def _quickest(case: Case, context: int) -> Iterator[MemoryPlan]:
    """Streamed weights: of what fits the quickest for the reference request."""
    tried = (
        candidate_of(variant, tokens, size)
        for size in case.platform.slice_sizes
        for variant in case.variants
        for tokens in _streamed_tokens(context)
    )
    fitting = [candidate for candidate in tried if candidate.fits]
    if fitting:
        # Of equals the first: larger slices, then fewer sweeps for a prompt.
        yield min(fitting, key=lambda candidate: request_bytes(candidate, case.layout))


def _streamed_tokens(context: int) -> Iterator[Tokens]:
    """The ways of a streamed prompt: all rows at once, layer by layer, in chunks."""
    whole = Tokens.at_once(context, context)
    yield whole
    for layer_rows in _LAYER_ROWS:
        if layer_rows < context:
            yield replace(whole, layer_rows=layer_rows)
    for chunk in _STREAMED_CHUNKS:
        if chunk < context:
            yield Tokens.at_once(context, chunk)


def request_bytes(candidate: MemoryPlan, layout: WeightLayout) -> float:
    """What the reference request reads from disk once the headroom holds pinned slices, and what it
    reads from memory once more for each few rows, as the bytes the disk would give meanwhile."""
    streaming = candidate.streaming
    assert streaming is not None, "a resident plan reads nothing"
    sweep = layout.sweep_bytes(streaming.slice_bytes)
    kept_bytes = sweep.kept_bytes
    # The more is pinned, the less of a layer is left to be held.
    unpinned = kept_bytes - sum(sweep.kept[streaming.num_slices - streaming.num_last_pinned :])
    held_bytes = candidate.pools[0].part("held layer")
    share = max(1 - candidate.headroom_bytes / max(unpinned - held_bytes, 1), 0.0)
    stored_bytes = sweep.stored_bytes + streaming.num_slices * _SLICE_COST_BYTES
    sweep_bytes = share * unpinned / kept_bytes * stored_bytes
    num_sweeps = -(-candidate.context // candidate.chunk)
    drafted = _DRAFTED_SHARE if candidate.num_mtp_layers else 1.0
    from_disk = (ANSWER_TOKENS * drafted + num_sweeps) * sweep_bytes
    layer_rows = streaming.layer_rows or _LAYER_ROWS[0]
    if layer_rows >= _LAYER_ROWS[0]:  # arithmetic takes longer than reading from memory
        return from_disk
    return from_disk + candidate.chunk / layer_rows * kept_bytes / _MEMORY_PER_DISK
