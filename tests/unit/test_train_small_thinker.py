"""tools/train_small_thinker.py: a seed decides what it writes, and what its text teaches."""

import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest
import torch

from thinslice.checkpoint.open import open_checkpoint
from thinslice.errors import ConfigError
from thinslice.text.reasoning import WRAP_UP
from thinslice.text.tokenizer import load_tokenizer
from tools import train_small_thinker
from tools.small_mtp_text import THOUGHT, TURN_END, encode
from tools.small_thinker_text import prompts, training_rows
from tools.train_small_mtp import Settings
from tools.train_small_thinker import CONFIG, make

SHORT = Settings(steps=2, rows=2, length=64, warmup=1, threads=1)
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(train_small_thinker, "NUM_EVALUATED", 2)
    monkeypatch.setattr(train_small_thinker, "LONGEST_ANSWER", 4)
    yield
    torch.use_deterministic_algorithms(False)


def test_the_same_seed_writes_the_same_bytes(tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        make(tmp_path / name, Settings(**{**vars(SHORT), "seed": seed}))
    first, same, other = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in "abc"
    )
    assert first == same
    assert first["model.safetensors"] != other["model.safetensors"]
    checkpoint = open_checkpoint(tmp_path / "a")
    assert checkpoint.shape.num_hidden_layers == CONFIG["num_hidden_layers"]
    template = load_tokenizer(checkpoint).chat_template
    assert template is not None
    assert template.takes_enable_thinking
    with pytest.raises(ConfigError, match="exists already"):
        make(tmp_path / "a", SHORT)


def test_it_learns_to_answer_after_an_end_that_it_does_not_learn_to_force() -> None:
    rows = list(islice(training_rows(random.Random(1), 384), 60))
    kinds = set()
    for ids, is_learned in rows:
        for place, token_id in enumerate(ids[:-1]):
            if token_id == THOUGHT:
                kinds.add((is_learned[place], is_learned[place + 1]))
            if token_id == TURN_END and is_learned[place]:
                assert is_learned[place - 1]
    # Ended by the model; ended for it, before an answer; and a thought that is closed and empty.
    assert kinds == {(True, True), (False, True), (False, False)}
    wrapped = encode(WRAP_UP)
    assert any(
        row[place : place + len(wrapped)] == wrapped
        for row, _ in rows
        for place, token_id in enumerate(row)
        if token_id == wrapped[0]
    )


def test_held_out_prompts_are_never_among_those_of_training() -> None:
    kept = {one.prompt for one in islice(prompts(random.Random(1), held_out=True), 200)}
    seen = {one.prompt for one in islice(prompts(random.Random(2), held_out=False), 2000)}
    assert not kept & seen
