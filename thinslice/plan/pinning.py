"""How many slices lie in a faster place, and what streamed ones take while a layer holds them."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from thinslice.plan.case import Case
from thinslice.plan.memory_plan import MemoryPlan, spread
from thinslice.plan.sweep_bytes import largest_layer

# A few more slices, taken from other places, may be fewer bytes: 40 of 727 were 11 MB less than 32.
_NEARBY = 24


def aligned(num_bytes: int, alignment: int) -> int:
    """The next multiple."""
    return -(-num_bytes // alignment) * alignment


def spread_bytes(sizes: Sequence[int], count: int) -> int:
    """Bytes of ``count`` slices of these, spread evenly."""
    return sum(map(sizes.__getitem__, spread(count, len(sizes))))


def with_pinned_slices(case: Case, chosen: MemoryPlan) -> MemoryPlan:
    """Pin as many slices as the headroom holds.

    The more of a layer is pinned, the less of it is held.
    """
    streaming, pool = chosen.streaming, chosen.pools[0]
    assert streaming is not None, "nothing is streamed"
    sweep = case.layout.sweep_bytes(streaming.slice_bytes)
    kept = [aligned(num_bytes, case.platform.alignment) for num_bytes in sweep.kept]
    first_last = len(kept) - streaming.num_last_pinned
    last_bytes, held_before = sum(kept[first_last:]), pool.part("held layer")

    def held_bytes(count: int) -> int:
        """Bytes held of the layer that streams most."""
        if streaming.layer_rows is None:
            return 0
        streamed = list(kept)
        for index in spread(count, first_last):
            streamed[index] = 0
        return largest_layer(streamed, sweep.layer_counts)

    room = pool.headroom_bytes + last_bytes + held_before
    rest = kept[:first_last]
    count = case.platform.most_slices(rest, room, lambda count: last_bytes + held_bytes(count))
    more = {"weights": spread_bytes(rest, count)}
    if streaming.layer_rows is not None:
        more["held layer"] = held_bytes(count) - held_before
    pinned = replace(streaming, num_pinned=streaming.num_last_pinned + count)
    return replace(chosen.with_more(0, more), streaming=pinned)


def most_by_halving(sizes: Sequence[int], room: int, beside: Callable[[int], int]) -> int:
    """The most slices that fit, where more of them are taken to be more bytes; see ``Platform``."""
    low, high = 0, len(sizes)
    while low < high:
        middle = (low + high + 1) // 2
        fits = spread_bytes(sizes, middle) + beside(middle) <= room
        low, high = (middle, high) if fits else (low, middle - 1)
    return low


def most_bytes(sizes: Sequence[int], room: int, beside: Callable[[int], int]) -> int:
    """The number of slices that are the most bytes of those that fit; see ``Platform``."""
    total, most = sum(sizes), len(sizes)

    def left(count: int) -> int:
        return room - spread_bytes(sizes, count) - beside(count)

    # The average is a good guess, from above; where the slices it picks are larger, or a layer
    # holds more, less will do.
    count = min(room * most // total, most)
    while (excess := -left(count)) > 0:
        count = max(count - max(excess * most // total, 1), 0)
    # That may have been too many: where the slices left out are the large ones, some fit again.
    step = most - count
    while (step := min(step, left(count) * most // total)) > 0:
        if left(count + step) >= 0:
            count += step
            step = most - count
        else:
            step -= max(step // 2, 1)
    nearby = range(max(count - _NEARBY, 0), min(count + _NEARBY, most + 1))
    sums = {count: spread_bytes(sizes, count) for count in nearby}
    return max(
        (count for count in nearby if sums[count] + beside(count) <= room), key=sums.__getitem__
    )
