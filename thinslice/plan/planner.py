"""plan(): from a shape, a budget and a workload to the sizes that fit. Arithmetic only.

The parts of a plan are summed up in candidates.py; the rule by which one is chosen is told and
stands in choose.py; what is said where none fits is in refusal.py.
"""

from dataclasses import dataclass

from thinslice.errors import ConfigError
from thinslice.plan.candidates import BLOCK_SIZE, CHUNKS, resident
from thinslice.plan.case import Case, Workload
from thinslice.plan.choose import SMALLEST_CONTEXT, best_plan, useful_context
from thinslice.plan.memory_plan import MemoryPlan
from thinslice.plan.model_shape import ModelShape
from thinslice.plan.refusal import JITTER_BYTES, budget_error
from thinslice.plan.weight_layout import WeightLayout
from thinslice.units import MIB


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
    case = Case(shape, layout, workload, runtime_bytes)
    chosen = best_plan(case, budget_bytes)
    if chosen is None:
        raise budget_error(case, budget_bytes)
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
    shape: ModelShape,
    layout: WeightLayout,
    budget_bytes: int,
    workload: Workload,
    runtime_bytes: int,
) -> Residency:
    """The changes to a budget or a context that keep weights in memory, or just still do.

    Both hold for the next process too, which may hold a few MiB more.
    """
    case = Case(shape, layout, workload, runtime_bytes).variants[-1]

    def peak_bytes(context: int) -> int:
        return max(resident(case, 0, context, CHUNKS[-1]).peak_bytes, case.packing_floor_bytes)

    longest = shape.max_position_embeddings
    context = workload.context or useful_context(longest)
    memory_bytes = -(-(peak_bytes(context) + JITTER_BYTES) // MIB) * MIB
    low, high = 0, -(-longest // BLOCK_SIZE)
    while low < high:
        middle = (low + high + 1) // 2
        fits = peak_bytes(min(middle * BLOCK_SIZE, longest)) <= budget_bytes - JITTER_BYTES
        low, high = (middle, high) if fits else (low, middle - 1)
    fitting = min(low * BLOCK_SIZE, longest)
    is_usable = fitting >= min(SMALLEST_CONTEXT, longest)
    return Residency(memory_bytes, context, fitting if is_usable else None)
