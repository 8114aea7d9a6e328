"""A packed model is the quantised source, bit for bit, from every kind of source."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors import safe_open

from tests.arrays import array_of, tensor_of
from tests.checkpoints import (
    GgufOptions,
    tiny_config,
    write_gguf_model,
    write_safetensors_model,
)
from tests.packed_checkpoints import cut_blocks, stored_bytes, write_packed_model
from tests.packer import repacked
from thinslice.checkpoint.index import Checkpoint, TensorEntry
from thinslice.checkpoint.names import expected_tensors
from thinslice.checkpoint.open import open_checkpoint
from thinslice.checkpoint.reader import CheckpointReader
from thinslice.kernels.arrays import empty_bytes
from thinslice.kernels.native_pack import quantized
from thinslice.kernels.packed import PackedWeight, unpack
from thinslice.pack import layout
from thinslice.pack.convert import convert
from thinslice.pack.pack import PackOptions, pack_model
from thinslice.plan.model_shape import ModelShape
from thinslice.plan.packed_format import PackedFormat
from thinslice.plan.packing import Packing
from thinslice.plan.shape_from_config import shape_from_config

INT4, INT4M, INT8 = PackedFormat.INT4, PackedFormat.INT4M, PackedFormat.INT8
# Blocks of 64 in a feed-forward of 160: three, the last one shorter.
SMALL = {"intermediate_size": 160, "vocab_size": 90}


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many slices and several blocks, also of a tiny model."""
    monkeypatch.setattr(layout, "_SLICE_WEIGHTS", 2048)
    monkeypatch.setattr("thinslice.plan.packing._BLOCK_WEIGHTS", 64 * 64)


def packed_from(source: Path, out: Path, fmt: PackedFormat) -> Checkpoint:
    pack_model(open_checkpoint(source), out, PackOptions(fmt, "tiny"))
    checkpoint = open_checkpoint(out)
    assert checkpoint.packing == Packing(fmt, INT8, 64)
    return checkpoint


def dense(checkpoint: Checkpoint, name: str) -> NDArray[np.float32]:
    entry = checkpoint.tensors[name]
    with CheckpointReader(checkpoint) as reader:
        if not entry.is_packed:
            out = np.empty(entry.shape, np.float32)
            reader.read(name, out)
            return out
        data = empty_bytes(entry.num_bytes)
        reader.read_bytes(name, 0, entry.shape[0], data)
    return unpack(PackedWeight(data, PackedFormat(entry.dtype), *entry.shape))


def expected_values(
    name: str, tensor: torch.Tensor, fmt: PackedFormat, shape: ModelShape
) -> torch.Tensor:
    """What a packed file holds of a tensor, in float32."""
    if tensor.ndim == 1:
        return tensor.float()
    if name == "model.embed_tokens.weight" and not shape.tie_word_embeddings:
        return tensor.bfloat16().float()
    wanted = fmt if name.startswith("model.layers.") else INT8
    return tensor_of(unpack(quantized(array_of(tensor), wanted)))


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
        ("LlamaForCausalLM", {"tie_word_embeddings": True}),
        ("Qwen2ForCausalLM", {}),
        ("Qwen3ForCausalLM", {}),
        ("MiMoForCausalLM", {"num_nextn_predict_layers": 2}),
        ("MiMoForCausalLM", {"tie_word_embeddings": True}),
    ],
)
@pytest.mark.parametrize("fmt", [INT4, INT8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_safetensors(
    architecture: str, changes: dict[str, Any], fmt: PackedFormat, dtype: torch.dtype,
    tmp_path: Path,
) -> None:  # fmt: skip
    config = tiny_config(architecture, **SMALL, **changes)
    tensors = write_safetensors_model(tmp_path / "source", config, shards=2, dtype=dtype)
    packed = packed_from(tmp_path / "source", tmp_path / "out", fmt)
    shape = shape_from_config(config)
    assert packed.shape == shape
    assert packed.packing is not None
    # A row's scales are chosen by the whole row, so what is cut is cut afterwards.
    expected = {name: expected_values(name, one, fmt, shape) for name, one in tensors.items()}
    cut = cut_blocks(expected, packed.packing)
    assert list(packed.tensors) == list(expected_tensors(shape, packed.packing))
    for name, tensor in cut.items():
        assert np.array_equal(dense(packed, name), array_of(tensor)), name
        if tensor.ndim == 1:
            assert packed.tensors[name].dtype == {2: "BF16", 4: "F32"}[dtype.itemsize]


def test_another_writer_makes_the_same_tensors(tmp_path: Path) -> None:
    """The tests' own writer of packed checkpoints, and safetensors' own reader; of one block, for
    that writer chooses the scales of each block by its own columns.
    """
    config = tiny_config("MiMoForCausalLM", **{**SMALL, "intermediate_size": 64})
    write_safetensors_model(tmp_path / "source", config, dtype=torch.float32)
    packed = packed_from(tmp_path / "source", tmp_path / "out", INT4)
    assert packed.packing is not None
    write_packed_model(tmp_path / "plain", config, packed.packing)
    files = [tmp_path / folder / "model.safetensors" for folder in ("out", "plain")]
    with safe_open(files[0], "pt") as ours, safe_open(files[1], "pt") as plain:
        names = [name for name in ours.keys() if "padding" not in name]  # noqa: SIM118
        assert sorted(names) == sorted(packed.tensors)
        for name in names:
            assert torch.equal(ours.get_tensor(name), plain.get_tensor(name))


def test_order_and_places_of_the_file(tmp_path: Path) -> None:
    config = tiny_config("MiMoForCausalLM", **SMALL)
    write_safetensors_model(tmp_path / "source", config)
    packed = packed_from(tmp_path / "source", tmp_path / "out", INT4)
    in_file = sorted(packed.tensors.values(), key=lambda entry: entry.offset)
    names = [entry.name for entry in in_file]
    matrices = [entry.name for entry in in_file if len(entry.shape) == 2]
    num_vectors = len(names) - len(matrices)
    assert names[0] == matrices[0] == "model.embed_tokens.weight"
    assert matrices[1:] == names[1 + num_vectors :], "vectors lie together"
    blocks = [f"mlp.blocks.{b}.{p}_proj" for b in range(3) for p in ("gate", "up", "down")]
    layer = [f"self_attn.{one}_proj" for one in "qkvo"] + blocks
    assert matrices[1:] == [
        *(f"model.layers.{idx}.{name}.weight" for idx in range(2) for name in layer),
        "lm_head.weight",
        *(f"model.mtp_layers.0.{name}.weight" for name in ["input_proj", *layer]),
    ]
    assert all(packed.tensors[name].offset % 4096 == 0 for name in matrices)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q8_0"])
@pytest.mark.parametrize("fmt", [INT4, INT8])
@pytest.mark.parametrize("tied", [False, True])
def test_gguf(dtype: str, fmt: PackedFormat, tied: bool, tmp_path: Path) -> None:
    """Codes that the format has are kept: then the numbers are the file's own."""
    shape = shape_from_config(tiny_config(**SMALL, tie_word_embeddings=tied))
    path = tmp_path / "tiny.gguf"
    tensors = write_gguf_model(path, shape, 3, GgufOptions(dtype=dtype))
    packed = packed_from(path, tmp_path / "out", fmt)
    assert packed.shape == shape
    assert packed.packing is not None
    is_kept = (dtype, fmt) in (("Q4_0", INT4), ("Q4_1", INT4), ("Q8_0", INT8))
    is_head_kept = is_kept or dtype == "Q8_0"
    expected = {name: expected_values(name, one, fmt, shape) for name, one in tensors.items()}
    numbers = cut_blocks(tensors, packed.packing)
    for name, wanted in cut_blocks(expected, packed.packing).items():
        is_head = name in ("lm_head.weight", "model.embed_tokens.weight")
        keeps = (is_head_kept and packed.tensors[name].is_packed) if is_head else is_kept
        keeps = keeps and wanted.ndim == 2
        values = numbers[name] if keeps else wanted
        assert np.array_equal(dense(packed, name), array_of(values)), name
    is_int4m = dtype == "Q4_1" and fmt is INT4
    assert packed.tensors["model.layers.1.mlp.blocks.1.down_proj.weight"].dtype == (
        "int4m" if is_int4m else fmt
    )


def test_a_block_cut_at_another_column_would_show(tmp_path: Path) -> None:
    """The planted fault: down's second block one pair of groups too early."""
    config = tiny_config(intermediate_size=256)
    tensors = write_safetensors_model(tmp_path / "source", config)
    packed = packed_from(tmp_path / "source", tmp_path / "out", INT4)
    down = tensors["model.layers.0.mlp.down_proj.weight"]
    found = dense(packed, "model.layers.0.mlp.blocks.1.down_proj.weight")
    whole = unpack(quantized(array_of(down), INT4))
    assert np.array_equal(found, whole[:, 64:128])
    assert not np.array_equal(found, whole[:, :64])
    assert stored_bytes(down[:, 64:128], INT4).shape == (4, 576)


@pytest.mark.parametrize("slice_weights", [1, 5000, 1 << 20])
@pytest.mark.parametrize("memory_bytes", [None, 1 << 40])
def test_slices_and_threads_do_not_show(
    slice_weights: int, memory_bytes: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_safetensors_model(tmp_path / "source", tiny_config(**SMALL))
    source = open_checkpoint(tmp_path / "source")
    pack_model(source, tmp_path / "first", PackOptions(INT4, "tiny"))
    monkeypatch.setattr(layout, "_SLICE_WEIGHTS", slice_weights)
    pack_model(source, tmp_path / "second", PackOptions(INT4, "tiny", memory_bytes))
    contents = [
        {path.name: path.read_bytes() for path in (tmp_path / folder).iterdir()}
        for folder in ("first", "second")
    ]
    assert contents[0] == contents[1]
    assert set(contents[0]) == {"config.json", "model.safetensors", "thinslice.json"}


def test_config_of_a_folder_is_kept(tmp_path: Path) -> None:
    config = tiny_config(rope_scaling={"rope_type": "yarn", "factor": 4.0}, something="else")
    write_safetensors_model(tmp_path / "source", config)
    (tmp_path / "source" / "generation_config.json").write_text(
        '{"eos_token_id": [2, 7], "temperature": 0.4}'
    )
    (tmp_path / "source" / "tokenizer.json").write_text("{}")
    (tmp_path / "source" / "modeling_tiny.py").write_text("raise SystemExit")
    packed = packed_from(tmp_path / "source", tmp_path / "out", INT4)
    assert packed.shape == open_checkpoint(tmp_path / "source").shape
    assert packed.shape.eos_token_ids == (2, 7)
    assert packed.sampling == {"temperature": 0.4}
    assert packed.packing is not None
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written == config | {"quantization_config": packed.packing.to_dict()}
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "thinslice.json",
        "tokenizer.json",
    ]


def test_codes_of_q4_k_are_kept_although_blocks_cut_through_its_own(tmp_path: Path) -> None:
    """Q4_K keeps 256 weights together, a block of a feed-forward ends at any multiple of 64."""
    rows, columns = 32, 512
    bits = np.random.default_rng(0).integers(0, 256, (rows, columns // 256, 144), dtype=np.uint8)
    bits[..., :4] = np.array([0.01, 0.02], dtype=np.float16).view(np.uint8)
    path = tmp_path / "blocks"
    path.write_bytes(bits.tobytes())
    name = "model.layers.0.mlp.down_proj.weight"
    entry = TensorEntry(name, path, "Q4_K", (rows, columns), 0, bits.size)
    source = Checkpoint(tmp_path, "gguf", shape_from_config(tiny_config()), {name: entry}, (path,))
    whole = unpack(repacked(bits.reshape(rows, -1), "Q4_K", columns))
    edges = [(0, 192), (192, 384), (384, 512)]
    targets = tuple(layout.Target(f"{one}", 0, 0, (0, rows), one) for one in edges)
    work = layout.Work(entry, INT4M, "F32", targets)
    with CheckpointReader(source) as reader:
        parts = [data for _, data in convert(reader, work, 0, rows)]
    for (first, last), data in zip(edges, parts, strict=True):
        aligned = empty_bytes(data.size)
        aligned[:] = data
        part = unpack(PackedWeight(aligned, INT4M, rows, last - first))
        assert np.array_equal(part, whole[:, first:last])
