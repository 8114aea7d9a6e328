"""tools/make_gguf.py writes a file that other readers take for a model of those sizes."""

import os
from math import prod
from pathlib import Path

import gguf
import numpy as np
import pytest

from thinslice.checkpoint.names import expected_tensors
from thinslice.plan.shape_from_config import shape_from_config
from tools import make_gguf
from tools.make_checkpoint import CONFIGS


@pytest.mark.parametrize("shape", ["tiny-mimo", "tiny-llama"])
@pytest.mark.parametrize("type_name", make_gguf.TYPES)
def test_a_second_reader_finds_every_number_where_it_should_be(
    shape: str, type_name: str, tmp_path: Path
) -> None:
    path = tmp_path / "model.gguf"
    assert make_gguf.main(["--shape", shape, "--type", type_name, "--out", str(path)]) == 0
    reader = gguf.GGUFReader(path)
    config = {**CONFIGS[shape], "num_nextn_predict_layers": 0}
    expected = expected_tensors(shape_from_config(config))
    assert len(reader.tensors) == len(expected)
    assert sum(int(tensor.n_elements) for tensor in reader.tensors) == sum(
        prod(sizes) for sizes in expected.values()
    )
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        mean = 1.0 if "norm" in tensor.name else 0.0
        assert np.isfinite(values).all()
        assert abs(values.mean() - mean) < 0.01
        assert 0.01 < values.std() < 0.03
        is_matrix = len(tensor.shape) == 2
        assert tensor.tensor_type.name == (type_name if is_matrix else "F32")


def test_the_sizes_stand_in_the_metadata(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    assert make_gguf.main(["--shape", "tiny-mimo", "--out", str(path)]) == 0
    fields = gguf.GGUFReader(path).fields
    assert fields["general.architecture"].contents() == "qwen2"
    assert fields["qwen2.block_count"].contents() == 2
    assert fields["qwen2.embedding_length"].contents() == 128
    assert fields["qwen2.attention.head_count_kv"].contents() == 2
    assert fields["qwen2.vocab_size"].contents() == 512
    assert fields["qwen2.rope.freq_base"].contents() == 640000


def test_a_file_that_is_there_is_not_touched(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"mine")
    assert make_gguf.main(["--shape", "tiny-mimo", "--out", str(path)]) == 2
    assert path.read_bytes() == b"mine"
    assert capsys.readouterr().err == f"error: {path} exists already; name a new file\n"


def test_an_interrupted_file_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(fd: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(make_gguf.os, "fsync", stop)
    with pytest.raises(KeyboardInterrupt):
        make_gguf.main(["--shape", "tiny-mimo", "--out", str(tmp_path / "model.gguf")])
    assert os.listdir(tmp_path) == []
