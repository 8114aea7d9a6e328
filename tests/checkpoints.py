"""Tiny random checkpoints on disk, as safetensors folders and as GGUF files, for all tests.

Both writers use the formats' own packages (safetensors, gguf), never thinslice's readers.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import save_file

from thinslice.checkpoint.names import expected_tensors
from thinslice.plan.model_shape import ModelShape
from thinslice.plan.shape_from_config import shape_from_config

_GGUF_ARCHITECTURES = {
    "LlamaForCausalLM": gguf.MODEL_ARCH.LLAMA,
    "MistralForCausalLM": gguf.MODEL_ARCH.LLAMA,
    "Qwen2ForCausalLM": gguf.MODEL_ARCH.QWEN2,
    "Qwen3ForCausalLM": gguf.MODEL_ARCH.QWEN3,
}


def tiny_config(architecture: str = "LlamaForCausalLM", **changes: Any) -> dict[str, Any]:
    """The config.json of a two-layer model; ``changes`` replace or add keys.

    Row sizes are multiples of 32, so that every simple GGUF block type can hold the model.
    """
    config = {
        "architectures": [architecture],
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": 512,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
    }
    if architecture == "MiMoForCausalLM":
        config["num_nextn_predict_layers"] = 1
    return config | changes


def random_tensors(
    shape: ModelShape, seed: int = 0, dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    """Every tensor of a model, scaled so that activations keep their size from layer to layer.

    Norms lie around one and biases around zero without being either, so a test that drops or swaps
    one can tell.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, size in expected_tensors(shape).items():
        values = torch.randn(size, generator=generator)
        if "norm" in name:
            values = 1.0 + 0.2 * values
        elif len(size) == 1:
            values = 0.2 * values
        elif "embed_tokens" not in name:
            values = values / size[1] ** 0.5
        tensors[name] = values.to(dtype)
    return tensors


def write_safetensors_model(
    folder: Path,
    config: Mapping[str, Any],
    seed: int = 0,
    shards: int = 1,
    dtype: torch.dtype = torch.bfloat16,
) -> dict[str, torch.Tensor]:
    """Write config.json and random tensors in one file or more; return the tensors."""
    tensors = random_tensors(shape_from_config(config), seed, dtype)
    write_safetensors(folder, tensors, shards)
    (folder / "config.json").write_text(json.dumps(config))
    return tensors


def write_safetensors(folder: Path, tensors: Mapping[str, torch.Tensor], shards: int = 1) -> None:
    """Write given tensors as model.safetensors, or as shards with their index."""
    folder.mkdir(parents=True, exist_ok=True)
    if shards == 1:
        save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
        return
    names = list(tensors)
    weight_map = {}
    for shard_idx in range(shards):
        file_name = f"model-{shard_idx + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in names[shard_idx::shards]}
        save_file(part, folder / file_name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file_name)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@dataclass(frozen=True)
class GgufTokenizer:
    """The tokenizer.* keys of a GGUF; ``more`` holds further ones without their prefix."""

    tokens: tuple[str, ...]
    merges: tuple[str, ...] = ()
    token_types: tuple[int, ...] = ()
    model: str = "gpt2"
    pre: str = "qwen2"
    chat_template: str = ""


@dataclass(frozen=True)
class GgufOptions:
    """How a GGUF is written.

    Attributes:
        dtype: ggml type of the matrices; vectors are always F32, as llama.cpp has them.
        other_dtypes: types of some matrices, by the end of their checkpoint name.
        max_tensors: if not 0, the file is split in parts of so many tensors.
        metadata: further keys and their values; a key of write_gguf_model's own is replaced.
        rope_factors: content of rope_freqs.weight.
    """

    dtype: str = "F32"
    tokenizer: GgufTokenizer | None = None
    max_tensors: int = 0
    metadata: Mapping[str, Any] | None = None
    rope_factors: tuple[float, ...] = ()
    other_dtypes: Mapping[str, str] = field(default_factory=dict)

    def type_of(self, name: str, tensor: torch.Tensor) -> gguf.GGMLQuantizationType:
        if tensor.ndim == 1:
            return gguf.GGMLQuantizationType.F32
        others = (dtype for end, dtype in self.other_dtypes.items() if name.endswith(end))
        return gguf.GGMLQuantizationType[next(others, self.dtype)]


def write_gguf_model(
    path: Path, shape: ModelShape, seed: int = 0, options: GgufOptions | None = None
) -> dict[str, torch.Tensor]:
    """Write random tensors as llama.cpp's converter does, q and k rows reordered for Llama.

    Returns the tensors under their checkpoint names, in float32 and in checkpoint order, with the
    values that the file's type holds.
    """
    options = options or GgufOptions()
    tensors = random_tensors(shape, seed)
    arch = _GGUF_ARCHITECTURES[shape.architecture]
    writer = gguf.GGUFWriter(
        path, gguf.MODEL_ARCH_NAMES[arch], split_max_tensors=options.max_tensors
    )
    _add_metadata(writer, shape, options)
    gguf_names = gguf.get_tensor_name_map(arch, shape.num_hidden_layers)
    for name, tensor in tensors.items():
        gguf_name = gguf_names.get_name(name, try_suffixes=(".weight", ".bias"))
        ggml_type = options.type_of(name, tensor)
        heads = _permuted_heads(name, shape) if arch == gguf.MODEL_ARCH.LLAMA else 0
        rows = _permute(tensor.numpy(), heads) if heads else tensor.numpy()
        content = gguf.quantize(rows, ggml_type)
        writer.add_tensor(gguf_name, content, raw_dtype=ggml_type)
        held = gguf.dequantize(content, ggml_type).reshape(rows.shape)
        tensors[name] = torch.from_numpy(_unpermute(held, heads) if heads else held.copy())
    if options.rope_factors:
        writer.add_tensor("rope_freqs.weight", np.array(options.rope_factors, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def _add_metadata(writer: gguf.GGUFWriter, shape: ModelShape, options: GgufOptions) -> None:
    writer.add_context_length(shape.max_position_embeddings)
    writer.add_embedding_length(shape.hidden_size)
    writer.add_block_count(shape.num_hidden_layers)
    writer.add_feed_forward_length(shape.intermediate_size)
    writer.add_head_count(shape.num_attention_heads)
    writer.add_head_count_kv(shape.num_key_value_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_layer_norm_rms_eps(shape.rms_norm_eps)
    writer.add_rope_freq_base(shape.rope_theta)
    if shape.bos_token_id is not None:
        writer.add_bos_token_id(shape.bos_token_id)
    if shape.eos_token_ids:
        writer.add_eos_token_id(shape.eos_token_ids[0])
    tokenizer = options.tokenizer
    if tokenizer is not None:
        writer.add_tokenizer_model(tokenizer.model)
        writer.add_tokenizer_pre(tokenizer.pre)
        writer.add_token_list(tokenizer.tokens)
        writer.add_token_types(tokenizer.token_types or (1,) * len(tokenizer.tokens))
        writer.add_token_merges(tokenizer.merges)
        writer.add_chat_template(tokenizer.chat_template)
    for key, value in (options.metadata or {}).items():
        value_type = gguf.GGUFValueType.get_type(value)
        is_size = value_type == gguf.GGUFValueType.INT32 and value >= 0
        writer.add_key_value(key, value, gguf.GGUFValueType.UINT32 if is_size else value_type)


def _permuted_heads(name: str, shape: ModelShape) -> int:
    if ".q_proj." in name:
        return shape.num_attention_heads
    return shape.num_key_value_heads if ".k_proj." in name else 0


def _permute(rows: np.ndarray, heads: int) -> np.ndarray:
    """Source: LlamaModel.permute in conversion/llama.py, ggml-org/llama.cpp."""
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(rows.shape))


def _unpermute(rows: np.ndarray, heads: int) -> np.ndarray:
    pairs = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(rows.shape))


# Ways in which something is there under a file's name and cannot be read as one.
UNREADABLE = ("folder", "loop", "long name", "dangling")


def make_unreadable(place: Path, kind: str) -> None:
    """Put something of that kind in a file's place."""
    place.unlink(missing_ok=True)
    if kind == "folder":
        place.mkdir()
        return
    targets = {"loop": place.name, "long name": "n" * 300, "dangling": "nothing"}
    place.symlink_to(targets[kind])
