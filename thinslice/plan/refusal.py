"""What is said where no plan fits: the need by part, and the single changes that would fit."""

from collections.abc import Iterator
from dataclasses import replace

from thinslice.errors import BudgetError, ConfigError
from thinslice.plan.candidates import floor
from thinslice.plan.case import Case, Workload
from thinslice.plan.choose import SMALLEST_CONTEXT, best_plan
from thinslice.plan.memory_plan import MemoryPlan
from thinslice.units import MIB, describe_need, format_bytes, parse_bytes, size_option

_DTYPES = ("float32", "bfloat16", "int8", "int4")
# What a process holds before the model differs from one start to the next by about a MiB; a
# suggestion must still fit the next time.
JITTER_BYTES = 4 * MIB


def budget_error(case: Case, budget_bytes: int) -> BudgetError:
    """The error for a case that no plan fits in a budget."""
    context = case.workload.context
    need = floor(case, context or min(SMALLEST_CONTEXT, case.shape.max_position_embeddings))
    memory, dtype = size_option(budget_bytes), case.workload.dtype
    if budget_bytes < case.packing_floor_bytes > need.peak_bytes:
        first = f"--dtype {dtype} has to be packed first, which does not fit --memory {memory}"
        needs = f"  needs {format_bytes(case.packing_floor_bytes)}; packed once, it runs in less"
    else:
        first = f"no plan fits --memory {memory} at --context {need.context}"
        needs = f"  {describe_need(need.parts)}"
    lines, changes = [first, needs], [*_suggestions(case, budget_bytes, need)]
    if changes:
        lines += ["  any one of these fits:", *(f"    {change}" for change in changes)]
    else:
        lines += ["  no single change fits what this process can have here"]
    return BudgetError("\n".join(lines))


def suggested_size(need_bytes: int) -> str:
    """A budget that fits a need, as an option has it, also the next time."""
    return size_option(-(-(need_bytes + JITTER_BYTES) // MIB) * MIB)


def _suggestions(case: Case, budget_bytes: int, need: MemoryPlan) -> Iterator[str]:
    """Single changes that fit, each the planner run again with that one change."""
    workload, room = case.workload, budget_bytes - JITTER_BYTES
    if workload.context is not None:
        shorter = best_plan(replace(case, workload=replace(workload, context=None)), room)
        if shorter is not None:
            yield f"--context {shorter.context}"
    if case.kv_dtype != "int8":
        smaller_cache = replace(case, workload=replace(workload, kv_dtype="int8"))
        if best_plan(smaller_cache, room) is not None:
            yield "--kv-dtype int8"
    for dtype in smaller_dtypes(workload):
        smaller = _with_dtype(case, dtype)
        if smaller is not None and best_plan(smaller, room) is not None:
            yield f"--dtype {dtype}"
            break
    if workload.draft != "off":
        undrafted = replace(case, workload=replace(workload, draft="off"))
        if best_plan(undrafted, room) is not None:
            yield "--draft off"
    memory = suggested_size(max(need.peak_bytes, case.packing_floor_bytes))
    if workload.most_memory is None or parse_bytes(memory) <= workload.most_memory:
        yield f"--memory {memory}"


def smaller_dtypes(workload: Workload) -> tuple[str, ...]:
    """What takes less, the least change first."""
    return _DTYPES[_DTYPES.index(workload.dtype) + 1 :] if workload.can_change_dtype else ()


def _with_dtype(case: Case, dtype: str) -> Case | None:
    """Return the case with another weight type; None if the model cannot have it."""
    workload = replace(case.workload, dtype=dtype)
    try:
        layout = case.layout.converted_to(case.shape, dtype)
    except ConfigError:
        return None
    return replace(case, workload=workload, layout=layout)
