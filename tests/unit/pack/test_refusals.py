"""What pack refuses, and what it says of a folder that is there already."""

from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from tests.checkpoints import GgufOptions, tiny_config, write_gguf_model, write_safetensors_model
from thinslice.checkpoint.open import open_checkpoint
from thinslice.errors import BudgetError, CheckpointError, ConfigError, StoreError
from thinslice.pack.pack import LOCK, PackOptions, pack_model
from thinslice.plan.packed_format import PackedFormat
from thinslice.plan.shape_from_config import shape_from_config
from thinslice.store.pack_record import read_record
from thinslice.units import MIB, parse_bytes

OPTIONS = PackOptions(PackedFormat.INT4, "tiny")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_safetensors_model(tmp_path / "source", tiny_config())
    return tmp_path / "source"


def test_the_same_packing_is_there_already(source: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(source)
    first = pack_model(checkpoint, tmp_path / "out", OPTIONS)
    again = pack_model(checkpoint, tmp_path / "out", OPTIONS)
    assert (first.was_there, again.was_there) == (False, True)
    assert first.record == again.record == read_record(tmp_path / "out")
    for options, difference in (
        (PackOptions(PackedFormat.INT8, "tiny"), "int4, not int8"),
        (PackOptions(PackedFormat.INT4, "other"), "of tiny, not of other"),
    ):
        with pytest.raises(ConfigError, match=f"a packed model already, {difference}; name"):
            pack_model(checkpoint, tmp_path / "out", options)
    packed = open_checkpoint(tmp_path / "out")
    with pytest.raises(ConfigError, match="is packed already, as int4"):
        pack_model(packed, tmp_path / "second", OPTIONS)


def test_a_folder_with_other_content_is_left_alone(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "letter.txt").write_text("dear")
    for out in (tmp_path / "out", source):
        before = sorted(out.iterdir())
        with pytest.raises(ConfigError, match="is not empty"):
            pack_model(open_checkpoint(source), out, OPTIONS)
        assert sorted(out.iterdir()) == before
    with pytest.raises(StoreError, match="File exists"):
        pack_model(open_checkpoint(source), source / "config.json", OPTIONS)


def test_two_at_once_are_refused(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with (
        FileLock(tmp_path / "out" / LOCK),
        pytest.raises(StoreError, match="another process is packing into"),
    ):
        pack_model(open_checkpoint(source), tmp_path / "out", OPTIONS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 80, "head_dim": 16}, "hidden_size is 80"),
        ({"intermediate_size": 100}, "intermediate_size is 100"),
        ({"head_dim": 12}, r"num_attention_heads \* head_dim is 48"),
    ],
)
def test_rows_that_do_not_divide_into_groups(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    write_safetensors_model(tmp_path / "source", tiny_config(**changes))
    with pytest.raises(CheckpointError, match=f"multiple of 32 weights; {message}"):
        pack_model(open_checkpoint(tmp_path / "source"), tmp_path / "out", OPTIONS)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["safetensors", "gguf"])
def test_a_budget_that_is_too_small_names_the_floor(kind: str, tmp_path: Path) -> None:
    if kind == "gguf":
        source = tmp_path / "tiny.gguf"
        write_gguf_model(source, shape_from_config(tiny_config()), 0, GgufOptions(dtype="Q8_0"))
    else:
        source = tmp_path / "source"
        write_safetensors_model(source, tiny_config())
    checkpoint = open_checkpoint(source)
    with pytest.raises(BudgetError, match="does not fit --memory 1MiB") as refused:
        pack_model(checkpoint, tmp_path / "out", PackOptions(PackedFormat.INT4, "tiny", MIB))
    assert not (tmp_path / "out").exists()
    assert "runtime" in str(refused.value)
    floor = parse_bytes(str(refused.value).split("--memory ")[-1])
    # What this process holds may have grown by a little since.
    options = PackOptions(PackedFormat.INT4, "tiny", floor + 8 * MIB)
    pack_model(checkpoint, tmp_path / "out", options)


def test_settings_that_are_too_large_to_copy(source: Path, tmp_path: Path) -> None:
    with (source / "tokenizer.json").open("wb") as file:
        file.truncate(65 * MIB)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json has 68157440 bytes; at most"):
        pack_model(open_checkpoint(source), tmp_path / "out", OPTIONS)


def test_weights_that_are_no_numbers(source: Path, tmp_path: Path) -> None:
    entry = open_checkpoint(source).tensors["model.layers.1.mlp.down_proj.weight"]
    with entry.path.open("r+b") as file:
        file.seek(entry.offset + 128)
        file.write(b"\xff" * 64)
    with pytest.raises(CheckpointError, match="infinite or not a number"):
        pack_model(open_checkpoint(source), tmp_path / "out", OPTIONS)
