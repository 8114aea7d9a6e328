"""A clone without Git LFS: each file of which there is only the pointer is named as one."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer, models

from tests.checkpoints import tiny_config, write_gguf_model, write_safetensors_model
from thinslice.checkpoint.open import open_checkpoint
from thinslice.errors import CheckpointError
from thinslice.plan.shape_from_config import shape_from_config
from thinslice.text.tokenizer import load_tokenizer

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'ab' * 32}\nsize 5368709120\n"


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "generation_config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    ],
)
def test_each_file_of_a_folder(tmp_path: Path, name: str) -> None:
    write_safetensors_model(tmp_path, tiny_config(), shards=2)
    vocab = {chr(33 + index): index for index in range(90)}
    Tokenizer(models.BPE(vocab=vocab, merges=[])).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / name).write_text(POINTER)
    with pytest.raises(CheckpointError) as caught:
        load_tokenizer(open_checkpoint(tmp_path))
    assert str(caught.value) == (
        f"{tmp_path / name} is a Git LFS pointer, not the file itself: fetch the file with git lfs "
        "pull in its folder, or download it again"
    )


def test_a_single_file_and_a_gguf(tmp_path: Path) -> None:
    write_safetensors_model(tmp_path / "folder", tiny_config())
    write_gguf_model(tmp_path / "model.gguf", shape_from_config(tiny_config()))
    for path, opened in (
        (tmp_path / "folder" / "model.safetensors", tmp_path / "folder"),
        (tmp_path / "model.gguf", tmp_path / "model.gguf"),
    ):
        path.write_text(POINTER)
        with pytest.raises(CheckpointError, match=f"{path.name} is a Git LFS pointer"):
            open_checkpoint(opened)
