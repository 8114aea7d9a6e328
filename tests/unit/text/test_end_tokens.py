"""Tokens that end a generation by their text, as llama.cpp has them."""

from typing import Any

import pytest

from tests.unit.text import vocabularies
from tests.unit.text.test_tokenizer import gguf
from thinslice.text.end_tokens import end_texts
from thinslice.text.tokenizer import load_tokenizer

# llama.cpp at 00ad355e, src/llama-vocab.cpp, in the order in which they are compared there.
LLAMA_CPP = (
    *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>"),
    *("<end_of_turn>", "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]"),
    *("<|end_of_text|>", "<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>"),
    *("<｜end▁of▁sentence｜>", "[e~["),  # noqa: RUF001
)


def with_tokens(*texts: str, kind: int = vocabularies.NORMAL, **keys: Any) -> dict[str, Any]:
    """A vocabulary with these tokens at its end; ids of keys count from the first of them."""
    metadata = vocabularies.byte_level()
    first = len(metadata["tokenizer.ggml.tokens"])
    metadata["tokenizer.ggml.tokens"] += texts
    metadata["tokenizer.ggml.token_type"] += [kind] * len(texts)
    ids = {f"tokenizer.ggml.{key}": first + place for key, place in keys.items()}
    return metadata | ids


def ends(metadata: dict[str, Any]) -> set[str]:
    tokenizer = load_tokenizer(gguf(metadata, eos_token_ids=()))
    tokens = metadata["tokenizer.ggml.tokens"]
    return {tokens[one] for one in tokenizer.special.eos_token_ids} - {"<|im_end|>"}


@pytest.mark.parametrize("kind", [vocabularies.NORMAL, vocabularies.USER_DEFINED])
@pytest.mark.parametrize("text", [one for one in LLAMA_CPP if one != "<|im_end|>"])
def test_each_of_them_ends_a_generation_and_is_no_text(text: str, kind: int) -> None:
    metadata = with_tokens(text, "<|other|>", kind=kind)
    tokenizer = load_tokenizer(gguf(metadata, eos_token_ids=()))
    assert ends(metadata) == {text}
    (token_id,) = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode([token_id]) == ""


def test_nothing_else_ends_one() -> None:
    assert end_texts({*LLAMA_CPP, "<|eot|>", "[e~]", "<|user|>", "", "▁<EOT>"}) <= set(LLAMA_CPP)


@pytest.mark.parametrize(
    ("tokens", "left_out"),
    [
        (("<|end|>",), None),
        (("<|end|>", "<|return|>"), None),
        (("<|end|>", "<|call|>"), None),
        (("<|end|>", "<|flush|>"), None),
        (("<|end|>", "<|return|>", "<|call|>"), "<|end|>"),
        (("<|end|>", "<|return|>", "<|calls|>"), "<|end|>"),
        (("<|end|>", "<|flush|>", "<|calls|>"), "<|end|>"),
        (("<|end|>", "<|flush|>", "<|call|>"), "<|end|>"),
        (("</s>", "<turn|>"), None),
        (("</s>", "<|tool_response>"), "</s>"),
    ],
)
def test_some_end_none_beside_others(tokens: tuple[str, ...], left_out: str | None) -> None:
    assert end_texts(set(tokens)) == set(tokens) - {left_out}
    assert ends(with_tokens(*tokens)) == set(tokens) - {left_out}


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        (with_tokens("<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<|fim_prefix|>"), "012"),
        (with_tokens("x1", "<|fim_pad|>", fim_pad_token_id=0), "0"),
        (with_tokens("x1", "<|fim_pad|>", fim_pad_token_id=10**6), "1"),
        (with_tokens("x1", "x2", fim_rep_token_id=0, fim_sep_token_id=1), "01"),
        (with_tokens("<PAD>", "[PAD]", "<reponame>", "<REPO>"), "02"),
        (with_tokens("<fim_suffix>", "<fim_middle>", "x1"), ""),
    ],
)
def test_what_stands_between_files_ends_a_generation_and_is_text(
    metadata: dict[str, Any], expected: str
) -> None:
    first = len(vocabularies.byte_level()["tokenizer.ggml.tokens"])
    added = metadata["tokenizer.ggml.tokens"][first:]
    assert ends(metadata) == {added[int(place)] for place in expected}
    tokenizer = load_tokenizer(gguf(metadata, eos_token_ids=()))
    ids = range(first, first + len(added))
    assert not tokenizer.special_token_ids & set(ids)
