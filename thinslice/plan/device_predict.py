"""How fast a plan will run on a measured device: arithmetic over the plan's own sizes.

Disk, link and computing go on side by side, so of their times the longest counts; launching comes
on top. The shares are estimates, for no run on a card has fitted them yet.
"""

from dataclasses import dataclass

from thinslice.plan.cost import kv_bytes_per_token
from thinslice.plan.memory_plan import MemoryPlan
from thinslice.plan.model_shape import ModelShape
from thinslice.plan.predict import Prediction, TokenTime
from thinslice.plan.weight_layout import WeightLayout

# Of the measured rates, what products with one row, and of whole prompts, are taken to reach.
_READ_SHARE = 0.8
_PRODUCT_SHARE = 0.5
# Launching one layer's operators from Python, and a step's sampling, scheduling and text.
_LAYER_S = 300e-6
_STEP_S = 700e-6


@dataclass(frozen=True)
class DeviceProfile:
    """How fast one device copies, reads and multiplies; as measured.

    Attributes:
        host_to_device_bytes_per_s: large copies from page-locked host memory.
        memory_read_bytes_per_s: a sum over its own memory.
        flops_per_s: bfloat16 products of many rows, two operations for each multiply-add.
    """

    host_to_device_bytes_per_s: float
    memory_read_bytes_per_s: float
    flops_per_s: float


def predict_on_device(
    plan: MemoryPlan,
    shape: ModelShape,
    layout: WeightLayout,
    device: DeviceProfile,
    disk_bytes_per_s: float,
) -> Prediction:
    """Predict the speed of a plan for a device."""
    from_host, from_disk = _copied(plan, layout)
    disk_s = from_disk / disk_bytes_per_s
    link_s = (from_host + from_disk) / device.host_to_device_bytes_per_s
    kept = sum(matrix.kept_bytes(matrix.rows) for matrix in layout.sweep)
    bandwidth = device.memory_read_bytes_per_s * _READ_SHARE
    read_s = kept / bandwidth
    position_s = kv_bytes_per_token(shape, plan.kv_dtype) / bandwidth
    fixed_s = _STEP_S + shape.num_hidden_layers * _LAYER_S
    numel = sum(m.rows * m.columns for layer in layout.layers for m in layer)
    products_s = 2 * numel * plan.chunk / (device.flops_per_s * _PRODUCT_SHARE)
    token = TokenTime(max(disk_s, link_s), read_s, position_s, fixed_s)
    parts = {"disk": disk_s, "link": link_s, "memory": read_s, "overhead": fixed_s}
    return Prediction(
        token=token,
        decode_position=plan.context // 2,
        decode_tokens_per_s=1 / token.seconds(plan.context // 2),
        prefill_tokens_per_s=plan.chunk / (max(disk_s, link_s, products_s) + fixed_s),
        streamed_bytes=from_host + from_disk,
        bound=max(parts, key=lambda name: parts[name]),
    )


def _copied(plan: MemoryPlan, layout: WeightLayout) -> tuple[int, int]:
    """Bytes copied for each sweep from host memory, and from disk."""
    if plan.streaming is None:
        return 0, 0
    assert plan.device is not None, "a plan for no device"
    pinned = frozenset(plan.streaming.pinned())
    slices = layout.slices(plan.streaming.slice_bytes)
    streamed = [index for index in range(len(slices)) if index not in pinned]
    locked = frozenset(plan.device.locked(streamed))
    sizes = [(index in locked, slices[index].kept_bytes) for index in streamed]
    from_host = sum(size for is_locked, size in sizes if is_locked)
    return from_host, sum(size for _, size in sizes) - from_host
