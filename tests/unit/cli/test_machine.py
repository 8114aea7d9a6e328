"""What doctor says of the process's surroundings, each in one line."""

import os
from pathlib import Path

import pytest

from thinslice.cli import machine
from thinslice.kernels import native
from thinslice.memory import device, process_state


@pytest.mark.parametrize(
    ("rooms", "state", "text"),
    [
        ([], "ok", "no bound"),
        ([(500, "pids.max of 512 with 12 in use")], "ok", "500 more allowed (pids.max of 512"),
        ([(500, "a"), (3, "pids.max of 9 with 6 in use")], "bad", "raise pids.max"),
        ([(-2, "pids.max of 1 with 3 in use")], "bad", "0 more allowed"),
    ],
)
def test_too_few_threads_are_told(
    rooms: list[tuple[int, str]], state: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "pid_rooms", lambda: list(rooms))
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    finding = machine._threads_allowed()
    assert finding.state == state
    assert text in finding.value


def test_bounds_on_threads_are_read_from_every_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = Path("/proc/self/cgroup").read_text().splitlines()
    assert own
    monkeypatch.setattr(process_state, "_CGROUP_ROOT", tmp_path)
    for folder in (tmp_path, tmp_path / "pids"):
        folder.mkdir(exist_ok=True)
        (folder / "pids.max").write_text("10\n")
        (folder / "pids.current").write_text("7\n")
    assert set(process_state.pid_rooms()) == {(3, "pids.max of 10 with 7 in use")}


@pytest.mark.parametrize(
    ("size", "flags", "isas", "state", "text"),
    [
        (None, {"amx_int8"}, ["amx", "avx512"], "ok", "no alternate one"),
        (8192, {"amx_int8"}, ["avx512"], "warn", "8.00 KiB: too small for AMX, which is not used"),
        (8192, {"avx2"}, ["avx2"], "ok", "alternate one of 8.00 KiB"),
        (65536, {"amx_int8"}, ["amx"], "ok", "alternate one of 64.00 KiB"),
        (None, {"amx_int8"}, ["avx512"], "warn", "another thread's may be too small"),
    ],
)
def test_a_signal_stack_too_small_for_amx_is_told(
    size: int | None,
    flags: set[str],
    isas: list[str],
    state: str,
    text: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(machine, "alternate_stack_bytes", lambda: size)
    monkeypatch.setattr(machine, "_cpu_flags", lambda: flags)
    monkeypatch.setattr(native, "is_available", lambda: True)
    monkeypatch.setattr(native, "available_isas", lambda: isas)
    finding = machine._signal_stack()
    assert finding.state == state
    assert finding.value.endswith(text)


@pytest.mark.skipif(not native.is_available(), reason="the kernels are not built")
def test_fewer_threads_than_asked_for_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine._kernels().state == "ok"
    monkeypatch.setattr(native, "num_threads", lambda: 8)
    monkeypatch.setattr(native, "set_num_threads", lambda count: count - 1)
    finding = machine._kernels()
    assert finding.state == "warn"
    assert "of 8: the system starts no more" in finding.value


def test_a_working_directory_that_is_gone_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert machine._working_directory().state == "ok"
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    finding = machine._working_directory()
    assert (finding.name, finding.state) == ("working directory", "bad")
    monkeypatch.setattr(device, "find_spec", lambda name: name)
    monkeypatch.setattr(device, "import_module", lambda name: pytest.fail(name))
    (finding,) = machine._devices()
    assert (finding.name, finding.state) == ("CUDA", "ok")
    assert "torch, which runs there, needs a working directory: No such file" in finding.value
    monkeypatch.chdir(tmp_path)


def test_kernels_that_are_missing_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_native", None)
    monkeypatch.setattr(native, "_import_error", "no such file")
    assert machine._kernels() == machine.Finding(
        "compiled kernels", "no compiled CPU kernels: no such file", "bad"
    )


def test_what_is_missing_for_a_card_is_told_and_is_no_fault(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Torch, which is needed there alone, is not asked for where it is not installed."""
    monkeypatch.setattr(device, "find_spec", lambda name: None)
    monkeypatch.setattr(device, "import_module", lambda name: pytest.fail(name))
    (finding,) = machine._devices()
    assert finding.state == "ok"
    assert "torch, which runs there, is missing; pip install" in finding.value


def test_a_torch_that_finds_no_card_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "missing_for_cuda", lambda: "torch finds no CUDA card here")
    assert machine._devices() == [machine.Finding("CUDA", "torch finds no CUDA card here")]
