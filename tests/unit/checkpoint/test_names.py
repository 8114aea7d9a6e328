"""Expected tensors of every family, and what the comparison with a checkpoint reports."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from tests.checkpoints import tiny_config
from tests.unit.plan.test_shape_from_config import MIMO_CONFIG, saved
from thinslice.checkpoint.index import TensorEntry
from thinslice.checkpoint.names import check_names, expected_tensors, left_out_note
from thinslice.errors import CheckpointError
from thinslice.plan.model_shape import ModelShape
from thinslice.plan.shape_from_config import shape_from_config


def tiny_shape(architecture: str = "LlamaForCausalLM", **changes: Any) -> ModelShape:
    return shape_from_config(tiny_config(architecture, **changes))


def entries_of(shape: ModelShape, *more: str) -> dict[str, TensorEntry]:
    sizes = expected_tensors(shape) | dict.fromkeys(more, (1,))
    return {
        name: TensorEntry(name, Path("model.safetensors"), "F32", size, 0, 4 * math.prod(size))
        for name, size in sizes.items()
    }


def test_mimo_has_451_tensors_and_its_published_size() -> None:
    """Tensors and parameters as listed for XiaomiMiMo/MiMo-7B-RL-0530."""
    tensors = expected_tensors(shape_from_config(MIMO_CONFIG))
    assert len(tensors) == 451
    assert sum(math.prod(size) for size in tensors.values()) == 7_833_409_536
    prediction = {name: size for name, size in tensors.items() if ".mtp_layers.0." in name}
    assert len(prediction) == 16
    assert sum(math.prod(size) for size in prediction.values()) == 210_790_400
    assert prediction["model.mtp_layers.0.input_proj.weight"] == (4096, 8192)


@pytest.mark.parametrize(
    ("config_class", "changes"),
    [
        (LlamaConfig, {}),
        (LlamaConfig, {"attention_bias": True, "mlp_bias": True, "head_dim": 24}),
        (LlamaConfig, {"tie_word_embeddings": True}),
        (MistralConfig, {}),
        (Qwen2Config, {}),
        (Qwen3Config, {"head_dim": 24}),
        (Qwen3Config, {"attention_bias": True}),
    ],
)
def test_names_and_shapes_are_those_of_transformers(
    config_class: type, changes: dict[str, Any]
) -> None:
    sizes = tiny_config()
    del sizes["architectures"], sizes["torch_dtype"]
    config = config_class(**{**sizes, **changes})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shape = shape_from_config(saved(config, type(model).__name__))
    reference = {name: tuple(one.shape) for name, one in model.named_parameters()}
    assert expected_tensors(shape) == reference


def test_a_whole_checkpoint_passes_unchanged() -> None:
    shape = tiny_shape("MiMoForCausalLM")
    entries = entries_of(shape)
    found_shape, found = check_names(shape, entries)
    assert found_shape == shape
    assert found == entries


def test_everything_wrong_is_reported_together() -> None:
    shape = tiny_shape()
    entries = entries_of(shape, "model.extra", "blk\x1b[31m")
    del entries["model.norm.weight"]
    name = "model.layers.1.mlp.up_proj.weight"
    entries[name] = replace(entries[name], shape=(64, 96))
    with pytest.raises(CheckpointError) as caught:
        check_names(shape, entries)
    assert str(caught.value) == (
        "the tensors are not those of the LlamaForCausalLM that the checkpoint describes\n"
        "  1 missing: model.norm.weight\n"
        "  2 unexpected: 'model.extra', 'blk\\x1b[31m'\n"
        "  1 misshapen: model.layers.1.mlp.up_proj.weight (64, 96), not (96, 64)"
    )


def test_ten_of_each_with_counts() -> None:
    shape = tiny_shape()
    extra = [f"extra.{number}" for number in range(12)]
    with pytest.raises(CheckpointError) as caught:
        check_names(shape, {name: entries_of(shape, *extra)[name] for name in extra})
    _, missing, unexpected = str(caught.value).splitlines()
    assert missing.startswith("  21 missing: model.embed_tokens.weight, ")
    assert missing.endswith(" and 11 more")
    assert unexpected.startswith("  12 unexpected: 'extra.0', 'extra.1', ")
    assert unexpected.endswith("'extra.9' and 2 more")


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "model.rotary_emb.inv_freq",
        "model.layers.1.self_attn.rotary_emb.cos_cached",
        "model.position_ids",
        "model.mtp_layers.0.final_layernorm.weight",
        "model.mtp_layers.7.self_attn.q_proj.bias",
    ],
)
def test_known_tensors_of_no_use_are_left_out(name: str) -> None:
    shape = tiny_shape()
    entries = entries_of(shape)
    found_shape, found = check_names(shape, entries_of(shape, name))
    assert found_shape == shape
    assert found == entries


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.rotary_emb.inv_freq.weight",
        "model.layers.x.self_attn.rotary_emb.inv_freq",
        "model.mtp_layers.x.final_layernorm.weight",
        "rotary_emb.inv_freq",
        "model.layers.2.input_layernorm.weight",
        "model.layers.0.self_attn.q_proj.bias",
    ],
)
def test_other_tensors_are_unexpected(name: str) -> None:
    shape = tiny_shape()
    with pytest.raises(CheckpointError, match=f"1 unexpected: '{name}'"):
        check_names(shape, entries_of(shape, name))


def test_whole_numbers_are_left_out_and_named_where_no_weight_is_missing() -> None:
    shape = tiny_shape()
    entries = entries_of(shape)
    odd = {
        name: TensorEntry(name, Path("model.safetensors"), dtype, (1,), 0, 1)
        for name, dtype in {"model.counts": "I64", "model.mask": "BOOL"}.items()
    }
    assert check_names(shape, entries | odd) == (shape, entries)
    assert left_out_note(shape, entries | odd) == (
        "tensors of whole numbers are left out: 2 unknown: model.counts, model.mask",
    )
    assert left_out_note(shape, entries_of(shape, "model.position_ids")) == ()
    (note,) = left_out_note(shape, entries_of(shape, "a\x1b[31m\nb"))
    assert note.endswith(r"1 unknown: a\x1b[31m\nb")
    del entries["model.norm.weight"]
    with pytest.raises(CheckpointError, match=r"2 unexpected: 'model\.counts', 'model\.mask'"):
        check_names(shape, entries | odd)


def test_a_stored_head_is_left_out_if_and_only_if_embeddings_are_tied() -> None:
    tied, untied = tiny_shape(tie_word_embeddings=True), tiny_shape()
    _, found = check_names(tied, entries_of(untied))
    assert "lm_head.weight" not in found
    with pytest.raises(CheckpointError, match=r"1 missing: lm_head\.weight"):
        check_names(untied, entries_of(tied))


def test_mimo_without_its_prediction_layers() -> None:
    shape = tiny_shape("MiMoForCausalLM")
    without = replace(shape, num_nextn_predict_layers=0)
    found_shape, found = check_names(shape, entries_of(without))
    assert found_shape == without
    assert found == entries_of(without)


def test_mimo_with_a_part_of_its_prediction_layers() -> None:
    shape = tiny_shape("MiMoForCausalLM", num_nextn_predict_layers=2)
    one = replace(shape, num_nextn_predict_layers=1)
    with pytest.raises(CheckpointError, match=r"16 missing: model\.mtp_layers\.1"):
        check_names(shape, entries_of(one))
    found_shape, found = check_names(one, entries_of(shape))
    assert found_shape == one
    assert found == entries_of(one)
