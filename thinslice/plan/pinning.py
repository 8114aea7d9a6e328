"""How many slices stay resident, and what streamed ones take while a layer holds them."""

from dataclasses import replace

from thinslice.plan.memory_plan import MemoryPlan, StreamingPlan
from thinslice.plan.sweep_bytes import SweepBytes, largest_layer

# A few more slices, taken from other places, may be fewer bytes: 40 of 727 were 11 MB less than 32.
_NEARBY = 24


def weight_parts(streaming: StreamingPlan, sweep: SweepBytes) -> dict[str, int]:
    """Bytes of the pinned slices, and of the slices held of the layer that streams most."""
    if streaming.num_pinned == streaming.num_last_pinned:  # the head's at most, and no layer's
        first_last = streaming.num_slices - streaming.num_last_pinned
        pinned_bytes, largest = sum(sweep.kept[first_last:]), sweep.largest_layer_bytes
    else:
        streamed = list(sweep.kept)
        for index in streaming.pinned():
            streamed[index] = 0
        pinned_bytes = sweep.kept_bytes - sum(streamed)
        largest = largest_layer(streamed, sweep.layer_counts)
    parts = {"weights": pinned_bytes}
    if streaming.layer_rows is not None:
        parts["held layer"] = largest
    return parts


def with_pinned_slices(chosen: MemoryPlan, sweep: SweepBytes) -> MemoryPlan:
    """Pin as many slices as the headroom holds.

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
    # That may have been too many: where the slices left out are the large ones, some fit again.
    step = last + len(rest) - count
    while (step := min(step, (room - sum(parts.values())) * len(rest) // sum(rest))) > 0:
        grown = weight_parts(replace(streaming, num_pinned=count + step), sweep)
        if sum(grown.values()) <= room:
            count, parts = count + step, grown
            step = last + len(rest) - count
        else:
            step -= max(step // 2, 1)
    count, parts = _most_pinned(streaming, sweep, range(count - _NEARBY, count + _NEARBY), room)
    more = {name: num_bytes - before[name] for name, num_bytes in parts.items()}
    return replace(
        chosen,
        streaming=replace(streaming, num_pinned=count),
        parts=tuple((name, num_bytes + more.get(name, 0)) for name, num_bytes in chosen.parts),
    )


def _most_pinned(
    streaming: StreamingPlan, sweep: SweepBytes, counts: range, room: int
) -> tuple[int, dict[str, int]]:
    """The count, of these, whose slices are the most bytes of those that fit, and its parts."""
    possible = range(max(counts.start, streaming.num_last_pinned), counts.stop)
    parts_of = {
        count: weight_parts(replace(streaming, num_pinned=count), sweep)
        for count in possible
        if count <= streaming.num_slices
    }
    fitting = [count for count, parts in parts_of.items() if sum(parts.values()) <= room]
    best = max(fitting, key=lambda count: parts_of[count]["weights"])
    return best, parts_of[best]
