"""plan(): from a shape, a workload and budgets to the sizes that fit. Arithmetic only.

A plan is one or two pools, each with a budget and parts. The search over candidates, and how one
grows into what it leaves, is in search.py; what there is to try, and what each part takes, in
processor.py (its rule in choose.py) and card.py; what is said where nothing fits in refusal.py.
"""

from bisect import bisect_right
from dataclasses import dataclass

from thinslice.errors import ConfigError
from thinslice.plan.case import Case, Platform, Tokens, Workload
from thinslice.plan.choose import useful_context
from thinslice.plan.memory_plan import MemoryPlan
from thinslice.plan.model_shape import ModelShape
from thinslice.plan.processor import Processor
from thinslice.plan.refusal import JITTER_BYTES, budget_error
from thinslice.plan.search import (
    BLOCK_SIZE,
    SMALLEST_CHUNK,
    SMALLEST_CONTEXT,
    best_plan,
    candidate_of,
)
from thinslice.plan.weight_layout import WeightLayout
from thinslice.units import MIB


def plan(
    shape: ModelShape, layout: WeightLayout, workload: Workload, platform: Platform
) -> MemoryPlan:
    """Choose residency, slices, chunk, context and KV blocks so that every peak fits its budget.

    Args:
        platform: what computes, with its memories and their budgets.

    Errors: ConfigError for what the model does not have or the platform does not do; BudgetError
    where nothing fits, with the need by part and the single changes that would fit.
    """
    if workload.context is not None and not 0 < workload.context <= shape.max_position_embeddings:
        raise ConfigError(
            f"--context {workload.context} is out of range; "
            f"this model has 1..{shape.max_position_embeddings}"
        )
    case = Case(shape, layout, workload, platform)
    platform.check(case)
    chosen = best_plan(case)
    if chosen is None:
        raise budget_error(case)
    return chosen


@dataclass(frozen=True)
class Residency:
    """What keeps a model's weights in memory.

    Attributes:
        memory_bytes: the smallest budget that does, at ``memory_context`` tokens: the context asked
            for, or the shortest that weights are kept in memory for without being asked.
        context: the longest context that does in the budget; None where none of a usable length
            does.
    """

    memory_bytes: int
    memory_context: int
    context: int | None


def residency(
    shape: ModelShape, layout: WeightLayout, workload: Workload, processor: Processor
) -> Residency:
    """The changes to a budget or a context that keep weights in memory, or just still do.

    Both hold for the next process too, which may hold a few MiB more.
    """
    case = Case(shape, layout, workload, processor).variants[-1]
    floor_bytes = processor.packing_floor_bytes(workload)

    def peak_bytes(context: int) -> int:
        candidate = candidate_of(case, Tokens.at_once(context, SMALLEST_CHUNK))
        return max(candidate.peak_bytes, floor_bytes)

    longest = shape.max_position_embeddings
    context = workload.context or useful_context(longest)
    memory_bytes = -(-(peak_bytes(context) + JITTER_BYTES) // MIB) * MIB
    room = processor.pools[0].budget_bytes - JITTER_BYTES
    blocks = range(1, -(-longest // BLOCK_SIZE) + 1)
    fitting = bisect_right(blocks, room, key=lambda one: peak_bytes(min(one * BLOCK_SIZE, longest)))
    fitting = min(fitting * BLOCK_SIZE, longest)
    is_usable = fitting >= min(SMALLEST_CONTEXT, longest)
    return Residency(memory_bytes, context, fitting if is_usable else None)
