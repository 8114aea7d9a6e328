"""The paged K and V tensors of every layer.

Which sequence owns which block is the block manager's business.
"""

import torch

from thinslice.kernels.dtypes import FLOAT_DTYPES
from thinslice.kernels.paged_kv import PagedKv
from thinslice.plan.memory_plan import MemoryPlan
from thinslice.plan.model_shape import ModelShape

_DTYPES = {**FLOAT_DTYPES, "int8": torch.int8}


def allocate_kv_caches(
    shape: ModelShape, plan: MemoryPlan, place: torch.device | None = None
) -> list[PagedKv]:
    """One cache for each layer, its K and V [num_blocks, K, block_size, H] of the plan's type.

    The last ones are those of the prediction layers, where the plan drafts with them.

    Memory: what ``plan`` calls ``kv cache``; pages count only once they are written.
    """
    size = (plan.num_kv_blocks, shape.num_key_value_heads, plan.block_size, shape.head_dim)
    dtype = _DTYPES[plan.kv_dtype]

    def scale() -> torch.Tensor | None:
        if dtype != torch.int8:
            return None
        return torch.empty(size[:3], dtype=torch.float16, device=place)

    def rows() -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device=place)

    return [
        PagedKv(rows(), rows(), scale(), scale())
        for _ in range(shape.num_hidden_layers + plan.num_mtp_layers)
    ]
