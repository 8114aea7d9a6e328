"""Tokenizers built from GGUF metadata: splitting rules, SentencePiece's merging, bad metadata."""

import inspect
from array import array
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import regex
from hypothesis import example, given
from hypothesis import strategies as st
from transformers.convert_slow_tokenizer import TikTokenConverter
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX as QWEN2

from tests.unit.text import vocabularies
from tests.unit.text.vocabularies import CONTROL, NORMAL
from thinslice.errors import CheckpointError
from thinslice.text.gguf_tokenizer import build_gguf_tokenizer, prepends_bos
from thinslice.text.tokenizer import BYTE_TO_CHARACTER, byte_level_bytes

LLAMA3 = inspect.signature(TikTokenConverter).parameters["pattern"].default
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# tokenizer.json of mistralai/Mistral-Nemo-Instruct-2407.
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Characters that the rules tell apart, more often than chance would have them.
mixed_text = st.text(
    st.sampled_from("aZéßǅʰमि্中ع १²Ⅷ7 '\u2019sLdRvE\t\n\r\u00a0\u3000\u200d./-_$<|😀")
    | st.characters(max_codepoint=0x24F),
    max_size=30,
)


def pieces_of(metadata: dict[str, Any], text: str) -> list[str]:
    """How the tokenizer cuts a text, as text."""
    splitter = build_gguf_tokenizer(metadata).pre_tokenizer
    assert splitter is not None
    return [byte_level_bytes(piece).decode() for piece, _ in splitter.pre_tokenize_str(text)]


RULES = {
    "gpt-2": GPT2,
    "qwen2": QWEN2,
    "deepseek-r1-qwen": QWEN2,
    "llama-bpe": LLAMA3,
    "llama3": LLAMA3,
    "llama-v3": LLAMA3,
    "tekken": TEKKEN,
}


@pytest.mark.parametrize(("pre", "rule"), RULES.items())
@given(text=mixed_text)
@example(text="1234567 x123")
@example(text="a.\n/\r\n/b")
@example(text="IT'S HTTPServer camelCase")
def test_text_is_split_by_the_rule_of_its_kind(pre: str, rule: str, text: str) -> None:
    assert pieces_of(vocabularies.byte_level(pre), text) == regex.findall(rule, text)


@given(text=mixed_text)
def test_smollm_splits_numeric_characters_first(text: str) -> None:
    runs = [run for run in regex.split(r"(\p{N})", text) if run]
    expected = [piece for run in runs for piece in regex.findall(GPT2, run)]
    assert pieces_of(vocabularies.byte_level("smollm"), text) == expected


def test_default_is_what_llama_cpp_makes_of_it() -> None:
    """Pieces as llama.cpp's tokenizer has them for this rule."""
    metadata = vocabularies.byte_level("default")
    assert pieces_of(metadata, "I'm $12345 (a-b)") == [
        *("I", "'", "m", " ", "$", "123", "45", " ", "(", "a", "-", "b", ")"),
    ]


@given(text=mixed_text)
def test_byte_level_round_trip_is_exact(text: str) -> None:
    tokenizer = build_gguf_tokenizer(vocabularies.byte_level("llama3", "hello world"))
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    tokens = [tokenizer.id_to_token(token_id) for token_id in ids]
    assert b"".join(byte_level_bytes(token) for token in tokens).decode() == text


def test_only_qwens_original_normalises_text() -> None:
    composed, decomposed = "\u00e9", "e\u0301"
    for pre, is_normalised in (("qwen2", True), ("smollm", False), ("llama3", False)):
        tokenizer = build_gguf_tokenizer(vocabularies.byte_level(pre))
        same = tokenizer.encode(composed).ids == tokenizer.encode(decomposed).ids
        assert same == is_normalised


def test_a_whole_token_wins_over_merges_where_the_kind_says_so() -> None:
    """``abc`` has no merge of its own; only rules that ignore merges find it."""
    for pre, whole in (("llama3", True), ("tekken", True), ("qwen2", False)):
        metadata = vocabularies.byte_level(pre)
        metadata["tokenizer.ggml.tokens"].append("abc")
        metadata["tokenizer.ggml.token_type"].append(NORMAL)
        assert (build_gguf_tokenizer(metadata).encode("abc").tokens == ["abc"]) == whole


def test_added_tokens_are_found_in_text_and_padding_is_not() -> None:
    metadata = vocabularies.byte_level()
    tokenizer = build_gguf_tokenizer(metadata)
    padding = metadata["tokenizer.ggml.tokens"][259]
    assert padding == "[PAD259]"
    tokens = tokenizer.encode(f"<|im_start|>é<think>{padding}").tokens
    assert tokens[:4] == ["<|im_start|>", "Ã", "©", "<think>"]
    assert "".join(tokens[4:]) == padding
    assert len(tokens[4:]) > 1
    assert tokenizer.token_to_id(padding) is None
    added = tokenizer.get_added_tokens_decoder()
    special = {token.content for token in added.values() if token.special}
    assert special == {"<|im_start|>", "<|im_end|>"}
    assert {token.content for token in added.values()} == special | {"<think>"}


def test_number_arrays_may_be_packed() -> None:
    metadata = vocabularies.sentencepiece("▁a ▁ab")
    expected = build_gguf_tokenizer(metadata).encode("abab").ids
    metadata["tokenizer.ggml.scores"] = array("d", metadata["tokenizer.ggml.scores"])
    metadata["tokenizer.ggml.token_type"] = array("i", metadata["tokenizer.ggml.token_type"])
    assert build_gguf_tokenizer(metadata).encode("abab").ids == expected


def naive_sentencepiece(metadata: dict[str, Any], text: str) -> list[int]:
    """llama.cpp's rule: join the neighbours whose token has the best score, leftmost first."""
    tokens, scores = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.scores"]
    ids = {token: token_id for token_id, token in enumerate(tokens)}
    result: list[int] = []
    for part in regex.split("(<s>|</s>|<unk>|<sep>)", text):
        if part in ("<s>", "</s>", "<unk>", "<sep>"):
            result.append(ids[part])
            continue
        symbols = list(("▁" + part).replace(" ", "▁")) if part else []
        while True:
            joined = [
                (scores[ids[left + right]], -place)
                for place, (left, right) in enumerate(pairwise(symbols))
                if left + right in ids
            ]
            if not joined:
                break
            place = -max(joined)[1]
            symbols[place : place + 2] = [symbols[place] + symbols[place + 1]]
        for symbol in symbols:
            as_bytes = [ids[f"<0x{byte:02X}>"] for byte in symbol.encode()]
            result += [ids[symbol]] if symbol in ids else as_bytes
    return result


SENTENCEPIECE = vocabularies.sentencepiece("▁t he ▁the re er ▁▁ ▁▁▁▁ the ab ba aba bab abab é中")


@given(
    st.lists(st.sampled_from([*"the rab é中ি😀\n▁", "  ", "<s>", "<sep>", "<0x41>"]), max_size=25)
)
def test_sentencepiece_ids_equal_a_naive_merging(parts: list[str]) -> None:
    text = "".join(parts)
    tokenizer = build_gguf_tokenizer(SENTENCEPIECE)
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert ids == naive_sentencepiece(SENTENCEPIECE, text)


def test_sentencepiece_without_the_space_before_a_text() -> None:
    metadata = vocabularies.sentencepiece("▁t he ▁the", add_space_prefix=False)
    assert build_gguf_tokenizer(metadata).encode("the the").tokens == ["t", "he", "▁the"]


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        (vocabularies.byte_level("qwen2"), False),
        (vocabularies.byte_level("llama3"), True),
        (vocabularies.byte_level("tekken"), True),
        (vocabularies.byte_level("llama3", add_bos_token=False), False),
        (vocabularies.byte_level("qwen2", add_bos_token=True), True),
        (vocabularies.sentencepiece("a"), True),
        (vocabularies.sentencepiece("a", add_bos_token=False), False),
    ],
)
def test_bos_is_the_files_word_or_the_kinds_habit(metadata: dict[str, Any], expected: bool) -> None:
    assert prepends_bos(metadata) is expected


def without(key: str) -> Callable[[dict[str, Any]], None]:
    return lambda metadata: metadata.__delitem__(f"tokenizer.ggml.{key}")


def changed(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda metadata: metadata.__setitem__(f"tokenizer.ggml.{key}", value)


NUM_TOKENS = len(vocabularies.byte_level()["tokenizer.ggml.tokens"])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (changed("model", "bert"), "'bert' is not supported"),
        (without("model"), "None is not supported"),
        (changed("pre", "no-such-rule"), "'no-such-rule' is not supported.*smollm"),
        (without("pre"), "pre-tokenizer None"),
        (changed("pre", ["qwen2"]), "is not supported"),
        (without("tokens"), "tokens is missing"),
        (changed("tokens", "abc"), "not a list of strings"),
        (changed("tokens", []), "tokens is missing"),
        (changed("tokens", [1, 2]), "not a list of strings"),
        (changed("tokens", ["a"] * NUM_TOKENS), "appears twice"),
        (changed("tokens", [f"{n}" * 400 for n in range(NUM_TOKENS)]), "over 1024 characters"),
        (without("token_type"), "token_type is missing"),
        (changed("token_type", [1]), f"1 entries for {NUM_TOKENS} tokens"),
        (changed("token_type", ["1"] * NUM_TOKENS), "not a list of numbers"),
        (changed("token_type", [True] * NUM_TOKENS), "not a list of numbers"),
        (without("merges"), "merges is missing"),
        (changed("merges", ["ab"]), "merge 'ab'"),
        (changed("merges", ["a bc"]), "merge 'a bc'"),
        (changed("merges", ["a c"]), "merge 'a c'"),
        (changed("merges", ["a b c"]), "merge 'a b c'"),
        (changed("merges", [b"a b"]), "not a list of strings"),
    ],
)
def test_bad_byte_level_metadata_is_a_checkpoint_error(
    change: Callable[[dict[str, Any]], None], reason: str
) -> None:
    metadata = vocabularies.byte_level()
    change(metadata)
    with pytest.raises(CheckpointError, match=reason):
        build_gguf_tokenizer(metadata)


NUM_PIECES = len(vocabularies.sentencepiece("ab")["tokenizer.ggml.tokens"])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (without("scores"), "scores is missing"),
        (changed("scores", [0.0]), "1 entries"),
        (changed("scores", [float("nan")] * NUM_PIECES), "no number"),
        (changed("scores", ["0"] * NUM_PIECES), "not a list of numbers"),
        (changed("token_type", [NORMAL] * NUM_PIECES), "256 of 256 byte tokens are missing"),
        (changed("token_type", [CONTROL] * NUM_PIECES), "byte tokens are missing"),
        (changed("add_space_prefix", "yes"), "add_space_prefix"),
    ],
)
def test_bad_sentencepiece_metadata_is_a_checkpoint_error(
    change: Callable[[dict[str, Any]], None], reason: str
) -> None:
    metadata = vocabularies.sentencepiece("ab")
    change(metadata)
    with pytest.raises(CheckpointError, match=reason):
        build_gguf_tokenizer(metadata)


def test_the_byte_alphabet_is_gpt2s() -> None:
    assert len(set(BYTE_TO_CHARACTER)) == 256
    assert BYTE_TO_CHARACTER[ord(" ")] == "Ġ"
    assert BYTE_TO_CHARACTER[ord("\n")] == "Ċ"
    assert BYTE_TO_CHARACTER[ord("a")] == "a"
    assert byte_level_bytes("ĠÃ©") == " é".encode()
    assert byte_level_bytes("<｜end▁") == "<｜end▁".encode()  # noqa: RUF001
