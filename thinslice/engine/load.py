"""From an opened checkpoint to an engine that fits the budget."""

from collections.abc import Callable

import torch

from thinslice.checkpoint.index import Checkpoint
from thinslice.checkpoint.reader import CheckpointReader
from thinslice.config import EngineSettings
from thinslice.engine.engine import Engine
from thinslice.engine.runner import Runner
from thinslice.errors import ConfigError
from thinslice.memory.kv_cache import allocate_kv_caches
from thinslice.memory.load import load_resident
from thinslice.memory.meter import current_rss_bytes
from thinslice.model.decoder import Decoder
from thinslice.plan.available import default_budget, free_memory
from thinslice.plan.memory_plan import MemoryPlan
from thinslice.plan.planner import Workload, plan

Progress = Callable[[str, int, int], None]


def plan_checkpoint(checkpoint: Checkpoint, settings: EngineSettings) -> MemoryPlan:
    """Plan for what this process holds now plus the model.

    Errors: ConfigError, BudgetError; nothing is allocated.
    """
    dtype = native_dtype() if settings.dtype == "auto" else settings.dtype
    workload = Workload(settings.context, settings.max_num_seqs, dtype)
    budget_bytes = settings.memory_bytes
    if budget_bytes is None:
        free_bytes = free_memory()
        if free_bytes is None:
            raise ConfigError("this system does not tell its free memory; name --memory")
        budget_bytes = default_budget(free_bytes)
    return plan(checkpoint.shape, budget_bytes, workload, current_rss_bytes())


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

    def report(done: int, total: int) -> None:
        if progress is not None:
            progress("loading weights", done, total)

    with CheckpointReader(checkpoint) as reader:
        load_resident(decoder, reader, dtype, report)
    kv_caches = allocate_kv_caches(checkpoint.shape, chosen, dtype)
    runner = Runner(decoder, kv_caches, chosen.block_size)
    return Engine(runner, chosen, eos_token_ids)


def native_dtype() -> str:
    """bfloat16 where the processor multiplies it natively, else float32.

    Without native support torch emulates bfloat16 many times slower than it runs float32.
    """
    return "bfloat16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "float32"
