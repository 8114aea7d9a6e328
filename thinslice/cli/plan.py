"""thinslice plan: what a model would take, before anything of it is loaded."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter
from rich.table import Table

from thinslice.cli.console import (
    note,
    note_all,
    out,
    plain_table,
    print_json,
    print_table,
    progress_bars,
)
from thinslice.cli.options import Json, LoadToServe
from thinslice.cli.plan_tables import parts_table, rate, sizes_table, thought, thought_s
from thinslice.config import EngineSettings, SamplingParams
from thinslice.errors import BudgetError, ConfigError, StoreError
from thinslice.plan.available import known_bound
from thinslice.plan.model_shape import ModelShape
from thinslice.units import MIB, format_bytes, size_option

if TYPE_CHECKING:
    from thinslice.engine.planning import Model
    from thinslice.memory.device import Device
    from thinslice.plan.available import Budget
    from thinslice.plan.device_predict import DeviceProfile
    from thinslice.plan.memory_plan import MemoryPlan
    from thinslice.plan.predict import HardwareProfile, Prediction
    from thinslice.store.store import Store


def plan(
    model: str,
    /,
    *,
    fit: LoadToServe = EngineSettings(),  # noqa: B008
    sequences: Annotated[int, Parameter(name="--sequences")] = 1,
    max_thinking_tokens: int | None = None,
    as_json: Json = False,
) -> None:
    """Show what a model would take within a budget and how fast it would be, and what other
    settings would give.

    Reads headers only; of a model of the Hugging Face Hub that is not stored it fetches the
    settings, a few KB. The first plan measures the machine, which takes under ten seconds. Where
    that cannot be done, as on a full disk, it comes without speeds.

    Args:
        model: Name of the model.
        sequences: Sequences that are to run at once.
        max_thinking_tokens: Say how long a thought of so many tokens takes, behind a prompt of one
            chunk, for one sequence alone and without drafts.
        as_json: Print one JSON object instead of the tables.
    """
    from thinslice.store.store import Store

    asked = replace(fit, max_num_seqs=sequences)
    SamplingParams(max_thinking_tokens=max_thinking_tokens)  # refuses what is no number of tokens
    Store().check_name(model)
    from thinslice.engine.planning import fit_model, open_device, residency_of
    from thinslice.engine.prepare import explaining

    # A device is opened first: what its libraries hold here is then counted.
    device = open_device(asked)
    settings, budget = _settled(asked, device)
    found, machine = _look_up(model, asked, device)
    with explaining(settings, budget):
        fitted = fit_model(found, settings, machine.runtime_bytes, device)
    to_run, chosen = fitted.model, fitted.plan
    speed = machine.predict(to_run, chosen)
    resident = None
    if device is None:
        resident = residency_of(to_run, settings, machine.runtime_bytes)
    if as_json:
        report: dict[str, Any] = {
            "prediction": speed and asdict(speed),
            "resident": resident and asdict(resident),
        }
        if max_thinking_tokens is not None:
            report["thought_s"] = speed and thought_s(chosen, speed, max_thinking_tokens)
        print_json({**chosen.to_dict(), **report})
        return
    _note_defaults(asked, budget, chosen)
    if found.needs_packing(settings.dtype):
        note(f"--dtype {settings.dtype}: planned as packed; thinslice run packs it once")
    if to_run is not found:
        note("to be streamed it is planned as packed; thinslice run packs it once")
    for title, pool in zip(("PART", "ON THE HOST"), chosen.pools, strict=False):
        out.print(parts_table(title, pool))
    sizes = sizes_table(chosen, speed, resident, is_asked=fit.context is not None)
    if max_thinking_tokens is not None and speed is not None:
        sizes.add_row("thought", thought(chosen, speed, max_thinking_tokens))
    print_table(sizes)
    print_table(_neighbours_table(found, settings, chosen, machine))


def _note_defaults(asked: EngineSettings, budget: "Budget", chosen: "MemoryPlan") -> None:
    """Say where a budget comes from that nobody gave."""
    is_on_card = asked.device != "cpu"
    if budget.source is not None:
        option = "--host-memory" if is_on_card else "--memory"
        note(f"no {option}: planned for {format_bytes(budget.num_bytes)}, {budget.source}")
    if is_on_card and asked.memory is None:
        size = format_bytes(chosen.budget_bytes)
        note(f"no --memory: planned for {size}, 80% of what the card has free")


def _settled(asked: EngineSettings, device: "Device | None") -> "tuple[EngineSettings, Budget]":
    """The settings with their budget; a plan for more than this machine has is one for another."""
    from thinslice.engine.planning import budget_bytes
    from thinslice.engine.prepare import with_budget
    from thinslice.plan.available import Budget

    try:
        return with_budget(asked, device)
    except BudgetError as error:
        note(f"planned for another machine: {str(error).splitlines()[0]}")
        return asked, Budget(budget_bytes(asked))


@dataclass(frozen=True)
class _Machine:
    """What plans are made for and predicted from; ``runtime_bytes`` the process held before."""

    profile: "HardwareProfile | None"
    runtime_bytes: int
    device: "Device | None"
    device_profile: "DeviceProfile | None"

    def predict(self, found: "Model", chosen: "MemoryPlan") -> "Prediction | None":
        """How fast a plan will run; None where the speeds could not be measured."""
        from thinslice.engine.planning import predict_speed

        if self.profile is None:
            return None
        return predict_speed(found, chosen, self.profile, self.device_profile)


def _look_up(name: str, asked: EngineSettings, device: "Device | None") -> "tuple[Model, _Machine]":
    """The model, and the speeds of this machine with the disk it lies on, measured once; those of a
    device are measured each time. A note tells of what cannot be measured.
    """
    from thinslice.engine.planning import Model
    from thinslice.engine.prepare import float16_notes, open_files
    from thinslice.memory.measure_device import measure_device
    from thinslice.memory.meter import current_rss_bytes
    from thinslice.store.store import Store

    store = Store()
    with progress_bars() as progress:
        here = store.locate(name, progress, offline=asked.offline)
        if isinstance(here, ModelShape):
            note(f"{name} is not stored: planned by its settings, its tokenizer not counted")
            found, weights = Model.of_shape(here), None
        else:
            # Held while planning: what the process has before a model is loaded is measured.
            opened = open_files(here)
            checkpoint = opened.checkpoint
            notes = (*checkpoint.notes, *float16_notes(checkpoint, asked.dtype))
            note_all((*notes, *opened.tokenizer.notes))
            found, weights = Model.of(checkpoint, opened.took), checkpoint.files[0]
        found.load_packing(asked.dtype)
        held = current_rss_bytes()
        profile = _speeds(store, weights)
    of_device = None if device is None else measure_device(device)
    return found, _Machine(profile, held, device, of_device)


def _speeds(store: "Store", weights: Path | None) -> "HardwareProfile | None":
    from thinslice.memory.measure import measured_profile

    try:
        profile = measured_profile(store.root, weights)
    except StoreError as error:
        note(f"no speeds are predicted: {error}")
        return None
    if profile.is_busy:
        note(
            f"other programs had {1 - profile.cpu_share:.0%} of the cores while their speeds were "
            "measured: the machine is faster; they are measured again when it is quieter"
        )
    return profile


def _neighbours_table(
    found: "Model",
    settings: EngineSettings,
    chosen: "MemoryPlan",
    machine: _Machine,
) -> Table:
    """What one change would give: half and double the memory, other weights, more context."""
    from thinslice.engine.planning import fit_model

    table = plain_table("WITH", "WEIGHTS", "CONTEXT", "PEAK", "DECODE")
    for label, changed in _neighbours(found, settings, chosen):
        try:
            fitted = fit_model(found, changed, machine.runtime_bytes, machine.device)
        except ConfigError:
            table.add_row(label, "cannot be packed", "", "", "")
            continue
        except BudgetError as error:
            packing = f"fits once packed, which takes {error.to_pack}"
            table.add_row(label, packing if error.to_pack else "does not fit", "", "", "")
            continue
        other = fitted.plan
        predicted = machine.predict(fitted.model, other)
        speed = "" if predicted is None else rate(predicted.decode_tokens_per_s)
        peak = format_bytes(other.peak_bytes)
        table.add_row(label, other.describe_weights(), str(other.context), peak, speed)
    return table


def _neighbours(
    found: "Model", settings: EngineSettings, chosen: "MemoryPlan"
) -> Iterator[tuple[str, EngineSettings]]:
    budget, bound = chosen.budget_bytes, known_bound()
    for memory in (max(budget // 2 // MIB, 1) * MIB, budget * 2):
        if bound is None or chosen.device is not None or memory <= max(bound[0], budget):
            yield f"--memory {size_option(memory)}", replace(settings, memory=memory)
    fixed = replace(settings, memory=budget)
    for dtype in ("bfloat16", "int8", "int4"):
        if dtype != chosen.dtype and found.packing is None:
            yield f"--dtype {dtype}", replace(fixed, dtype=dtype)
    longer = min(chosen.context * 2, found.shape.max_position_embeddings)
    if longer > chosen.context:
        yield f"--context {longer}", replace(fixed, context=longer)
