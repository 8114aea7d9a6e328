"""What of generation_config.json says how to sample, and what in it is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import tiny_config, write_gguf_model, write_safetensors_model
from thinslice.checkpoint.open import open_checkpoint
from thinslice.config import ADVISABLE
from thinslice.errors import CheckpointError
from thinslice.plan.advised_sampling import advised_sampling
from thinslice.plan.shape_from_config import shape_from_config


@pytest.mark.parametrize(
    ("settings", "advised"),
    [
        ({}, {}),
        ({"eos_token_id": 2, "max_length": 20}, {}),
        (dict.fromkeys([*ADVISABLE, "do_sample"]), {}),
        ({"temperature": 0.7, "top_k": 20}, {"temperature": 0.7, "top_k": 20}),
        ({"do_sample": True, "top_p": 1, "min_p": 0}, {"top_p": 1, "min_p": 0}),
        ({"do_sample": False}, {"temperature": 0}),
        (
            {"do_sample": False, "temperature": 0.7, "repetition_penalty": 1.05},
            {"temperature": 0, "repetition_penalty": 1.05},
        ),
    ],
)
def test_what_the_file_sets_is_advised(settings: dict[str, Any], advised: dict[str, Any]) -> None:
    assert advised_sampling(settings, "the file") == advised


def nonsense() -> list[tuple[str, str]]:
    """Each key with values as JSON spells them."""
    values = ['"0.7"', "NaN", "Infinity", "-1", "1e9000", "1" + "0" * 400, "true", "[1]", "{}"]
    cases = [(key, value) for key in ADVISABLE for value in values]
    outside = {"temperature": "101", "top_k": "2.5", "top_p": "0", "min_p": "1.1"}
    cases += [*outside.items(), ("repetition_penalty", "0"), ("top_p", "1.01")]
    return cases + [("do_sample", value) for value in ('"false"', "0", "1", "NaN", "[]")]


@pytest.mark.parametrize(("key", "value"), nonsense())
def test_nonsense_is_refused_on_one_line_naming_file_key_and_value(
    key: str, value: str, tmp_path: Path
) -> None:
    write_safetensors_model(tmp_path, tiny_config())
    path = tmp_path / "generation_config.json"
    path.write_text(f'{{"{key}": {value}}}')
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path)
    line = str(caught.value)
    shown = str(json.loads(value))[:20]
    assert line.startswith(f"{path}: {key} is ")
    assert shown in line
    assert "; expected " in line
    assert "\n" not in line
    assert len(line) < len(str(path)) + 200


def test_an_opened_folder_advises_and_a_gguf_does_not(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    write_safetensors_model(folder, tiny_config())
    assert open_checkpoint(folder).sampling == {}
    (folder / "generation_config.json").write_text('{"top_k": 3, "min_p": 0.1}')
    assert open_checkpoint(folder).sampling == {"top_k": 3, "min_p": 0.1}
    path = tmp_path / "model.gguf"
    write_gguf_model(path, shape_from_config(tiny_config()))
    assert open_checkpoint(path).sampling == {}
