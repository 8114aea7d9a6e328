"""Adapters given as models, alone and beside one: refused, with what they are and what works."""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.checkpoints import tiny_config, write_gguf_model, write_safetensors_model
from thinslice.checkpoint.open import open_checkpoint
from thinslice.errors import CheckpointError
from thinslice.plan.shape_from_config import shape_from_config

PREFIX = "base_model.model.model.layers.0.self_attn.q_proj"
LORA = {
    f"{PREFIX}.lora_A.weight": torch.ones(2, 64),
    f"{PREFIX}.lora_B.weight": torch.ones(64, 2),
}


def write_adapter(folder: Path, settings: object = None) -> None:
    folder.mkdir(exist_ok=True)
    save_file(LORA, folder / "adapter_model.safetensors")
    held = {"peft_type": "LORA", "base_model_name_or_path": "org/base"}
    content = json.dumps(held if settings is None else settings)
    (folder / "adapter_config.json").write_text(content)


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < len(str(path)) + 300
    return message


@pytest.mark.parametrize("has_config", [False, True])
def test_an_adapter_alone(tmp_path: Path, has_config: bool) -> None:
    write_adapter(tmp_path)
    if has_config:
        (tmp_path / "config.json").write_text(json.dumps(tiny_config()))
    assert refusal(tmp_path) == (
        f"{tmp_path} holds an adapter of org/base, not a whole model: merge it into that model "
        "first (PEFT: merge_and_unload), then name the merged folder"
    )


@pytest.mark.parametrize("settings", [{}, {"base_model_name_or_path": 7}, [1]])
def test_an_adapter_that_does_not_name_its_base(tmp_path: Path, settings: object) -> None:
    write_adapter(tmp_path, settings)
    assert "an adapter of a model it does not name" in refusal(tmp_path)


def test_weights_of_an_adapter_without_its_settings(tmp_path: Path) -> None:
    write_adapter(tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(tiny_config()))
    assert "holds an adapter of a model it does not name" in refusal(tmp_path)


@pytest.mark.parametrize("kind", ["safetensors", "shards", "gguf"])
def test_an_adapter_beside_a_model(tmp_path: Path, kind: str) -> None:
    config = tiny_config()
    if kind == "gguf":
        write_gguf_model(tmp_path / "model.gguf", shape_from_config(config))
    else:
        write_safetensors_model(tmp_path, config, shards=1 if kind == "safetensors" else 2)
    write_adapter(tmp_path)
    message = refusal(tmp_path)
    assert "holds an adapter beside the model (adapter_config.json, of org/base)" in message
    assert "merge it into the model, or move it out of the folder" in message
    (tmp_path / "adapter_config.json").unlink()
    open_checkpoint(tmp_path)  # transformers does not apply it without its settings either


def test_settings_of_an_adapter_that_is_gone_change_nothing(tmp_path: Path) -> None:
    write_safetensors_model(tmp_path, tiny_config())
    write_adapter(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    open_checkpoint(tmp_path)


def write_gguf(path: Path, tensor: str, **text: str) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in text.items():
        writer.add_string(key.replace("__", "."), value)
    writer.add_tensor(tensor, np.zeros((8, 32), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("tensor", "text", "message"),
    [
        ("t", {"general__type": "adapter"}, "is an adapter for a llama model, not a whole model"),
        ("blk.0.attn_q.weight.lora_a", {}, "is an adapter for a llama model, not a whole model"),
        (
            "t",
            {"general__type": "adapter", "general__base_model__0__repo_url": "https://x/org/base"},
            "is an adapter of https://x/org/base, not a whole model: merge it into its base model "
            "first (llama.cpp: llama-export-lora), then name the merged file",
        ),
        ("t", {"general__type": "mmproj"}, "is the part of a model that takes in pictures or"),
        ("t", {"general__type": "imatrix"}, "is statistics for a quantiser (general.type imatrix)"),
    ],
)
def test_ggufs_that_are_no_model(
    tmp_path: Path, tensor: str, text: dict[str, str], message: str
) -> None:
    path = write_gguf(tmp_path / "adapter.gguf", tensor, **text)
    assert message in refusal(path)
    assert message in refusal(tmp_path)
