"""Plan a model for this process and this machine."""

from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module

from thinslice.checkpoint.index import Checkpoint
from thinslice.config import EngineSettings
from thinslice.errors import BudgetError, CheckpointError, ConfigError, StoreError
from thinslice.kernels import native
from thinslice.memory.device import Device, missing_for_cuda
from thinslice.memory.meter import rss_to_plan_from, touched_library_bytes
from thinslice.plan.available import (
    budget_for_process,
    default_budget,
    known_bound,
)
from thinslice.plan.card import Card
from thinslice.plan.case import Platform, Workload
from thinslice.plan.device_predict import DeviceProfile, predict_on_device
from thinslice.plan.memory_plan import MemoryPlan
from thinslice.plan.model_shape import ModelShape
from thinslice.plan.packed_format import PackedFormat, is_packable, most_common_format
from thinslice.plan.packing import Packing, packing_for
from thinslice.plan.planner import Residency, plan, residency
from thinslice.plan.predict import HardwareProfile, Prediction, predict
from thinslice.plan.processor import Processor
from thinslice.plan.refusal import suggested_size
from thinslice.plan.tensors import Room, tensors_of
from thinslice.plan.weight_layout import (
    FLOAT_BYTES,
    Stored,
    WeightLayout,
    layout_of,
    packed_as,
    packed_layout,
    stored_as,
)
from thinslice.units import MIB, format_bytes, size_option

# What packing a model of floats takes that is not here yet; a slice has two MiB of them.
_PACKING_BYTES = 64 * MIB
_STORED_FLOATS = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


@dataclass(frozen=True)
class Opening:
    """What opening a model's files took of this process's memory.

    Attributes:
        tokenizer_bytes: what was added to what the process holds, nearly all of it the tokenizer's.
            Memory that was free in the process before is not in it. 0 where the system does not
            tell.
        peak_bytes: the most the process held meanwhile; 0 where it had held more before.
    """

    tokenizer_bytes: int = 0
    peak_bytes: int = 0


NOT_OPENED = Opening()


@dataclass(frozen=True)
class Model:
    """What a plan needs to know of a model.

    Attributes:
        stored: how its matrices lie on disk.
        own_dtype: the weight type that the files run in unconverted.
        packed_copy: what packing its files for ``own_dtype`` gives, where they are blocks of a GGUF
            and not all of them have a packed twin.
        source: the files that it is packed from first, if it must be; None where they are not here.
        took: what opening its files took.
    """

    shape: ModelShape
    stored: Stored
    packing: Packing | None
    own_dtype: str
    packed_copy: "Model | None" = None
    source: Checkpoint | None = None
    took: Opening = NOT_OPENED

    @classmethod
    def of(cls, checkpoint: Checkpoint, took: Opening = NOT_OPENED) -> "Model":
        """A checkpoint that is here."""
        own, shape = checkpoint_dtype(checkpoint), checkpoint.shape
        stored, packing = checkpoint.stored, checkpoint.packing
        model = cls(shape, stored, packing, own, source=checkpoint, took=took)
        sizes = (shape.hidden_size, shape.q_size, shape.intermediate_size)
        if own in FLOAT_BYTES or not all(is_packable(size) for size in sizes):
            return model
        if not any(matrix.is_requantized for matrix in model.layout(own).sweep):
            return model
        from thinslice.pack.layout import matrix_formats

        packing = packing_for(shape, PackedFormat(own))
        stored = packed_as(shape, packing, matrix_formats(checkpoint, packing))
        return replace(model, packed_copy=replace(model, stored=stored, packing=packing))

    @classmethod
    def of_shape(cls, shape: ModelShape) -> "Model":
        """A checkpoint of floats of which only the shape is known."""
        stored = stored_as(shape, _STORED_FLOATS.get(shape.dtype, "BF16"))
        return cls(shape, stored, None, "bfloat16")

    def dtype(self, wanted: str) -> str:
        """Resolve a requested weight type.

        Errors: ConfigError for floats of a packed model.
        """
        if wanted == "auto":
            return self.own_dtype
        if self.packing is not None and wanted != self.own_dtype:
            raise ConfigError(
                f"--dtype {wanted}: the model is packed in {self.own_dtype}; name its source"
            )
        return wanted

    def needs_packing(self, wanted: str) -> bool:
        """Return whether the files must be packed first to run in this dtype."""
        dtype = self.dtype(wanted)
        return dtype not in FLOAT_BYTES and dtype != self.own_dtype

    def load_packing(self, wanted: str) -> None:
        """Load what packs, before the process is measured, where that is needed: 2 MiB of code that
        would else come between a plan and the next one. Errors: as ``dtype``."""
        if self.needs_packing(wanted):
            import thinslice.pack.stored  # noqa: F401

    def packing_bytes(self, dtype: str) -> int | None:
        """What packing its files for a dtype takes beyond what plans begin above; None where they
        need not be packed for it."""
        if self.packing is None:
            is_to_be_packed = self.needs_packing(dtype)
        else:  # a copy that is only planned is of files that are not packed
            is_planned = self.source is not None and self.source.packing is None
            is_to_be_packed = is_planned and dtype == self.own_dtype
        if not is_to_be_packed:
            return None
        # Packing counts all that the process holds.
        return self._bytes_to_pack(PackedFormat(dtype)) + touched_library_bytes()

    def _bytes_to_pack(self, fmt: PackedFormat) -> int:
        if self.source is None:
            return _PACKING_BYTES
        from thinslice.pack.stored import bytes_to_pack

        try:
            return bytes_to_pack(self.source, fmt)
        except (CheckpointError, StoreError):
            return 0  # said where the model is packed, with its reason

    def layout(self, wanted: str) -> WeightLayout:
        """Return the layout of the matrices, packed if the model must be packed first.

        Errors: ConfigError.
        """
        dtype = self.dtype(wanted)
        if self.needs_packing(wanted):
            return packed_layout(self.shape, dtype)
        return layout_of(self.shape, self.stored, dtype, self.packing)


def plan_model(
    model: Model,
    settings: EngineSettings,
    runtime_bytes: int | None = None,
    device: Device | None = None,
) -> MemoryPlan:
    """Plan for what this process holds now plus the model.

    Args:
        runtime_bytes: what the process holds, where that was measured before.
        device: that ``settings`` name, opened; None for the processor.

    Errors: ConfigError, BudgetError; nothing is allocated.
    """
    assert (device is None) == (settings.device == "cpu"), "a plan for another device"
    runtime_bytes = runtime_bytes or rss_to_plan_from()
    workload, layout = _workload(model, settings), model.layout(settings.dtype)
    platform = _platform(settings, device, runtime_bytes)
    # What a process holds shrinks where pages go back late, or another thread lets go of some.
    platform = platform.with_tokenizer(min(model.took.tokenizer_bytes, runtime_bytes))
    return plan(model.shape, layout, workload, platform)


def residency_of(model: Model, settings: EngineSettings, runtime_bytes: int) -> Residency:
    """What keeps a model's weights in the machine's memory; ``settings`` have been planned."""
    workload, layout = _workload(model, settings), model.layout(settings.dtype)
    processor = Processor.of(budget_bytes(settings), runtime_bytes)
    return residency(model.shape, layout, workload, processor)


def _workload(model: Model, settings: EngineSettings) -> Workload:
    bound = None if settings.device != "cpu" else known_bound()
    return Workload(
        context=settings.context,
        max_num_seqs=settings.max_num_seqs,
        dtype=model.dtype(settings.dtype),
        kv_dtype=None if settings.kv_dtype == "auto" else settings.kv_dtype,
        num_threads=native.num_threads() if native.is_available() else 1,
        can_change_dtype=model.packing is None,
        packing_bytes=cache(model.packing_bytes),
        most_memory=None if bound is None else bound[0],
        draft=settings.draft,
        draft_length=settings.draft_length,
        mtp_hidden=settings.mtp_hidden,
        reserve_bytes=settings.reserve_bytes,
        reserve_per_token=settings.reserve_per_token,
        forms=settings.forms,
    )


def _platform(settings: EngineSettings, device: Device | None, runtime_bytes: int) -> Platform:
    host_bytes = budget_bytes(settings)
    if device is None:
        return Processor.of(host_bytes, runtime_bytes)
    card_bytes = settings.memory_bytes
    if card_bytes is None:
        card_bytes = default_budget(device.free_bytes() + device.context_bytes)
    return Card.of(device.name, card_bytes, device.context_bytes, host_bytes, runtime_bytes)


def open_device(settings: EngineSettings) -> Device | None:
    """The device that settings name; None for the processor.

    Errors: ConfigError where it, or what is needed to use it, is not there.
    """
    if settings.device == "cpu":
        return None
    if (missing := missing_for_cuda()) is not None:
        raise ConfigError(f"--device cuda: {missing}")
    return import_module("thinslice.memory.cuda_device").CudaDevice()  # type: ignore[no-any-return]


@dataclass(frozen=True)
class FittedModel:
    """A plan, and what it is of: the model, or the copy that it is packed into first.

    Attributes:
        is_to_be_packed: the files that are here do not run as they are.
    """

    model: Model
    plan: MemoryPlan
    is_to_be_packed: bool


def fit_model(
    model: Model,
    settings: EngineSettings,
    runtime_bytes: int | None = None,
    device: Device | None = None,
) -> FittedModel:
    """Plan a model; its packed copy where it has to be streamed and some of its blocks would be
    quantised anew at each use; for a device, which takes them in once, where nothing else fits.

    Errors: as ``plan_model``; BudgetError also where the budget is less than what the process held
    while it opened the files.
    """
    fitted = _fit(model, settings, runtime_bytes, device)
    budget, peak = budget_bytes(settings), model.took.peak_bytes
    if budget < peak:
        option = budget_option(settings)
        raise BudgetError(
            f"opening the model's tokenizer took {format_bytes(peak)}, which does not fit "
            f"{option} {size_option(budget)}\n  this fits: {option} {suggested_size(peak)}"
        )
    return fitted


def _fit(
    model: Model, settings: EngineSettings, runtime_bytes: int | None, device: Device | None
) -> FittedModel:
    copy = model.packed_copy if model.dtype(settings.dtype) == model.own_dtype else None
    try:
        chosen = plan_model(model, settings, runtime_bytes, device)
    except BudgetError:
        if copy is None:
            raise
    else:
        if copy is None or chosen.streaming is None or device is not None:
            return FittedModel(model, chosen, model.needs_packing(settings.dtype))
    return FittedModel(
        copy, plan_model(copy, settings, runtime_bytes, device), is_to_be_packed=True
    )


def budget_bytes(settings: EngineSettings) -> int:
    """The budget of the machine's own memory: the one that was named, whatever the machine has, or
    else the default.

    Errors: ConfigError where none was named and the system does not tell what is free.
    """
    named = named_budget(settings)
    return budget_for_process(None, budget_option(settings)).num_bytes if named is None else named


def named_budget(settings: EngineSettings) -> int | None:
    """The budget of the machine's own memory, where one was named."""
    return settings.memory_bytes if settings.device == "cpu" else settings.host_memory_bytes


def budget_option(settings: EngineSettings) -> str:
    """The option that names it."""
    return "--memory" if settings.device == "cpu" else "--host-memory"


def predict_speed(
    model: Model,
    chosen: MemoryPlan,
    hardware: HardwareProfile,
    device: DeviceProfile | None = None,
) -> Prediction:
    """How fast a plan of this model will run, on the device of a plan for one."""
    layout = model.layout(chosen.dtype)
    if device is not None:
        disk = hardware.disk_read_bytes_per_s
        return predict_on_device(chosen, model.shape, layout, device, disk)
    return predict(chosen, model.shape, layout, hardware)


def checkpoint_dtype(checkpoint: Checkpoint) -> str:
    """Return the weight type a checkpoint runs in unconverted: int4 or int8 if most of its layers
    are of that size, otherwise bfloat16."""
    if checkpoint.packing is not None:
        return str(checkpoint.packing.weights)
    most = most_common_format(
        checkpoint.tensors[tensor.name].dtype
        for tensor in tensors_of(checkpoint.shape)
        if tensor.is_matrix and tensor.room is Room.LAYERS
    )
    if most is None:
        return "bfloat16"
    return "int8" if most is PackedFormat.INT8 else "int4"
