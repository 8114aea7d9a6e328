"""The paged K and V tensors of every layer.

Which sequence owns which block is the block manager's business.
"""

import torch

from thinslice.plan.memory_plan import MemoryPlan
from thinslice.plan.model_shape import ModelShape


def allocate_kv_caches(
    shape: ModelShape, plan: MemoryPlan, dtype: torch.dtype
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """One (K, V) pair for each layer, each [num_blocks, K, block_size, H], zeroed by first use.

    Memory: what ``plan`` calls ``kv cache``; pages count only once they are written.
    """
    size = (plan.num_kv_blocks, shape.num_key_value_heads, plan.block_size, shape.head_dim)
    return [
        (torch.empty(size, dtype=dtype), torch.empty(size, dtype=dtype))
        for _ in range(shape.num_hidden_layers)
    ]
