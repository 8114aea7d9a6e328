"""What is said where no plan fits: the need by part, and the single changes that would fit."""

from collections.abc import Iterator
from dataclasses import replace

from thinslice.errors import BudgetError, ConfigError
from thinslice.plan.case import Case
from thinslice.plan.memory_plan import MemoryPlan
from thinslice.plan.search import best_plan, floors, grown
from thinslice.units import MIB, describe_need, format_bytes, parse_bytes, size_option

_DTYPES = ("float32", "bfloat16", "int8", "int4")
# What a process holds before the model differs from one start to the next by about a MiB; a
# suggestion must still fit the next time.
JITTER_BYTES = 4 * MIB


def budget_error(case: Case) -> BudgetError:
    """The error for a case that no plan fits."""
    need, place = _need(case)
    pool, workload = need.pools[place], case.workload
    budget = f"{pool.option} {size_option(pool.budget_bytes)}{pool.owner and ' '}{pool.owner}"
    packing_bytes = case.platform.packing_floor_bytes(workload)
    is_to_be_packed = pool.budget_bytes < packing_bytes > pool.peak_bytes
    if is_to_be_packed:
        lines = [
            f"--dtype {workload.dtype} has to be packed first, which does not fit {budget}",
            f"  needs {format_bytes(packing_bytes)}; packed once, it runs in less",
        ]
    else:
        lines = [
            f"no plan fits {budget} at --context {need.context}",
            f"  {describe_need(pool.parts)}",
        ]
    is_converted = any(matrix.is_converted for matrix in case.layout.sweep)
    if need.device is not None and need.device.num_locked and is_converted:
        lines.append("  converted matrices cannot be copied from disk; thinslice pack first")
    changes = [*_smaller_needs(case)]
    memory = suggested_size(max(pool.peak_bytes, packing_bytes))
    larger = f"{pool.option} {memory}"
    may_be_larger = _may_have(case, place, parse_bytes(memory))
    if may_be_larger:
        changes.append(larger)
    if changes:
        lines += ["  any one of these fits:", *(f"    {change}" for change in changes)]
    else:
        lines.append("  no single change fits what this process can have here")
    error = BudgetError("\n".join(lines))
    if is_to_be_packed and may_be_larger and pool.peak_bytes <= pool.budget_bytes:
        error.to_pack = larger
    return error


def suggested_size(need_bytes: int) -> str:
    """A budget that fits a need, as an option has it, also the next time."""
    return size_option(-(-(need_bytes + JITTER_BYTES) // MIB) * MIB)


def _need(case: Case) -> tuple[MemoryPlan, int]:
    """The plan that takes least of the first pool that is too small, and that pool's place."""
    plans = floors(case)
    for place in range(len(case.platform.pools)):
        need = min(plans, key=lambda plan: plan.pools[place].peak_bytes)
        plans = [grown(case, plan) for plan in plans if plan.pools[place].headroom_bytes >= 0]
        if not plans:
            break
    return need, place


def _smaller_needs(case: Case) -> Iterator[str]:
    """Single changes that fit the budgets, each the planner run again with that one change."""
    workload = case.workload
    if workload.context is not None:
        shorter = _changed(case, context=None)
        if shorter is not None:
            yield f"--context {shorter.context}"
    can_shrink_cache = case.kv_dtype != "int8" and case.platform.has_int8_cache
    if can_shrink_cache and _changed(case, kv_dtype="int8") is not None:
        yield "--kv-dtype int8"
    smaller = _DTYPES[_DTYPES.index(workload.dtype) + 1 :]  # the least change first
    for dtype in smaller if workload.can_change_dtype else ():
        try:
            layout = case.layout.converted_to(case.shape, dtype)
        except ConfigError:
            continue
        if _changed(replace(case, layout=layout), dtype=dtype) is not None:
            yield f"--dtype {dtype}"
            break
    if workload.draft != "off" and _changed(case, draft="off") is not None:
        yield "--draft off"
    if workload.forms == "reserved" and _changed(case, forms="off") is not None:
        yield "--forms off"


def _changed(case: Case, **changes: object) -> MemoryPlan | None:
    """The plan with another workload, in a little less than the process may have: what is
    suggested must still fit the next time."""
    workload = replace(case.workload, **changes)  # type: ignore[arg-type]
    room = case.platform.pools[-1].budget_bytes - JITTER_BYTES
    return best_plan(replace(case, workload=workload, platform=case.platform.with_budget(-1, room)))


def _may_have(case: Case, place: int, num_bytes: int) -> bool:
    """Whether a larger budget of one pool is one that there may be, and fits."""
    most, is_host = case.workload.most_memory, place == len(case.platform.pools) - 1
    if is_host and most is not None and num_bytes > most:
        return False
    larger = case.platform.with_budget(place, num_bytes)
    return best_plan(replace(case, platform=larger)) is not None
