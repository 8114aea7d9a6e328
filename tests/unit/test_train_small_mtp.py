"""tools/train_small_mtp.py: a seed decides what it writes, and only what was checked stays."""

import random
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import pytest
import torch

from tools import train_small_mtp
from tools.small_mtp_text import THINK, THOUGHT, encode, examples, training_rows
from tools.train_small_mtp import Settings, TrainedModel, main, make

SHORT = Settings(steps=2, rows=2, length=64, warmup=1, threads=1)
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(train_small_mtp, "NUM_EVALUATED", 4)
    monkeypatch.setattr(train_small_mtp, "LONGEST_ANSWER", 6)
    yield
    torch.use_deterministic_algorithms(False)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_same_seed_writes_the_same_bytes(tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        make(tmp_path / name, Settings(**{**vars(SHORT), "seed": seed}))
    first, same, other = (content(tmp_path / name) for name in "abc")
    assert first == same
    assert first["model.safetensors"] != other["model.safetensors"]
    assert sorted(first) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "training.json",
    ]


def swap_halves(tensors: dict[str, torch.Tensor]) -> None:
    name = "model.mtp_layers.0.input_proj.weight"
    tensors[name] = torch.cat(tensors[name].chunk(2, dim=1)[::-1], dim=1)


def lose_a_norm(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"] = 1.1 * tensors["model.norm.weight"]


@pytest.mark.parametrize("fault", [swap_halves, lose_a_norm])
def test_weights_that_give_other_logits_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Callable[[dict], None]
) -> None:
    save_file = train_small_mtp.save_file

    def save_changed(tensors: dict[str, torch.Tensor], *args: object, **more: object) -> None:
        fault(tensors)
        save_file(tensors, *args, **more)

    monkeypatch.setattr(train_small_mtp, "save_file", save_changed)
    with pytest.raises(AssertionError):
        make(tmp_path / "model", SHORT)
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--out", str(tmp_path)]) == 2
    assert "exists already" in capsys.readouterr().err


def test_only_answers_count() -> None:
    """The targets that are not ignored are those of the answers."""
    rows = list(islice(training_rows(random.Random(0), 60), 3))
    torch.manual_seed(0)
    model = TrainedModel(train_small_mtp.shape_from_config(train_small_mtp.CONFIG))
    with torch.no_grad():
        main_loss, mtp_losses = train_small_mtp._losses(model, rows)
        main_logits, drafted = model(torch.tensor([ids[:-1] for ids, _ in rows]))
        every = [(main_loss, main_logits, 1, 0)]
        every += [(loss, drafted[i], 2, i) for i, loss in enumerate(mtp_losses)]
        for loss, logits, ahead, first in every:
            picked = [
                -logits[row, place - ahead].log_softmax(0)[ids[place]]
                for row, (ids, is_answer) in enumerate(rows)
                for place in range(ahead + first, 58 + ahead)
                if is_answer[place]
            ]
            torch.testing.assert_close(loss, torch.stack(picked).mean())


def test_tags_are_tokens_of_their_own() -> None:
    assert encode("<think>a</think>b") == [THINK, ord("a"), THOUGHT, ord("b")]


def test_every_kind_comes_held_out_and_not() -> None:
    for held_out in (True, False):
        some = list(islice(examples(random.Random(1), held_out), 200))
        assert {one.kind for one in some} == {"sum", "count", "copy", "rename"}
        assert all(one.is_held_out == held_out for one in some)
