"""What opening a model leaves in the process: its tokenizer, and no more than is said of it."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.checkpoints import (
    GgufOptions,
    GgufTokenizer,
    tiny_config,
    write_gguf_model,
    write_safetensors_model,
)
from tests.tiny_llm import write_model
from thinslice.checkpoint.open import open_checkpoint, with_vocabulary, without_vocabulary
from thinslice.config import EngineSettings
from thinslice.engine import prepare as prepare_module
from thinslice.engine.planning import Model, Opening, fit_model, plan_model
from thinslice.engine.prepare import open_files
from thinslice.errors import BudgetError
from thinslice.pack.pack import PackOptions, pack_model
from thinslice.plan.packed_format import PackedFormat
from thinslice.plan.shape_from_config import shape_from_config
from thinslice.text.tokenizer import load_tokenizer
from thinslice.units import GIB, MIB
from tools.make_vocabulary import make_vocabulary, write_vocabulary

# Qwen's and MiMo's, with the rows of the embedding that are no token's.
LARGE = 151_680
# As a command has it: no test's own memory is in it.
OPEN = """
import sys
from pathlib import Path
from thinslice.engine.prepare import open_files
from thinslice.memory.meter import current_rss_bytes, peak_rss_bytes
before = current_rss_bytes()
opened = open_files(Path(sys.argv[1]))
held = current_rss_bytes()
print(before, opened.took.tokenizer_bytes, held, opened.took.peak_bytes, peak_rss_bytes())
"""
# Pages of libraries' code that come while a tokenizer is made.
CODE_BYTES = 3 * MIB


def measure(path: Path) -> tuple[int, int]:
    """Bytes held before the model is opened, and those that its tokenizer adds; what is held after
    it is the sum of both, and the peak is known."""
    done = subprocess.run(
        [sys.executable, "-c", OPEN, str(path)], capture_output=True, text=True, check=True
    )
    before, tokenizer, held, told, peak = map(int, done.stdout.split())
    assert abs(held - before - tokenizer) <= CODE_BYTES
    assert told == peak >= held
    return before, tokenizer


def test_the_embedded_model(smollm2_path: Path) -> None:
    before, tokenizer = measure(smollm2_path)
    assert before <= 60 * MIB
    # With the vocabulary of its header it is 26 MiB, and 3 MiB more before free pages go back.
    assert 8 * MIB <= tokenizer <= 20 * MIB


@pytest.mark.parametrize("kind", ["folder", "gguf"])
def test_a_large_vocabulary(kind: str, tmp_path: Path) -> None:
    """A tokenizer takes 46 or 39 MiB; 98 or 79 where free pages or the header's text are kept."""
    ids = {"bos_token_id": LARGE - 3, "eos_token_id": LARGE - 1}
    config = tiny_config("Qwen2ForCausalLM", vocab_size=LARGE, hidden_size=32, **ids)
    if kind == "folder":
        write_safetensors_model(tmp_path, config)
        write_vocabulary(tmp_path, LARGE)
        path = tmp_path
    else:
        made = make_vocabulary(LARGE)
        tokenizer = GgufTokenizer(made.tokens, made.merges, made.types)
        path = tmp_path / "model.gguf"
        options = GgufOptions(tokenizer=tokenizer, dtype="Q4_0")
        write_gguf_model(path, shape_from_config(config), 1, options)
    assert 20 * MIB <= measure(path)[1] <= 60 * MIB


def test_what_is_measured_is_never_negative(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another thread may let go of more than the tokenizer takes."""
    held = iter([100 * MIB, 90 * MIB])
    monkeypatch.setattr(prepare_module, "anonymous_bytes", lambda: next(held))
    assert open_files(write_model(tmp_path / "tiny.gguf")).took.tokenizer_bytes == 0


@pytest.mark.parametrize("tokenizer_bytes", [0, 30 * MIB, GIB])
def test_both_parts_are_what_the_process_holds(tokenizer_bytes: int, tmp_path: Path) -> None:
    """And all else of the plan is as without the second one."""
    checkpoint = open_checkpoint(write_model(tmp_path / "tiny.gguf"))
    settings = EngineSettings(memory="2GiB", context=64)
    alone = dict(plan_model(Model.of(checkpoint), settings, 100 * MIB).parts)
    model = Model.of(checkpoint, Opening(tokenizer_bytes))
    parts = dict(plan_model(model, settings, 100 * MIB).parts)
    taken = min(tokenizer_bytes, 100 * MIB)
    assert alone["tokenizer"] == 0
    assert parts == alone | {"runtime": alone["runtime"] - taken, "tokenizer": taken}


def test_what_opening_took_has_to_fit_too(tmp_path: Path) -> None:
    """The tokenizer is there before there is a plan, which needs less than its making did."""
    checkpoint = open_checkpoint(write_model(tmp_path / "tiny.gguf"))
    model = Model.of(checkpoint, Opening(20 * MIB, 200 * MIB))
    settings = EngineSettings(memory="199MiB", context=64)
    with pytest.raises(BudgetError) as refused:
        fit_model(model, settings, 50 * MIB)
    first, second = str(refused.value).splitlines()
    assert "took 200.00 MiB, which does not fit --memory 199MiB" in first
    assert second == "  this fits: --memory 204MiB"
    fitted = fit_model(model, EngineSettings(memory="204MiB", context=64), 50 * MIB)
    assert fitted.plan.peak_bytes < 199 * MIB


def test_a_gguf_is_kept_without_its_vocabulary(tmp_path: Path) -> None:
    path = write_model(tmp_path / "tiny.gguf")
    whole, kept = open_checkpoint(path), open_files(path).checkpoint
    lists = {"tokenizer.ggml.tokens", "tokenizer.ggml.merges", "tokenizer.ggml.token_type"}
    assert set(whole.metadata) - set(kept.metadata) == lists
    assert dict(with_vocabulary(kept).metadata) == dict(whole.metadata)
    assert with_vocabulary(whole) is whole
    assert without_vocabulary(whole).tensors == whole.tensors


def test_a_gguf_that_was_opened_is_packed_with_its_tokenizer(tmp_path: Path) -> None:
    path = write_model(tmp_path / "tiny.gguf")
    source = open_files(path).checkpoint
    pack_model(source, tmp_path / "out", PackOptions(PackedFormat("int8"), "tiny"))
    packed = load_tokenizer(open_checkpoint(tmp_path / "out"))
    text = "the <|im_end|>"
    ids = load_tokenizer(open_checkpoint(path)).encode(text, add_special_tokens=True)
    assert packed.encode(text, add_special_tokens=True) == ids
