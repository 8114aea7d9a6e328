"""A hardware profile goes to JSON and back, and nothing else passes for one."""

import json
import math

import pytest

from thinslice.errors import ConfigError
from thinslice.plan.hardware import HardwareProfile

PROFILE = HardwareProfile(
    machine="a processor, 2 cores",
    measured_at="2026-01-31T12:00:00+00:00",
    num_threads=2,
    memory_read_bytes_per_s=29e9,
    disk_read_bytes_per_s=1.9e9,
    is_disk_direct=True,
    bfloat16_flops_per_s=8e11,
    float32_flops_per_s=1.2e11,
    packed_flops_per_s=5e11,
    slice_overhead_s=1e-4,
    cpu_share=0.99,
)


def test_a_profile_survives_json() -> None:
    assert HardwareProfile.from_dict(json.loads(json.dumps(PROFILE.to_dict()))) == PROFILE


def test_rates_by_dtype() -> None:
    assert PROFILE.product_rate("bfloat16") == 8e11
    assert PROFILE.product_rate("float32") == 1.2e11
    assert PROFILE.product_rate("int4") == 5e11


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("disk_read_bytes_per_s", 0),
        ("disk_read_bytes_per_s", -1.0),
        ("memory_read_bytes_per_s", math.nan),
        ("memory_read_bytes_per_s", math.inf),
        ("bfloat16_flops_per_s", "fast"),
        ("float32_flops_per_s", True),
        ("slice_overhead_s", None),
        ("num_threads", 2.0),
        ("num_threads", 0),
        ("is_disk_direct", 1),
        ("machine", 7),
        ("measured_at", None),
    ],
)
def test_values_that_make_no_sense_are_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=name):
        HardwareProfile.from_dict({**PROFILE.to_dict(), name: value})


def test_missing_and_unknown_keys_are_refused() -> None:
    values = PROFILE.to_dict()
    with pytest.raises(ConfigError, match="'colour' is missing or unknown"):
        HardwareProfile.from_dict({**values, "colour": 1})
    del values["machine"]
    with pytest.raises(ConfigError, match="'machine' is missing or unknown"):
        HardwareProfile.from_dict(values)
