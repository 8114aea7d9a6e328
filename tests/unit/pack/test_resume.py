"""A packing that is broken off, at any moment and for any reason, ends with the same bits."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.checkpoints import tiny_config, write_safetensors_model
from thinslice.checkpoint.open import open_checkpoint
from thinslice.errors import CheckpointError, ConfigError, StoreError
from thinslice.pack import layout, write_weights
from thinslice.pack.pack import PackOptions, pack_model
from thinslice.pack.part import JOURNAL, PART, read_journal
from thinslice.plan.packed_format import PackedFormat

OPTIONS = PackOptions(PackedFormat.INT4, "tiny")
FILES = {"config.json", "model.safetensors", "thinslice.json"}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_safetensors_model(tmp_path / "source", tiny_config("MiMoForCausalLM"))
    return tmp_path / "source"


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "_SLICE_WEIGHTS", 4096)
    monkeypatch.setattr(write_weights, "SYNC_BYTES", 16384)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_killed_at_any_step_it_goes_on_and_ends_with_the_same_bits(
    source: Path, tmp_path: Path
) -> None:
    script = Path(__file__).with_name("kill_at_steps.py")
    command = [sys.executable, str(script), str(source), str(tmp_path / "out"), "5"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    kills = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(kills) > 20
    assert all(kill["is_same"] for kill in kills)
    progress = [kill["done"] for kill in kills]
    assert progress[0] == 0
    assert len(set(progress)) > 4, "no kill left a journal that another had not"
    left = [set(kill["left"]) for kill in kills]
    for state in (PART, JOURNAL, "config.json", "model.safetensors", "thinslice.json"):
        assert any(state in files for files in left), f"no kill left {state}"
    assert any(PART not in files and "model.safetensors" in files for files in left)
    assert any("config.json" in files and PART not in files for files in left)


@pytest.mark.usefixtures("small_pieces")
def test_a_disk_that_fills_up_is_told_and_what_is_done_is_kept(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(source)
    pack_model(checkpoint, tmp_path / "whole", OPTIONS)
    real, room = os.pwrite, 60_000

    def fill(file: int, data: memoryview, offset: int) -> int:
        nonlocal room
        room -= len(data)
        if room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(file, data, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", fill)
        with pytest.raises(
            StoreError, match=r"the disk is full for the packed tiny: needs .* kept"
        ):
            pack_model(checkpoint, tmp_path / "out", OPTIONS)
    journal = read_journal(tmp_path / "out")
    assert journal is not None
    assert journal[1] > 0
    pack_model(checkpoint, tmp_path / "out", OPTIONS)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_real_limit_of_the_system_is_told_in_one_line(source: Path, tmp_path: Path) -> None:
    """No file may have more than 64 KiB."""
    command = [sys.executable, "-m", "thinslice", "pack", str(source), "--dtype", "int4"]
    command += ["--out", str(tmp_path / "out")]
    limited = ["sh", "-c", 'ulimit -f 128 || exit 99; exec "$@"', "sh", *command]
    done = subprocess.run(limited, capture_output=True, text=True, check=False)
    assert done.returncode == 6, done.stderr
    assert done.stderr.count("\n") == 1
    assert "the disk is full for the packed source" in done.stderr
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert set(contents(tmp_path / "out")) == FILES


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("thinslice.store.files._free_bytes", lambda folder: 1000)
    with pytest.raises(
        StoreError, match=r"needs 1\d\d\.\d\d KiB more, 1000 B free in .*/out; free"
    ):
        pack_model(open_checkpoint(source), tmp_path / "out", OPTIONS)
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("small_pieces")
def test_a_source_that_changes_meanwhile_is_an_error(source: Path, tmp_path: Path) -> None:
    def touch(step: str, done: int, total: int) -> None:
        os.utime(source / "config.json")

    with pytest.raises(CheckpointError, match=r"config\.json changed while it was packed"):
        pack_model(open_checkpoint(source), tmp_path / "out", OPTIONS, touch)
    assert not (tmp_path / "out" / "thinslice.json").exists()


def broken_off(source: Path, out: Path, options: PackOptions) -> None:
    def stop(step: str, done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack_model(open_checkpoint(source), out, options, stop)


@pytest.mark.usefixtures("small_pieces")
def test_an_unfinished_packing_of_something_else_is_refused(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    broken_off(source, out, OPTIONS)
    for options, difference in (
        (PackOptions(PackedFormat.INT8, "tiny"), "int4, not int8"),
        (PackOptions(PackedFormat.INT4, "other"), "of tiny, not of other"),
    ):
        with pytest.raises(ConfigError, match=f"unfinished packing, {difference}; delete it"):
            pack_model(open_checkpoint(source), out, options)
    os.utime(source / "model.safetensors")
    with pytest.raises(ConfigError, match="of a tiny whose files have changed since"):
        pack_model(open_checkpoint(source), out, OPTIONS)
    before = read_journal(out)
    starts_over = PackOptions(PackedFormat.INT8, "tiny", starts_over=True)
    assert not pack_model(open_checkpoint(source), out, starts_over).was_there
    assert before is not None
    assert set(contents(out)) == FILES


@pytest.mark.usefixtures("small_pieces")
def test_a_damaged_journal_counts_as_none(source: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(source)
    pack_model(checkpoint, tmp_path / "whole", OPTIONS)
    for damage in (b"", b"[]", b'{"format": 1, "settings": {}, "num_slices": 3}', b'{"format": 2}'):
        broken_off(source, tmp_path / "out", OPTIONS)
        (tmp_path / "out" / JOURNAL).write_bytes(damage)
        assert read_journal(tmp_path / "out") is None
    pack_model(checkpoint, tmp_path / "out", OPTIONS)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
