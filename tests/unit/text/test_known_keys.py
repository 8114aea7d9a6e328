"""The tables of a tokenizer's keys: whole, without overlaps, and each key does what they say."""

import inspect
import json
import re
import tracemalloc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import normalizers, pre_tokenizers, processors
from transformers import GPT2Tokenizer, LlamaTokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from tests.unit.text import vocabularies
from tests.unit.text.test_tokenizer import BYTE_LEVEL, IM_END, IM_START, folder
from tests.unit.text.test_tokenizer import gguf as gguf_checkpoint
from thinslice.checkpoint.index import Checkpoint
from thinslice.errors import CheckpointError, RequestError
from thinslice.plan.shape_from_gguf import shape_from_gguf
from thinslice.text.chat_template import ChatTemplate
from thinslice.text.gguf_tokenizer import build_gguf_tokenizer
from thinslice.text.known_keys import (
    ADDED_TOKEN_READ,
    CONFIG_INERT,
    CONFIG_NEUTRAL,
    CONFIG_NOT_APPLIED,
    CONFIG_READ,
    GGUF_INERT,
    GGUF_NOT_APPLIED,
    GGUF_READ,
    tokenizer_json_notes,
)
from thinslice.text.named_tokens import NAMES
from thinslice.text.tokenizer import load_tokenizer

OTHER = "no value that any table lists"
TEXT = "hello <|im_start|>ab<|im_end|> world<think>"
CONFIG_KNOWN = CONFIG_READ | CONFIG_INERT | set(CONFIG_NEUTRAL) | set(CONFIG_NOT_APPLIED)
# For each key that is read: settings to begin with, and a value that must be seen.
READ: dict[str, tuple[dict[str, Any], Any]] = {
    "add_bos_token": ({"bos_token": "<|im_start|>"}, True),
    "added_tokens_decoder": ({}, {str(IM_END): {"content": "<|im_end|>", "special": True}}),
    "additional_special_tokens": ({}, ["<|im_end|>"]),
    "chat_template": ({}, "{{ 1 }}"),
    "extra_special_tokens": ({}, ["<|im_end|>"]),
    "image_token": ({}, "<|im_end|>"),
    "model_specific_special_tokens": ({}, {"image_token": "<|im_end|>"}),
    **{name: ({}, "<|im_end|>") for name in NAMES},
}


def bare_backend() -> Backend:
    """A tokenizer whose control tokens lie in its vocabulary alone."""
    state = json.loads(build_gguf_tokenizer(BYTE_LEVEL).to_str())
    state["model"]["vocab"] |= {one["content"]: one["id"] for one in state["added_tokens"]}
    state["added_tokens"] = []
    return Backend.from_str(json.dumps(state))


def outcome(checkpoint: Checkpoint) -> Any:
    """All that is read, or the words of the refusal; without the notes."""
    try:
        tokenizer = load_tokenizer(checkpoint)
    except CheckpointError as error:
        return str(error)
    ids = tokenizer.encode(TEXT, add_special_tokens=True)
    template = tokenizer.chat_template
    rendered = [] if template is None else [template.render([]), with_tools(template)]
    return ids, tokenizer.decode(ids), tokenizer.special, tokenizer.special_token_ids, rendered


def with_tools(template: ChatTemplate) -> str:
    try:
        return template.render([], tools=[{}])
    except RequestError as error:
        return str(error)


def notes(checkpoint: Checkpoint) -> tuple[str, ...]:
    return load_tokenizer(checkpoint).notes


@pytest.mark.parametrize(
    "tables",
    [
        (CONFIG_READ, CONFIG_NEUTRAL, CONFIG_NOT_APPLIED, CONFIG_INERT),
        (GGUF_READ, GGUF_NOT_APPLIED, GGUF_INERT),
    ],
)
def test_no_key_is_in_two_tables(tables: tuple[Any, ...]) -> None:
    keys = [key for table in tables for key in table]
    assert len(keys) == len(set(keys))


def test_every_setting_of_the_reference_classes_is_in_a_table(tmp_path: Path) -> None:
    classes = (LlamaTokenizer, Qwen2Tokenizer, GPT2Tokenizer)
    keys = {name for one in classes for name in inspect.signature(one).parameters}
    for base in (PreTrainedTokenizerBase, PreTrainedTokenizerFast):
        source = inspect.getsource(base.__init__)
        keys |= set(re.findall(r'kwargs\.(?:pop|get|setdefault)\(\s*"(\w+)"', source))
    PreTrainedTokenizerFast(tokenizer_object=bare_backend()).save_pretrained(tmp_path)
    keys |= set(json.loads((tmp_path / "tokenizer_config.json").read_text()))
    # What a caller gives, and what the class keeps for itself.
    keys -= {name for name in keys if name.startswith("_")} - {"_commit_hash"}
    keys -= {"self", "kwargs", "vocab", "merges", "tokenizer_object", "gguf_file", "tokenizer"}
    keys -= {"post_processor", "tokenizer_padding", "tokenizer_truncation"}
    assert len(keys) > 30
    assert keys <= CONFIG_KNOWN


def test_what_is_read_is_seen(tmp_path: Path) -> None:
    assert set(READ) == CONFIG_READ | {"image_token"}
    for key, (settings, value) in READ.items():
        plain = outcome(folder(tmp_path, settings, bare_backend()))
        assert outcome(folder(tmp_path, {**settings, key: value}, bare_backend())) != plain, key


@pytest.mark.parametrize("key", CONFIG_NEUTRAL)
def test_what_would_change_tokens_is_refused(tmp_path: Path, key: str) -> None:
    plain = outcome(folder(tmp_path, {}))
    for neutral in (None, *CONFIG_NEUTRAL[key]):
        assert outcome(folder(tmp_path, {key: neutral})) == plain
        assert notes(folder(tmp_path, {key: neutral})) == ()
    with pytest.raises(CheckpointError, match=f"tokenizer_config.json: {key} is True"):
        load_tokenizer(folder(tmp_path, {key: True}))


def test_what_is_not_applied_is_named(tmp_path: Path) -> None:
    plain = outcome(folder(tmp_path, {}))
    for key, neutral in CONFIG_NOT_APPLIED.items():
        for value in (None, *neutral):
            assert notes(folder(tmp_path, {key: value})) == ()
        checkpoint = folder(tmp_path, {key: OTHER})
        assert outcome(checkpoint) == plain
        assert notes(checkpoint) == (f"tokenizer_config.json sets {key}, which is not applied",)


def test_what_does_not_matter_changes_nothing_and_is_not_named(tmp_path: Path) -> None:
    checkpoint = folder(tmp_path, dict.fromkeys(CONFIG_INERT, OTHER))
    assert notes(checkpoint) == ()
    assert outcome(checkpoint) == outcome(folder(tmp_path, {}))


def test_other_keys_are_named_on_one_line_for_each_file(tmp_path: Path) -> None:
    checkpoint = folder(tmp_path, {"novel": 1, "new_token": 3, "image_token": "<|im_end|>"})
    (tmp_path / "special_tokens_map.json").write_text('{"strange": 1, "pad_token": "<think>"}')
    assert notes(checkpoint) == (
        "tokenizer_config.json sets new_token, novel, which are not known to thinslice and not "
        "read",
        "special_tokens_map.json sets strange, which is not known to thinslice and not read",
    )


@pytest.mark.parametrize(
    ("change", "adds_space"),
    [
        (lambda one: None, False),
        (lambda one: setattr(one, "normalizer", normalizers.Prepend("▁")), True),
        (lambda one: setattr(one, "pre_tokenizer", pre_tokenizers.Metaspace()), True),
        (
            lambda one: setattr(one, "pre_tokenizer", pre_tokenizers.ByteLevel(True)),
            True,
        ),
        (
            lambda one: setattr(
                one,
                "pre_tokenizer",
                pre_tokenizers.Sequence(
                    [pre_tokenizers.Metaspace(prepend_scheme="never"), pre_tokenizers.Digits()]
                ),
            ),
            False,
        ),
    ],
)
def test_a_space_before_a_text_that_the_files_disagree_on_is_named(
    tmp_path: Path, change: Callable[[Backend], None], adds_space: bool
) -> None:
    backend = build_gguf_tokenizer(BYTE_LEVEL)
    change(backend)
    assert notes(folder(tmp_path, {"add_prefix_space": adds_space}, backend)) == ()
    said = str(not adds_space).lower()
    assert notes(folder(tmp_path, {"add_prefix_space": not adds_space}, backend)) == (
        f"tokenizer_config.json sets add_prefix_space to {said}, and tokenizer.json does "
        "otherwise; tokenizer.json is followed",
    )


def test_a_beginning_that_the_files_disagree_on_is_named(tmp_path: Path) -> None:
    backend = build_gguf_tokenizer(BYTE_LEVEL)
    special = [("<|im_start|>", IM_START)]
    backend.post_processor = processors.TemplateProcessing("<|im_start|> $A", None, special)
    agreeing = {"bos_token": "<|im_start|>", "add_bos_token": True}
    assert notes(folder(tmp_path, agreeing, backend)) == ()
    assert notes(folder(tmp_path, agreeing | {"add_bos_token": False}, backend)) == (
        f"tokenizer_config.json sets add_bos_token to false, and tokenizer.json begins a prompt "
        f"with token {IM_START}; tokenizer_config.json is followed",
    )
    # Transformers 5 adds none of its own accord.
    assert notes(folder(tmp_path, agreeing)) == (
        "tokenizer_config.json sets add_bos_token to true, and tokenizer.json begins a prompt "
        "with no token of its own; tokenizer_config.json is followed",
    )
    assert notes(folder(tmp_path, agreeing | {"add_bos_token": False})) == ()


def test_the_library_takes_the_listed_keys_of_tokenizer_json_and_no_other(tmp_path: Path) -> None:
    checkpoint = folder(tmp_path, {})
    state = json.loads((tmp_path / "tokenizer.json").read_text())
    read = {"added_tokens", "decoder", "model", "normalizer", "post_processor", "pre_tokenizer"}
    # Truncation and padding are of batches.
    assert set(state) == read | {"padding", "truncation", "version"}
    (tmp_path / "tokenizer.json").write_text(json.dumps({**state, "novel": 1}))
    with pytest.raises(CheckpointError, match="no valid tokenizer"):
        load_tokenizer(checkpoint)


def test_flags_of_added_tokens_are_read_and_others_named(tmp_path: Path) -> None:
    checkpoint = folder(tmp_path, {})
    state = json.loads((tmp_path / "tokenizer.json").read_text())
    plain = load_tokenizer(checkpoint)
    assert set(state["added_tokens"][0]) == ADDED_TOKEN_READ
    assert plain.notes == ()
    # A vocabulary may have anything in it.
    state["model"]["vocab"]['"added_tokens": [{"novel": 1}]'] = 270
    state["model"]["vocab"]["added_tokens"] = 271
    reordered = {"model": state["model"], **state}
    (tmp_path / "tokenizer.json").write_text(json.dumps(reordered))
    assert load_tokenizer(checkpoint).notes == ()
    reordered["added_tokens"][1]["novel"] = True
    (tmp_path / "tokenizer.json").write_text(json.dumps(reordered))
    assert load_tokenizer(checkpoint).notes == (
        "an added token of tokenizer.json sets novel, which is not known to thinslice and not read",
    )


@pytest.mark.parametrize("flag", ["single_word", "lstrip", "rstrip", "normalized", "special"])
def test_each_flag_of_an_added_token_counts(tmp_path: Path, flag: str) -> None:
    ids = []
    for value in (False, True):
        backend = build_gguf_tokenizer(BYTE_LEVEL)
        backend.normalizer = normalizers.Replace("<<", "<|im_start|>")
        checkpoint = folder(tmp_path, {}, backend)
        state = json.loads((tmp_path / "tokenizer.json").read_text())
        state["added_tokens"][0][flag] = value
        (tmp_path / "tokenizer.json").write_text(json.dumps(state))
        tokenizer = load_tokenizer(checkpoint)
        text = "a <|im_start|> b<|im_start|>c<<"
        ids.append((tokenizer.encode(text, add_special_tokens=False), tokenizer.special_token_ids))
    assert ids[0] != ids[1]


def test_a_long_list_of_added_tokens_is_read_to_its_end(tmp_path: Path) -> None:
    checkpoint = folder(tmp_path, {})
    state = json.loads((tmp_path / "tokenizer.json").read_text())
    blanks = '"added_tokens": [' + " " * (2 << 20) + json.dumps(state["added_tokens"][0])[:-1]
    text = json.dumps({key: value for key, value in state.items() if key != "added_tokens"})
    content = "{" + blanks + ', "novel": 1}], ' + text[1:]
    (tmp_path / "tokenizer.json").write_text(content)
    (note,) = load_tokenizer(checkpoint).notes
    assert "novel" in note


@pytest.mark.parametrize(
    ("num_tokens", "is_named", "most_mib"), [(12_000, True, 24), (100_000, False, 64)]
)
def test_a_long_list_is_read_without_the_vocabulary_after_it(
    num_tokens: int, is_named: bool, most_mib: int
) -> None:
    added = b",".join(
        b'{"id": %d, "content": "<%d>", "single_word": false, "lstrip": false, "rstrip": false, '
        b'"normalized": false, "special": true, "novel": 1}' % (number, number)
        for number in range(num_tokens)
    )
    vocabulary = b",".join(b'"word %d": %d' % (number, number) for number in range(1_000_000))
    content = b'{"added_tokens": [' + added + b'], "model": {"vocab": {' + vocabulary + b"}}}"
    tracemalloc.start()
    try:
        has_note = bool(tokenizer_json_notes(content))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert has_note == is_named
    assert peak < most_mib << 20


GGUF_OTHER: dict[str, tuple[dict[str, Any], Any]] = {
    "chat_template": ({}, "{{ 1 }}"),
    "chat_template.tool_use": (BYTE_LEVEL | {"tokenizer.chat_template": "1"}, "{{ tools }}"),
    "ggml.add_bos_token": ({}, True),
    "ggml.add_space_prefix": (vocabularies.sentencepiece("▁he llo"), False),
    "ggml.bos_token_id": ({}, 5),
    "ggml.eom_token_id": ({}, 5),
    "ggml.eos_token_id": ({}, 5),
    "ggml.eot_token_id": ({}, 5),
    "ggml.fim_pad_token_id": ({}, 5),
    "ggml.fim_rep_token_id": ({}, 5),
    "ggml.fim_sep_token_id": ({}, 5),
    "ggml.merges": ({}, ["a b"]),
    "ggml.model": ({}, "bert"),
    "ggml.pre": ({}, "llama-bpe"),
    "ggml.scores": (vocabularies.sentencepiece("▁he llo"), []),
    "ggml.token_type": ({}, []),
    "ggml.tokens": ({}, []),
}


def with_eos(metadata: Mapping[str, Any]) -> Checkpoint:
    """A checkpoint whose shape has the ids that its metadata name."""
    plan = {
        "general.architecture": "llama",
        "llama.block_count": 2,
        "llama.context_length": 512,
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 96,
        "llama.attention.head_count": 4,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
    }
    shape = shape_from_gguf({**plan, **metadata}, {"token_embd.weight": (300, 64)})
    return gguf_checkpoint(dict(metadata), eos_token_ids=shape.eos_token_ids)


def test_gguf_keys_that_are_read_are_seen() -> None:
    assert set(GGUF_OTHER) == GGUF_READ
    for key, (changes, value) in GGUF_OTHER.items():
        plain = changes or BYTE_LEVEL
        assert outcome(with_eos({**plain, f"tokenizer.{key}": value})) != outcome(
            with_eos(plain)
        ), key


def test_gguf_keys_that_do_not_matter_change_nothing_and_others_are_named() -> None:
    inert = {f"tokenizer.{key}": OTHER for key in GGUF_INERT}
    inert |= {"tokenizer.chat_template.rag": "x", "general.novel": 1}
    assert outcome(with_eos(BYTE_LEVEL | inert)) == outcome(with_eos(BYTE_LEVEL))
    assert notes(with_eos(BYTE_LEVEL | inert)) == ()
    assert notes(with_eos(BYTE_LEVEL | {"tokenizer.ggml.novel": 1})) == (
        "this GGUF sets tokenizer.ggml.novel, which is not known to thinslice and not read",
    )


def test_gguf_keys_that_are_not_applied_are_named() -> None:
    for key, neutral in GGUF_NOT_APPLIED.items():
        for value in neutral:
            assert notes(with_eos(BYTE_LEVEL | {f"tokenizer.{key}": value})) == ()
        checkpoint = with_eos(BYTE_LEVEL | {f"tokenizer.{key}": [1]})
        assert outcome(checkpoint) == outcome(with_eos(BYTE_LEVEL))
        assert notes(checkpoint) == (f"this GGUF sets tokenizer.{key}, which is not applied",)


def test_every_tokenizer_key_of_the_gguf_package_is_in_a_table() -> None:
    values = [one for one in vars(gguf.Keys.Tokenizer).values() if isinstance(one, str)]
    keys = {one.removeprefix("tokenizer.") for one in values if one.startswith("tokenizer.")}
    assert len(keys) > 25
    assert keys - {"chat_template.{name}"} <= GGUF_READ | GGUF_INERT | set(GGUF_NOT_APPLIED)
    # Of llama.cpp, and of older versions of the package.
    elsewhere = {
        "chat_template.tool_use",
        "ggml.cls_token_id",
        "ggml.normalizer.lowercase",
        "ggml.normalizer.strip_accents",
        "ggml.suppress_tokens",
    }
    assert GGUF_READ | GGUF_INERT | set(GGUF_NOT_APPLIED) <= keys | elsewhere
