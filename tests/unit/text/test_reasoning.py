"""Reasoning and answer, apart for any chunking; and where a completion is in its thought, for every
way to cut its text into tokens."""

from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from thinslice.text.reasoning import Phase, ReasoningSplitter, Thought

CHAT = "<|im_start|>assistant\n"
OPENED = CHAT + "<think>\n"
PIECES = [b"<think>", b"</think>", b"</th", b"<", b"think>", b"a", b"\n", b" ", b"\xc2\xa0"]
PIECES += ["é🙂".encode(), b"\xff"]


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


def cut(data: bytes, cuts: list[int]) -> list[bytes]:
    """Tokens that in sum are these bytes; some may be empty, as special tokens are."""
    bounds = [0, *sorted(one % (len(data) + 1) for one in cuts), len(data)]
    return [data[a:b] for a, b in pairwise(bounds)]


def counted(prompt: str, tokens: list[bytes]) -> int:
    """Tokens of the thought, found by looking at the whole text."""
    data = b"".join(tokens)
    start, from_here = 0, 0
    if prompt != OPENED:
        start = data.find(b"<think>")
        if start < 0 or data[:start].decode(errors="replace").strip():
            return 0
        from_here = start + len(b"<think>")
    end = data.find(b"</think>", from_here)
    end = len(data) + 1 if end < 0 else end + len(b"</think>")
    count, place = 0, 0
    for token in tokens:
        after = place + len(token)
        is_first = prompt == OPENED and place == start
        bears = after > start and place < end if token else start < place < end or is_first
        count += bears
        place = after
    return count


def followed(prompt: str, tokens: list[bytes]) -> Thought:
    thought = Thought.behind(prompt)
    for token in tokens:
        thought = thought.after(token)
    return thought


@pytest.mark.parametrize("prompt", [CHAT, OPENED])
@given(pieces=st.lists(st.sampled_from(PIECES), max_size=8), cuts=st.lists(st.integers(0, 90)))
@example(pieces=[b"<think>", b"a", b"</think>", b"\n"], cuts=list(range(20)))
@example(pieces=[b"<think>", b"</think>"], cuts=[])
@example(pieces=[b"\xc2\xa0", b"<think>", b"a"], cuts=[1])
@example(pieces=[b"</think>", b"\n", b"\n"], cuts=[])
def test_it_counts_what_bears_the_thought_and_its_tags(
    prompt: str, pieces: list[bytes], cuts: list[int]
) -> None:
    tokens = cut(b"".join(pieces), cuts)
    thought = followed(prompt, tokens)
    assert thought.num_tokens == counted(prompt, tokens)


@pytest.mark.parametrize("prompt", [CHAT, OPENED])
@given(pieces=st.lists(st.sampled_from(PIECES), max_size=8), cuts=st.lists(st.integers(0, 90)))
def test_it_says_what_the_splitter_says(prompt: str, pieces: list[bytes], cuts: list[int]) -> None:
    tokens = cut(b"".join(pieces), cuts)
    thought = followed(prompt, tokens)
    # A letter behind it all shows where the splitter is, once no tag can be under way.
    text = b"".join(tokens).decode(errors="replace")
    splitter = ReasoningSplitter(prompt)
    kinds = [kind for kind, _ in splitter.push(f"{text}x") + splitter.finish()]
    after = thought.after(b"x").phase
    assert after is (Phase.INSIDE if kinds[-1] == "reasoning" else Phase.BEHIND)


@pytest.mark.parametrize("closing", [[b"</think>"], [b"</", b"think", b">\n\n"], [b".</think>\n"]])
def test_a_tag_is_one_token_or_several_or_part_of_one(closing: list[bytes]) -> None:
    thought = followed(CHAT, [b"<think>", b"\n", b"so", *closing, b"yes"])
    assert (thought.phase, thought.num_tokens) == (Phase.BEHIND, 3 + len(closing))


def test_a_second_thought_is_text() -> None:
    thought = followed(CHAT, [b"<think>", b"</think>", b"\n", b"<think>", b"a"])
    assert (thought.phase, thought.num_tokens) == (Phase.BEHIND, 2)


def test_a_plain_completion_has_none() -> None:
    thought = Thought.behind(None).after(b"<think>")
    assert (thought.phase, thought.num_tokens) == (Phase.BEHIND, 0)


def test_an_unfinished_character_is_told() -> None:
    thought = Thought.behind(OPENED).after("🙂".encode()[:2])
    assert thought.partial
    assert not thought.after("🙂".encode()[2:]).partial
