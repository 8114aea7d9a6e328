"""Tokenizer: loading from a folder and from a GGUF, special tokens, exact bytes, bad files."""

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, models, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from tests.checkpoints import (
    UNREADABLE,
    GgufOptions,
    make_unreadable,
    tiny_config,
    write_gguf_model,
)
from tests.unit.text import vocabularies
from thinslice.checkpoint.index import Checkpoint
from thinslice.checkpoint.open import open_checkpoint
from thinslice.errors import CheckpointError, RequestError
from thinslice.plan.shape_from_config import shape_from_config
from thinslice.text.gguf_tokenizer import build_gguf_tokenizer
from thinslice.text.library_errors import named_library_errors
from thinslice.text.tokenizer import Tokenizer, load_tokenizer

VOCAB_SIZE = 300
SHAPE = replace(shape_from_config(tiny_config()), vocab_size=VOCAB_SIZE, eos_token_ids=(7,))
BYTE_LEVEL = vocabularies.byte_level("qwen2", "hello he world ab")
SENTENCEPIECE = vocabularies.sentencepiece("▁he ▁hello llo he ll ▁▁ é")
IM_START, IM_END = (
    BYTE_LEVEL["tokenizer.ggml.tokens"].index(token) for token in ("<|im_start|>", "<|im_end|>")
)


def gguf(metadata: dict[str, Any], **shape_changes: Any) -> Checkpoint:
    shape = replace(SHAPE, **shape_changes)
    return Checkpoint(Path("model.gguf"), "gguf", shape, {}, (), metadata)


def folder(path: Path, config: dict[str, Any] | None, backend: Backend | None = None) -> Checkpoint:
    backend = backend or build_gguf_tokenizer(BYTE_LEVEL)
    (path / "tokenizer.json").write_text(backend.to_str())
    if config is not None:
        (path / "tokenizer_config.json").write_text(json.dumps(config))
    return Checkpoint(path, "safetensors", SHAPE, {}, ())


def with_prefix(token: str, suffix: str | None = None) -> Backend:
    """A tokenizer whose post-processor puts tokens around a text."""
    backend = build_gguf_tokenizer(BYTE_LEVEL)
    pattern = f"{token} $A" + (f" {suffix}" if suffix else "")
    specials = [(one, backend.token_to_id(one)) for one in (token, suffix) if one]
    template = processors.TemplateProcessing(single=pattern, special_tokens=specials)
    backend.post_processor = processors.Sequence([processors.ByteLevel(), template])
    return backend


@pytest.fixture(params=["gguf", "folder"])
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> Tokenizer:
    if request.param == "gguf":
        return load_tokenizer(gguf(BYTE_LEVEL))
    return load_tokenizer(folder(tmp_path, {"eos_token": "<|im_end|>"}))


def test_both_kinds_of_checkpoint_give_the_same_tokenizer(tokenizer: Tokenizer) -> None:
    text = "<|im_start|>hello world<|im_end|>é 😀"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert ids[0] == IM_START
    assert tokenizer.decode(ids) == "hello worldé 😀"
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert tokenizer.special_token_ids == {IM_START, IM_END}
    assert tokenizer.special.eos_token_ids == {7, IM_END}
    assert tokenizer.special.eos_token == "<|im_end|>"
    assert tokenizer.chat_template is None


def test_ids_after_the_last_token_are_padding(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == VOCAB_SIZE
    assert tokenizer.token_bytes(VOCAB_SIZE - 1) == b""
    assert tokenizer.decode([VOCAB_SIZE - 1]) == ""
    for token_id in (-1, VOCAB_SIZE, 1 << 40):
        with pytest.raises(RequestError, match=f"{token_id} is outside .* {VOCAB_SIZE}"):
            tokenizer.token_bytes(token_id)


@pytest.mark.parametrize("text", ["\ud83d", "a\udc00b"])
def test_half_a_surrogate_pair_is_a_request_error(tokenizer: Tokenizer, text: str) -> None:
    with pytest.raises(RequestError, match=r"surrogate pair.*at character"):
        tokenizer.encode(text, add_special_tokens=False)


def test_a_token_without_an_embedding_is_a_request_error() -> None:
    tokenizer = load_tokenizer(gguf(BYTE_LEVEL, vocab_size=IM_END))
    assert tokenizer.encode("<|im_start|>", add_special_tokens=False) == [IM_START]
    with pytest.raises(RequestError, match=r"<\|im_end\|>.*has no embedding"):
        tokenizer.encode("a<|im_end|>", add_special_tokens=False)


def test_reasoning_tags_are_text_also_where_a_file_calls_them_special() -> None:
    metadata = vocabularies.byte_level()
    place = metadata["tokenizer.ggml.tokens"].index("<think>")
    metadata["tokenizer.ggml.token_type"][place] = vocabularies.CONTROL
    tokenizer = load_tokenizer(gguf(metadata))
    assert tokenizer.encode("<think>", add_special_tokens=False) == [place]
    assert tokenizer.decode([place, IM_END]) == "<think>"


def test_every_end_token_ends_a_generation_whoever_names_it() -> None:
    """The configuration's (7), the tokenizer's own (9), and the families' special ones."""
    tokenizer = load_tokenizer(gguf(BYTE_LEVEL | {"tokenizer.ggml.eos_token_id": 9}))
    assert tokenizer.special.eos_token_ids == {7, 9, IM_END}


def test_added_tokens_are_their_text_whatever_the_byte_alphabet_says() -> None:
    metadata = vocabularies.byte_level()
    place = metadata["tokenizer.ggml.tokens"].index("<think>")
    metadata["tokenizer.ggml.tokens"][place] = "<é>"
    assert load_tokenizer(gguf(metadata)).token_bytes(place) == "<é>".encode()


@given(st.lists(st.integers(0, len(BYTE_LEVEL["tokenizer.ggml.tokens"]) - 1), max_size=12))
def test_byte_level_decoding_equals_that_of_tokenizers(ids: list[int]) -> None:
    tokenizer = load_tokenizer(gguf(BYTE_LEVEL))
    backend = build_gguf_tokenizer(BYTE_LEVEL)
    for skip in (True, False):
        expected = backend.decode(ids, skip_special_tokens=skip)
        assert tokenizer.decode(ids, skip_special_tokens=skip) == expected


# A special token that a text spells out, as <s>, is a token; it is no part of what is decoded.
PLAIN = st.characters(exclude_categories=["Cs"], exclude_characters="<")


@given(st.text(st.sampled_from("hello é中😀\n▁ ") | PLAIN))
def test_sentencepiece_decoding_equals_that_of_tokenizers(text: str) -> None:
    tokenizer = load_tokenizer(gguf(SENTENCEPIECE, vocab_size=400))
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == build_gguf_tokenizer(SENTENCEPIECE).decode(ids)
    assert tokenizer.decode(ids) == text.replace("▁", " ")
    assert b"".join(map(tokenizer.token_bytes, ids)).decode().removeprefix(" ") == tokenizer.decode(
        ids
    )


def test_sentencepiece_tokens_have_exact_bytes() -> None:
    tokenizer = load_tokenizer(gguf(SENTENCEPIECE, vocab_size=400))
    ids = tokenizer.encode("hello  😀é", add_special_tokens=True)
    expected = [b"<s>", b" hello", b"  ", b"\xf0", b"\x9f", b"\x98", b"\x80", "é".encode()]
    assert [tokenizer.token_bytes(token_id) for token_id in ids] == expected
    assert tokenizer.strips_leading_space
    bare = vocabularies.sentencepiece("he", add_space_prefix=False)
    assert not load_tokenizer(gguf(bare, vocab_size=400)).strips_leading_space


@pytest.mark.parametrize(
    ("metadata", "prefix"),
    [
        (BYTE_LEVEL, ()),
        (BYTE_LEVEL | {"tokenizer.ggml.add_bos_token": True}, (IM_START,)),
        (BYTE_LEVEL | {"tokenizer.ggml.pre": "llama3"}, (IM_START,)),
        (SENTENCEPIECE, (1,)),
    ],
)
def test_gguf_prompts_begin_with_bos_where_the_model_wants_it(
    metadata: dict[str, Any], prefix: tuple[int, ...]
) -> None:
    tokenizer = load_tokenizer(gguf(metadata, vocab_size=400))
    bare = tokenizer.encode("hello", add_special_tokens=False)
    assert tokenizer.encode("hello", add_special_tokens=True) == [*prefix, *bare]


@pytest.mark.parametrize(
    ("config", "backend", "prefix"),
    [
        ({"bos_token": "<|im_start|>"}, None, ()),
        ({"bos_token": "<|im_start|>", "add_bos_token": True}, None, (IM_START,)),
        ({"bos_token": {"content": "<|im_start|>"}, "add_bos_token": True}, None, (IM_START,)),
        ({"bos_token": None, "add_bos_token": True}, None, ()),
        ({"bos_token": "<|im_start|>"}, with_prefix("<|im_start|>"), (IM_START,)),
        ({}, with_prefix("<|im_start|>", "<|im_end|>"), (IM_START,)),
        (None, with_prefix("<|im_start|>"), (IM_START,)),
        ({"bos_token": "<|im_start|>", "add_bos_token": False}, with_prefix("<|im_start|>"), ()),
    ],
)
def test_folder_prompts_begin_with_bos_where_the_model_wants_it(
    tmp_path: Path, config: dict[str, Any] | None, backend: Backend | None, prefix: tuple[int, ...]
) -> None:
    tokenizer = load_tokenizer(folder(tmp_path, config, backend))
    bare = tokenizer.encode("hello", add_special_tokens=False)
    assert tokenizer.encode("hello", add_special_tokens=True) == [*prefix, *bare]


def test_a_post_processor_cannot_drop_the_text(tmp_path: Path) -> None:
    backend = build_gguf_tokenizer(BYTE_LEVEL)
    specials = [("<|im_start|>", IM_START)]
    backend.post_processor = processors.TemplateProcessing("<|im_start|>", special_tokens=specials)
    tokenizer = load_tokenizer(folder(tmp_path, {}, backend))
    ids = tokenizer.encode("hello", add_special_tokens=True)
    assert (ids[0], tokenizer.decode(ids)) == (IM_START, "hello")


def test_what_training_did_to_texts_is_undone(tmp_path: Path) -> None:
    backend = build_gguf_tokenizer(BYTE_LEVEL)
    backend.model.dropout = 0.5
    backend.enable_truncation(max_length=4)
    backend.enable_padding(length=64, pad_id=3)
    tokenizer = load_tokenizer(folder(tmp_path, {}, backend))
    assert tokenizer.decode(tokenizer.encode("hello world " * 9, add_special_tokens=False)) == (
        "hello world " * 9
    )
    once, again = (tokenizer.encode("hello " * 99, add_special_tokens=False) for _ in range(2))
    assert once == again


def test_without_a_tokenizer_config_the_models_ids_tell_bos_and_eos(tmp_path: Path) -> None:
    checkpoint = folder(tmp_path, None)
    shape = replace(SHAPE, bos_token_id=IM_START, eos_token_ids=(IM_END,))
    special = load_tokenizer(replace(checkpoint, shape=shape)).special
    assert (special.bos_token, special.eos_token) == ("<|im_start|>", "<|im_end|>")


@pytest.mark.parametrize("token_id", [-1, VOCAB_SIZE, 1 << 32, 10**40])
def test_without_a_tokenizer_config_ids_of_no_token_have_no_text(
    tmp_path: Path, token_id: int
) -> None:
    checkpoint = folder(tmp_path, None)
    shape = replace(SHAPE, bos_token_id=token_id, eos_token_ids=(token_id,))
    special = load_tokenizer(replace(checkpoint, shape=shape)).special
    assert (special.bos_token, special.eos_token) == (None, None)


@pytest.mark.parametrize(
    ("config", "file", "expected"),
    [
        ({"chat_template": "{{ 1 }}"}, None, "1"),
        ({"chat_template": "{{ 1 }}"}, "{{ 2 }}", "2"),
        ({}, "{{ bos_token }}{{ eos_token }}", "<|im_start|><|im_end|>"),
        (
            {
                "chat_template": [
                    {"name": "rag", "template": "{{ 3 }}"},
                    {"name": "default", "template": "{{ 4 }}"},
                ]
            },
            None,
            "4",
        ),
        (
            {
                "chat_template": "{{ pad_token ~ image_token ~ unk_token }}",
                "pad_token": "<think>",
                "image_token": {"content": "<|im_end|>"},
            },
            None,
            "<think><|im_end|>",
        ),
        ({}, None, None),
        ({"chat_template": None}, None, None),
    ],
)
def test_the_chat_template_of_a_folder(
    tmp_path: Path, config: dict[str, Any], file: str | None, expected: str | None
) -> None:
    tokens = {"bos_token": "<|im_start|>", "eos_token": {"content": "<|im_end|>"}}
    checkpoint = folder(tmp_path, config | tokens)
    if file is not None:
        (tmp_path / "chat_template.jinja").write_text(file)
    template = load_tokenizer(checkpoint).chat_template
    assert (None if template is None else template.render([])) == expected


def test_the_chat_template_of_a_gguf() -> None:
    source = "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    metadata = BYTE_LEVEL | {"tokenizer.chat_template": source}
    template = load_tokenizer(gguf(metadata)).chat_template
    assert template is not None
    rendered = template.render([{"role": "user", "content": "hi"}])
    assert rendered == "<|im_start|>hi<|im_end|>"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            {"tokenizer.ggml.bos_token_id": 10**6, "tokenizer.ggml.add_bos_token": True},
            "bos_token_id names no token",
        ),
        ({"tokenizer.ggml.eos_token_id": -1}, "eos_token_id is -1"),
        ({"tokenizer.ggml.eos_token_id": "2"}, "eos_token_id is '2'"),
        ({"tokenizer.ggml.bos_token_id": None, "tokenizer.ggml.add_bos_token": True}, "names no"),
        ({"tokenizer.ggml.add_bos_token": 1}, "add_bos_token is 1"),
        ({"tokenizer.chat_template": 1}, "chat_template is 1"),
        (
            {"tokenizer.chat_template": "é" * ((1 << 19) + 1)},
            "GGUF: chat_template has 1.00 MiB; at most 1.00 MiB are expected",
        ),
    ],
)
def test_bad_gguf_metadata_is_a_checkpoint_error(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(CheckpointError, match=reason):
        _ = load_tokenizer(gguf(BYTE_LEVEL | change)).chat_template


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("tokenizer.json", None, "has no tokenizer.json"),
        ("tokenizer.json", b"{}", "is no valid tokenizer"),
        ("tokenizer.json", b"[", "is no valid tokenizer"),
        ("tokenizer.json", b"\xff\xfe", "is no valid tokenizer"),
        ("tokenizer.json", b'{"continuing_subword_prefix": "##"}', "subword prefix"),
        ("tokenizer.json", b" " * ((64 << 20) + 1), "at most 64.00 MiB"),
        ("tokenizer_config.json", b"{", "not valid JSON"),
        ("tokenizer_config.json", b"[]", "no object"),
        ("tokenizer_config.json", b" " * ((8 << 20) + 1), "at most"),
        ("tokenizer_config.json", b'{"bos_token": 1}', "bos_token is 1"),
        ("tokenizer_config.json", b'{"eos_token": {"content": []}}', "eos_token is"),
        ("tokenizer_config.json", b'{"chat_template": 1}', "chat_template is 1"),
        (
            "tokenizer_config.json",
            b'{"chat_template": "' + b"x" * (2 << 20) + b'"}',
            "chat_template has 2.00 MiB; at most 1.00 MiB",
        ),
        ("tokenizer_config.json", b'{"chat_template": [1]}', "no chat_template is named default"),
        ("chat_template.jinja", b"\xff", "not UTF-8"),
        ("chat_template.jinja", b" " * ((1 << 20) + 1), "at most 1.00 MiB"),
    ],
)
def test_a_bad_file_is_a_checkpoint_error(
    tmp_path: Path, name: str, content: bytes | None, reason: str
) -> None:
    checkpoint = folder(tmp_path, {})
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=reason):
        _ = load_tokenizer(checkpoint).chat_template


@pytest.mark.parametrize(
    ("model", "reason"),
    [(models.WordLevel({"a": 0}, "a"), "WordLevel tokenizer"), (models.BPE({}, []), "decoder")],
)
def test_other_kinds_of_tokenizer_are_refused(
    tmp_path: Path, model: models.Model, reason: str
) -> None:
    with pytest.raises(CheckpointError, match=f"{reason}.* not supported"):
        load_tokenizer(folder(tmp_path, {}, Backend(model)))


@pytest.mark.parametrize(
    ("step", "changes"),
    [
        (0, {"content": "_"}),
        (0, {"pattern": {"String": "_"}}),
        (0, {"pattern": {"Regex": "▁"}}),
        (3, {"content": "x"}),
        (3, {"start": 2}),
        (3, {"stop": 1}),
    ],
)
def test_a_decoder_of_known_kinds_with_other_content_is_refused(
    tmp_path: Path, step: int, changes: dict[str, Any]
) -> None:
    checkpoint = folder(tmp_path, {}, build_gguf_tokenizer(SENTENCEPIECE))
    assert load_tokenizer(checkpoint).strips_leading_space
    state = json.loads((tmp_path / "tokenizer.json").read_text())
    state["decoder"]["decoders"][step] |= changes
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    with pytest.raises(CheckpointError, match=f"decoder .*{next(iter(changes))}.* not supported"):
        load_tokenizer(checkpoint)


ENDS = (("<|im_end|>", IM_END), ("<|im_start|>", IM_START))
TEMPLATE = processors.TemplateProcessing("<|im_start|> $A", None, [ENDS[1]])


@pytest.mark.parametrize(
    ("processor", "reason"),
    [
        (processors.RobertaProcessing(*ENDS), "RobertaProcessing, is not supported; supported"),
        (processors.BertProcessing(*ENDS), "BertProcessing, is not supported"),
        (processors.Sequence([TEMPLATE, processors.BertProcessing(*ENDS)]), "BertProcessing, is"),
        (processors.Sequence([TEMPLATE, TEMPLATE]), "TemplateProcessing, TemplateProcessing, is"),
        (processors.TemplateProcessing("$A $A", None, []), "takes a text more than once"),
        (
            processors.TemplateProcessing("<s> $A", None, [("<s>", VOCAB_SIZE)]),
            f"begins a text with token {VOCAB_SIZE}, and the model's vocabulary has {VOCAB_SIZE}",
        ),
    ],
)
def test_a_post_processor_that_is_not_done_is_refused(
    tmp_path: Path, processor: processors.PostProcessor, reason: str
) -> None:
    backend = build_gguf_tokenizer(BYTE_LEVEL)
    backend.post_processor = processor
    with pytest.raises(CheckpointError, match=f"tokenizer.json: its post-processor.*{reason}"):
        load_tokenizer(folder(tmp_path, {}, backend))


def test_what_a_post_processor_puts_behind_a_text_is_left_out_and_named(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(folder(tmp_path, {}, with_prefix("<|im_start|>", "<|im_end|>")))
    assert tokenizer.encode("", add_special_tokens=True) == [IM_START]
    assert tokenizer.notes == ("tokenizer.json ends a text with <|im_end|>, which is not applied",)


@pytest.mark.parametrize("value", ["false", "true", 0, 1, ["x"], {}])
def test_whether_a_prompt_begins_with_bos_is_true_or_false(tmp_path: Path, value: Any) -> None:
    config = {"bos_token": "<|im_start|>", "add_bos_token": value}
    with pytest.raises(CheckpointError, match=r"add_bos_token is .*; expected true or false"):
        load_tokenizer(folder(tmp_path, config))


@pytest.mark.parametrize(("side", "refused"), [("prefix", True), ("suffix", False)])
def test_a_post_processor_that_names_an_unknown_token_cannot_panic(
    tmp_path: Path, side: str, refused: bool
) -> None:
    checkpoint = folder(tmp_path, {}, with_prefix("<|im_start|>", "<|im_end|>"))
    content = json.loads((tmp_path / "tokenizer.json").read_bytes())
    single = content["post_processor"]["processors"][1]["single"]
    single[0 if side == "prefix" else -1]["SpecialToken"]["id"] = "no such token"
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    if refused:
        with pytest.raises(CheckpointError, match="names an unknown token"):
            load_tokenizer(checkpoint)
    else:
        assert load_tokenizer(checkpoint).encode("a", add_special_tokens=True)[0] == IM_START


def test_a_damaged_tokenizer_json_gives_a_checkpoint_error_or_works(tmp_path: Path) -> None:
    source = random.Random(3)
    checkpoint = folder(tmp_path, {}, with_prefix("<|im_start|>"))
    original = (tmp_path / "tokenizer.json").read_bytes()
    # The vocabulary is most of the file; what steers is at both ends.
    places = [*range(1500), *range(len(original) - 300, len(original))]
    outcomes = set()
    for _ in range(600):
        damaged = bytearray(original)
        for _ in range(source.randint(1, 2)):
            damaged[source.choice(places)] = source.choice(b'0123456789-"{}[],:ntfx')
        (tmp_path / "tokenizer.json").write_bytes(damaged)
        try:
            load_tokenizer(checkpoint).encode("hello <|im_start|>", add_special_tokens=True)
            outcomes.add("works")
        except CheckpointError:
            outcomes.add("refused")
    assert outcomes == {"works", "refused"}


def test_a_template_that_is_none_blocks_no_plain_prompt(tmp_path: Path) -> None:
    other = [{"name": name, "template": "x"} for name in ("rag", [], {}, None)]
    for template in (other, {"rag": "x"}, 1, "{% endif %}"):
        tokenizer = load_tokenizer(folder(tmp_path, {"chat_template": template}))
        assert tokenizer.encode("a", add_special_tokens=True)
        with pytest.raises(CheckpointError, match=r"chat.template"):
            _ = tokenizer.chat_template
    for template in ("", None):
        assert load_tokenizer(folder(tmp_path, {"chat_template": template})).chat_template is None
    template = load_tokenizer(folder(tmp_path, {"chat_template": {"default": "x"}})).chat_template
    assert template is not None
    assert template.render([]) == "x"


def test_a_template_of_a_gguf_that_is_no_text_blocks_no_plain_prompt(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf_model(
        path,
        shape_from_config(tiny_config(vocab_size=VOCAB_SIZE)),
        options=GgufOptions(metadata=BYTE_LEVEL | {"tokenizer.chat_template": "CHATTEMPLATE"}),
    )
    path.write_bytes(path.read_bytes().replace(b"CHATTEMPLATE", b"CHAT\xffEMPLATE"))
    tokenizer = load_tokenizer(open_checkpoint(path))
    assert tokenizer.encode("a", add_special_tokens=True)
    with pytest.raises(CheckpointError, match=r"'tokenizer\.chat_template' is not UTF-8"):
        _ = tokenizer.chat_template


@pytest.mark.parametrize("kind", UNREADABLE)
@pytest.mark.parametrize(
    "name",
    [
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "chat_template.jinja",
    ],
)
def test_what_is_there_and_cannot_be_read_is_refused(tmp_path: Path, name: str, kind: str) -> None:
    checkpoint = folder(tmp_path, None)
    make_unreadable(tmp_path / name, kind)
    with pytest.raises(CheckpointError, match=f"{name} (cannot be|is not a|does not)"):
        load_tokenizer(checkpoint)


def test_an_end_token_ends_a_turn_whatever_its_type() -> None:
    for kind in (1, 4):
        metadata = vocabularies.byte_level()
        place = metadata["tokenizer.ggml.tokens"].index("<|im_end|>")
        metadata["tokenizer.ggml.token_type"][place] = kind
        tokenizer = load_tokenizer(gguf(metadata))
        assert place in tokenizer.special.eos_token_ids & tokenizer.special_token_ids


def test_a_bos_that_no_token_has_is_none_where_nothing_uses_it() -> None:
    metadata = BYTE_LEVEL | {"tokenizer.ggml.bos_token_id": 0xFFFFFFFF}
    assert load_tokenizer(gguf(metadata)).special.bos_token is None


@pytest.mark.parametrize("place", ["decoder", "names", "file"])
def test_special_tokens_may_be_named_beside_the_tokenizer(tmp_path: Path, place: str) -> None:
    checkpoint = folder(tmp_path, {})
    path = tmp_path / "tokenizer.json"
    state = json.loads(path.read_text())
    names = {one["content"]: one["id"] for one in state["added_tokens"]}
    state["model"]["vocab"] |= names
    state["added_tokens"] = []
    path.write_text(json.dumps(state))
    config: dict[str, Any] = {"extra_special_tokens": list(names)}
    if place == "decoder":
        config = {
            "added_tokens_decoder": {
                str(token_id): {"content": text, "normalized": False, "special": True}
                for text, token_id in names.items()
            }
        }
    if place == "file":
        (tmp_path / "added_tokens.json").write_text(json.dumps(names))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(checkpoint)
    assert tokenizer.encode("<|im_start|>a<|im_end|>", add_special_tokens=False)[0] == IM_START
    assert {IM_START, IM_END} <= tokenizer.special_token_ids


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"added_tokens_decoder": {"5000": {"content": "<new>"}}}, "is given the id 5000"),
        ({"extra_special_tokens": [f"<{i}>" for i in range(99)]}, "<32>.*in no vocabulary"),
        ({"added_tokens_decoder": {"x": 1}}, "no token"),
    ],
)
def test_no_token_is_made_up(tmp_path: Path, config: dict[str, Any], reason: str) -> None:
    with pytest.raises(CheckpointError, match=reason):
        load_tokenizer(folder(tmp_path, config))


def test_a_stop_string_that_is_a_special_token_is_its_id(tokenizer: Tokenizer) -> None:
    assert tokenizer.stop_ids(["<|im_start|>", "end"]) == {IM_START}
    with pytest.raises(RequestError, match=f"stop at its id instead, {IM_END}"):
        tokenizer.stop_ids(["x<|im_end|>"])


@pytest.mark.parametrize(
    "call", [lambda one: one.token_to_id("\ud800"), lambda one: one.id_to_token(1 << 32)]
)
def test_what_does_not_fit_the_librarys_types_is_named(call: Callable[[Backend], Any]) -> None:
    with pytest.raises(CheckpointError, match="a file: "):  # noqa: SIM117
        with named_library_errors(CheckpointError, "a file"):
            call(build_gguf_tokenizer(BYTE_LEVEL))


def test_a_panic_of_the_library_is_a_request_error(tmp_path: Path) -> None:
    backend = build_gguf_tokenizer(BYTE_LEVEL)
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("(a+)+$"), "isolated")
    tokenizer = load_tokenizer(folder(tmp_path, {}, backend))
    with pytest.raises(RequestError, match="retry-limit"):
        tokenizer.encode("a" * 40 + "b", add_special_tokens=False)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ '<|\ud800|>' }}<|x\udc00|>", ()),
        ("<|im_start|>{{ messages[0].content }}<|im_end|>", ()),
        ("{{ '<|im_start|>' + messages[0].role }}", ()),
        ("{% for m in messages %}<|user|>{{ m.content }}<|user|>{% endfor %}", ("<|user|>",)),
        (
            "{{ '<|user|>' }}<start_of_turn><\uff5cUser\uff5c>",
            ("<start_of_turn>", "<|user|>", None),
        ),
        ("{# <|user|> #}[INST] {{ messages }} <b> a <| b |> {{ x<|y|>z }}", ("<|y|>",)),
        ("{# <|a|> {# <|b|> #}<|user|>{#}<|c|>#}{##}<|d|>{#<|e|>", ("<|d|>", "<|e|>", "<|user|>")),
        ("{{ '<|' + messages[0].role + '|>' }}", ()),
        ("", ()),
    ],
)
def test_markers_of_a_template_that_are_no_tokens_are_named(
    tmp_path: Path, template: str, expected: tuple[str | None, ...]
) -> None:
    wide = "<\uff5cUser\uff5c>"
    names = [wide if one is None else one for one in expected]
    verb = "is no token" if len(names) == 1 else "are no tokens"
    note = (
        f"the chat template writes {', '.join(names)}, which {verb} of this tokenizer: the model "
        "gets pieces of text instead"
    )
    notes = (note,) if names else ()
    metadata = BYTE_LEVEL | {"tokenizer.chat_template": template}
    assert load_tokenizer(gguf(metadata)).notes == notes
    assert load_tokenizer(folder(tmp_path, {"chat_template": template})).notes == notes


def test_a_marker_that_is_a_token_of_the_vocabulary_alone_is_named(tmp_path: Path) -> None:
    """It is cut before the vocabulary is asked."""
    state = json.loads(build_gguf_tokenizer(BYTE_LEVEL).to_str())
    state["model"]["vocab"]["<|im_end|>"] = IM_END
    state["added_tokens"] = [one for one in state["added_tokens"] if one["id"] != IM_END]
    backend = Backend.from_str(json.dumps(state))
    tokenizer = load_tokenizer(folder(tmp_path, {"chat_template": "<|im_end|>"}, backend))
    assert len(tokenizer.encode("<|im_end|>", add_special_tokens=False)) > 1
    (note,) = tokenizer.notes
    assert "<|im_end|>" in note
    named = {"chat_template": "<|im_end|>", "eos_token": "<|im_end|>"}
    assert load_tokenizer(folder(tmp_path, named, backend)).notes == ()
