"""How many slices stay resident, and what streamed ones take while a layer holds them."""

from dataclasses import replace
from itertools import islice

from thinslice.plan.memory_plan import MemoryPlan, StreamingPlan
from thinslice.plan.weight_layout import SweepBytes


def weight_parts(streaming: StreamingPlan, sweep: SweepBytes) -> dict[str, int]:
    """Bytes of the pinned slices, and of the slices held of the layer that streams most."""
    streamed = list(sweep.kept)
    for index in streaming.pinned():
        streamed[index] = 0
    parts = {"weights": sum(sweep.kept) - sum(streamed)}
    if streaming.layer_rows is not None:
        rest = iter(streamed)
        parts["held layer"] = max(sum(islice(rest, count)) for count in sweep.layer_counts)
    return parts


def with_pinned_slices(chosen: MemoryPlan, sweep: SweepBytes) -> MemoryPlan:
    """The same plan with as many slices resident as the headroom holds.

    The more of a layer is pinned, the less of it is held.
    """
    streaming = chosen.streaming
    assert streaming is not None, "nothing is streamed"
    before = weight_parts(streaming, sweep)
    last = streaming.num_last_pinned
    rest = sweep.kept[: len(sweep.kept) - last]
    room = chosen.headroom_bytes + sum(before.values())
    # The average is a good guess, from above; where the slices it picks are larger, or a layer
    # holds more, less will do.
    count = last + min(room * len(rest) // sum(rest), len(rest))
    parts = weight_parts(replace(streaming, num_pinned=count), sweep)
    while (excess := sum(parts.values()) - room) > 0:
        count = max(count - max(excess * len(rest) // sum(rest), 1), last)
        parts = weight_parts(replace(streaming, num_pinned=count), sweep)
    more = {name: num_bytes - before[name] for name, num_bytes in parts.items()}
    return replace(
        chosen,
        streaming=replace(streaming, num_pinned=count),
        parts=tuple((name, num_bytes + more.get(name, 0)) for name, num_bytes in chosen.parts),
    )
