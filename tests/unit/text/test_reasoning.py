"""Reasoning and answer, apart for any chunking."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thinslice.text.reasoning import ReasoningSplitter

CHAT = "<|im_start|>assistant\n"


def split(prompt: str, chunks: list[str]) -> tuple[str, str]:
    splitter = ReasoningSplitter(prompt)
    pieces = [piece for chunk in chunks for piece in splitter.push(chunk)] + splitter.finish()
    assert all(text for _, text in pieces), "a piece is empty"
    return tuple(
        "".join(text for kind, text in pieces if kind == wanted)
        for wanted in ("reasoning", "answer")
    )


@pytest.mark.parametrize(
    ("prompt", "text", "reasoning", "answer"),
    [
        (CHAT, "<think>\n2+2\nis 4\n</think>\n\nFour.\n", "2+2\nis 4", "Four.\n"),
        (CHAT, "\n <think>a</think>b", "a", "b"),
        (CHAT + "<think>\n", "so\n</think>\n\nFour", "so", "Four"),
        (CHAT + "<think>\n\n</think>\n\n", "Four <think> is text", "", "Four <think> is text"),
        (CHAT, "Four, </think> too", "", "Four, </think> too"),
        (CHAT, "<thinking> is no tag", "", "<thinking> is no tag"),
        (CHAT, "<think>never closed", "never closed", ""),
        (CHAT, "<think>cut in the tag</thi", "cut in the tag", ""),
        (CHAT, "<think></think>only an answer", "", "only an answer"),
        (CHAT, "<thi", "", "<thi"),
        (CHAT, "<think>a < b and </ c</think>yes", "a < b and </ c", "yes"),
        ("<think> was asked about", "plain", "", "plain"),
    ],
)
@given(cuts=st.lists(st.integers(0, 60)))
def test_cases_for_any_chunking(
    prompt: str, text: str, reasoning: str, answer: str, cuts: list[int]
) -> None:
    bounds = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    chunks = [text[a:b] for a, b in pairwise(bounds)]
    assert split(prompt, chunks) == (reasoning, answer)


@given(st.lists(st.sampled_from(["<think>", "</think>", "<", "/", "think>", "a", "\n", " "])))
def test_nothing_is_lost_but_tags_and_white_space(chunks: list[str]) -> None:
    whole = split(CHAT, ["".join(chunks)])
    assert split(CHAT, chunks) == whole
    kept = "".join(whole).replace("\n", "").replace(" ", "")
    text = "".join(chunks).replace("\n", "").replace(" ", "")
    if not text.startswith("<think>"):
        assert kept == text
