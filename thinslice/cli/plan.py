"""thinslice plan: what a model would take, before anything of it is loaded."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from rich.table import Table

from thinslice.cli.console import note, note_all, out, print_json, progress_bars
from thinslice.cli.models import plain_table
from thinslice.cli.options import Fit, FitOptions, Json
from thinslice.errors import BudgetError, ConfigError, StoreError
from thinslice.plan.model_shape import ModelShape
from thinslice.units import MIB, format_bytes, size_option

if TYPE_CHECKING:
    from thinslice.config import EngineSettings
    from thinslice.engine.planning import Model
    from thinslice.memory.device import Device
    from thinslice.plan.device_predict import DeviceProfile
    from thinslice.plan.hardware import HardwareProfile
    from thinslice.plan.memory_plan import MemoryPlan
    from thinslice.plan.predict import Prediction
    from thinslice.store.store import Store

_BAR_WIDTH = 32


def plan(
    model: str,
    /,
    *,
    fit: Fit = FitOptions(),  # noqa: B008
    sequences: Annotated[int, Parameter(name="--sequences")] = 1,
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
        as_json: Print one JSON object instead of the tables.
    """
    from thinslice.config import EngineSettings
    from thinslice.engine.planning import model_to_run, open_device, plan_model

    settings = EngineSettings(
        memory=fit.memory,
        device=fit.device,
        host_memory=fit.host_memory,
        context=fit.context,
        dtype=fit.dtype,
        kv_dtype=fit.kv_dtype,
        max_num_seqs=sequences,
        draft=fit.draft,
        draft_length=fit.draft_length,
        mtp_hidden=fit.mtp_hidden,
    )
    # A device is opened first: what its libraries hold here is then counted.
    device = open_device(settings)
    found, machine = _look_up(model, device)
    to_run = model_to_run(found, settings, machine.runtime_bytes, device)
    chosen = plan_model(to_run, settings, machine.runtime_bytes, device)
    speed = machine.predict(to_run, chosen)
    if as_json:
        print_json({**chosen.to_dict(), "prediction": speed and asdict(speed)})
        return
    if fit.memory is None:
        note(f"no --memory: planned for 80% of what is free, {format_bytes(chosen.budget_bytes)}")
    if chosen.device is not None and fit.host_memory is None:
        size = format_bytes(chosen.device.host_budget_bytes)
        note(f"no --host-memory: planned for 80% of what is free, {size}")
    if found.needs_packing(settings.dtype):
        note(f"--dtype {settings.dtype}: planned as packed; thinslice run packs it once")
    if to_run is not found:
        note("to be streamed it is planned as packed; thinslice run packs it once")
    out.print(_parts_table("PART", chosen.parts, chosen.budget_bytes))
    if chosen.device is not None:
        host = chosen.device
        out.print(_parts_table("ON THE HOST", host.host_parts, host.host_budget_bytes))
    out.print(_sizes_table(chosen, speed))
    out.print(_neighbours_table(found, settings, chosen, machine))


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


def _look_up(name: str, device: "Device | None") -> "tuple[Model, _Machine]":
    """The model, and the speeds of this machine with the disk it lies on, measured once; those of a
    device are measured each time. A note tells of what cannot be measured.
    """
    from thinslice.checkpoint.open import open_checkpoint
    from thinslice.engine.planning import Model
    from thinslice.memory.measure_device import measure_device
    from thinslice.memory.meter import current_rss_bytes
    from thinslice.store.store import Store
    from thinslice.text.tokenizer import load_tokenizer

    store = Store()
    with progress_bars() as progress:
        here = store.locate(name, progress)
        if isinstance(here, ModelShape):
            note(f"{name} is not stored: planned by its settings, its tokenizer not counted")
            held = current_rss_bytes()
            found, profile = Model.of_shape(here), _speeds(store, None)
        else:
            checkpoint = open_checkpoint(here)
            note_all(checkpoint.notes)
            # Held while planning: what the process has before a model is loaded is measured.
            _tokenizer = load_tokenizer(checkpoint)
            held = current_rss_bytes()
            found, profile = Model.of(checkpoint), _speeds(store, checkpoint.files[0])
    of_device = None if device is None else measure_device(device)
    return found, _Machine(profile, held, device, of_device)


def _speeds(store: "Store", weights: Path | None) -> "HardwareProfile | None":
    from thinslice.engine.planning import measured_profile

    try:
        return measured_profile(store.root, weights)
    except StoreError as error:
        note(f"no speeds are predicted: {error}")
        return None


def _parts_table(title: str, parts: tuple[tuple[str, int], ...], budget_bytes: int) -> Table:
    table = plain_table(title, "SIZE", "SHARE OF THE BUDGET")
    headroom_bytes = budget_bytes - sum(num_bytes for _, num_bytes in parts)
    for name, num_bytes in [*parts, ("headroom", headroom_bytes)]:
        bar = "█" * round(_BAR_WIDTH * num_bytes / budget_bytes)
        table.add_row(name, format_bytes(num_bytes), bar)
    table.add_row("budget", format_bytes(budget_bytes), "")
    return table


def _sizes_table(chosen: "MemoryPlan", speed: "Prediction | None") -> Table:
    table = plain_table()
    table.add_row("dtype", f"{chosen.dtype}, KV cache {chosen.kv_dtype}")
    table.add_row("weights", chosen.describe_weights())
    table.add_row("context", f"{chosen.context} tokens")
    table.add_row("chunk", chosen.describe_chunk())
    table.add_row("sequences", f"{chosen.max_num_seqs}, {chosen.num_kv_blocks} KV blocks in all")
    table.add_row("drafting", chosen.describe_drafting())
    if speed is not None:
        table.add_row("decode", f"{_rate(speed.decode_tokens_per_s)}, bound by {speed.bound}")
        table.add_row("prefill", _rate(speed.prefill_tokens_per_s))
    return table


def _neighbours_table(
    found: "Model",
    settings: "EngineSettings",
    chosen: "MemoryPlan",
    machine: _Machine,
) -> Table:
    """What one change would give: half and double the memory, other weights, more context."""
    from thinslice.engine.planning import model_to_run, plan_model

    table = plain_table("WITH", "WEIGHTS", "CONTEXT", "PEAK", "DECODE")
    for label, changed in _neighbours(found, settings, chosen):
        try:
            to_run = model_to_run(found, changed, machine.runtime_bytes, machine.device)
            other = plan_model(to_run, changed, machine.runtime_bytes, machine.device)
        except (BudgetError, ConfigError) as error:
            reason = "does not fit" if isinstance(error, BudgetError) else "cannot be packed"
            table.add_row(label, reason, "", "", "")
            continue
        predicted = machine.predict(to_run, other)
        speed = "" if predicted is None else _rate(predicted.decode_tokens_per_s)
        peak = format_bytes(other.peak_bytes)
        table.add_row(label, other.describe_weights(), str(other.context), peak, speed)
    return table


def _neighbours(
    found: "Model", settings: "EngineSettings", chosen: "MemoryPlan"
) -> Iterator[tuple[str, "EngineSettings"]]:
    budget = chosen.budget_bytes
    for memory in (max(budget // 2 // MIB, 1) * MIB, budget * 2):
        yield f"--memory {size_option(memory)}", replace(settings, memory=memory)
    fixed = replace(settings, memory=budget)
    for dtype in ("bfloat16", "int8", "int4"):
        if dtype != chosen.dtype and found.packing is None:
            yield f"--dtype {dtype}", replace(fixed, dtype=dtype)
    longer = min(chosen.context * 2, found.shape.max_position_embeddings)
    if longer > chosen.context:
        yield f"--context {longer}", replace(fixed, context=longer)


def _rate(tokens_per_s: float) -> str:
    """Tokens a second, or seconds a token where that is the larger number."""
    if tokens_per_s >= 10:
        return f"{tokens_per_s:.0f} tokens/s"
    if tokens_per_s >= 1:
        return f"{tokens_per_s:.1f} tokens/s"
    return f"{1 / tokens_per_s:.1f} s/token"
