"""From an opened checkpoint to an engine that fits the budget."""

from collections.abc import Callable
from functools import partial

import torch

from thinslice.checkpoint.index import Checkpoint
from thinslice.checkpoint.reader import CheckpointReader
from thinslice.engine.drafting import Drafting
from thinslice.engine.engine import Engine
from thinslice.engine.mtp_drafter import MTPDrafter
from thinslice.engine.planning import Model
from thinslice.engine.runner import Runner
from thinslice.kernels.dispatch import NATIVE, cuda_ops, ops_for
from thinslice.kernels.dtypes import FLOAT_DTYPES
from thinslice.memory.device import Device
from thinslice.memory.device_store import DeviceStore
from thinslice.memory.forks import prepare_for_forks
from thinslice.memory.fuse import fuse, fuse_prediction
from thinslice.memory.kv_cache import allocate_kv_caches
from thinslice.memory.load import LoadedDtypes, load_resident, load_vectors
from thinslice.memory.spilled_kv import SpilledKv
from thinslice.memory.weight_store import WeightStore
from thinslice.model.decoder import Decoder
from thinslice.model.mtp import MTPDecoder
from thinslice.plan.memory_plan import MemoryPlan

Progress = Callable[[str, int, int], None]


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
    prepare_for_forks()
    if device is not None:
        return _load_on_device(checkpoint, chosen, eos_token_ids, progress, device)
    shape = checkpoint.shape
    ops = ops_for(chosen.dtype, shape.head_dim)
    weights_dtype = FLOAT_DTYPES.get(chosen.dtype, torch.float32)
    dtypes = LoadedDtypes(weights_dtype, torch.float32 if ops is NATIVE else weights_dtype)
    decoder = _decoder(checkpoint, chosen)
    decoder.use(ops)
    weights = None
    loading = progress and partial(progress, "loading weights")
    with CheckpointReader(checkpoint) as reader:
        if chosen.streaming is None and chosen.dtype in FLOAT_DTYPES:
            load_resident(decoder, reader, dtypes, loading)
        else:
            load_vectors(decoder, reader, dtypes)
            layout = Model.of(checkpoint).layout(chosen.dtype)
            layout = layout if chosen.num_mtp_layers else layout.without_prediction()
            weights = WeightStore(checkpoint, layout, chosen.streaming, weights_dtype)
    try:
        if weights is not None:
            weights.open(loading)
            weights.attach(decoder)
        every_cache = allocate_kv_caches(shape, chosen)
        kv_caches = every_cache[: shape.num_hidden_layers]
        mtp_caches = every_cache[shape.num_hidden_layers :]
        drafting = None
        if chosen.draft is not None:
            mtp = None
            if isinstance(decoder, MTPDecoder):
                is_normed = chosen.draft.mtp_hidden == "post-norm"
                mtp = MTPDrafter(decoder, mtp_caches, takes_normed_hidden=is_normed)
            drafting = Drafting(chosen.draft, mtp)
        if weights is not None and ops is NATIVE:
            decoder.stack = fuse(decoder, weights, kv_caches)
            if drafting is not None and drafting.mtp is not None:
                for layer, cache in zip(drafting.mtp.layers, mtp_caches, strict=True):
                    layer.stack = fuse_prediction(drafting.mtp.decoder, layer, weights, cache)
    except BaseException:
        if weights is not None:
            weights.close()
        raise
    is_packed = ops is NATIVE and chosen.dtype not in FLOAT_DTYPES
    runner = Runner(decoder, kv_caches, chosen.block_size, weights, is_packed)
    return Engine(runner, chosen, eos_token_ids, drafting)


def _load_on_device(
    checkpoint: Checkpoint,
    chosen: MemoryPlan,
    eos_token_ids: frozenset[int],
    progress: Progress | None,
    device: Device,
) -> Engine:
    device.hold_to(chosen.budget_bytes)
    dtype = FLOAT_DTYPES.get(chosen.dtype, torch.float32)
    decoder = _decoder(checkpoint, chosen)
    decoder.use(cuda_ops())
    with CheckpointReader(checkpoint) as reader:
        load_vectors(decoder, reader, LoadedDtypes(dtype, dtype))
    layout = Model.of(checkpoint).layout(chosen.dtype).without_prediction()
    weights = DeviceStore(checkpoint, layout, chosen, device, dtype)
    spilled = None
    try:
        weights.open(progress and partial(progress, "loading weights"))
        weights.attach(decoder)
        kv_caches = allocate_kv_caches(checkpoint.shape, chosen, device.place)
        if chosen.device is not None and chosen.device.num_spilled_blocks:
            spilled = SpilledKv(device, kv_caches, chosen.device.num_spilled_blocks)
    except BaseException:
        weights.close()
        raise
    runner = Runner(decoder, kv_caches, chosen.block_size, weights)
    runner.device = device
    runner.spilled = spilled
    drafting = None if chosen.draft is None else Drafting(chosen.draft, None)
    return Engine(runner, chosen, eos_token_ids, drafting)


def _decoder(checkpoint: Checkpoint, chosen: MemoryPlan) -> Decoder:
    """The model without weights; its prediction layers where they draft."""
    kind = MTPDecoder if chosen.num_mtp_layers else Decoder
    return kind(checkpoint.shape, checkpoint.packing)
