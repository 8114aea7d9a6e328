"""A float16 checkpoint: what is said of its numbers, and that this is what becomes of them."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.checkpoints import GgufOptions, GgufTokenizer, tiny_config, write_gguf_model
from tests.checkpoints import write_safetensors_model as write_folder
from thinslice.checkpoint.open import open_checkpoint
from thinslice.checkpoint.reader import CheckpointReader
from thinslice.config import EngineSettings
from thinslice.engine.prepare import float16_notes, prepare
from thinslice.kernels.arrays import FLOAT_DTYPES
from thinslice.kernels.native_pack import converted
from thinslice.memory.resident import LoadedDtypes, load_resident
from thinslice.plan.shape_from_config import shape_from_config
from thinslice.text.tokenizer import BYTE_TO_CHARACTER

ALL = "the model's 16 matrices are float16: "
ROUNDED = "rounded to bfloat16, which keeps 8 of their 11 significant bits"
EXACT = "computed with as float32, which holds each of their numbers exactly"
INT4 = "quantised to int4 and int8"
TOKENS = (*BYTE_TO_CHARACTER, "th", "<|im_end|>")
CONFIG = tiny_config(vocab_size=258, bos_token_id=None, eos_token_id=257)


def write_gguf(folder: Path, options: GgufOptions) -> Path:
    path = folder / "tiny.gguf"
    write_gguf_model(path, shape_from_config(CONFIG), 5, options)
    return path


@pytest.mark.parametrize(
    ("wanted", "note"),
    [
        ("auto", f"{ALL}{ROUNDED}; --dtype float32 keeps them all"),
        ("bfloat16", f"{ALL}{ROUNDED}; --dtype float32 keeps them all"),
        ("float32", f"{ALL}{EXACT}"),
        ("int8", f"{ALL}quantised to int8 and in the embedding table {ROUNDED}"),
        ("int4", f"{ALL}{INT4} and in the embedding table {ROUNDED}"),
    ],
)
def test_one_line_says_what_they_become(wanted: str, note: str, tmp_path: Path) -> None:
    write_folder(tmp_path, CONFIG, dtype=torch.float16)
    told = float16_notes(open_checkpoint(tmp_path), wanted)
    assert told == (note,)


@pytest.mark.parametrize(
    ("others", "note"),
    [
        ({"lm_head.weight": "F16"}, "quantised to int8"),
        ({"embed_tokens.weight": "F16"}, f"in the embedding table {ROUNDED}"),
        ({}, None),
    ],
)
def test_one_matrix_among_blocks(others: dict[str, str], note: str | None, tmp_path: Path) -> None:
    options = GgufOptions(dtype="Q8_0", other_dtypes=others)
    told = float16_notes(open_checkpoint(write_gguf(tmp_path, options)), "auto")
    assert told == (() if note is None else (f"1 of the model's 16 matrices are float16: {note}",))


@pytest.mark.parametrize("wanted", ["bfloat16", "float32"])
def test_the_numbers_become_that(wanted: str, tmp_path: Path) -> None:
    tensors = write_folder(tmp_path, CONFIG, dtype=torch.float16)
    dtypes = LoadedDtypes(FLOAT_DTYPES[wanted], np.dtype(np.float32))
    with CheckpointReader(open_checkpoint(tmp_path)) as reader:
        loaded = load_resident(reader, dtypes, has_predictions=False).tensors
    for name, tensor in tensors.items():
        kept = getattr(torch, wanted) if tensor.dim() == 2 else torch.float32
        numbers = converted(loaded[name], np.dtype(np.float32))
        assert np.array_equal(numbers, tensor.to(kept).float().numpy()), name
        is_exact = wanted == "float32" or tensor.dim() == 1
        assert np.array_equal(numbers, tensor.float().numpy()) == is_exact, name


def test_a_load_and_a_plan_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the model was packed first, and what runs has no float16 number."""
    monkeypatch.setenv("THINSLICE_HOME", str(tmp_path / "store"))
    tokenizer = GgufTokenizer(TOKENS, ("t h",), (*[1] * 257, 3))
    path = write_gguf(tmp_path, GgufOptions(dtype="F16", tokenizer=tokenizer))
    for dtype, begin in (("auto", ROUNDED), ("float32", EXACT), ("int8", "quantised to int8")):
        prepared = prepare(str(path), EngineSettings(memory="2GiB", context=64, dtype=dtype))
        told = [note for note in prepared.notes if "float16" in note]
        assert len(told) == 1
        assert told[0].startswith(ALL + begin)
        command = ["plan", str(path), "--memory", "200MiB", "--dtype", dtype]
        planned = subprocess.run(
            [sys.executable, "-m", "thinslice", *command],
            capture_output=True,
            text=True,
            check=True,
        )
        assert told[0] in " ".join(planned.stderr.split())
