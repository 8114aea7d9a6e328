"""What of a model's files says how to sample, and what of it is left out."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import GgufOptions, tiny_config, write_gguf_model, write_safetensors_model
from thinslice.checkpoint.index import Checkpoint
from thinslice.checkpoint.open import open_checkpoint
from thinslice.config import ADVISABLE
from thinslice.plan.advised_sampling import GGUF_NAMES, advised_sampling
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
        ({"top_k": 50.0}, {"top_k": 50}),
        (
            {"do_sample": False, "temperature": 0.7, "repetition_penalty": 1.05},
            {"temperature": 0, "repetition_penalty": 1.05},
        ),
    ],
)
def test_what_the_file_sets_is_advised(settings: dict[str, Any], advised: dict[str, Any]) -> None:
    assert advised_sampling(settings, "the file") == (advised, ())


def nonsense() -> list[tuple[str, str]]:
    """Each key with values as JSON spells them."""
    values = ['"0.7"', "NaN", "Infinity", "-1", "1e9000", "1" + "0" * 400, "true", "[1]", "{}"]
    cases = [(key, value) for key in ADVISABLE for value in values]
    outside = {"temperature": "101", "top_k": "2.5", "top_p": "0", "min_p": "1.1"}
    cases += [*outside.items(), ("repetition_penalty", "0"), ("top_p", "1.01")]
    return cases + [("do_sample", value) for value in ('"false"', "0", "1", "NaN", "[]")]


@pytest.mark.parametrize(("key", "value"), nonsense())
def test_nonsense_is_left_out_and_named_on_one_line(key: str, value: str, tmp_path: Path) -> None:
    write_safetensors_model(tmp_path, tiny_config())
    good = {"min_p": 0.1, "top_k": 3}
    good.pop(key, None)
    rest = json.dumps(good)[1:]
    (tmp_path / "generation_config.json").write_text(f'{{"{key}": {value}, {rest}')
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.sampling == good
    (line,) = checkpoint.notes
    shown = str(json.loads(value))[:20]
    assert line.startswith(f"generation_config.json: {key} is ")
    assert shown in line
    assert "; expected " in line
    assert "\n" not in line
    assert len(line) < 250


def test_a_whole_number_may_be_written_as_a_float() -> None:
    advised, notes = advised_sampling({"top_k": 50.0}, "the file")
    assert (type(advised["top_k"]), notes) == (int, ())


def test_an_opened_folder_advises(tmp_path: Path) -> None:
    write_safetensors_model(tmp_path, tiny_config())
    assert open_checkpoint(tmp_path).sampling == {}
    (tmp_path / "generation_config.json").write_text('{"top_k": 3, "min_p": 0.1}')
    assert open_checkpoint(tmp_path).sampling == {"top_k": 3, "min_p": 0.1}


def opened_gguf(path: Path, **sampling: Any) -> Checkpoint:
    metadata = {f"general.sampling.{key}": value for key, value in sampling.items()}
    write_gguf_model(path, shape_from_config(tiny_config()), options=GgufOptions(metadata=metadata))
    return open_checkpoint(path)


def test_an_opened_gguf_advises(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    plain = opened_gguf(path)
    assert (plain.sampling, plain.notes) == ({}, ())
    every = {"temp": 0.7, "top_k": 20, "top_p": 0.8, "min_p": 0.05, "penalty_repeat": 1.05}
    full = opened_gguf(path, **every)
    assert full.notes == ()
    assert full.sampling == {GGUF_NAMES[key]: value for key, value in every.items()}


def test_nonsense_in_a_gguf_is_left_out_and_named(tmp_path: Path) -> None:
    wrong = {"temp": math.nan, "top_k": -1, "top_p": 0.0, "min_p": "x", "penalty_repeat": True}
    checkpoint = opened_gguf(tmp_path / "model.gguf", **wrong)
    assert checkpoint.sampling == {}
    end = "; this advice is left out"
    assert [line.removeprefix("this GGUF: general.sampling.") for line in checkpoint.notes] == [
        f"temp is nan; expected 0.0..100.0{end}",
        f"top_k is -1; expected 0..2147483648{end}",
        f"top_p is 0; expected above 0 (for greedy set temperature to 0){end}",
        f"min_p is 'x'; expected a number{end}",
        f"penalty_repeat is True; expected a number{end}",
    ]
