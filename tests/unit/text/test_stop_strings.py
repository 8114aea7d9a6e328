"""Stop strings for any chunking, against a plain search of the whole text."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from thinslice.text.stop_strings import StopStringMatcher

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
