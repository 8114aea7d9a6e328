"""The tool's folder is a packed checkpoint of finite numbers, and no half of one is left."""

from pathlib import Path

import numpy as np
import pytest

from thinslice.checkpoint.open import open_checkpoint
from thinslice.checkpoint.reader import CheckpointReader
from thinslice.kernels.packed import empty, unpack
from thinslice.plan.packed_format import PackedFormat
from tools import make_packed


@pytest.mark.parametrize("shape", ["tiny-mimo", "tiny-llama", "tiny-qwen2"])
@pytest.mark.parametrize("dtype", ["int4", "int8"])
def test_every_tensor_is_in_its_place(shape: str, dtype: str, tmp_path: Path) -> None:
    out = tmp_path / "model"
    assert make_packed.main(["--shape", shape, "--dtype", dtype, "--out", str(out)]) == 0
    checkpoint = open_checkpoint(out)
    assert checkpoint.packing is not None
    assert checkpoint.packing.weights == dtype
    with CheckpointReader(checkpoint) as reader:
        for name, entry in checkpoint.tensors.items():
            if entry.is_packed:
                packed = empty(PackedFormat(entry.dtype), *entry.shape)
                reader.read_bytes(name, 0, entry.shape[0], packed.data)
                assert unpack(packed).std() == pytest.approx(0.02, rel=0.1)
            else:
                values = np.empty(entry.shape, np.float32)
                reader.read(name, values)
                assert values.mean() == pytest.approx(float("norm" in name), abs=0.02)


def test_a_folder_that_exists_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert make_packed.main(["--shape", "tiny-llama", "--out", str(tmp_path)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
