"""Tiny packed checkpoints on disk, written the plain way: whole matrices, one after the other.

The format is written down here once more, apart from thinslice's own writer.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tests.arrays import array_of, tensor_of
from tests.checkpoints import random_tensors
from thinslice.kernels.native_pack import quantized
from thinslice.plan.packed_format import PackedFormat
from thinslice.plan.packing import Packing
from thinslice.plan.shape_from_config import shape_from_config

ALIGNMENT = 4096
DTYPES = {torch.uint8: "U8", torch.bfloat16: "BF16", torch.float32: "F32"}
Fields = dict[str, dict[str, Any]]


def write_packed_model(
    folder: Path, config: Mapping[str, Any], packing: Packing, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Write a packed model with random weights; return them as they were before, blocks cut."""
    tensors = cut_blocks(random_tensors(shape_from_config(config), seed), packing)
    folder.mkdir(parents=True, exist_ok=True)
    stored = {name: stored_tensor(name, one, config, packing) for name, one in tensors.items()}
    write_aligned(folder / "model.safetensors", stored)
    section = {"quantization_config": packing.to_dict()}
    (folder / "config.json").write_text(json.dumps({**config, **section}))
    return tensors


def cut_blocks(tensors: Mapping[str, torch.Tensor], packing: Packing) -> dict[str, torch.Tensor]:
    """Rows of gate and up, columns of down; down's bias goes with the first block."""
    cut: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if ".mlp." not in name:
            cut[name] = tensor
            continue
        prefix, rest = name.split(".mlp.")
        if rest == "down_proj.bias":
            cut[f"{prefix}.mlp.blocks.0.{rest}"] = tensor
            continue
        parts = tensor.split(packing.ffn_block, dim=int(rest == "down_proj.weight"))
        for idx, part in enumerate(parts):
            cut[f"{prefix}.mlp.blocks.{idx}.{rest}"] = part.contiguous()
    return cut


def stored_tensor(
    name: str, tensor: torch.Tensor, config: Mapping[str, Any], packing: Packing
) -> torch.Tensor:
    """A matrix as bytes, a vector as it is."""
    if tensor.ndim == 1:
        return tensor
    if name == "model.embed_tokens.weight" and not config["tie_word_embeddings"]:
        return tensor.to(torch.bfloat16)
    fmt = packing.weights if name.startswith("model.layers.") else packing.head
    return stored_bytes(tensor, fmt)


def stored_bytes(tensor: torch.Tensor, fmt: PackedFormat) -> torch.Tensor:
    """[panels, bytes of one], or for int4m [panels, groups, bytes of one]."""
    panels = -(-tensor.shape[0] // 16)
    data = tensor_of(quantized(array_of(tensor), fmt).data)
    if fmt is PackedFormat.INT4M:
        return data.view(panels, tensor.shape[1] // 32, -1)
    return data.view(panels, -1)


def write_aligned(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write a safetensors file in which each tensor starts at a multiple of 4096 bytes."""
    header: Fields = {}
    content = bytearray()
    for number, (name, tensor) in enumerate(tensors.items()):
        start = len(content)
        content += tensor.contiguous().view(torch.uint8).numpy().tobytes()
        header[name] = fields(DTYPES[tensor.dtype], list(tensor.shape), start, len(content))
        if missing := -len(content) % ALIGNMENT:
            start = len(content)
            content += bytes(missing)
            header[f"thinslice.padding.{number}"] = fields("U8", [missing], start, len(content))
    write_header(path, header, bytes(content))


def fields(dtype: str, shape: list[int], start: int, stop: int) -> dict[str, Any]:
    """What a header says of one tensor."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def write_header(path: Path, header: Fields, content: bytes) -> None:
    """The header, filled up with spaces to 4096 bytes, and the content."""
    text = json.dumps(header).encode()
    text += b" " * (-(len(text) + 8) % ALIGNMENT)
    path.write_bytes(len(text).to_bytes(8, "little") + text + content)


def read_header(path: Path) -> tuple[Fields, bytes]:
    """Header and content of a file."""
    everything = path.read_bytes()
    start = 8 + int.from_bytes(everything[:8], "little")
    return json.loads(everything[8:start]), everything[start:]
