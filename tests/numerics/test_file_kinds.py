"""Models as they are found, against transformers: heads, windows, rotary settings, text trunks."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from tests.engines import engine_of, greedy, logits_of
from tests.numerics.exactness import Reference
from tests.numerics.test_families import SIZES, make_reference
from thinslice.checkpoint.open import open_checkpoint
from thinslice.errors import CheckpointError

PROMPT = [(7 * index * index + 13) % SIZES["vocab_size"] for index in range(60)]


def saved(family: str, folder: Path, changes: dict[str, Any]) -> None:
    """A reference model whose config.json is changed after it was written."""
    make_reference(family).save_pretrained(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(config))


def assert_equal(folder: Path, reference: PreTrainedModel | None = None) -> NDArray[np.float32]:
    """Our logits are transformers', which reads the same folder; returns them."""
    if reference is None:
        reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    engine = engine_of(open_checkpoint(folder), dtype="float32")
    found = logits_of(engine, PROMPT)
    Reference(reference).check((PROMPT, found))
    return found


def test_a_head_of_its_own_beside_tied_embeddings(tmp_path: Path) -> None:
    saved("llama", tmp_path, {"tie_word_embeddings": True})
    found = assert_equal(tmp_path)
    make_reference("llama-tied").save_pretrained(tmp_path / "tied")
    tied = logits_of(engine_of(open_checkpoint(tmp_path / "tied"), dtype="float32"), PROMPT)
    assert not np.allclose(found, tied)


FULL, SLIDING = "full_attention", "sliding_attention"
WINDOW = {"use_sliding_window": True, "sliding_window": 24}


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("qwen3", {**WINDOW, "layer_types": [FULL, FULL, FULL]}),
        ("qwen3", {**WINDOW, "layer_types": [SLIDING, FULL, SLIDING]}),
        ("qwen3", {**WINDOW, "layer_types": [SLIDING, SLIDING, SLIDING]}),
        ("qwen2", {**WINDOW, "max_window_layers": 0, "layer_types": [FULL, FULL, FULL]}),
        ("qwen2", {**WINDOW, "max_window_layers": 3, "layer_types": [FULL, SLIDING, FULL]}),
        ("qwen2", {**WINDOW, "max_window_layers": 1, "layer_types": None}),
        ("qwen2", {"use_sliding_window": False, "sliding_window": 24, "layer_types": None}),
        ("mistral-window", {"layer_types": [SLIDING, FULL, SLIDING]}),
        ("mistral-window", {"layer_types": [FULL, FULL, FULL]}),
        ("llama", {"layer_types": [FULL, FULL, FULL]}),
    ],
)
def test_layers_that_slide_are_those_of_transformers(
    tmp_path: Path, family: str, changes: dict[str, Any]
) -> None:
    saved(family, tmp_path, changes)
    assert_equal(tmp_path)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("qwen3", {"layer_types": [SLIDING, FULL, FULL]}, "layer_types has 1 layers of sliding_"),
        ("llama", {"layer_types": [SLIDING] * 3}, "no sliding_window that holds for a LlamaFor"),
        ("qwen3", {**WINDOW, "layer_types": [FULL]}, "layer_types has 1 entries; expected one for"),
        ("qwen3", {**WINDOW, "layer_types": ["conv"] * 3}, "layer_types has 'conv'; supported are"),
        ("qwen3", {**WINDOW, "layer_types": "full"}, "layer_types has no list"),
    ],
)
def test_layers_of_another_kind_are_refused(
    tmp_path: Path, family: str, changes: dict[str, Any], message: str
) -> None:
    saved(family, tmp_path, {"use_sliding_window": False, **changes})
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


def test_a_planted_fault_in_the_windows_is_seen(tmp_path: Path) -> None:
    """The comparison fails where the layers that slide are others than transformers reads."""
    saved("qwen3", tmp_path, {**WINDOW, "layer_types": [SLIDING, FULL, FULL]})
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert_equal(tmp_path, reference)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text()) | {"layer_types": [FULL, FULL, SLIDING]}
    path.write_text(json.dumps(config))
    with pytest.raises(AssertionError):
        assert_equal(tmp_path, reference)


def test_yarn_beyond_the_positions_that_the_config_was_left_at(tmp_path: Path) -> None:
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    saved(
        "qwen2",
        tmp_path,
        {"max_position_embeddings": 32, "rope_scaling": scaling, "rope_parameters": None},
    )
    assert open_checkpoint(tmp_path).shape.max_position_embeddings == 128
    assert_equal(tmp_path)


TRUNK = {
    **{key: SIZES[key] for key in SIZES if key not in ("initializer_range", "num_hidden_layers")},
    "num_hidden_layers": 2,
    "initializer_range": 0.2,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "rope_scaling": {"type": "mrope", "mrope_section": [1, 2, 3]},
    "rope_theta": 640000.0,
    "vision_config": {
        "depth": 1,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_heads": 2,
        "out_hidden_size": 48,
        "fullatt_block_indexes": [0],
    },
}


@pytest.mark.parametrize("spelling", ["as saved", "flat"])
def test_the_text_trunk_of_a_model_for_pictures(tmp_path: Path, spelling: str) -> None:
    """Text alone gives the logits of the whole model, whose other tensors are left out."""
    torch.manual_seed(7)
    config = Qwen2_5_VLConfig(**json.loads(json.dumps(TRUNK)))
    reference = Qwen2_5_VLForConditionalGeneration(config).float().eval()
    for name, parameter in reference.named_parameters():
        if "norm" in name or name.endswith("bias"):
            torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.2)
    reference.save_pretrained(tmp_path)
    if spelling == "flat":
        settings = {**TRUNK, "architectures": ["Qwen2_5_VLForConditionalGeneration"]}
        settings |= {"model_type": "qwen2_5_vl"}
        (tmp_path / "config.json").write_text(json.dumps(settings))
    assert_equal(tmp_path, reference)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.shape.architecture == "Qwen2ForCausalLM"
    assert not [name for name in checkpoint.tensors if "visual" in name]


def test_greedy_tokens_of_a_trunk_beside_a_part_for_sound(tmp_path: Path) -> None:
    reference = make_reference("qwen2")
    reference.save_pretrained(tmp_path / "text")
    tokens = greedy(engine_of(open_checkpoint(tmp_path / "text"), dtype="float32"), PROMPT, 16)
    tensors = dict(reference.state_dict())
    others = ("local_transformer.norm.weight", "speech_embeddings.0.weight")
    tensors |= {name: torch.ones(3, 2) for name in others}
    reference.save_pretrained(tmp_path, state_dict=tensors)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text()) | {"architectures": ["MiMoAudioModel"], "group_size": 4}
    path.write_text(json.dumps(config))
    assert greedy(engine_of(open_checkpoint(tmp_path), dtype="float32"), PROMPT, 16) == tokens
