"""HardwareProfile: what a machine can do, as measured once. Plain numbers for the planner.

Measuring is in memory/measure.py; nothing here looks at the machine.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields

from thinslice.errors import ConfigError

# Rows of the products that are timed: a prompt's chunk, so that arithmetic is the bound.
MEASURED_ROWS = 512
# Below this share of the cores the figures are those of a machine that others were using.
_BUSY_SHARE = 0.75


@dataclass(frozen=True)
class HardwareProfile:
    """How fast one machine reads and multiplies.

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


def _is_valid(kind: object, value: object) -> bool:
    if kind is float:
        return isinstance(value, int | float) and type(value) is not bool and 0 < value < math.inf
    if kind is int:
        return type(value) is int and value > 0
    return type(value) is kind
