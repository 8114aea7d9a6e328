"""plan(): from a shape, a budget and a workload to the sizes that fit. Arithmetic only."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from thinslice.errors import BudgetError, ConfigError
from thinslice.plan.cost import (
    DTYPE_BYTES,
    activation_bytes,
    kv_bytes_per_token,
    library_bytes,
    logits_bytes,
    model_parameters,
)
from thinslice.plan.memory_plan import MemoryPlan
from thinslice.plan.model_shape import ModelShape
from thinslice.units import MIB, gib, size_option

BLOCK_SIZE = 16
_CHUNKS = (512, 256, 128, 64, 32, 16)
# Below this a chat turn does not fit; a plan that could only offer less says so instead.
_SMALLEST_CONTEXT = 256
# The checkpoint reader's buffers while weights are read and converted.
LOADING_BYTES = 16 * MIB


@dataclass(frozen=True)
class Workload:
    """What is to be run.

    Attributes:
        context: tokens of prompt and completion together; None takes as many as fit.
        max_num_seqs: sequences that may run at once.
        dtype: ``bfloat16`` or ``float32``.
    """

    context: int | None = None
    max_num_seqs: int = 1
    dtype: str = "bfloat16"


def plan(
    shape: ModelShape, budget_bytes: int, workload: Workload, runtime_bytes: int
) -> MemoryPlan:
    """Choose chunk, context and KV blocks so that the planned peak fits the budget.

    Args:
        runtime_bytes: what the process holds before the model is loaded, as measured.

    Errors: ConfigError for a context the model does not have; BudgetError where nothing fits,
    with the need by part and the single changes that would fit.
    """
    if workload.context is not None and not 0 < workload.context <= shape.max_position_embeddings:
        raise ConfigError(
            f"--context {workload.context} is out of range; "
            f"this model has 1..{shape.max_position_embeddings}"
        )
    chosen = _first_fit(shape, budget_bytes, workload, runtime_bytes)
    if chosen is None:
        raise _budget_error(shape, budget_bytes, workload, runtime_bytes)
    return chosen


def smallest_budget(shape: ModelShape, workload: Workload, runtime_bytes: int) -> int:
    """The least budget, in whole MiB, that some plan for this workload fits."""
    context = workload.context or min(_SMALLEST_CONTEXT, shape.max_position_embeddings)
    floor = _sized(shape, 0, replace(workload, context=context), runtime_bytes, _CHUNKS[-1])
    return -(-floor.peak_bytes // MIB) * MIB


def _first_fit(
    shape: ModelShape, budget_bytes: int, workload: Workload, runtime_bytes: int
) -> MemoryPlan | None:
    """The candidate with the largest chunk that fits, its KV cache grown to use the budget."""
    for chunk in _CHUNKS:
        for context in _contexts(shape, workload):
            sized = replace(workload, context=context)
            candidate = _sized(shape, budget_bytes, sized, runtime_bytes, chunk)
            if candidate.headroom_bytes >= 0:
                return _grown(shape, candidate)
    return None


def _contexts(shape: ModelShape, workload: Workload) -> Iterator[int]:
    """Contexts to try, largest first: the one asked for, or the model's own and its fractions."""
    if workload.context is not None:
        yield workload.context
        return
    context = shape.max_position_embeddings
    smallest = min(_SMALLEST_CONTEXT, context)
    while context > smallest:
        yield context
        context = context * 3 // 4 // BLOCK_SIZE * BLOCK_SIZE
    yield smallest


def _sized(
    shape: ModelShape, budget_bytes: int, workload: Workload, runtime_bytes: int, chunk: int
) -> MemoryPlan:
    """The plan with room for one sequence of the whole context."""
    assert workload.context is not None, "a context was chosen before"
    itemsize = DTYPE_BYTES[workload.dtype]
    num_blocks = -(-workload.context // BLOCK_SIZE)
    rows = min(workload.max_num_seqs, chunk)
    running = activation_bytes(shape, chunk, workload.context, itemsize)
    running = max(running, logits_bytes(shape, rows, itemsize))
    parts = (
        ("runtime", runtime_bytes + library_bytes(shape, chunk, itemsize)),
        ("weights", model_parameters(shape) * itemsize),
        ("kv cache", num_blocks * BLOCK_SIZE * kv_bytes_per_token(shape, itemsize)),
        ("activations", max(running, LOADING_BYTES)),
    )
    return MemoryPlan(
        budget_bytes=budget_bytes,
        dtype=workload.dtype,
        context=workload.context,
        chunk=chunk,
        max_num_seqs=workload.max_num_seqs,
        block_size=BLOCK_SIZE,
        num_kv_blocks=num_blocks,
        parts=parts,
    )


def _grown(shape: ModelShape, candidate: MemoryPlan) -> MemoryPlan:
    """The same plan with KV blocks for as many of its sequences as the headroom holds."""
    per_block = BLOCK_SIZE * kv_bytes_per_token(shape, DTYPE_BYTES[candidate.dtype])
    wanted = candidate.num_kv_blocks * (candidate.max_num_seqs - 1)
    extra = min(wanted, candidate.headroom_bytes // per_block)
    parts = tuple(
        (name, num_bytes + extra * per_block if name == "kv cache" else num_bytes)
        for name, num_bytes in candidate.parts
    )
    return replace(candidate, num_kv_blocks=candidate.num_kv_blocks + extra, parts=parts)


def _budget_error(
    shape: ModelShape, budget_bytes: int, workload: Workload, runtime_bytes: int
) -> BudgetError:
    context = workload.context or min(_SMALLEST_CONTEXT, shape.max_position_embeddings)
    asked = replace(workload, context=context)
    need = _sized(shape, budget_bytes, asked, runtime_bytes, _CHUNKS[-1])
    lines = [
        f"no plan fits --memory {size_option(budget_bytes)} at --context {context}",
        f"  needs {gib(need.peak_bytes)} GiB: {need.describe_parts()}",
        "  any one of these fits:",
    ]
    for change in _suggestions(shape, budget_bytes, workload, runtime_bytes):
        lines.append(f"    {change}")
    return BudgetError("\n".join(lines))


def _suggestions(
    shape: ModelShape, budget_bytes: int, workload: Workload, runtime_bytes: int
) -> Iterator[str]:
    """Single changes that fit, each the planner run again with that one change."""
    if workload.context is not None:
        shorter = _first_fit(shape, budget_bytes, replace(workload, context=None), runtime_bytes)
        if shorter is not None:
            yield f"--context {shorter.context}"
    if workload.dtype == "float32":
        smaller = replace(workload, dtype="bfloat16")
        if _first_fit(shape, budget_bytes, smaller, runtime_bytes) is not None:
            yield "--dtype bfloat16"
    yield f"--memory {size_option(smallest_budget(shape, workload, runtime_bytes))}"
