"""thinslice plan: what a model would take, before anything of it is loaded."""

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from rich.table import Table

from thinslice.cli.console import note, out
from thinslice.cli.models import plain_table, print_json
from thinslice.cli.options import Fit, FitOptions, Json
from thinslice.errors import BudgetError
from thinslice.units import MIB, format_bytes, size_option

if TYPE_CHECKING:
    from thinslice.checkpoint.index import Checkpoint
    from thinslice.config import EngineSettings
    from thinslice.plan.memory_plan import MemoryPlan

_BAR_WIDTH = 32


def plan(
    model: str,
    /,
    *,
    fit: Fit = FitOptions(),  # noqa: B008
    sequences: Annotated[int, Parameter(name="--sequences")] = 1,
    as_json: Json = False,
) -> None:
    """Show what a model would take within a budget, and what other settings would give.

    Reads headers only. The model must be here; thinslice pull fetches one.

    Args:
        model: Name of the model.
        sequences: Sequences that are to run at once.
        as_json: Print one JSON object instead of the tables.
    """
    from thinslice.checkpoint.open import open_checkpoint
    from thinslice.config import EngineSettings
    from thinslice.engine.load import plan_checkpoint
    from thinslice.store.store import Store
    from thinslice.text.tokenizer import load_tokenizer

    checkpoint = open_checkpoint(Store().resolve(model))
    # Held while planning: what the process has before a model is loaded is measured.
    _tokenizer = load_tokenizer(checkpoint)
    settings = EngineSettings(fit.memory, fit.context, fit.dtype, fit.kv_dtype, sequences)
    chosen = plan_checkpoint(checkpoint, settings)
    if as_json:
        print_json(chosen.to_dict())
        return
    if fit.memory is None:
        note(f"no --memory: planned for 80% of what is free, {format_bytes(chosen.budget_bytes)}")
    out.print(_parts_table(chosen))
    out.print(_sizes_table(chosen))
    out.print(_neighbours_table(checkpoint, settings, chosen))


def _parts_table(chosen: "MemoryPlan") -> Table:
    table = plain_table("PART", "SIZE", "SHARE OF THE BUDGET")
    rows = [*chosen.parts, ("headroom", chosen.headroom_bytes)]
    for name, num_bytes in rows:
        bar = "█" * round(_BAR_WIDTH * num_bytes / chosen.budget_bytes)
        table.add_row(name, format_bytes(num_bytes), bar)
    table.add_row("budget", format_bytes(chosen.budget_bytes), "")
    return table


def _sizes_table(chosen: "MemoryPlan") -> Table:
    table = plain_table()
    table.add_row("dtype", chosen.dtype)
    table.add_row("weights", chosen.describe_weights())
    table.add_row("context", f"{chosen.context} tokens")
    table.add_row("chunk", f"{chosen.chunk} tokens")
    table.add_row("sequences", f"{chosen.max_num_seqs}, {chosen.num_kv_blocks} KV blocks in all")
    return table


def _neighbours_table(
    checkpoint: "Checkpoint", settings: "EngineSettings", chosen: "MemoryPlan"
) -> Table:
    """What one change would give: half and double the memory, the other dtype, more context."""
    from thinslice.engine.load import plan_checkpoint

    table = plain_table("WITH", "WEIGHTS", "CONTEXT", "PEAK")
    for label, changed in _neighbours(settings, chosen, checkpoint):
        try:
            other = plan_checkpoint(checkpoint, changed)
        except BudgetError:
            table.add_row(label, "does not fit", "", "")
            continue
        peak = format_bytes(other.peak_bytes)
        table.add_row(label, other.describe_weights(), str(other.context), peak)
    return table


def _neighbours(
    settings: "EngineSettings", chosen: "MemoryPlan", checkpoint: "Checkpoint"
) -> Iterator[tuple[str, "EngineSettings"]]:
    budget = chosen.budget_bytes
    for memory in (max(budget // 2 // MIB, 1) * MIB, budget * 2):
        yield f"--memory {size_option(memory)}", replace(settings, memory=memory)
    fixed = replace(settings, memory=budget)
    other_dtype = "float32" if chosen.dtype == "bfloat16" else "bfloat16"
    yield f"--dtype {other_dtype}", replace(fixed, dtype=other_dtype)
    longer = min(chosen.context * 2, checkpoint.shape.max_position_embeddings)
    if longer > chosen.context:
        yield f"--context {longer}", replace(fixed, context=longer)
