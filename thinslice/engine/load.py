"""From an opened checkpoint to an engine that fits the budget."""

from collections import Counter
from collections.abc import Callable
from functools import partial

import torch

from thinslice.checkpoint.index import Checkpoint
from thinslice.checkpoint.reader import CheckpointReader
from thinslice.config import EngineSettings
from thinslice.engine.engine import Engine
from thinslice.engine.runner import Runner
from thinslice.errors import ConfigError
from thinslice.kernels.dispatch import NATIVE, is_native, ops_for
from thinslice.memory.fuse import fuse
from thinslice.memory.kv_cache import allocate_kv_caches
from thinslice.memory.load import LoadedDtypes, load_resident, load_vectors
from thinslice.memory.meter import current_rss_bytes
from thinslice.memory.weight_store import WeightStore
from thinslice.model.decoder import Decoder
from thinslice.plan.available import default_budget, free_memory
from thinslice.plan.memory_plan import MemoryPlan
from thinslice.plan.packed_format import PackedFormat, packed_format_of
from thinslice.plan.planner import Workload, plan
from thinslice.plan.weight_layout import WeightLayout, layout_of

Progress = Callable[[str, int, int], None]
_FLOATS = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def plan_checkpoint(checkpoint: Checkpoint, settings: EngineSettings) -> MemoryPlan:
    """Plan for what this process holds now plus the model.

    Errors: ConfigError, BudgetError; nothing is allocated.
    """
    dtype = computed_dtype(checkpoint, settings.dtype)
    shape = checkpoint.shape
    workload = Workload(
        context=settings.context,
        max_num_seqs=settings.max_num_seqs,
        dtype=dtype,
        kv_dtype=None if settings.kv_dtype == "auto" else settings.kv_dtype,
        is_native=is_native(dtype, shape.head_dim),
    )
    budget_bytes = settings.memory_bytes
    if budget_bytes is None:
        free_bytes = free_memory()
        if free_bytes is None:
            raise ConfigError("this system does not tell its free memory; name --memory")
        budget_bytes = default_budget(free_bytes)
    layout = weight_layout(checkpoint, dtype)
    return plan(shape, layout, budget_bytes, workload, current_rss_bytes())


def weight_layout(checkpoint: Checkpoint, dtype: str) -> WeightLayout:
    """The matrices of a checkpoint for a model computed with in ``dtype``."""
    return layout_of(checkpoint.shape, checkpoint.stored, dtype, checkpoint.packing)


def computed_dtype(checkpoint: Checkpoint, wanted: str) -> str:
    """What the weights are computed with.

    ``auto`` keeps what the file has: quantised matrices stay so, others are numbers.
    Errors: ConfigError where the file has not what is wanted.
    """
    own = checkpoint_dtype(checkpoint)
    if wanted == "auto":
        return own
    if wanted in _FLOATS and checkpoint.packing is None:
        return wanted
    if wanted != own:
        raise ConfigError(f"--dtype {wanted}: {checkpoint.path} is {own}; leave --dtype out")
    return own


def checkpoint_dtype(checkpoint: Checkpoint) -> str:
    """What a checkpoint is computed with as it stands: int4 or int8 where its layers are mostly
    of that size, else the float type this processor computes in."""
    if checkpoint.packing is not None:
        return str(checkpoint.packing.weights)
    formats = Counter(
        packed_format_of(entry.dtype)
        for name, entry in checkpoint.tensors.items()
        if len(entry.shape) == 2 and name.startswith("model.layers.")
    )
    most = formats.most_common(1)[0][0]
    if most is None:
        return native_dtype()
    return "int8" if most is PackedFormat.INT8 else "int4"


def load_engine(
    checkpoint: Checkpoint,
    chosen: MemoryPlan,
    eos_token_ids: frozenset[int],
    progress: Progress | None = None,
) -> Engine:
    """Place weights and KV cache as planned.

    Errors: CheckpointError from reading the weights.
    """
    shape = checkpoint.shape
    ops = ops_for(chosen.dtype, shape.head_dim)
    weights_dtype = _FLOATS.get(chosen.dtype, torch.float32)
    dtypes = LoadedDtypes(weights_dtype, torch.float32 if ops is NATIVE else weights_dtype)
    decoder = Decoder(shape, checkpoint.packing)
    decoder.use(ops)
    weights = None
    loading = progress and partial(progress, "loading weights")
    with CheckpointReader(checkpoint) as reader:
        if chosen.streaming is None and chosen.dtype in _FLOATS:
            load_resident(decoder, reader, dtypes, loading)
        else:
            load_vectors(decoder, reader, dtypes)
            layout = weight_layout(checkpoint, chosen.dtype)
            weights = WeightStore(checkpoint, layout, chosen.streaming, weights_dtype)
            weights.open(loading)
            weights.attach(decoder)
    if ops is NATIVE and chosen.dtype not in _FLOATS:
        # Two pools of threads that take turns wait for each other; see kernels/cpu/threads.cpp.
        torch.set_num_threads(1)
    kv_caches = allocate_kv_caches(shape, chosen)
    if weights is not None and ops is NATIVE:
        decoder.stack = fuse(decoder, weights, kv_caches)
    runner = Runner(decoder, kv_caches, chosen.block_size, weights)
    return Engine(runner, chosen, eos_token_ids)


def native_dtype() -> str:
    """bfloat16 where torch's products of it run compiled on this processor, else float32.

    Elsewhere torch emulates bfloat16 many times slower than it runs float32.
    """
    return "bfloat16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "float32"
