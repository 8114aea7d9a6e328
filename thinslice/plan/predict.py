"""How fast a plan will run on a measured machine: arithmetic over the plan's own sizes.

A sweep reads the streamed slices from disk while it computes with those that have come, so of the
two times the longer counts; what is fixed for each slice and layer comes on top.
Source of the model: FlexGen (arXiv 2303.06865), section 4.3, for one kind of sequence and one slow
tier.
"""

import math
from dataclasses import dataclass

from thinslice.plan.cost import kv_bytes_per_token
from thinslice.plan.hardware import HardwareProfile
from thinslice.plan.memory_plan import MemoryPlan
from thinslice.plan.model_shape import ModelShape
from thinslice.plan.weight_layout import FLOAT_BYTES, WeightLayout

# Fitted on runs of SmolLM2-135M and of MiMo-7B's shape on two cores. The share of the memory's
# read bandwidth that a product with one row reaches, and of the rate of large products that whole
# prompts reach.
_READ_SHARE = 0.9
_PRODUCT_SHARE = 0.85
# Seconds between two layers in one call into the kernels, and from one operator to the next.
_FUSED_LAYER_S = 30e-6
_LAYER_S = 300e-6
# Sampling, scheduling and text, for each step.
_STEP_S = 700e-6
# Bytes a second of blocks of a GGUF put into packed order.
_CONVERTED_BYTES_PER_S = 1e9


@dataclass(frozen=True)
class Prediction:
    """What a plan promises.

    Attributes:
        decode_tokens_per_s: one sequence, its context half full.
        prefill_tokens_per_s: a prompt of a whole chunk, which takes one sweep.
        streamed_bytes: read from disk for each sweep.
        bound: what the time of a generated token goes to: ``disk``, ``memory`` or ``overhead``.
    """

    decode_tokens_per_s: float
    prefill_tokens_per_s: float
    streamed_bytes: int
    bound: str


def predict(
    plan: MemoryPlan,
    shape: ModelShape,
    layout: WeightLayout,
    hardware: HardwareProfile,
    *,
    is_native: bool = True,
) -> Prediction:
    """Predict the speed of a plan; ``is_native``: the compiled kernels run its operators."""
    streamed, num_streamed, converted = _streamed(plan, layout)
    io_s = streamed / hardware.disk_read_bytes_per_s
    kept = sum(matrix.kept_bytes(matrix.rows) for matrix in layout.sweep)
    kv_bytes = plan.context // 2 * kv_bytes_per_token(shape, plan.kv_dtype)
    bandwidth = hardware.memory_read_bytes_per_s * _READ_SHARE
    converting_s = converted / _CONVERTED_BYTES_PER_S
    is_packed = plan.dtype not in FLOAT_BYTES
    # Without the kernels packed weights become numbers once for each run of rows.
    unpacking_s = 0.0 if is_native or not is_packed else hardware.unpacking_s
    unpacking_s *= sum(m.rows * m.columns for m in layout.sweep if m.is_packed)
    read_s = (kept + kv_bytes) / bandwidth + converting_s + unpacking_s
    is_fused = plan.streaming is None and is_packed and is_native
    layer_s = _FUSED_LAYER_S if is_fused else _LAYER_S
    fixed_s = _STEP_S + shape.num_hidden_layers * layer_s
    fixed_s += num_streamed * hardware.slice_overhead_s
    decode_s = max(io_s, read_s) + fixed_s
    numel = sum(m.rows * m.columns for layer in layout.layers for m in layer)
    rate = hardware.product_rate(plan.dtype if is_native or not is_packed else "float32")
    products_s = 2 * numel * plan.chunk / (rate * _PRODUCT_SHARE)
    layer_rows = (plan.streaming and plan.streaming.layer_rows) or plan.chunk
    computing_s = products_s + converting_s + unpacking_s * math.ceil(plan.chunk / layer_rows)
    # A held layer's slices come while its first rows pass, and the ring fills during the others.
    reading_s = max(io_s - _ring_bytes_ahead(plan, shape) / hardware.disk_read_bytes_per_s, 0)
    first_s = computing_s * layer_rows / plan.chunk
    prefill_s = computing_s - first_s + max(reading_s, first_s) + fixed_s
    parts = {"disk": io_s, "memory": read_s, "overhead": fixed_s}
    return Prediction(
        decode_tokens_per_s=1 / decode_s,
        prefill_tokens_per_s=plan.chunk / prefill_s,
        streamed_bytes=streamed,
        bound=max(parts, key=lambda name: parts[name]),
    )


def _ring_bytes_ahead(plan: MemoryPlan, shape: ModelShape) -> int:
    """What the ring takes in of all layers while later rows pass through the layer before."""
    if plan.streaming is None or plan.streaming.layer_rows is None:
        return 0
    return plan.streaming.num_buffers * plan.streaming.buffer_bytes * shape.num_hidden_layers


def _streamed(plan: MemoryPlan, layout: WeightLayout) -> tuple[int, int, int]:
    """Bytes and number of the slices streamed, and the bytes of those converted on the way."""
    if plan.streaming is None:
        return 0, 0, 0
    pinned = frozenset(plan.streaming.pinned())
    slices = layout.slices(plan.streaming.slice_bytes)
    streamed = [one for index, one in enumerate(slices) if index not in pinned]
    converted = [one.stored_bytes for one in streamed if one.matrix.is_converted]
    return sum(one.stored_bytes for one in streamed), len(streamed), sum(converted)
