"""From a model's name to what loading it starts from: opened, fitted into the budget, reserved."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from thinslice.checkpoint.index import Checkpoint
from thinslice.checkpoint.open import open_checkpoint, without_vocabulary
from thinslice.config import EngineSettings
from thinslice.engine.planning import (
    FittedModel,
    Model,
    Opening,
    budget_bytes,
    budget_option,
    fit_model,
    named_budget,
    open_device,
    predict_speed,
)
from thinslice.errors import BudgetError, StoreError
from thinslice.kernels import native
from thinslice.memory.device import Device
from thinslice.memory.ledger import Reservation, ledger
from thinslice.memory.measure import known_profile
from thinslice.memory.meter import anonymous_bytes, peak_rss_bytes
from thinslice.plan.available import Budget, budget_for_process, check_bound
from thinslice.plan.memory_plan import MemoryPlan
from thinslice.plan.packed_format import PackedFormat
from thinslice.plan.predict import HardwareProfile, Prediction
from thinslice.plan.tensors import EMBEDDING, HEAD
from thinslice.process import bound_allocator, give_back, return_free_pages
from thinslice.store.progress import Progress, silent
from thinslice.store.store import Store
from thinslice.text.tokenizer import Tokenizer, load_tokenizer
from thinslice.units import format_bytes, size_option

# What becomes of float16 numbers, which no plan computes with as they are.
_ROUNDED = "rounded to bfloat16, which keeps 8 of their 11 significant bits"
_EXACT = "computed with as float32, which holds each of their numbers exactly"


@dataclass(frozen=True)
class Opened:
    """A model's files.

    Attributes:
        checkpoint: without the vocabulary in a GGUF's header, which the tokenizer has.
        took: what opening them took.
    """

    checkpoint: Checkpoint
    tokenizer: Tokenizer
    took: Opening


@dataclass(frozen=True)
class Prepared:
    """A model that is opened and planned, and not loaded.

    Attributes:
        checkpoint: the files that run; those of the packed copy where the model needs one.
        plan: the only one that loading it follows.
        reservation: what the plan promises it of this process's memory.
        device: that it is planned for; None for the processor.
        prediction: how fast it will be; None where the machine was never measured.
        is_prediction_busy: other programs computed while the machine was measured.
    """

    checkpoint: Checkpoint
    tokenizer: Tokenizer
    plan: MemoryPlan
    reservation: Reservation
    device: Device | None
    prediction: Prediction | None
    is_prediction_busy: bool

    @property
    def notes(self) -> tuple[str, ...]:
        """What its user should know of the model's files, one line each."""
        return (*self.checkpoint.notes, *self.tokenizer.notes)


def prepare(name: str, asked: EngineSettings, progress: Progress | None = None) -> Prepared:
    """Open a model by name, fetching it first where it is not there, and plan it.

    A model that must be packed for ``asked.dtype``, or to be streamed, is packed the first time,
    and planned again as it lies in its copy.

    Errors: ConfigError, StoreError, CheckpointError, BudgetError, each before anything large is
    allocated or packed.
    """
    if asked.device == "cpu":
        native.library()  # told before anything is fetched
    device = open_device(asked)
    settings, budget = with_budget(asked, device)
    with explaining(settings, budget):
        opened = open_model(name, settings, progress)
        checkpoint, took = opened.checkpoint, opened.took
        found, reservation = _reserved(Model.of(checkpoint, took), settings, device)
        if found.is_to_be_packed:
            try:
                checkpoint = packed_copy(checkpoint, found, settings, progress, reservation)
            finally:  # an error's traceback would keep it
                reservation.release()
            found, reservation = _reserved(Model.of(checkpoint, took), settings, device)
    profile = _known_profile(checkpoint)
    prediction = None
    if profile is not None and device is None:
        prediction = predict_speed(found.model, found.plan, profile)
    is_busy = profile is not None and profile.is_busy
    return Prepared(
        checkpoint, opened.tokenizer, found.plan, reservation, device, prediction, is_busy
    )


def open_model(name: str, settings: EngineSettings, progress: Progress | None = None) -> Opened:
    """Open a model's files, fetching them first where they are not here; with a note of what their
    float16 numbers become.

    Errors: ConfigError, StoreError, CheckpointError.
    """
    path = Store().ensure(name, progress, offline=settings.offline)
    # What is read later is found wherever the program has gone by then.
    opened = open_files(path.absolute())
    notes = (*opened.checkpoint.notes, *float16_notes(opened.checkpoint, settings.dtype))
    return replace(opened, checkpoint=replace(opened.checkpoint, notes=notes))


def open_files(path: Path) -> Opened:
    """Open a model by its path, before it is planned: a plan begins above what the process holds.

    What was needed only while the tokenizer was made, up to three times what stays, has gone back
    to the system then.
    Errors: CheckpointError.
    """
    bound_allocator()
    return_free_pages()
    before, peak_before = anonymous_bytes(), peak_rss_bytes()
    checkpoint = open_checkpoint(path)
    tokenizer = load_tokenizer(checkpoint)
    checkpoint = without_vocabulary(checkpoint)
    return_free_pages()
    added, peak = max(anonymous_bytes() - before, 0), peak_rss_bytes()
    return Opened(checkpoint, tokenizer, Opening(added, peak if peak > peak_before else 0))


def float16_notes(checkpoint: Checkpoint, wanted: str) -> tuple[str, ...]:
    """One line where matrices of a checkpoint are float16; none for any other.

    Norms and biases are not told of: the processor has them in float32, exactly.

    Args:
        wanted: the weight type that is asked for; auto takes the checkpoint's own.

    Errors: ConfigError as ``Model.dtype``.
    """
    stored = checkpoint.stored
    names = {name for name, matrix in stored.items() if matrix.dtype == "F16"}
    if not names:
        return ()
    count = f"{len(names)} of " if len(names) < len(stored) else ""
    fates = " and ".join(_fates(Model.of(checkpoint), wanted, names))
    return (f"{count}the model's {len(stored)} matrices are float16: {fates}",)


def _fates(model: Model, wanted: str, names: set[str]) -> list[str]:
    dtype = model.dtype(wanted)
    if dtype == "float32":
        return [_EXACT]
    if dtype == "bfloat16":
        return [f"{_ROUNDED}; --dtype float32 keeps them all"]
    layout = model.layout(dtype)
    matrices = (*layout.sweep, *layout.prediction)
    kept = {one.kept for one in matrices if one.tensor.origin.name in names}
    formats = " and ".join(sorted(kept & set(PackedFormat)))
    fates = [f"quantised to {formats}"] if formats else []
    if "float32" in kept:  # rows that do not divide into groups
        fates.append(_EXACT)
    if EMBEDDING in names and HEAD in model.stored:
        fates.append(f"in the embedding table {_ROUNDED}")
    return fates


def _reserved(
    model: Model, settings: EngineSettings, device: Device | None
) -> tuple[FittedModel, Reservation]:
    model.load_packing(settings.dtype)
    with ledger().planning() as planning:
        found = fit_model(model, settings, planning.runtime_bytes, device)
        return found, planning.reserve(found.plan)


def packed_copy(
    source: Checkpoint,
    found: FittedModel,
    settings: EngineSettings,
    progress: Progress | None,
    reservation: Reservation | None = None,
) -> Checkpoint:
    """The packed copy of a model's files, made where it is not in the store yet.

    Args:
        reservation: the model's own, in whose room it is packed.

    Errors: CheckpointError, StoreError; BudgetError before anything is packed.
    """
    from thinslice.pack.stored import ensure_packed

    fmt = PackedFormat(found.plan.dtype)
    budget = budget_bytes(settings) - ledger().promised_bytes(but=reservation)
    folder = ensure_packed(source, fmt, progress or silent, memory_bytes=budget)
    give_back()
    opened = open_checkpoint(folder.absolute())
    # A copy that an older version packed of a GGUF does not have what it advises.
    return replace(opened, notes=source.notes, sampling=source.sampling)


def with_budget(
    settings: EngineSettings, device: Device | None = None
) -> tuple[EngineSettings, Budget]:
    """Settle the budget of main memory, so that every step of a load plans for the same number.

    Errors: as ``budget_for_process``; BudgetError for more than a device has of its own.
    """
    if device is not None and settings.memory_bytes is not None:
        check_bound(settings.memory_bytes, bound=(device.total_bytes(), "the device has"))
    budget = budget_for_process(named_budget(settings), budget_option(settings))
    if settings.device == "cpu":
        return replace(settings, memory=budget.num_bytes), budget
    return replace(settings, host_memory=budget.num_bytes), budget


@contextmanager
def explaining(settings: EngineSettings, budget: Budget) -> Iterator[None]:
    """Inside, an error about a budget also says where the number comes from, if nobody named it,
    and what other models of the process take of it."""
    try:
        yield
    except BudgetError as error:
        more = ""
        if budget.source is not None:
            size, option = size_option(budget.num_bytes), budget_option(settings)
            more += f"\n  {option} was not given: {size} is {budget.source}"
        if promised := ledger().promised_bytes():
            size = format_bytes(promised)
            more += f"\n  other models of this process may come to hold {size} more of it"
        if not more:
            raise
        raise BudgetError(f"{error}{more}") from error


def _known_profile(checkpoint: Checkpoint) -> HardwareProfile | None:
    """The speeds that were measured before; None also where there is no store to keep them in."""
    with suppress(StoreError, OSError):
        return known_profile(Store().root, checkpoint.files[0])
    return None
