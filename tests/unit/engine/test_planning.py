"""Which files a model runs from: its own, or a packed copy of them."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.checkpoints import (
    GgufOptions,
    GgufTokenizer,
    tiny_config,
    write_gguf_model,
    write_safetensors_model,
)
from tests.engines import engine_of, logits_of
from thinslice.checkpoint.open import open_checkpoint
from thinslice.config import EngineSettings
from thinslice.engine.planning import Model, fit_model
from thinslice.engine.prepare import prepare
from thinslice.errors import ConfigError, StoreError
from thinslice.kernels import native
from thinslice.memory.ledger import ledger
from thinslice.pack import stored as stored_module
from thinslice.pack.pack import PackOptions, pack_model
from thinslice.plan import choose
from thinslice.plan.packed_format import PackedFormat
from thinslice.plan.shape_from_config import shape_from_config
from thinslice.text.tokenizer import BYTE_TO_CHARACTER

PROMPT = [3, 17, 5, 88, 41, 9, 60]
# What a GGUF is written with, what it is computed with, and the formats of a packed layer.
MIXED = GgufOptions(
    dtype="Q4_0", other_dtypes={"v_proj.weight": "Q5_0", "down_proj.weight": "Q4_1"}
)
KINDS = {
    "Q5_0": (GgufOptions(dtype="Q5_0"), "int8", {"int8"}),
    "mixed": (MIXED, "int4", {"int4", "int4m", "int8"}),
    "F16 in layers": (
        GgufOptions(
            dtype="Q4_0", other_dtypes={"v_proj.weight": "Q5_0", "down_proj.weight": "F16"}
        ),
        "int4",
        {"int4", "int8"},
    ),
    "Q5_0 and four bits": (
        GgufOptions(
            "Q5_0",
            other_dtypes={
                "v_proj.weight": "Q4_0",
                "down_proj.weight": "Q4_1",
                "lm_head.weight": "Q4_0",
            },
        ),
        "int8",
        {"int4", "int4m", "int8"},
    ),
    "F16 head": (
        GgufOptions(dtype="Q8_0", other_dtypes={"lm_head.weight": "F16"}),
        "int8",
        {"int8"},
    ),
}


def write(folder: Path, options: GgufOptions) -> Path:
    path = folder / "tiny.gguf"
    tokens = (*BYTE_TO_CHARACTER, "th", "<|im_end|>")
    tokenizer = GgufTokenizer(tokens, ("t h",), (*[1] * 257, 3))
    config = tiny_config(vocab_size=258, bos_token_id=None, eos_token_id=257)
    write_gguf_model(path, shape_from_config(config), 5, replace(options, tokenizer=tokenizer))
    return path


@pytest.fixture
def streamed_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """No budget holds the weights."""
    monkeypatch.setattr(choose, "resident", lambda *args: ())


@pytest.mark.parametrize("kind", KINDS)
def test_the_copy_that_is_planned_is_the_one_that_packing_makes(kind: str, tmp_path: Path) -> None:
    options, dtype, formats = KINDS[kind]
    source = open_checkpoint(write(tmp_path, options))
    planned = Model.of(source).packed_copy
    assert planned is not None
    assert planned.own_dtype == dtype
    pack_model(source, tmp_path / "out", PackOptions(PackedFormat(dtype), "tiny"))
    packed = Model.of(open_checkpoint(tmp_path / "out"))
    assert planned.layout("auto") == packed.layout("auto")
    layers = [matrix for layer in packed.layout("auto").layers for matrix in layer]
    assert {matrix.kept for matrix in layers} == formats
    assert not any(matrix.is_converted for matrix in layers)


@pytest.mark.usefixtures("streamed_only")
@pytest.mark.parametrize("kind", KINDS)
def test_blocks_without_a_packed_twin_are_packed_once_to_be_streamed(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the bits that the model has in memory."""
    options, dtype, _ = KINDS[kind]
    monkeypatch.setenv("THINSLICE_HOME", str(tmp_path / "store"))
    path, told = write(tmp_path, options), list[str]()
    settings = EngineSettings(memory="2GiB", context=64)
    prepared = prepare(str(path), settings, lambda what, done, total: told.append(what))
    opened = prepared.checkpoint
    assert opened.packing is not None
    assert any("packing" in what for what in told)
    fitted = fit_model(Model.of(open_checkpoint(path)), settings)
    assert fitted.is_to_be_packed
    assert fitted.model.layout("auto") == Model.of(opened).layout("auto")
    assert fitted.plan.streaming is not None
    assert prepared.plan.streaming is not None
    told.clear()
    assert prepare(str(path), settings).checkpoint.path == opened.path
    expected = logits_of(engine_of(open_checkpoint(path), dtype), PROMPT)
    assert np.array_equal(logits_of(engine_of(opened, dtype), PROMPT), expected)


@pytest.mark.parametrize("dtype", ["Q5_0", "Q4_0"])
def test_in_memory_a_model_runs_from_its_own_files(dtype: str, tmp_path: Path) -> None:
    path = write(tmp_path, GgufOptions(dtype=dtype))
    model = Model.of(open_checkpoint(path))
    assert fit_model(model, EngineSettings(memory="2GiB")).model is model


@pytest.mark.usefixtures("streamed_only")
def test_what_can_be_streamed_as_it_is_runs_from_its_own_files(tmp_path: Path) -> None:
    """Blocks that keep their codes, floats, and blocks computed with as numbers."""
    settings = EngineSettings(memory="2GiB")
    for dtype in ("Q4_0", "Q8_0", "F16"):
        model = Model.of(open_checkpoint(write(tmp_path, GgufOptions(dtype=dtype))))
        assert fit_model(model, settings).model is model
    as_numbers = EngineSettings(memory="2GiB", dtype="float32")
    model = Model.of(open_checkpoint(write(tmp_path, GgufOptions(dtype="Q5_0"))))
    assert fit_model(model, as_numbers).model is model
    write_safetensors_model(tmp_path / "bf16", tiny_config())
    model = Model.of(open_checkpoint(tmp_path / "bf16"))
    assert fit_model(model, settings).model is model


@pytest.mark.usefixtures("streamed_only")
def test_a_packing_that_fails_leaves_no_promise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also while its error is kept, as a notebook keeps the last one."""

    def fail(*_: object, **__: object) -> Path:
        raise StoreError("the disk is full")

    monkeypatch.setattr(stored_module, "ensure_packed", fail)
    path, before = write(tmp_path, GgufOptions(dtype="Q5_0")), ledger().promised_bytes()
    with pytest.raises(StoreError, match="the disk is full") as kept:
        prepare(str(path), EngineSettings(memory="2GiB", context=64))
    assert ledger().promised_bytes() == before
    assert kept.value is not None


def test_without_the_compiled_kernels_nothing_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_native", None)
    monkeypatch.setattr(native, "_import_error", "no such file")
    with pytest.raises(ConfigError, match="no compiled CPU kernels: no such file; install thin"):
        prepare("no/such/model", EngineSettings())
