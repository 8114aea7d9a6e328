"""Rows decoded from bytes read elsewhere equal those the reader reads."""

from pathlib import Path

import numpy as np
import pytest

from tests.arrays import to_float32
from tests.checkpoints import GgufOptions, tiny_config, write_gguf_model
from thinslice.checkpoint.open import open_checkpoint
from thinslice.checkpoint.reader import CheckpointReader, decode_rows
from thinslice.plan.shape_from_config import shape_from_config


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16", "Q4_1", "Q8_0"])
@pytest.mark.parametrize("name", ["self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj"])
def test_decoded_rows_equal_read_rows(dtype: str, name: str, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf_model(path, shape_from_config(tiny_config()), 3, GgufOptions(dtype=dtype))
    checkpoint = open_checkpoint(path)
    entry = checkpoint.tensors[f"model.layers.1.{name}.weight"]
    row_bytes = entry.num_bytes // entry.shape[0]
    for start, stop in ((0, 16), (16, 32), (0, entry.shape[0])):
        expected = np.full((stop - start, entry.shape[1]), np.nan, np.float32)
        with CheckpointReader(checkpoint) as reader:
            reader.read_rows(entry.name, start, stop, expected)
        with path.open("rb") as file:
            file.seek(entry.offset + start * row_bytes)
            content = bytearray(b"x" + file.read((stop - start) * row_bytes))
        unaligned = np.frombuffer(content, np.uint8)[1:]
        for raw in (unaligned.copy(), unaligned):
            found = decode_rows(entry, start, raw)
            assert found.flags.aligned
            assert np.array_equal(to_float32(found), expected)
