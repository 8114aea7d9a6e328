"""From an opened checkpoint to an engine that fits the budget."""

import math
from collections.abc import Callable
from functools import partial

import torch

from thinslice.checkpoint.index import Checkpoint
from thinslice.checkpoint.reader import CheckpointReader
from thinslice.config import EngineSettings
from thinslice.engine.engine import Engine
from thinslice.engine.runner import Runner
from thinslice.errors import ConfigError
from thinslice.memory.kv_cache import allocate_kv_caches
from thinslice.memory.load import load_resident, load_vectors
from thinslice.memory.meter import current_rss_bytes
from thinslice.memory.weight_store import WeightStore
from thinslice.model.decoder import Decoder
from thinslice.plan.available import default_budget, free_memory
from thinslice.plan.memory_plan import MemoryPlan
from thinslice.plan.planner import WeightSource, Workload, plan

Progress = Callable[[str, int, int], None]
# What a checkpoint calls the dtypes that are computed in.
_ON_DISK = {"bfloat16": "BF16", "float32": "F32"}


def plan_checkpoint(checkpoint: Checkpoint, settings: EngineSettings) -> MemoryPlan:
    """Plan for what this process holds now plus the model.

    Errors: ConfigError, BudgetError; nothing is allocated.
    """
    dtype = native_dtype() if settings.dtype == "auto" else settings.dtype
    workload = Workload(settings.context, settings.max_num_seqs, dtype)
    source = weight_source(checkpoint, dtype)
    return plan(checkpoint.shape, source, budget_bytes(settings), workload, current_rss_bytes())


def budget_bytes(settings: EngineSettings) -> int:
    """The budget that was named, or a share of what is free.

    Errors: ConfigError where none was named and the system does not tell what is free.
    """
    if settings.memory_bytes is not None:
        return settings.memory_bytes
    free_bytes = free_memory()
    if free_bytes is None:
        raise ConfigError("this system does not tell its free memory; name --memory")
    return default_budget(free_bytes)


def weight_source(checkpoint: Checkpoint, dtype: str) -> WeightSource:
    """How a checkpoint's matrices lie on disk, for a model that computes in ``dtype``."""
    matrices = [entry for entry in checkpoint.tensors.values() if len(entry.shape) > 1]
    return WeightSource(
        bytes_per_weight=max(entry.num_bytes / math.prod(entry.shape) for entry in matrices),
        is_converted=any(entry.dtype != _ON_DISK[dtype] for entry in matrices),
    )


def load_engine(
    checkpoint: Checkpoint,
    chosen: MemoryPlan,
    eos_token_ids: frozenset[int],
    progress: Progress | None = None,
) -> Engine:
    """Place weights and KV cache as planned.

    Errors: CheckpointError from reading the weights.
    """
    dtype = torch.bfloat16 if chosen.dtype == "bfloat16" else torch.float32
    decoder = Decoder(checkpoint.shape)
    weights = None
    if chosen.streaming is None:
        with CheckpointReader(checkpoint) as reader:
            load_resident(decoder, reader, dtype, progress and partial(progress, "loading weights"))
    else:
        weights = WeightStore(checkpoint, dtype, chosen.streaming)
        with CheckpointReader(checkpoint) as reader:
            load_vectors(decoder, reader, dtype)
        weights.open()
        weights.attach(decoder)
    kv_caches = allocate_kv_caches(checkpoint.shape, chosen, dtype)
    runner = Runner(decoder, kv_caches, chosen.block_size, weights)
    return Engine(runner, chosen, eos_token_ids)


def native_dtype() -> str:
    """bfloat16 where torch's products of it run compiled on this processor, else float32.

    Elsewhere torch emulates bfloat16 many times slower than it runs float32.
    """
    return "bfloat16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "float32"
