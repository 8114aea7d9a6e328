"""Opening packed checkpoints: what is in them, and every refusal of what should not be."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.arrays import array_of
from tests.checkpoints import tiny_config
from tests.packed_checkpoints import (
    Fields,
    fields,
    read_header,
    stored_bytes,
    write_aligned,
    write_header,
    write_packed_model,
)
from thinslice.checkpoint.index import Checkpoint
from thinslice.checkpoint.names import expected_tensors
from thinslice.checkpoint.open import open_checkpoint
from thinslice.checkpoint.reader import CheckpointReader
from thinslice.errors import CheckpointError
from thinslice.kernels.arrays import empty_bytes
from thinslice.kernels.native_pack import quantized
from thinslice.kernels.packed import PackedWeight, unpack
from thinslice.plan.packed_format import PackedFormat
from thinslice.plan.packing import Packing
from thinslice.plan.shape_from_config import shape_from_config

PACKING = Packing(PackedFormat.INT4, PackedFormat.INT8, 64)
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
GATE = "model.layers.1.mlp.blocks.0.gate_proj.weight"


def read_packed(checkpoint: Checkpoint, name: str, start: int, stop: int) -> NDArray[np.float32]:
    entry = checkpoint.tensors[name]
    panels = -(-(stop - start) // 16)
    data = empty_bytes(panels * 16 * entry.row_bytes)
    with CheckpointReader(checkpoint) as reader:
        reader.read_bytes(name, start, stop, data)
    return unpack(PackedWeight(data, PackedFormat(entry.dtype), stop - start, entry.shape[1]))


@pytest.mark.parametrize(
    "architecture", ["LlamaForCausalLM", "Qwen3ForCausalLM", "MiMoForCausalLM"]
)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("weights", [PackedFormat.INT4, PackedFormat.INT8])
def test_everything_reads_back(
    architecture: str, tied: bool, weights: PackedFormat, tmp_path: Path
) -> None:
    config = tiny_config(architecture, tie_word_embeddings=tied, vocab_size=90, mlp_bias=True)
    packing = Packing(weights, PackedFormat.INT8, 64)
    tensors = write_packed_model(tmp_path, config, packing)
    checkpoint = open_checkpoint(tmp_path)
    assert (checkpoint.kind, checkpoint.packing) == ("safetensors", packing)
    assert checkpoint.shape == shape_from_config(config)
    sizes = {name: entry.shape for name, entry in checkpoint.tensors.items()}
    assert sizes == expected_tensors(checkpoint.shape, packing)
    assert sizes == {name: tuple(one.shape) for name, one in tensors.items()}
    assert f"{GATE.removesuffix('weight')}bias" in sizes or architecture != "LlamaForCausalLM"
    for name, tensor in tensors.items():
        entry = checkpoint.tensors[name]
        if not entry.is_packed:
            out = np.full(entry.shape, np.nan, np.float32)
            with CheckpointReader(checkpoint) as reader:
                reader.read(name, out)
            kept = tensor if tensor.ndim == 1 else tensor.bfloat16().float()
            assert np.array_equal(out, array_of(kept))
            continue
        fmt = weights if name.startswith("model.layers.") else PackedFormat.INT8
        assert entry.dtype == fmt
        dense = unpack(quantized(array_of(tensor), fmt))
        rows = len(tensor)
        assert np.array_equal(read_packed(checkpoint, name, 0, rows), dense)
        assert np.array_equal(read_packed(checkpoint, name, 16, rows), dense[16:])
        assert np.array_equal(read_packed(checkpoint, name, 0, 16), dense[:16])
    assert not any("padding" in name for name in sizes)


def test_an_int4_checkpoint_may_hold_int4m_matrices(tmp_path: Path) -> None:
    """At nine groups a panel of int4 and one of int4m have the same bytes; shapes tell them."""
    config = tiny_config(hidden_size=288)
    tensors = write_packed_model(tmp_path, config, PACKING)
    stored = tmp_path / "model.safetensors"
    packed = {name: one if one.ndim == 1 else one.bfloat16() for name, one in tensors.items()}
    for name, one in tensors.items():
        if one.ndim == 2 and name != "model.embed_tokens.weight":
            is_layer = name.startswith("model.layers.")
            fmt = PACKING.weights if is_layer else PACKING.head
            packed[name] = stored_bytes(one, PackedFormat.INT4M if name == Q_PROJ else fmt)
    write_aligned(stored, packed)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.tensors[Q_PROJ].dtype == "int4m"
    assert checkpoint.tensors[GATE].dtype == "int4"
    dense = unpack(quantized(array_of(tensors[Q_PROJ]), PackedFormat.INT4M))
    assert np.array_equal(read_packed(checkpoint, Q_PROJ, 0, 64), dense)


def rewrite(folder: Path, change: Callable[[Fields], None]) -> None:
    header, content = read_header(folder / "model.safetensors")
    change(header)
    write_header(folder / "model.safetensors", header, content)


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def quantization(**changes: Any) -> dict[str, Any]:
    return {"quantization_config": PACKING.to_dict() | changes}


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    write_packed_model(tmp_path, tiny_config(), PACKING)
    return tmp_path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h[Q_PROJ].update(shape=[2, 1152]), r"1 misshapen: .*q_proj\.weight \(2, 1152\)"),
        (lambda h: h[Q_PROJ].update(shape=[8, 576]), "span 2304 bytes, shape and dtype 4608"),
        (lambda h: h[Q_PROJ].update(shape=[1 << 62, 4]), "span 2304 bytes"),
        (lambda h: h[Q_PROJ].update(dtype="F32", shape=[64, 9]), r"misshapen: .* \(64, 9\)"),
        (lambda h: h[Q_PROJ].update(dtype="I8"), r"misshapen: .* \(4, 576\), not \(64, 64\)"),
        (lambda h: h[Q_PROJ].update(data_offsets=[0, 2304]), "where .* was expected"),
        (lambda h: h.pop(GATE), "starts at byte"),
        (lambda h: h.update({"x": h.pop(GATE)}), "1 missing: .*\n.*1 unexpected: 'x'"),
        (lambda h: h.update({"thinslice.padding.x": h.pop(GATE)}), "1 unexpected"),
        (lambda h: h.update({"thinslice.padding.9999": h.pop(GATE)}), "1 missing"),
        (lambda h: h["model.norm.weight"].update(dtype="U8", shape=[256]), "1 misshapen"),
        (lambda h: h["model.norm.weight"].update(dtype="BF16", shape=[128]), "1 misshapen"),
    ],
)
def test_headers_that_lie_are_refused(
    change: Callable[[Fields], object], message: str, packed: Path
) -> None:
    rewrite(packed, change)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(packed)


def test_a_vector_of_bytes_is_refused(tmp_path: Path) -> None:
    tensors = write_packed_model(tmp_path, tiny_config(), PACKING)
    header, content = read_header(tmp_path / "model.safetensors")
    norm = header["model.norm.weight"]
    start = norm["data_offsets"][0]
    norm.update(fields("U8", [64], start, start + 64))
    header["thinslice.padding.500"] = fields("U8", [192], start + 64, start + 256)
    write_header(tmp_path / "model.safetensors", header, content)
    assert tensors["model.norm.weight"].shape == (64,)
    with pytest.raises(CheckpointError, match=r"norm.weight is U8; expected BF16 or F16 or F32"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["lm_head.weight", GATE, Q_PROJ])
def test_a_matrix_of_floats_is_refused(name: str, tmp_path: Path) -> None:
    packing = Packing(PackedFormat.INT4, PackedFormat.INT4, 64)
    tensors = write_packed_model(tmp_path, tiny_config(), packing)
    packed = {
        one: tensor if tensor.ndim == 1 or "embed" in one else stored_bytes(tensor, packing.weights)
        for one, tensor in tensors.items()
    }
    packed[name] = tensors[name]
    write_aligned(tmp_path / "model.safetensors", packed)
    with pytest.raises(CheckpointError, match="is F32; expected int4"):
        open_checkpoint(tmp_path)


def test_a_matrix_at_an_odd_place_is_refused(packed: Path) -> None:
    header, content = read_header(packed / "model.safetensors")
    for entry in header.values():
        entry["data_offsets"] = [number + 64 for number in entry["data_offsets"]]
    header["thinslice.padding.500"] = fields("U8", [64], 0, 64)
    write_header(packed / "model.safetensors", header, bytes(64) + content)
    with pytest.raises(CheckpointError, match=r"starts at byte \d+, no multiple of 4096"):
        open_checkpoint(packed)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (quantization(version=2), "packed by another version of thinslice"),
        (quantization(ffn_block=0), "ffn_block is 0; expected a multiple of 64"),
        (quantization(ffn_block=64.0), "ffn_block is 64.0"),
        (quantization(weights="int4m"), "quantization_config.weights is 'int4m'"),
        (quantization(head="bfloat16"), "quantization_config.head is 'bfloat16'"),
        (quantization(ffn_block=128), "misshapen"),
        ({"intermediate_size": 100}, "multiple of 32 weights; intermediate_size is 100"),
        ({"hidden_size": 80}, "multiple of 32 weights; hidden_size is 80"),
        ({"head_dim": 10}, r"multiple of 32 weights; num_attention_heads \* head_dim is 40"),
        ({"intermediate_size": 1 << 19, "num_hidden_layers": 1024}, "too many tensors"),
        ({"quantization_config": None}, "is 'U8'; supported are BF16, F16, F32, so take"),
    ],
)
def test_settings_that_lie_are_refused(changes: dict[str, Any], message: str, packed: Path) -> None:
    change_config(packed, **changes)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(packed)


def test_a_truncated_file_is_refused(packed: Path) -> None:
    path = packed / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="truncated"):
        open_checkpoint(packed)


def test_another_file_name_is_refused(packed: Path) -> None:
    (packed / "model.safetensors").rename(packed / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors does not exist"):
        open_checkpoint(packed)
