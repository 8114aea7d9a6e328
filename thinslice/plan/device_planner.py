"""plan_on_device(): the best plan for a device, or why there is none and what would fit."""

from collections.abc import Iterator
from dataclasses import replace

from thinslice.errors import BudgetError, ConfigError
from thinslice.plan.case import Workload
from thinslice.plan.device_plan import (
    DeviceCase,
    DeviceLimits,
    best_on_device,
    floors,
    least_on_host,
)
from thinslice.plan.kernel_limits import MOST_SINGLE_ROWS
from thinslice.plan.memory_plan import DraftPlan, MemoryPlan
from thinslice.plan.model_shape import ModelShape
from thinslice.plan.refusal import JITTER_BYTES, smaller_dtypes, suggested_size
from thinslice.plan.weight_layout import WeightLayout
from thinslice.units import describe_need, parse_bytes, size_option


def plan_on_device(
    shape: ModelShape, layout: WeightLayout, limits: DeviceLimits, workload: Workload
) -> MemoryPlan:
    """Choose residency, slices, chunk, context and KV blocks so that both peaks fit their budgets.

    Errors: ConfigError for what the model does not have or a device does not do; BudgetError where
    nothing fits, with the need by part and what would fit.
    """
    _check(shape, limits, workload)
    case = _case(shape, layout, limits, workload)
    chosen = best_on_device(case)
    if chosen is None:
        raise _budget_error(case)
    return chosen


def _check(shape: ModelShape, limits: DeviceLimits, workload: Workload) -> None:
    """Errors: ConfigError for what the model does not have or a device does not do."""
    if workload.context is not None and not 0 < workload.context <= shape.max_position_embeddings:
        raise ConfigError(
            f"--context {workload.context} is out of range; "
            f"this model has 1..{shape.max_position_embeddings}"
        )
    if workload.draft == "mtp":
        raise ConfigError(f"--draft mtp does not run on {limits.name}; --draft ngram does")
    if workload.mtp_hidden != "pre-norm":
        raise ConfigError(
            f"--mtp-hidden has no effect: no prediction layer drafts on {limits.name}"
        )
    if workload.kv_dtype == "int8":
        raise ConfigError(f"--kv-dtype int8 does not run on {limits.name}; bfloat16 does")


def _case(
    shape: ModelShape, layout: WeightLayout, limits: DeviceLimits, workload: Workload
) -> DeviceCase:
    draft = _draft(limits, workload)
    return DeviceCase(shape, layout.without_prediction(), limits, workload, draft)


def _draft(limits: DeviceLimits, workload: Workload) -> DraftPlan | None:
    """Drafts as long as all sequences' rows together are multiplied one by one: beyond that a row
    has other bits, and a text would depend on the drafts.

    Errors: ConfigError where drafts were asked for and there is no room for one.
    """
    if workload.draft == "off":
        return None
    length = min(workload.draft_length, MOST_SINGLE_ROWS // workload.max_num_seqs - 1)
    if length > 0:
        return DraftPlan(uses_ngram=True, num_mtp_layers=0, length=length)
    if workload.draft == "auto":
        return None
    raise ConfigError(
        f"--draft {workload.draft}: with {workload.max_num_seqs} sequences {limits.name} has no "
        f"rows for drafts; --sequences {MOST_SINGLE_ROWS // 2} has"
    )


def _budget_error(case: DeviceCase) -> BudgetError:
    """The least that either side needs, by part, and what would fit."""
    limits, least = case.limits, least_on_host(case)
    if least is None or least.device is None:
        need = min(floors(case), key=lambda one: one.peak_bytes)
        memory = size_option(limits.device_bytes)
        lines = [
            f"no plan fits --memory {memory} of {limits.name} at --context {need.context}",
            f"  {describe_need(need.parts)}",
        ]
        larger = f"--memory {suggested_size(need.peak_bytes)}"
    else:
        host = least.device
        lines = [
            f"no plan fits --host-memory {size_option(limits.host_bytes)} beside {limits.name} at "
            f"--context {least.context}",
            f"  {describe_need(host.host_parts)}",
        ]
        if host.num_locked and any(matrix.is_converted for matrix in case.layout.sweep):
            lines.append("  converted matrices cannot be copied from disk; thinslice pack first")
        larger = f"--host-memory {suggested_size(host.host_peak_bytes)}"
    changes = [*_suggestions(case)]
    if _fits(case, larger):
        changes.append(larger)
    if changes:
        lines += ["  any one of these fits:", *(f"    {change}" for change in changes)]
    else:
        lines.append("  no single change fits what this process can have here")
    return BudgetError("\n".join(lines))


def _suggestions(case: DeviceCase) -> Iterator[str]:
    """Single changes that fit, each the planner run again with that one change."""
    workload = case.workload
    if workload.context is not None:
        shorter = best_on_device(_changed(case, context=None))
        if shorter is not None:
            yield f"--context {shorter.context}"
    for dtype in smaller_dtypes(workload):
        try:
            layout = case.layout.converted_to(case.shape, dtype)
        except ConfigError:
            continue
        if best_on_device(_changed(replace(case, layout=layout), dtype=dtype)) is not None:
            yield f"--dtype {dtype}"
            break
    if case.draft is not None and best_on_device(_changed(case, draft="off")) is not None:
        yield "--draft off"


def _changed(case: DeviceCase, **changes: object) -> DeviceCase:
    """The case with another workload, in a little less than the budgets: what is suggested must
    still fit the next time."""
    limits = replace(case.limits, host_bytes=case.limits.host_bytes - JITTER_BYTES)
    workload = replace(case.workload, **changes)  # type: ignore[arg-type]
    return replace(case, limits=limits, workload=workload, draft=_draft(limits, workload))


def _fits(case: DeviceCase, larger: str) -> bool:
    """Whether a larger budget is one that there may be, and fits."""
    option, size = larger.split()
    num_bytes = parse_bytes(size)
    if option == "--memory":
        limits = replace(case.limits, device_bytes=num_bytes)
    else:
        most = case.workload.most_memory
        if most is not None and num_bytes > most:
            return False
        limits = replace(case.limits, host_bytes=num_bytes)
    return best_on_device(replace(case, limits=limits)) is not None
