"""Text as tokens come: whole characters at once, in sum what decoding all tokens gives, and stop
strings for any chunking, against a plain search of the whole text."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.checkpoints import tiny_config
from tests.unit.text import vocabularies
from thinslice.checkpoint.index import Checkpoint
from thinslice.plan.shape_from_config import shape_from_config
from thinslice.text.incremental import IncrementalDetokenizer, StopStringMatcher
from thinslice.text.tokenizer import BYTE_TO_CHARACTER, Tokenizer, load_tokenizer

VOCAB_SIZE = 600


def load(metadata: dict[str, Any]) -> Tokenizer:
    shape = replace(shape_from_config(tiny_config()), vocab_size=VOCAB_SIZE)
    return load_tokenizer(Checkpoint(Path("model.gguf"), "gguf", shape, {}, (), metadata))


BYTE_LEVEL = load(vocabularies.byte_level("smollm", "Ġthe ðŁĺ â"))
SENTENCEPIECE = load(vocabularies.sentencepiece("he the ▁the ▁▁ é ি"))
TOKENIZERS = {"byte-level": BYTE_LEVEL, "sentencepiece": SENTENCEPIECE}


def stream(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    detokenizer = IncrementalDetokenizer(tokenizer)
    return [*(detokenizer.push(token_id) for token_id in ids), detokenizer.finish()]


@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS.keys())
@given(ids=st.lists(st.integers(0, 320) | st.sampled_from([VOCAB_SIZE - 1]), max_size=20))
def test_any_tokens_in_sum_give_their_decoding(tokenizer: Tokenizer, ids: list[int]) -> None:
    assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)


# A special token that a text spells out, as <|im_end|>, is a token and no text; Hypothesis draws
# texts that it finds in the code.
PLAIN = st.characters(exclude_categories=["Cs"], exclude_characters="<")


@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS.keys())
@given(text=st.text(st.sampled_from("the é中ি😀👩‍👧 \n") | PLAIN))
def test_a_text_comes_back_in_whole_characters(tokenizer: Tokenizer, text: str) -> None:
    text = text.replace("▁", " ")
    pieces = stream(tokenizer, tokenizer.encode(text, add_special_tokens=False))
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces) or "\ufffd" in text


def test_bytes_that_may_become_a_character_wait_and_others_do_not() -> None:
    assert BYTE_TO_CHARACTER[0xF0] == "ð", "byte tokens have the bytes as their ids"
    emoji = list("😀".encode())
    assert stream(BYTE_LEVEL, emoji) == ["", "", "", "😀", ""]
    assert stream(BYTE_LEVEL, emoji[:3]) == ["", "", "", "\ufffd"]
    assert stream(BYTE_LEVEL, [0xFF, ord("a")]) == ["\ufffd", "a", ""]
    assert stream(BYTE_LEVEL, [0xF0, 0x9F, ord("a")]) == ["", "", "\ufffda", ""]
    assert stream(BYTE_LEVEL, [0xED, 0xA0, 0x80, ord("a")]) == ["", "", "\ufffd" * 3, "a", ""]


def test_special_tokens_and_padding_have_no_text_and_hold_nothing_up() -> None:
    (end,) = BYTE_LEVEL.encode("<|im_end|>", add_special_tokens=False)
    assert stream(BYTE_LEVEL, [0xC3, end, VOCAB_SIZE - 1, 0xA9]) == ["", "", "", "é", ""]


def test_only_the_first_space_of_a_sentencepiece_text_is_dropped() -> None:
    ids = SENTENCEPIECE.encode(" the the", add_special_tokens=True)
    assert "".join(stream(SENTENCEPIECE, ids)) == " the the"
    (the,) = SENTENCEPIECE.encode("the", add_special_tokens=False)
    assert stream(SENTENCEPIECE, [VOCAB_SIZE - 1, the, the]) == ["", "the", " the", ""]


@pytest.mark.parametrize("num_tokens", [2000, 64_000])
def test_each_token_takes_constant_time(num_tokens: int) -> None:
    """Bytes that never make a character do not pile up."""
    detokenizer = IncrementalDetokenizer(BYTE_LEVEL)
    pieces = [detokenizer.push(0x80) for _ in range(num_tokens)]
    assert pieces == ["\ufffd"] * num_tokens


letters = st.text("ab<|é", max_size=30)
stops = st.lists(st.text("ab<|é", min_size=1, max_size=4), max_size=4)


def feed(text: str, stop_strings: list[str], cuts: list[int]) -> tuple[list[str], str | None]:
    matcher = StopStringMatcher(stop_strings)
    bounds = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    pieces = [matcher.push(text[a:b]) for a, b in pairwise(bounds)]
    return [*pieces, matcher.finish()], matcher.matched


@given(letters, stops, st.lists(st.integers(0, 100)))
def test_any_chunking_gives_the_text_before_the_first_stop(
    text: str, stop_strings: list[str], cuts: list[int]
) -> None:
    pieces, matched = feed(text, stop_strings, cuts)
    whole, matched_whole = feed(text, stop_strings, [])
    assert ("".join(pieces), matched) == ("".join(whole), matched_whole)
    shown = "".join(pieces)
    ends = [text.find(stop) for stop in stop_strings if stop in text]
    if matched is None:
        assert not ends
        assert shown == text
    else:
        assert text.startswith(shown + matched)
        assert not any(stop in shown for stop in stop_strings)


@given(letters, stops)
def test_one_character_at_a_time_finds_the_stop_that_ends_first(
    text: str, stop_strings: list[str]
) -> None:
    matcher = StopStringMatcher(stop_strings)
    for count, character in enumerate(text, start=1):
        matcher.push(character)
        is_complete = any(text[:count].endswith(stop) for stop in stop_strings)
        assert (matcher.matched is not None) == is_complete
        if is_complete:
            return


def test_what_may_begin_a_stop_string_is_held_back() -> None:
    matcher = StopStringMatcher(["</end>"])
    assert matcher.push("text </en") == "text "
    assert matcher.push("d") == ""
    assert matcher.push("ing") == "</ending"
    assert matcher.push("</end> more") == ""
    assert matcher.matched == "</end>"
    assert matcher.push("more") == ""
