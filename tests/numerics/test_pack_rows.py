"""Rows from disk into packed matrices: codes kept where they can be, else quantised."""

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.arrays import array_of
from tests.checkpoints import GgufOptions, tiny_config, write_gguf_model, write_safetensors_model
from tests.packer import repacked
from thinslice.checkpoint.index import Checkpoint, TensorEntry
from thinslice.checkpoint.open import open_checkpoint
from thinslice.checkpoint.reader import CheckpointReader, pack_rows
from thinslice.kernels.native_pack import quantized
from thinslice.kernels.packed import PackedWeight, empty, unpack
from thinslice.plan.packed_format import PackedFormat, keeps_codes
from thinslice.plan.shape_from_config import shape_from_config

NAMES = ["self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj"]
EXACT = {"Q4_0": "int4", "Q4_1": "int4m", "Q8_0": "int8"}


def packed_rows(
    checkpoint: Checkpoint, name: str, fmt: PackedFormat, start: int, stop: int
) -> PackedWeight:
    entry = checkpoint.tensors[name]
    raw = np.empty((stop - start) * entry.row_bytes, np.uint8)
    with CheckpointReader(checkpoint) as reader:
        reader.read_bytes(name, start, stop, raw)
    target = empty(fmt, stop - start, entry.shape[1])
    pack_rows(entry, start, raw, target)
    return target


def numbers(checkpoint: Checkpoint, name: str, start: int, stop: int) -> NDArray[np.float32]:
    out = np.empty((stop - start, checkpoint.tensors[name].shape[1]), np.float32)
    with CheckpointReader(checkpoint) as reader:
        reader.read_rows(name, start, stop, out)
    return out


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q8_0"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("fmt", list(PackedFormat))
def test_rows_of_a_gguf(dtype: str, name: str, fmt: PackedFormat, tmp_path: Path) -> None:
    """Codes that are kept give the file's own numbers; the rest what ``quantize`` makes of them."""
    path = tmp_path / "tiny.gguf"
    write_gguf_model(path, shape_from_config(tiny_config()), 3, GgufOptions(dtype=dtype))
    checkpoint = open_checkpoint(path)
    full = f"model.layers.1.{name}.weight"
    rows = checkpoint.tensors[full].shape[0]
    for start, stop in ((0, rows), (0, 16), (16, 32)):
        dense = numbers(checkpoint, full, start, stop)
        found = packed_rows(checkpoint, full, fmt, start, stop)
        if keeps_codes(dtype, fmt):
            assert np.array_equal(unpack(found), dense)
        else:
            assert np.array_equal(found.data, quantized(dense, fmt).data)
    assert keeps_codes(dtype, fmt) == (EXACT.get(dtype) == fmt)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rows_of_safetensors(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = write_safetensors_model(tmp_path, tiny_config(), dtype=dtype)
    checkpoint = open_checkpoint(tmp_path)
    for name, tensor in tensors.items():
        if tensor.ndim == 2:
            found = packed_rows(checkpoint, name, PackedFormat.INT4, 16, 32)
            given = array_of(tensor[16:32])
            assert np.array_equal(found.data, quantized(given, PackedFormat.INT4).data)


def test_reordered_rows_that_are_not_put_back_would_show(tmp_path: Path) -> None:
    """The planted fault: the same bytes with rows left where llama.cpp has them."""
    path = tmp_path / "tiny.gguf"
    write_gguf_model(path, shape_from_config(tiny_config()), 3, GgufOptions(dtype="Q8_0"))
    checkpoint = open_checkpoint(path)
    name = f"model.layers.0.{NAMES[0]}.weight"
    entry = checkpoint.tensors[name]
    assert entry.rotary_heads
    raw = np.empty(entry.num_bytes, np.uint8)
    with CheckpointReader(checkpoint) as reader:
        reader.read_bytes(name, 0, entry.shape[0], raw)
    faulty = repacked(raw.reshape(entry.shape[0], -1), "Q8_0", entry.shape[1])
    dense = numbers(checkpoint, name, 0, entry.shape[0])
    assert not np.array_equal(unpack(faulty), dense)
    found = packed_rows(checkpoint, name, PackedFormat.INT8, 0, entry.shape[0])
    assert np.array_equal(unpack(found), dense)


def test_rows_within_a_head_are_refused(tmp_path: Path) -> None:
    entry = TensorEntry("q", tmp_path, "F32", (64, 32), 0, 64 * 128, rotary_heads=2)
    with pytest.raises(AssertionError, match="within a head"):
        pack_rows(entry, 16, np.zeros(16 * 128, np.uint8), empty(PackedFormat.INT4, 16, 32))
