"""tools/make_references.py writes one model in several types, all from the same numbers."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind

from tests.checkpoints import GgufOptions, GgufTokenizer, tiny_config, write_gguf_model
from thinslice.checkpoint.index import Checkpoint
from thinslice.checkpoint.open import open_checkpoint
from thinslice.checkpoint.reader import CheckpointReader
from thinslice.errors import ConfigError
from thinslice.plan.shape_from_config import shape_from_config
from thinslice.text.tokenizer import BYTE_TO_CHARACTER, load_tokenizer
from tools import make_references
from tools.make_references import VERSIONS, write_references

TABLE = "model.embed_tokens.weight"


def tensors_of(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    tensors = {}
    with CheckpointReader(checkpoint) as reader:
        for name, entry in checkpoint.tensors.items():
            numbers = np.empty(entry.shape, np.float32)
            reader.read(name, numbers)
            tensors[name] = torch.from_numpy(numbers)
    return tensors


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied model of the Llama family, whose q and k rows a GGUF keeps in another order."""
    path = tmp_path_factory.mktemp("source") / "model.gguf"
    tokenizer = GgufTokenizer(
        (*BYTE_TO_CHARACTER, "ab", "<|im_end|>"), ("a b",), (1,) * 257 + (3,), pre="smollm"
    )
    write_gguf_model(
        path, shape_from_config(CONFIG), options=GgufOptions(dtype="Q8_0", tokenizer=tokenizer)
    )
    return path


CONFIG = tiny_config(vocab_size=258, tie_word_embeddings=True, bos_token_id=257, eos_token_id=257)


@pytest.fixture(scope="module")
def out(source: Path) -> Path:
    folder = source.parent / "references"
    write_references(source, CONFIG, folder)
    return folder


def test_bf16_holds_the_source_rounded_and_its_tokenizer(source: Path, out: Path) -> None:
    folder, given = open_checkpoint(out / "bf16"), open_checkpoint(source)
    assert folder.kind == "safetensors"
    assert {entry.dtype for entry in folder.tensors.values()} == {"BF16"}
    expected = tensors_of(given)
    for name, tensor in tensors_of(folder).items():
        assert torch.equal(tensor, expected[name].bfloat16().float()), name
    of_folder, of_source = load_tokenizer(folder), load_tokenizer(given)
    for text in ("a cab, 12 abs<|im_end|>", "ÄÖ\n\n  x"):
        ids = of_folder.encode(text, add_special_tokens=True)
        assert ids == of_source.encode(text, add_special_tokens=True)
        assert of_folder.decode(ids, skip_special_tokens=False) == text


@pytest.mark.parametrize(("name", "matrices", "table"), VERSIONS)
def test_each_gguf_is_bf16_quantised(out: Path, name: str, matrices: Kind, table: Kind) -> None:
    """Row by row, whatever their order; norms keep their numbers."""
    version = open_checkpoint(out / name)
    numbers = tensors_of(open_checkpoint(out / "bf16"))
    held = tensors_of(version)
    assert set(held) == set(numbers)
    for key, values in numbers.items():
        kind = Kind.F32 if values.ndim == 1 else table if key == TABLE else matrices
        assert version.tensors[key].dtype == kind.name
        expected = gguf.dequantize(gguf.quantize(values.numpy(), kind), kind)
        assert torch.equal(held[key], torch.from_numpy(expected.copy())), key
    tokens = load_tokenizer(version).encode("a cab", add_special_tokens=True)
    assert tokens == load_tokenizer(open_checkpoint(out / "bf16")).encode(
        "a cab", add_special_tokens=True
    )


def test_an_existing_folder_is_left_alone(source: Path, out: Path) -> None:
    files = sorted(path.name for path in out.iterdir())
    with pytest.raises(ConfigError, match="exists already"):
        write_references(source, CONFIG, out)
    assert sorted(path.name for path in out.iterdir()) == files
    assert files == ["bf16", "q4_0-pure.gguf", "q4_0.gguf", "q8_0.gguf"]


def test_what_is_broken_off_leaves_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(make_references, "write_gguf", full)
    with pytest.raises(OSError, match="No space"):
        write_references(source, CONFIG, tmp_path / "references")
    assert not list(tmp_path.iterdir())
