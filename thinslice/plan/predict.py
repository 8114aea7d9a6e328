"""How fast a plan will run on a machine, whose speeds were measured once: arithmetic over the
plan's own sizes.

A sweep reads the streamed slices from disk while it computes with those that have come, so of the
two times the longer counts; what is fixed for each slice and layer comes on top.
Source of the model: FlexGen (arXiv 2303.06865), section 4.3, for one kind of sequence and one slow
tier.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields

from thinslice.errors import ConfigError
from thinslice.plan.memory_plan import MemoryPlan
from thinslice.plan.model_shape import ModelShape
from thinslice.plan.weight_layout import STORED_FLOAT_BYTES, WeightLayout, WeightSlice

# Fitted on runs of SmolLM2-135M and of MiMo-7B's shape on two cores. The share of the memory's
# read bandwidth that a product with one row reaches, and of the rate of large products that whole
# prompts reach.
_READ_SHARE = 0.9
_PRODUCT_SHARE = 0.85
# Of the rate of large float32 products, what the kernels' attention of one row reaches with all
# threads at work: 60 to 77 of 197 GFLOP/s over 500 to 4,000 positions, bfloat16 or int8.
_ATTENTION_SHARE = 0.32
# Seconds between two layers in one call into the kernels, and from one operator to the next.
_FUSED_LAYER_S = 30e-6
_LAYER_S = 300e-6
# Sampling, scheduling and text, for each step.
_STEP_S = 700e-6
# Stored bytes a second put into packed order, or from one kind of float into another.
_CONVERTED_BYTES_PER_S = 1e9
# Weights a second that the gguf package makes floats from blocks of.
_DEQUANTIZED_PER_S = 1.7e8
# Rows of the products that are timed: a prompt's chunk, so that arithmetic is the bound.
MEASURED_ROWS = 512
# Below this share of the cores the figures are those of a machine that others were using.
_BUSY_SHARE = 0.75


@dataclass(frozen=True)
class HardwareProfile:
    """How fast one machine reads and multiplies, as memory/measure.py measures it.

    Attributes:
        machine: what the figures hold for; others must be measured anew.
        measured_at: date and time, ISO 8601, UTC.
        num_threads: threads that computed.
        memory_read_bytes_per_s: a walk over more than the caches hold, all threads together.
        disk_read_bytes_per_s: large reads past the page cache, several in flight.
        is_disk_direct: whether they got past it; where not, the figure may be that of memory.
        bfloat16_flops_per_s: matrix products of many rows, two operations for each multiply-add.
        float32_flops_per_s: the same in float32.
        packed_flops_per_s: the same with int4 weights.
        slice_overhead_s: what one more slice costs a sweep, whatever its size.
        cpu_share: of the time its threads computed, the part they had a core for. Well below 1,
            other programs were computing too, and the figures are lower than the machine's.
    """

    machine: str
    measured_at: str
    num_threads: int
    memory_read_bytes_per_s: float
    disk_read_bytes_per_s: float
    is_disk_direct: bool
    bfloat16_flops_per_s: float
    float32_flops_per_s: float
    packed_flops_per_s: float
    slice_overhead_s: float
    cpu_share: float

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not _is_valid(field.type, value):
                raise ConfigError(f"hardware profile: {field.name} is {value!r:.80}")

    @property
    def is_busy(self) -> bool:
        """Whether other programs computed while this was measured: to be measured again."""
        return self.cpu_share < _BUSY_SHARE

    def product_rate(self, dtype: str) -> float:
        """Operations per second of matrix products of many rows with weights of this dtype."""
        rates = {"bfloat16": self.bfloat16_flops_per_s, "float32": self.float32_flops_per_s}
        return rates.get(dtype, self.packed_flops_per_s)

    def to_dict(self) -> dict[str, str | int | float | bool]:
        """The profile as JSON keeps it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> "HardwareProfile":
        """Read what ``to_dict`` wrote.

        Errors: ConfigError for a missing or unknown key, another type, or a number that is not
        finite and above 0.
        """
        names = {field.name for field in fields(cls)}
        if odd := sorted(names ^ set(values)):
            raise ConfigError(f"hardware profile: {odd[0]!r:.80} is missing or unknown")
        known: dict[str, object] = dict(values)
        return cls(**known)  # type: ignore[arg-type]  # __post_init__ checks each one


@dataclass(frozen=True)
class TokenTime:
    """Where the time of a generated token goes. Slices are read while others are multiplied.

    Attributes:
        io_s: reading what is streamed.
        read_s: reading the weights from memory, and what converting them takes.
        position_s: of attention, for each position that is seen.
        fixed_s: what comes on top.
    """

    io_s: float
    read_s: float
    position_s: float
    fixed_s: float

    def seconds(self, num_positions: float) -> float:
        """Seconds of a token that sees this many positions."""
        return max(self.io_s, self.read_s + self.position_s * num_positions) + self.fixed_s

    def run_seconds(self, start: int, count: int) -> float:
        """Seconds of so many tokens one after the other, the first behind ``start`` positions.

        Their mean is taken for each: exact but where reading hides a part of the attention.
        """
        return count * self.seconds(start + count / 2)


@dataclass(frozen=True)
class Prediction:
    """What a plan promises.

    Attributes:
        token: where the time of a generated token goes, one sequence alone.
        decode_position: tokens that the decode speed holds at: half of the context.
        decode_tokens_per_s: the speed of that, with ``decode_position`` tokens in the context.
        prefill_tokens_per_s: a prompt of a whole chunk, which takes one sweep.
        streamed_bytes: read from disk for each sweep.
        bound: what the time of a generated token goes to: ``disk``, ``memory``, ``attention`` or
            ``overhead``; on a device also ``link``.
    """

    token: TokenTime
    decode_position: int
    decode_tokens_per_s: float
    prefill_tokens_per_s: float
    streamed_bytes: int
    bound: str


def predict(
    plan: MemoryPlan,
    shape: ModelShape,
    layout: WeightLayout,
    hardware: HardwareProfile,
) -> Prediction:
    """Predict the speed of a plan."""
    streamed, num_streamed, converting_s = _streamed(plan, layout)
    io_s = streamed / hardware.disk_read_bytes_per_s
    kept = sum(matrix.kept_bytes(matrix.rows) for matrix in layout.sweep)
    bandwidth = hardware.memory_read_bytes_per_s * _READ_SHARE
    read_s = kept / bandwidth + converting_s
    position_s = _position_s(shape, hardware)
    layer_s = _FUSED_LAYER_S if plan.streaming is None else _LAYER_S
    fixed_s = _STEP_S + shape.num_hidden_layers * layer_s
    fixed_s += num_streamed * hardware.slice_overhead_s
    token = TokenTime(io_s, read_s, position_s, fixed_s)
    half = plan.context // 2
    numel = sum(m.rows * m.columns for layer in layout.layers for m in layer)
    rate = hardware.product_rate(plan.dtype)
    products_s = 2 * numel * plan.chunk / (rate * _PRODUCT_SHARE)
    layer_rows = (plan.streaming and plan.streaming.layer_rows) or plan.chunk
    num_runs = math.ceil(plan.chunk / layer_rows)
    # Each row sees half the chunk on average.
    flops = 2 * shape.q_size * shape.num_hidden_layers * plan.chunk**2
    attention_s = flops / (hardware.float32_flops_per_s * _PRODUCT_SHARE)
    computing_s = products_s + attention_s + converting_s
    computing_s += shape.num_hidden_layers * layer_s * (num_runs - 1)
    # A held layer's slices come while its first rows pass, and the ring fills during the others.
    reading_s = max(io_s - _ring_bytes_ahead(plan, shape) / hardware.disk_read_bytes_per_s, 0)
    first_s = computing_s * layer_rows / plan.chunk
    prefill_s = computing_s - first_s + max(reading_s, first_s) + fixed_s
    parts = {"disk": io_s, "memory": read_s, "attention": position_s * half, "overhead": fixed_s}
    return Prediction(
        token=token,
        decode_position=half,
        decode_tokens_per_s=1 / token.seconds(half),
        prefill_tokens_per_s=plan.chunk / prefill_s,
        streamed_bytes=streamed,
        bound=max(parts, key=lambda name: parts[name]),
    )


def _is_valid(kind: object, value: object) -> bool:
    if kind is float:
        return isinstance(value, int | float) and type(value) is not bool and 0 < value < math.inf
    if kind is int:
        return type(value) is int and value > 0
    return type(value) is kind


def _position_s(shape: ModelShape, hardware: HardwareProfile) -> float:
    """Seconds of attention for a position, all layers; a KV head is one thread's, others idle."""
    flops = 4 * shape.q_size * shape.num_hidden_layers
    rounds = -(-shape.num_key_value_heads // hardware.num_threads)
    busy = shape.num_key_value_heads / (rounds * hardware.num_threads)
    return flops / (hardware.float32_flops_per_s * _ATTENTION_SHARE * busy)


def _ring_bytes_ahead(plan: MemoryPlan, shape: ModelShape) -> int:
    """What the ring takes in of all layers while later rows pass through the layer before."""
    if plan.streaming is None or plan.streaming.layer_rows is None:
        return 0
    return plan.streaming.num_buffers * plan.streaming.buffer_bytes * shape.num_hidden_layers


def _streamed(plan: MemoryPlan, layout: WeightLayout) -> tuple[int, int, float]:
    """Bytes and number of the slices streamed, and the seconds their conversion takes."""
    if plan.streaming is None:
        return 0, 0, 0.0
    pinned = frozenset(plan.streaming.pinned())
    slices = layout.slices(plan.streaming.slice_bytes)
    streamed = [one for index, one in enumerate(slices) if index not in pinned]
    seconds = sum(_converting_s(one) for one in streamed if one.matrix.is_converted)
    return sum(one.stored_bytes for one in streamed), len(streamed), seconds


def _converting_s(one: WeightSlice) -> float:
    is_block = not one.matrix.is_packed and one.matrix.stored not in STORED_FLOAT_BYTES
    if is_block or one.matrix.is_requantized:
        return (one.stop - one.start) * one.matrix.columns / _DEQUANTIZED_PER_S
    return one.stored_bytes / _CONVERTED_BYTES_PER_S
