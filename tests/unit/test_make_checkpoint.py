"""tools/make_checkpoint.py writes what other programs take for the published model."""

import json
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors import safe_open

from tests.checkpoints import GgufOptions, GgufTokenizer, tiny_config, write_gguf_model
from tests.engines import engine_of, greedy
from thinslice.checkpoint.index import Checkpoint
from thinslice.checkpoint.names import expected_tensors
from thinslice.checkpoint.open import open_checkpoint
from thinslice.errors import ConfigError
from thinslice.plan.shape_from_config import shape_from_config
from thinslice.plan.tensors import tensors_of
from thinslice.text.tokenizer import BYTE_TO_CHARACTER
from thinslice.text.tokenizer_files import read_tokenizer_files
from thinslice.units import GIB
from tools import make_checkpoint
from tools.make_checkpoint import CONFIGS, Job, main, write_checkpoint


def tensors_in(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """Read with the safetensors package."""
    tensors = {}
    for path in checkpoint.files:
        with safe_open(path, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return tensors


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ("tiny-mimo", "bfloat16"),
        ("tiny-qwen2", "float16"),
        ("tiny-llama", "float32"),
    ],
)
def test_a_checkpoint_opens_and_holds_random_values(tmp_path: Path, shape: str, dtype: str) -> None:
    out = tmp_path / "model"
    assert main(["--shape", shape, "--out", str(out), "--dtype", dtype]) == 0
    checkpoint = open_checkpoint(out)
    assert checkpoint.shape.dtype == dtype
    tensors = tensors_in(checkpoint)
    assert set(tensors) == set(expected_tensors(checkpoint.shape)) == set(checkpoint.tensors)
    for name, tensor in tensors.items():
        assert str(tensor.dtype) == f"torch.{dtype}"
        mean = 1.0 if "norm" in name else 0.0
        assert abs(float(tensor.double().mean()) - mean) < 0.01
        assert 0.01 < float(tensor.double().std()) < 0.03
    content = tensors["model.embed_tokens.weight"].view(torch.uint8).numpy().tobytes()
    assert len(zlib.compress(content)) > 0.6 * len(content)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_shards_and_index_are_as_transformers_writes_them(tmp_path: Path) -> None:
    out = tmp_path / "model"
    write_checkpoint(Job("tiny-mimo", out, shard_bytes=400_000))
    shards = sorted(path.name for path in out.glob("*.safetensors"))
    count = len(shards)
    assert count > 2
    assert shards == [f"model-{no:05}-of-{count:05}.safetensors" for no in range(1, count + 1)]
    assert all((out / name).stat().st_size < 410_000 for name in shards)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    checkpoint = open_checkpoint(out)
    assert index["metadata"]["total_size"] == checkpoint.num_bytes
    assert {name: entry.path.name for name, entry in checkpoint.tensors.items()} == index[
        "weight_map"
    ]
    assert set(tensors_in(checkpoint)) == set(checkpoint.tensors)


def test_the_seed_decides_the_values_and_no_two_matrices_are_equal(tmp_path: Path) -> None:
    def content(name: str, seed: int) -> dict[str, torch.Tensor]:
        write_checkpoint(Job("tiny-mimo", tmp_path / name, seed=seed))
        return tensors_in(open_checkpoint(tmp_path / name))

    first, again, other = content("first", 0), content("again", 0), content("other", 1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)
    gate = "model.layers.{}.mlp.gate_proj.weight"
    assert not torch.equal(first[gate.format(0)], first[gate.format(1)])


@pytest.mark.parametrize("start", [0, 7, 130, 500])
def test_the_greedy_text_of_a_cycle_begins_anew_after_so_many_tokens(
    start: int, tmp_path: Path
) -> None:
    write_checkpoint(Job("tiny-mimo", tmp_path / "model", cycle=16))
    first = start // 16 * 16
    engine = engine_of(open_checkpoint(tmp_path / "model"), "float32")
    tokens = greedy(engine, [3, 9, start], 40)
    assert tokens == [first + (start + 1 + i) % 16 for i in range(40)]


@pytest.mark.parametrize(
    ("shape", "cycle", "message"),
    [
        ("tiny-llama", 16, "no head of its own"),
        ("tiny-mimo", 12, "16 would do"),
        ("tiny-mimo", 1, "16 would do"),
    ],
)
def test_a_cycle_that_cannot_be_is_refused(
    shape: str, cycle: int, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        write_checkpoint(Job(shape, tmp_path / "model", cycle=cycle))
    assert not list(tmp_path.iterdir())


def test_mimo_has_the_published_number_of_parameters() -> None:
    """Source: 7833.409536 M as printed for MiMo-7B-RL-0530, prediction layer included."""
    shape = shape_from_config(CONFIGS["mimo-7b"])
    assert sum(tensor.numel for tensor in tensors_of(shape)) == 7_833_409_536
    job = Job("mimo-7b", Path("model"))
    assert len(make_checkpoint.split_into_shards(expected_tensors(shape), job)) == 4


def test_a_tokenizer_is_taken_from_another_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokens = (*BYTE_TO_CHARACTER, "ab", "<|im_end|>")
    tokenizer = GgufTokenizer(
        tokens, ("a b",), (1,) * 257 + (3,), chat_template="{{ messages[0].content }}"
    )
    config = tiny_config("Qwen2ForCausalLM", vocab_size=258, eos_token_id=257, bos_token_id=None)
    gguf = tmp_path / "model.gguf"
    write_gguf_model(gguf, shape_from_config(config), options=GgufOptions(tokenizer=tokenizer))
    out = tmp_path / "model"
    assert main(["--shape", "tiny-mimo", "--out", str(out), "--tokenizer", str(gguf)]) == 0
    files = read_tokenizer_files(open_checkpoint(out))
    assert files.backend.encode("a<|im_end|>", add_special_tokens=False).ids == [
        tokens.index("a"),
        257,
    ]
    assert files.templates.default == "{{ messages[0].content }}"
    assert files.special.eos_token == "<|im_end|>"


class _Usage(NamedTuple):
    total: int
    used: int
    free: int


def test_a_full_disk_is_told_in_one_line_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: _Usage(99 * GIB, 89 * GIB, 10 * GIB))
    assert main(["--shape", "mimo-7b", "--out", str(tmp_path / "a" / "model")]) == 6
    told = capsys.readouterr().err
    assert told == f"error: the checkpoint needs 14.59 GiB; {tmp_path} has 10.00 GiB free\n"
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--shape", "tiny-mimo", "--out", str(tmp_path)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def fail_on_write(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(make_checkpoint, "sync", full)


def interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(make_checkpoint, "sync", stop)


@pytest.mark.parametrize("break_off", [fail_on_write, interrupt])
def test_what_is_broken_off_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, break_off: Callable[[pytest.MonkeyPatch], None]
) -> None:
    break_off(monkeypatch)
    with pytest.raises((OSError, KeyboardInterrupt)):
        write_checkpoint(Job("tiny-mimo", tmp_path / "model"))
    assert not list(tmp_path.iterdir())
