"""A head beside tied embeddings: used where it has values of its own, whatever the config says."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.arrays import tensor_of
from tests.checkpoints import random_tensors, tiny_config, write_safetensors
from thinslice.checkpoint import own_head
from thinslice.checkpoint.open import open_checkpoint
from thinslice.checkpoint.reader import CheckpointReader
from thinslice.errors import CheckpointError
from thinslice.kernels.arrays import BF16
from thinslice.plan.shape_from_config import shape_from_config

HEAD, TABLE = "lm_head.weight", "model.embed_tokens.weight"
CONFIG = tiny_config(tie_word_embeddings=True, vocab_size=40_000)


def write(folder: Path, changes: dict[str, torch.Tensor | None], shards: int = 1) -> None:
    """A model with tied embeddings and the tensors of ``changes``; None takes one away."""
    tensors: dict[str, Any] = random_tensors(shape_from_config(CONFIG), dtype=torch.bfloat16)
    tensors |= {name: value for name, value in changes.items() if value is not None}
    kept = {name: tensors[name] for name in tensors if changes.get(name, 0) is not None}
    write_safetensors(folder, kept, shards)
    (folder / "config.json").write_text(json.dumps(CONFIG))


def table() -> torch.Tensor:
    return random_tensors(shape_from_config(CONFIG), dtype=torch.bfloat16)[TABLE].clone()


@pytest.mark.parametrize("shards", [1, 2])
def test_an_equal_head_stays_tied(tmp_path: Path, shards: int) -> None:
    write(tmp_path, {HEAD: table()}, shards)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.shape.tie_word_embeddings
    assert HEAD not in checkpoint.tensors
    assert checkpoint.notes == ()


@pytest.mark.parametrize("row", [0, 12_345, 39_999])
@pytest.mark.parametrize("shards", [1, 2])
def test_one_other_value_makes_it_a_head_of_its_own(tmp_path: Path, row: int, shards: int) -> None:
    head = table()
    head[row, 63] += 1
    write(tmp_path, {HEAD: head}, shards)
    checkpoint = open_checkpoint(tmp_path)
    assert not checkpoint.shape.tie_word_embeddings
    assert checkpoint.shape.head_name == HEAD
    found = np.zeros((1, 64), BF16)
    with CheckpointReader(checkpoint) as reader:
        reader.read_rows(HEAD, row, row + 1, found)
    assert torch.equal(tensor_of(found)[0], head[row])


def test_a_difference_far_from_every_sample_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The twin compares samples alone, and takes the same head for the table."""
    head = table()
    head[1_300, 7] += 1
    write(tmp_path, {HEAD: head})
    assert not open_checkpoint(tmp_path).shape.tie_word_embeddings
    all_pieces = own_head._pieces
    monkeypatch.setattr(own_head, "_pieces", lambda size: list(all_pieces(size))[:16])
    assert open_checkpoint(tmp_path).shape.tie_word_embeddings


def test_a_head_of_another_type_is_one_of_its_own(tmp_path: Path) -> None:
    write(tmp_path, {HEAD: table().float()})
    assert not open_checkpoint(tmp_path).shape.tie_word_embeddings


def test_a_head_of_another_shape_is_refused(tmp_path: Path) -> None:
    write(tmp_path, {HEAD: table()[:-1].clone()})
    with pytest.raises(CheckpointError, match=r"1 misshapen: lm_head\.weight \(39999, 64\)"):
        open_checkpoint(tmp_path)


def test_a_head_without_a_table_is_the_table(tmp_path: Path) -> None:
    write(tmp_path, {HEAD: table(), TABLE: None})
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.shape.tie_word_embeddings
    found = np.zeros((2, 64), BF16)
    with CheckpointReader(checkpoint) as reader:
        reader.read_rows(TABLE, 5, 7, found)
    assert torch.equal(tensor_of(found), table()[5:7])


def test_without_a_head_nothing_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, {})
    monkeypatch.setattr(own_head, "_are_equal", lambda *_: pytest.fail("compared"))
    assert open_checkpoint(tmp_path).shape.tie_word_embeddings
