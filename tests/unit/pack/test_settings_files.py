"""config.json and tokenizer of a packed GGUF: they read back as what the GGUF's header says."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoints import (
    GgufOptions,
    random_tensors,
    tiny_config,
    write_gguf_model,
    write_safetensors,
    write_safetensors_model,
)
from tests.unit.text.vocabularies import byte_level, sentencepiece
from thinslice.checkpoint.file_names import TOOL_TEMPLATES
from thinslice.checkpoint.open import open_checkpoint
from thinslice.errors import CheckpointError
from thinslice.pack.pack import PackOptions, pack_model
from thinslice.pack.source import SourceFiles
from thinslice.plan.packed_format import PackedFormat
from thinslice.plan.shape_from_config import shape_from_config
from thinslice.text.gguf_tokenizer import build_gguf_tokenizer
from thinslice.text.template_source import TemplateSources
from thinslice.text.tokenizer import load_tokenizer
from thinslice.text.tokenizer_files import read_tokenizer_files

TEXTS = ("Hello, world!", "<|im_start|>a b<|im_end|>", "  12 éa 🙂\n", "the the", "▁<sep> x")


def gguf(tmp_path: Path, architecture: str = "LlamaForCausalLM", **options: Any) -> Path:
    shape = shape_from_config(tiny_config(architecture, vocab_size=512))
    path = tmp_path / "tiny.gguf"
    write_gguf_model(path, shape, 0, GgufOptions(dtype="Q8_0", **options))
    return path


def packed(path: Path, tmp_path: Path) -> Path:
    pack_model(open_checkpoint(path), tmp_path / "out", PackOptions(PackedFormat.INT4, "tiny"))
    return tmp_path / "out"


@pytest.mark.parametrize(
    "metadata",
    [
        {},
        {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0},
        {
            "llama.rope.scaling.type": "yarn",
            "llama.rope.scaling.factor": 4.0,
            "llama.rope.scaling.original_context_length": 128,
            "llama.rope.scaling.yarn_log_multiplier": 0.1,
            "llama.rope.scaling.attn_factor": 1.5,
        },
        {"llama.attention.sliding_window": 64},
        {"tokenizer.ggml.eot_token_id": 9, "tokenizer.ggml.eos_token_id": 5},
        {"llama.rope.freq_base": 500000.0, "llama.attention.layer_norm_rms_epsilon": 1e-6},
    ],
)
def test_the_shape_reads_back(metadata: dict[str, Any], tmp_path: Path) -> None:
    path = gguf(tmp_path, metadata=metadata)
    source = open_checkpoint(path).shape
    found = open_checkpoint(packed(path, tmp_path)).shape
    if "llama.attention.sliding_window" in metadata:
        assert found.architecture == "MistralForCausalLM"
        assert (found.sliding_window, found.sliding_layers) == (64, source.sliding_layers)
        return
    assert found == source
    assert (found.rope_scaling is not None) == ("llama.rope.scaling.type" in metadata)


def test_rotary_factors_read_back(tmp_path: Path) -> None:
    factors = tuple(float(idx) / 3 + 1 for idx in range(8))
    path = gguf(tmp_path, rope_factors=factors)
    out = packed(path, tmp_path)
    source = open_checkpoint(path).shape
    assert source.rope_scaling is not None
    assert source.rope_scaling.rope_type == "factors"
    assert open_checkpoint(out).shape == source
    config = json.loads((out / "config.json").read_text())
    config["rope_scaling"]["freq_factors"][0] = -1
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="8 factors; expected 8 numbers above 0"):
        open_checkpoint(out)


def test_a_head_of_its_own_stays_one_where_the_config_ties_the_embeddings(tmp_path: Path) -> None:
    tied = tiny_config(tie_word_embeddings=True)
    write_safetensors_model(tmp_path / "in", tiny_config())
    (tmp_path / "in" / "config.json").write_text(json.dumps(tied))
    found = open_checkpoint(packed(tmp_path / "in", tmp_path))
    assert not found.shape.tie_word_embeddings
    assert "lm_head.weight" in found.tensors


@pytest.mark.parametrize("prefix", ["model.", "model.language_model."])
def test_a_text_trunk_is_packed_as_the_decoder_it_is(tmp_path: Path, prefix: str) -> None:
    config = tiny_config("Qwen2ForCausalLM")
    tensors = {
        name.replace("model.", prefix): value
        for name, value in random_tensors(shape_from_config(config)).items()
    }
    write_safetensors(tmp_path / "in", tensors | {"visual.norm.weight": torch.ones(3)})
    names = {"architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl"}
    (tmp_path / "in" / "config.json").write_text(json.dumps(config | names))
    source = open_checkpoint(tmp_path / "in")
    found = open_checkpoint(packed(tmp_path / "in", tmp_path))
    assert found.shape == source.shape
    assert found.notes == ()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == [
        "Qwen2ForCausalLM"
    ]


def test_what_config_json_cannot_say_is_refused(tmp_path: Path) -> None:
    """Biases of q, k and v alone are Qwen2's; a Llama has them with one of the output."""
    shape = shape_from_config(tiny_config("Qwen2ForCausalLM"))
    path = tmp_path / "tiny.gguf"
    write_gguf_model(path, shape)
    content = path.read_bytes().replace(b"qwen2", b"llama")
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="cannot say attention_"):
        packed(path, tmp_path)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "vocabulary",
    [
        byte_level(words="hello the", add_bos_token=True),
        byte_level("llama-bpe", words="hello"),
        byte_level("smollm") | {"tokenizer.chat_template": "{{ messages[0].content }}"},
        byte_level()
        | {"tokenizer.chat_template": "a{{ tools }}", "tokenizer.chat_template.tool_use": "b"},
        sentencepiece("▁the ▁a he"),
        sentencepiece("▁the", add_bos_token=False, add_space_prefix=False),
        byte_level(fim_pad_token_id=5, fim_sep_token_id=9),
    ],
)
def test_the_tokenizer_reads_back(vocabulary: dict[str, Any], tmp_path: Path) -> None:
    metadata = {"tokenizer.ggml.eot_token_id": 7, **vocabulary}
    path = gguf(tmp_path, metadata=metadata)
    source, found = (open_checkpoint(one) for one in (path, packed(path, tmp_path)))
    before, after = load_tokenizer(source), load_tokenizer(found)
    assert before.special == after.special
    assert before.notes == after.notes
    assert before.special_token_ids == after.special_token_ids
    assert before.strips_leading_space == after.strips_leading_space
    templates = [read_tokenizer_files(one).templates for one in (source, found)]
    keys = ("tokenizer.chat_template", "tokenizer.chat_template.tool_use")
    assert templates[0] == templates[1] == TemplateSources(*map(vocabulary.get, keys))
    for text in TEXTS:
        for prefix in (False, True):
            ids = before.encode(text, add_special_tokens=prefix)
            assert after.encode(text, add_special_tokens=prefix) == ids
            assert after.decode(ids) == before.decode(ids)


def test_tokens_named_in_a_file_of_their_own_read_back(tmp_path: Path) -> None:
    source = tmp_path / "in"
    write_safetensors_model(source, tiny_config(vocab_size=512))
    state = json.loads(build_gguf_tokenizer(byte_level()).to_str())
    names = {one["content"]: one["id"] for one in state["added_tokens"]}
    state["model"]["vocab"] |= names
    state["added_tokens"] = []
    (source / "tokenizer.json").write_text(json.dumps(state))
    (source / "added_tokens.json").write_text(json.dumps(names))
    before = load_tokenizer(open_checkpoint(source))
    after = load_tokenizer(open_checkpoint(packed(source, tmp_path)))
    for tokenizer in (before, after):
        ids = tokenizer.encode("<|im_start|>a", add_special_tokens=False)
        assert ids == [names["<|im_start|>"], state["model"]["vocab"]["a"]]


@pytest.mark.parametrize("name", TOOL_TEMPLATES)
def test_a_template_for_tools_in_a_file_of_its_own_reads_back(name: str, tmp_path: Path) -> None:
    source = tmp_path / "in"
    write_safetensors_model(source, tiny_config(vocab_size=512))
    (source / "tokenizer.json").write_text(build_gguf_tokenizer(byte_level()).to_str())
    (source / "chat_template.jinja").write_text("plain")
    (source / name).parent.mkdir(exist_ok=True)
    (source / name).write_text("{{ tools }}")
    out = open_checkpoint(packed(source, tmp_path))
    assert read_tokenizer_files(out).templates == TemplateSources("plain", "{{ tools }}")


@pytest.mark.parametrize("metadata", [{}, {"tokenizer.ggml.model": "no_vocab"}])
def test_a_gguf_without_a_tokenizer_is_packed_without_one(
    metadata: dict[str, Any], tmp_path: Path
) -> None:
    out = packed(gguf(tmp_path, metadata=metadata), tmp_path)
    assert not (out / "tokenizer.json").exists()


def test_a_tokenizer_that_cannot_be_read_is_refused_before_the_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*arguments: object) -> None:
        raise AssertionError("packed")

    monkeypatch.setattr("thinslice.pack.pack.write_weights", never)
    path = gguf(tmp_path, metadata={"tokenizer.ggml.model": "bert"})
    with pytest.raises(CheckpointError, match="GGUF tokenizer 'bert' is not supported"):
        packed(path, tmp_path)


def test_a_gguf_says_its_licence_in_the_packed_folder(tmp_path: Path) -> None:
    said = {"general.license": 'other"\nx: 🙂', "general.license.link": "https://example.org/l"}
    card = packed(gguf(tmp_path, metadata=said), tmp_path) / "README.md"
    assert card.read_text().splitlines()[:4] == [
        "---",
        'license: "other\\"\\nx: 🙂"',
        'license_link: "https://example.org/l"',
        "---",
    ]


def test_what_a_gguf_advises_is_advised_by_the_packed_folder(tmp_path: Path) -> None:
    said = {"general.sampling.temp": 0.7, "general.sampling.top_k": 20}
    out = packed(gguf(tmp_path, metadata=said), tmp_path)
    assert open_checkpoint(out).sampling == {"temperature": 0.7, "top_k": 20}


@pytest.mark.parametrize("is_fetched", [False, True])
def test_documents_beside_a_gguf_are_its_own_where_the_store_fetched_it(
    is_fetched: bool, tmp_path: Path
) -> None:
    path = gguf(tmp_path, metadata={"general.license": "mit"})
    (tmp_path / "LICENSE.txt").write_text("do as you like")
    (tmp_path / "README.md").write_text("a card")
    if is_fetched:
        (tmp_path / "manifest.json").write_text("{}")
    before = SourceFiles(open_checkpoint(path)).records
    out = packed(path, tmp_path)
    assert (out / "LICENSE.txt").exists() is is_fetched
    assert (out / "README.md").read_text().startswith("a card" if is_fetched else "---")
    (tmp_path / "README.md").write_text("another card")
    assert SourceFiles(open_checkpoint(path)).records == before, "what is packed is the same"


def test_tokens_named_beside_the_tokenizer_are_packed_with_it(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    write_safetensors_model(folder, tiny_config(vocab_size=512))
    (folder / "added_tokens.json").write_text('{"<|new|>": 500}')
    assert (packed(folder, tmp_path) / "added_tokens.json").read_text() == '{"<|new|>": 500}'
