"""Predictions: arithmetic that can be done by hand on a machine with round figures. A profile goes
to JSON and back, and nothing else passes for one."""

import json
import math
from dataclasses import replace

import pytest

from tests.unit.plan.test_planner import LARGE, LARGE_BF16, RUNTIME, SMOL
from thinslice.errors import ConfigError
from thinslice.plan.case import Workload
from thinslice.plan.memory_plan import MemoryPlan
from thinslice.plan.planner import plan
from thinslice.plan.predict import HardwareProfile, predict
from thinslice.plan.processor import Processor
from thinslice.plan.weight_layout import packed_layout
from thinslice.units import GIB

MACHINE = HardwareProfile(
    machine="round",
    measured_at="2026-01-01T00:00:00+00:00",
    num_threads=2,
    memory_read_bytes_per_s=20e9,
    disk_read_bytes_per_s=2e9,
    is_disk_direct=True,
    bfloat16_flops_per_s=1e12,
    float32_flops_per_s=2e11,
    packed_flops_per_s=1e12,
    slice_overhead_s=1e-6,
    cpu_share=1.0,
)
SMOL_INT4 = packed_layout(SMOL, "int4")


def large_plan(context: int) -> MemoryPlan:
    return plan(LARGE, LARGE_BF16, Workload(context), Processor.of(8 * GIB, RUNTIME))


def streamed_bytes(chosen: MemoryPlan) -> int:
    pinned = set(chosen.streaming.pinned())
    slices = LARGE_BF16.slices(chosen.streaming.slice_bytes)
    return sum(one.stored_bytes for index, one in enumerate(slices) if index not in pinned)


def test_a_streamed_token_takes_as_long_as_its_bytes() -> None:
    chosen = large_plan(4096)
    prediction = predict(chosen, LARGE, LARGE_BF16, MACHINE)
    assert prediction.streamed_bytes == streamed_bytes(chosen)
    assert prediction.bound == "disk"
    expected = prediction.streamed_bytes / 2e9
    assert 1 / prediction.decode_tokens_per_s == pytest.approx(expected, rel=0.01)
    faster = replace(MACHINE, disk_read_bytes_per_s=1e12)
    assert predict(chosen, LARGE, LARGE_BF16, faster).bound == "memory"


def test_a_resident_token_takes_as_long_as_the_memory_is_read() -> None:
    chosen = plan(SMOL, SMOL_INT4, Workload(16, dtype="int4"), Processor.of(GIB, RUNTIME))
    kept = sum(matrix.kept_bytes(matrix.rows) for matrix in SMOL_INT4.sweep)
    fixed_s = 30 * 30e-6 + 700e-6
    prediction = predict(chosen, SMOL, SMOL_INT4, MACHINE)
    expected_s = kept / (0.9 * 20e9) + fixed_s
    assert 1 / prediction.decode_tokens_per_s == pytest.approx(expected_s, rel=0.01)
    assert (prediction.streamed_bytes, prediction.bound) == (0, "memory")


def test_a_token_takes_longer_the_more_positions_it_sees() -> None:
    chosen = plan(SMOL, SMOL_INT4, Workload(4096, dtype="int4"), Processor.of(GIB, RUNTIME))
    prediction = predict(chosen, SMOL, SMOL_INT4, MACHINE)
    # Scores and sums of values: a multiplication and an addition each, for every query feature.
    # Three KV heads on two threads: one thread is idle for a quarter of the two rounds' time.
    position_s = 4 * 576 * 30 / (0.32 * 0.75 * 2e11)
    seen = prediction.token.seconds(3000) - prediction.token.seconds(1000)
    assert seen == pytest.approx(2000 * position_s)
    assert prediction.decode_tokens_per_s == 1 / prediction.token.seconds(2048)
    one_by_one = sum(prediction.token.seconds(512 + place + 0.5) for place in range(200))
    assert prediction.token.run_seconds(512, 200) == pytest.approx(one_by_one)
    assert prediction.bound == "memory"


def test_a_prompt_through_a_held_layer_reads_each_weight_once() -> None:
    """Reading hides behind the computing of a layer's first rows and fills the ring behind that of
    the others; what is left adds to it."""
    chosen = large_plan(16384)
    assert chosen.streaming.layer_rows == 512
    numel = sum(m.rows * m.columns for layer in LARGE_BF16.layers for m in layer)
    # Products, and attention, in which a row sees half the others.
    computing_s = 2 * numel * 16384 / (0.85 * 1e12)
    computing_s += 4 * 5120 * 64 * 16384 * 8192 / (0.85 * 2e11)
    fast = predict(chosen, LARGE, LARGE_BF16, MACHINE)
    assert 16384 / fast.prefill_tokens_per_s == pytest.approx(computing_s, rel=0.01)
    slow = predict(chosen, LARGE, LARGE_BF16, replace(MACHINE, disk_read_bytes_per_s=1e8))
    ring = 64 * chosen.streaming.num_buffers * chosen.streaming.buffer_bytes
    expected_s = computing_s * 31 / 32 + (streamed_bytes(chosen) - ring) / 1e8
    assert 16384 / slow.prefill_tokens_per_s == pytest.approx(expected_s, rel=0.01)


@pytest.mark.parametrize(("stored", "per_weight_s"), [("Q4_1", 1 / 1.7e8), ("F16", 2 / 1e9)])
def test_a_streamed_matrix_that_is_converted_takes_that_time(
    stored: str, per_weight_s: float
) -> None:
    row_bytes = {"Q4_1": 5120 // 32 * 20, "F16": 2 * 5120}[stored]
    layers = tuple(
        tuple(
            replace(m, stored=stored, stored_row_bytes=m.columns * row_bytes // 5120) for m in one
        )
        for one in LARGE_BF16.layers
    )
    layout = replace(LARGE_BF16, layers=layers)
    chosen = plan(LARGE, layout, Workload(4096), Processor.of(8 * GIB, RUNTIME))
    plain = predict(chosen, LARGE, LARGE_BF16, MACHINE).token
    assert chosen.streaming is not None
    pinned = set(chosen.streaming.pinned())
    weights = sum(
        (one.stop - one.start) * one.matrix.columns
        for index, one in enumerate(layout.slices(chosen.streaming.slice_bytes))
        if index not in pinned and one.matrix.stored == stored
    )
    converting_s = predict(chosen, LARGE, layout, MACHINE).token.read_s - plain.read_s
    assert converting_s == pytest.approx(weights * per_weight_s)


# Rates that are told apart.
DISTINCT = replace(
    MACHINE, bfloat16_flops_per_s=8e11, float32_flops_per_s=1.2e11, packed_flops_per_s=5e11
)


def test_a_profile_survives_json() -> None:
    assert HardwareProfile.from_dict(json.loads(json.dumps(DISTINCT.to_dict()))) == DISTINCT


def test_rates_by_dtype() -> None:
    assert DISTINCT.product_rate("bfloat16") == 8e11
    assert DISTINCT.product_rate("float32") == 1.2e11
    assert DISTINCT.product_rate("int4") == 5e11


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
        HardwareProfile.from_dict({**DISTINCT.to_dict(), name: value})


def test_missing_and_unknown_keys_are_refused() -> None:
    values = DISTINCT.to_dict()
    with pytest.raises(ConfigError, match="'colour' is missing or unknown"):
        HardwareProfile.from_dict({**values, "colour": 1})
    del values["machine"]
    with pytest.raises(ConfigError, match="'machine' is missing or unknown"):
        HardwareProfile.from_dict(values)
