"""Opening a model by its path: every kind, every refusal, and nothing of the folder is run."""

import json
import os
from pathlib import Path

import pytest
import torch

from tests.checkpoints import (
    UNREADABLE,
    GgufOptions,
    GgufTokenizer,
    make_unreadable,
    tiny_config,
    write_gguf_model,
    write_safetensors,
    write_safetensors_model,
)
from thinslice.checkpoint.names import expected_tensors
from thinslice.checkpoint.open import open_checkpoint
from thinslice.errors import CheckpointError
from thinslice.plan.model_shape import RopeScaling
from thinslice.plan.shape_from_config import shape_from_config

FAMILIES = ["LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"]


@pytest.mark.parametrize("architecture", [*FAMILIES, "MiMoForCausalLM"])
@pytest.mark.parametrize("shards", [1, 2])
def test_folder_of_safetensors(tmp_path: Path, architecture: str, shards: int) -> None:
    config = tiny_config(architecture)
    tensors = write_safetensors_model(tmp_path, config, shards=shards)
    checkpoint = open_checkpoint(tmp_path)
    assert (checkpoint.path, checkpoint.kind) == (tmp_path, "safetensors")
    assert checkpoint.shape == shape_from_config(config)
    assert {name: entry.shape for name, entry in checkpoint.tensors.items()} == expected_tensors(
        checkpoint.shape
    )
    assert checkpoint.num_bytes == sum(tensor.nbytes for tensor in tensors.values())
    assert len(checkpoint.files) == shards
    assert checkpoint.metadata == {}


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", *FAMILIES[2:]])
def test_gguf(tmp_path: Path, architecture: str) -> None:
    shape = shape_from_config(tiny_config(architecture))
    path = tmp_path / "model.gguf"
    tokenizer = GgufTokenizer(tuple(f"t{number}" for number in range(shape.vocab_size)))
    write_gguf_model(path, shape, options=GgufOptions(tokenizer=tokenizer))
    for opened in (path, tmp_path):
        checkpoint = open_checkpoint(opened)
        assert (checkpoint.path, checkpoint.kind) == (path, "gguf")
        assert checkpoint.shape == shape
        assert checkpoint.files == (path,)
        assert checkpoint.metadata["tokenizer.ggml.tokens"][5] == "t5"
        assert set(checkpoint.tensors) == set(expected_tensors(shape))


def test_mistral_gguf_is_of_architecture_llama(tmp_path: Path) -> None:
    shape = shape_from_config(tiny_config("MistralForCausalLM"))
    write_gguf_model(tmp_path / "model.gguf", shape)
    assert open_checkpoint(tmp_path).shape.architecture == "LlamaForCausalLM"


def test_tied_gguf(tmp_path: Path) -> None:
    shape = shape_from_config(tiny_config(tie_word_embeddings=True))
    write_gguf_model(tmp_path / "model.gguf", shape)
    assert open_checkpoint(tmp_path).shape == shape


def test_split_gguf(tmp_path: Path) -> None:
    shape = shape_from_config(tiny_config())
    write_gguf_model(tmp_path / "model.gguf", shape, options=GgufOptions(max_tensors=10))
    parts = sorted(tmp_path.iterdir())
    assert len(parts) == 3
    for opened in (tmp_path, parts[0], parts[2]):
        checkpoint = open_checkpoint(opened)
        assert (checkpoint.path, checkpoint.files) == (parts[0], tuple(parts))
        assert set(checkpoint.tensors) == set(expected_tensors(shape))
    parts[0].unlink()
    for opened in (tmp_path, parts[2]):
        with pytest.raises(CheckpointError, match=r"model-00001-of-00003\.gguf is missing"):
            open_checkpoint(opened)


def test_rotary_factors_of_a_gguf(tmp_path: Path) -> None:
    factors = tuple(float(number + 1) for number in range(8))
    shape = shape_from_config(tiny_config())
    write_gguf_model(tmp_path / "model.gguf", shape, options=GgufOptions(rope_factors=factors))
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.shape.rope_scaling == RopeScaling("factors", freq_factors=factors)
    assert set(checkpoint.tensors) == set(expected_tensors(shape))


def test_unknown_tensors_of_a_gguf_are_reported(tmp_path: Path) -> None:
    shape = shape_from_config(tiny_config("Qwen2ForCausalLM"))
    path = tmp_path / "model.gguf"
    write_gguf_model(path, shape)
    content = path.read_bytes()
    path.write_bytes(content.replace(b"blk.1.ffn_gate", b"blk.1.fnf_gate"))
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    assert "1 missing: model.layers.1.mlp.gate_proj.weight" in str(caught.value)
    assert "1 unexpected: 'gguf:blk.1.fnf_gate.weight'" in str(caught.value)


def test_generation_config_adds_end_of_sequence_ids(tmp_path: Path) -> None:
    write_safetensors_model(tmp_path, tiny_config(eos_token_id=2))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 2]}')
    assert open_checkpoint(tmp_path).shape.eos_token_ids == (2, 5)


def test_tensors_that_nobody_needs_may_be_missing_from_the_shards(tmp_path: Path) -> None:
    tensors = write_safetensors_model(tmp_path, tiny_config(), shards=2)
    index_path = tmp_path / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    index["weight_map"] |= {"model.old.inv_freq": "gone.safetensors", "lm.bias": "gone.safetensors"}
    index_path.write_text(json.dumps(index))
    assert set(open_checkpoint(tmp_path).tensors) == set(tensors)
    index["weight_map"]["model.norm.weight"] = "gone.safetensors"
    index_path.write_text(json.dumps(index))
    assert set(open_checkpoint(tmp_path).tensors) == set(tensors)  # the shards have it all the same
    shard = tmp_path / "model-00002-of-00002.safetensors"
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"shard {shard.name} is missing; download it again"):
        open_checkpoint(tmp_path)


def test_a_comment_of_a_gguf_in_another_encoding(tmp_path: Path) -> None:
    shape = shape_from_config(tiny_config())
    path = tmp_path / "model.gguf"
    texts = {"general.description": "caf#", "llama.remark": "b#se", "general.file": "#"}
    write_gguf_model(path, shape, options=GgufOptions(metadata=texts))
    path.write_bytes(path.read_bytes().replace(b"#", b"\xe9"))
    checkpoint = open_checkpoint(path)
    assert checkpoint.shape == shape
    assert checkpoint.notes == (
        "this GGUF sets llama.remark, which is not known to thinslice and not read",
    )
    scaling = {"llama.rope.scaling.type": "line#r"}
    write_gguf_model(path, shape, options=GgufOptions(metadata=scaling))
    path.write_bytes(path.read_bytes().replace(b"#", b"\xe9"))
    with pytest.raises(CheckpointError, match=r"of 'llama\.rope\.scaling\.type' is not UTF-8"):
        open_checkpoint(path)


def test_python_of_a_model_folder_is_never_run(tmp_path: Path) -> None:
    auto_map = {"AutoModelForCausalLM": "modeling_mimo.MiMoForCausalLM"}
    write_safetensors_model(tmp_path, tiny_config("MiMoForCausalLM", auto_map=auto_map))
    trace = tmp_path / "was_run"
    for name in ("modeling_mimo.py", "configuration_mimo.py", "__init__.py"):
        (tmp_path / name).write_text(f"open({str(trace)!r}, 'w')")
    assert open_checkpoint(tmp_path).shape.architecture == "MiMoForCausalLM"
    assert not trace.exists()


def test_safetensors_come_before_other_kinds(tmp_path: Path) -> None:
    config = tiny_config()
    write_safetensors_model(tmp_path, config)
    write_gguf_model(tmp_path / "model.gguf", shape_from_config(config))
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02.")
    assert open_checkpoint(tmp_path).kind == "safetensors"


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".ckpt", ".pkl", ".BIN"])
@pytest.mark.parametrize("by_folder", [True, False])
def test_pickle_is_refused_with_the_reason(tmp_path: Path, suffix: str, by_folder: bool) -> None:
    path = tmp_path / f"pytorch_model{suffix}"
    path.write_bytes(b"\x80\x02.")
    (tmp_path / "config.json").write_text(json.dumps(tiny_config()))
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path if by_folder else path)
    assert str(caught.value) == (
        f"{path} is a pickle file, which can run any code when it is loaded; "
        "take the model as safetensors or GGUF"
    )


def test_paths_that_are_no_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="none does not exist"):
        open_checkpoint(tmp_path / "none")
    with pytest.raises(CheckpointError, match="holds no model: neither safetensors nor a GGUF"):
        open_checkpoint(tmp_path)
    write_safetensors(tmp_path, {"a": torch.ones(1)})
    with pytest.raises(CheckpointError, match=r"holds safetensors but no config\.json"):
        open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="one file of a model; name its folder instead"):
        open_checkpoint(tmp_path / "model.safetensors")
    (tmp_path / "notes.txt").touch()
    with pytest.raises(
        CheckpointError, match=r"is no model: name a folder with config\.json and s"
    ):
        open_checkpoint(tmp_path / "notes.txt")


def test_two_ggufs_in_a_folder(tmp_path: Path) -> None:
    (tmp_path / "b-Q8_0.gguf").touch()
    (tmp_path / "a-Q4_0.gguf").touch()
    with pytest.raises(CheckpointError, match=r"2 GGUF models; name one of a-Q4_0.gguf, b-Q8_0."):
        open_checkpoint(tmp_path)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.gguf")
    with pytest.raises(CheckpointError, match="is not a regular file"):
        open_checkpoint(tmp_path / "model.gguf")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"config\.json: not valid JSON"),
        (b"[1]", r"config\.json: JSON holds no object"),
        (b"{" + b" " * (1 << 20) + b"}", r"config\.json has 1048578 bytes; at most 1048576"),
        (b'{"architectures": ["GPT2LMHeadModel"]}', "architecture GPT2LMHeadModel is not support"),
        (b'{"a": 1, "a": 2}', r"config\.json: not valid JSON: key 'a' appears twice"),
    ],
)
def test_configs_that_are_none(tmp_path: Path, content: bytes, message: str) -> None:
    write_safetensors_model(tmp_path, tiny_config())
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


def test_config_and_tensors_must_agree(tmp_path: Path) -> None:
    write_safetensors_model(tmp_path, tiny_config())
    (tmp_path / "config.json").write_text(json.dumps(tiny_config(intermediate_size=95)))
    with pytest.raises(CheckpointError, match=r"6 misshapen: model\.layers\.0\.mlp\.gate_proj"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("kind", UNREADABLE)
def test_settings_that_are_there_and_cannot_be_read_are_refused(
    tmp_path: Path, name: str, kind: str
) -> None:
    write_safetensors_model(tmp_path, tiny_config())
    make_unreadable(tmp_path / name, kind)
    with pytest.raises(CheckpointError, match=f"{name} (cannot be|is not a|does not)"):
        open_checkpoint(tmp_path)
