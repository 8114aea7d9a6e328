"""Measuring: plausible figures, nothing left behind, and when a kept profile is good enough."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from thinslice.errors import StoreError
from thinslice.memory import measure
from thinslice.memory.measure import (
    SMALLEST_MAX_BYTES,
    load_or_measure,
    machine_key,
    measure_hardware,
)
from thinslice.plan.predict import HardwareProfile
from thinslice.units import GIB, MIB


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few passes in place of a second's worth, over a small file."""
    for name in ("_PHASE_S", "_OVERHEAD_S"):
        monkeypatch.setattr(measure, name, 0.01)
    monkeypatch.setattr(measure, "_SAMPLE_BYTES", 32 * MIB)


@pytest.mark.usefixtures("quick")
def test_figures_are_plausible_and_the_disk_is_left_as_it_was(tmp_path: Path) -> None:
    profile = measure_hardware(tmp_path, max_bytes=SMALLEST_MAX_BYTES)
    assert profile.machine == machine_key(tmp_path)
    assert 1e8 < profile.memory_read_bytes_per_s < 1e13
    assert 1e5 < profile.disk_read_bytes_per_s < 1e12
    assert 1e8 < profile.bfloat16_flops_per_s < 1e15
    assert 1e8 < profile.float32_flops_per_s < 1e15
    assert 0 < profile.slice_overhead_s < 0.1
    assert 0 < profile.cpu_share < 1.5
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("quick")
def test_memory_stays_within_its_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    allocate = measure.aligned_buffer

    def noted(num_bytes: int) -> Any:
        asked.append(num_bytes)
        return allocate(num_bytes)

    monkeypatch.setattr(measure, "aligned_buffer", noted)
    measure_hardware(tmp_path, max_bytes=SMALLEST_MAX_BYTES)
    assert asked == [SMALLEST_MAX_BYTES]
    assert measure._NUM_BUFFERS * (measure._SLICE_BYTES + MIB) < SMALLEST_MAX_BYTES


@pytest.mark.usefixtures("quick")
def test_a_given_file_is_read_and_nothing_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = tmp_path / "model.safetensors"
    sample.touch()
    os.truncate(sample, 64 * MIB)
    monkeypatch.setattr(measure, "_write_random", None)  # a call would fail
    assert measure._measure_disk(tmp_path / "nowhere", sample)[0] > 0


class _Usage(NamedTuple):
    total: int
    used: int
    free: int


def test_a_full_disk_is_told_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: _Usage(GIB, GIB - MIB, MIB))
    with pytest.raises(StoreError, match=r"needs 256\.00 MiB free in .*, which has 1\.00 MiB"):
        measure_hardware(tmp_path, max_bytes=SMALLEST_MAX_BYTES)


def profile_of(machine: str) -> HardwareProfile:
    return HardwareProfile(
        machine, "2026-01-01T00:00:00+00:00", 1, 1e9, 1e9, True, *[1e9] * 3, 1, 1
    )


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders that were measured, by a stand-in."""
    folders: list[Path] = []

    def stand_in(folder: Path, *, sample: Path | None, max_bytes: int) -> HardwareProfile:
        folders.append(folder)
        return profile_of(machine_key(folder))

    monkeypatch.setattr(measure, "measure_hardware", stand_in)
    return folders


def test_a_profile_is_measured_once_and_kept(tmp_path: Path, measured: list[Path]) -> None:
    path = tmp_path / "store" / "hardware.json"
    first = load_or_measure(path, tmp_path)
    assert load_or_measure(path, tmp_path) == first
    assert measured == [tmp_path]
    assert [entry.name for entry in path.parent.iterdir()] == ["hardware.json"]


@pytest.mark.parametrize(
    ("shares", "free", "expected", "num_measured"),
    [
        ([0.3, 0.99], 1.0, 0.99, 2),  # quieter
        ([0.3, 0.99], 0.5, 0.3, 1),  # as busy as before
        ([0.8, 0.99], 1.0, 0.8, 1),  # was quiet
        ([0.5, 0.3], 1.0, 0.5, 2),  # became busier while it was measured
    ],
)
def test_what_was_measured_on_a_busy_machine_is_measured_again_when_it_is_quieter(
    shares: list[float],
    free: float,
    expected: float,
    num_measured: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rest = iter(shares)
    seen: list[Path] = []

    def stand_in(folder: Path, *, sample: Path | None, max_bytes: int) -> HardwareProfile:
        seen.append(folder)
        return replace(profile_of(machine_key(folder)), cpu_share=next(rest))

    monkeypatch.setattr(measure, "measure_hardware", stand_in)
    monkeypatch.setattr(measure, "cores_free", lambda: free)
    path = tmp_path / "hardware.json"
    assert load_or_measure(path, tmp_path).cpu_share == shares[0]
    assert load_or_measure(path, tmp_path).cpu_share == expected
    assert measure.kept_profile(path, tmp_path).cpu_share == expected
    assert len(seen) == num_measured


def test_cores_that_others_use_are_not_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a second core 0 idles for 60 of 100 ticks, core 1 is always taken, another's by us not."""
    stat = tmp_path / "stat"
    states = iter(["cpu0 5 0 5 0 0 0 0 0", "cpu0 25 0 15 50 10 0 0 10"])
    monkeypatch.setattr(measure, "_STAT", stat)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    monkeypatch.setattr(measure.time, "sleep", lambda seconds: write())
    taken = iter([0, 100])

    def write() -> None:
        core_0, core_1 = next(states), next(taken)
        stat.write_text(
            f"cpu 9 9 9 9 9 9 9 9\n{core_0}\ncpu1 {core_1} 0 0 0 0 0 0 0\ncpu2 0 0 0 99\n"
        )

    write()
    assert measure.cores_free() == pytest.approx(60 / 200)
    stat.unlink()
    monkeypatch.setattr(measure.time, "sleep", lambda seconds: None)
    assert measure.cores_free() == 1


def of_another_machine(path: Path) -> None:
    path.write_text(json.dumps(profile_of("another").to_dict()))


def of_zeros(path: Path) -> None:
    path.write_bytes(bytes(1000))


def cut_short(path: Path) -> None:
    path.write_text(path.read_text()[:-20])


def nested(path: Path) -> None:
    path.write_text("[" * 60_000)


@pytest.mark.parametrize("damage", [of_another_machine, of_zeros, cut_short, nested])
def test_a_profile_that_does_not_hold_is_measured_anew(
    tmp_path: Path, measured: list[Path], damage: Callable[[Path], None]
) -> None:
    path = tmp_path / "hardware.json"
    good = load_or_measure(path, tmp_path)
    damage(path)
    assert load_or_measure(path, tmp_path) == good
    assert load_or_measure(path, tmp_path) == good
    assert len(measured) == 2


def test_a_crash_while_keeping_leaves_the_old_profile(
    tmp_path: Path, measured: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "hardware.json"
    of_another_machine(path)
    before = path.read_bytes()

    def crash(source: str, target: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        load_or_measure(path, tmp_path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_store_that_cannot_be_written_still_gets_its_profile(
    tmp_path: Path, measured: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    in_the_way = tmp_path / "store"
    in_the_way.touch()
    assert load_or_measure(in_the_way / "hardware.json", tmp_path).num_threads == 1
    assert "cannot be kept" in caplog.text
