"""The paged K and V of every layer.

Which sequence owns which block is the block manager's business.
"""

from collections.abc import Callable

import numpy as np

from thinslice.kernels import arrays
from thinslice.kernels.arrays import FLOAT_DTYPES, Array
from thinslice.kernels.paged_kv import PagedKv
from thinslice.plan.memory_plan import MemoryPlan
from thinslice.plan.model_shape import ModelShape

_DTYPES = {**FLOAT_DTYPES, "int8": np.dtype(np.int8), "float16": np.dtype(np.float16)}


def empty_on_host(shape: tuple[int, ...], dtype: str) -> Array:
    """Main memory for K or V, or for their scales; pages count only once they are written."""
    return arrays.empty(shape, _DTYPES[dtype])


def allocate_kv_caches(
    shape: ModelShape,
    plan: MemoryPlan,
    empty: Callable[[tuple[int, ...], str], Array] = empty_on_host,
) -> list[PagedKv]:
    """One cache for each layer, its K and V [num_blocks, K, block_size, H] of the plan's type.

    The last ones are those of the prediction layers, where the plan drafts with them.

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
