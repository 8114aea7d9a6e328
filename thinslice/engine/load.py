"""From an opened checkpoint to an engine that fits the budget."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from importlib import import_module

import numpy as np

from thinslice.checkpoint.index import Checkpoint
from thinslice.checkpoint.reader import CheckpointReader
from thinslice.engine.drafting import Drafting
from thinslice.engine.engine import Engine
from thinslice.engine.mtp_drafter import MTPDrafter
from thinslice.engine.planning import Model
from thinslice.engine.prepare import Prepared
from thinslice.engine.runner import Runner
from thinslice.kernels import arrays
from thinslice.kernels.arrays import FLOAT_DTYPES, Array
from thinslice.kernels.native_ops import NATIVE
from thinslice.kernels.ops import Ops
from thinslice.kernels.paged_kv import PagedKv
from thinslice.memory.device import Device
from thinslice.memory.host_slices import HostSlices
from thinslice.memory.resident import LoadedDtypes, load_resident
from thinslice.memory.weight_store import WeightStore
from thinslice.model.decoder import Decoder
from thinslice.model.weights import Weights, WeightSource
from thinslice.plan.memory_plan import MemoryPlan
from thinslice.plan.model_shape import ModelShape
from thinslice.store.progress import Progress

_CACHE_DTYPES = {**FLOAT_DTYPES, "int8": np.dtype(np.int8), "float16": np.dtype(np.float16)}


def load_prepared(prepared: Prepared, progress: Progress | None) -> Engine:
    """The engine of a prepared model, which holds its reservation from then on.

    Errors: CheckpointError from reading the weights.
    """
    plan, reservation = prepared.plan, prepared.reservation
    end_ids = prepared.tokenizer.special.eos_token_ids
    try:
        engine = load_engine(prepared.checkpoint, plan, end_ids, progress, prepared.device)
    except BaseException:
        reservation.release()
        raise
    on_host = [] if prepared.device is not None else engine.runner.kv_caches
    reservation.taken([rows for cache in on_host for rows in (cache.k, cache.v)])
    engine.reservation = reservation
    return engine


def load_engine(
    checkpoint: Checkpoint,
    chosen: MemoryPlan,
    eos_token_ids: frozenset[int],
    progress: Progress | None = None,
    device: Device | None = None,
) -> Engine:
    """Place weights and KV cache as planned, on the device that the plan is for.

    Errors: CheckpointError from reading the weights.
    """
    if device is not None:
        return _load_on_device(checkpoint, chosen, eos_token_ids, progress, device)
    shape, has_predictions = checkpoint.shape, chosen.num_mtp_layers > 0
    source = _source(checkpoint, chosen, progress and partial(progress, "loading weights"))
    try:
        weights = Weights(shape, source, NATIVE, checkpoint.packing, has_predictions)
        every_cache = allocate_kv_caches(shape, chosen)
        kv_caches = every_cache[: shape.num_hidden_layers]
        mtp_caches = every_cache[shape.num_hidden_layers :]
        weights.fuse(kv_caches, mtp_caches)
        decoder = Decoder(shape)
        drafting = None
        if chosen.draft is not None:
            mtp = None
            if has_predictions:
                is_normed = chosen.draft.mtp_hidden == "post-norm"
                mtp = MTPDrafter(decoder, weights, mtp_caches, takes_normed_hidden=is_normed)
            drafting = Drafting(chosen.draft, mtp)
    except BaseException:
        source.close()
        raise
    runner = Runner(decoder, weights, kv_caches, chosen.block_size)
    return Engine(runner, chosen, eos_token_ids, drafting)


def _source(
    checkpoint: Checkpoint,
    chosen: MemoryPlan,
    progress: Callable[[int, int], None] | None,
) -> WeightSource:
    """The weights in memory, or those pinned there and a reader for the others."""
    float32 = np.dtype(np.float32)
    dtypes = LoadedDtypes(FLOAT_DTYPES.get(chosen.dtype, float32), float32)
    has_predictions = chosen.num_mtp_layers > 0
    with CheckpointReader(checkpoint) as reader:
        if chosen.streaming is None and chosen.dtype in FLOAT_DTYPES:
            return load_resident(reader, dtypes, has_predictions, progress)
    layout = Model.of(checkpoint).layout(chosen.dtype)
    layout = layout if has_predictions else layout.without_prediction()
    place = HostSlices(checkpoint, chosen.streaming)
    store = WeightStore(CheckpointReader(checkpoint), layout, chosen.streaming, dtypes, place)
    try:
        store.open(progress)
    except BaseException:
        store.close()
        raise
    return store


def _empty_on_host(shape: tuple[int, ...], dtype: str) -> Array:
    """Main memory for K or V, or for their scales; pages count only once they are written."""
    return arrays.empty_in_small_pages(shape, _CACHE_DTYPES[dtype])


def allocate_kv_caches(
    shape: ModelShape,
    plan: MemoryPlan,
    empty: Callable[[tuple[int, ...], str], Array] = _empty_on_host,
) -> list[PagedKv]:
    """One cache for each layer, its K and V [num_blocks, K, block_size, H] of the plan's type.

    The last ones are those of the prediction layers, where the plan drafts with them. Which
    sequence owns which block is the block manager's business.

    Args:
        empty: gives memory of a shape and a type.

    Memory: what ``plan`` calls ``kv cache``.
    """
    size = (plan.num_kv_blocks, shape.num_key_value_heads, plan.block_size, shape.head_dim)

    def scale() -> Array | None:
        return empty(size[:3], "float16") if plan.kv_dtype == "int8" else None

    def rows() -> Array:
        return empty(size, plan.kv_dtype)

    return [
        PagedKv(rows(), rows(), scale(), scale())
        for _ in range(shape.num_hidden_layers + plan.num_mtp_layers)
    ]


def cuda_ops() -> Ops:
    """The operators on a CUDA card. Torch and Triton are needed there alone; importing them takes
    seconds."""
    ops: Ops = import_module("thinslice.kernels.cuda_ops").CUDA
    return ops


def _load_on_device(
    checkpoint: Checkpoint,
    chosen: MemoryPlan,
    eos_token_ids: frozenset[int],
    progress: Progress | None,
    device: Device,
) -> Engine:
    from thinslice.memory.device_slices import DeviceSlices
    from thinslice.memory.spilled_kv import SpilledKv

    ops = replace(cuda_ops(), placed=device.moved)  # first: what it imports may be missing
    device.hold_to(chosen.budget_bytes)
    dtype = FLOAT_DTYPES.get(chosen.dtype, np.dtype(np.float32))
    layout = Model.of(checkpoint).layout(chosen.dtype).without_prediction()
    store = WeightStore(
        CheckpointReader(checkpoint),
        layout,
        chosen.streaming,
        LoadedDtypes(dtype, dtype),
        DeviceSlices(checkpoint, chosen, device),
    )
    with ExitStack() as stack:
        stack.callback(store.close)
        store.open(progress and partial(progress, "loading weights"))
        weights = Weights(checkpoint.shape, store, ops, checkpoint.packing)
        kv_caches = allocate_kv_caches(checkpoint.shape, chosen, device.empty)
        runner = Runner(Decoder(checkpoint.shape), weights, kv_caches, chosen.block_size)
        runner.device = device
        if chosen.device is not None and chosen.device.num_spilled_blocks:
            runner.spilled = SpilledKv(device, kv_caches, chosen.device.num_spilled_blocks)
            stack.callback(runner.spilled.close)
        drafting = None if chosen.draft is None else Drafting(chosen.draft, None)
        engine = Engine(runner, chosen, eos_token_ids, drafting)
        stack.pop_all()
        return engine
