"""Prompt lookup against a search through the whole text."""

import os
import subprocess
import sys
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thinslice.engine import ngram
from thinslice.engine.ngram import NgramDrafter
from thinslice.plan.cost import ngram_index_bytes

few_tokens = st.lists(st.integers(0, 3), max_size=60)


def drafter_of(tokens: list[int], max_n: int = 4, min_n: int = 2) -> NgramDrafter:
    drafter = NgramDrafter(len(tokens), max_n, min_n)
    drafter.extend(tokens)
    return drafter


def search(tokens: list[int], lengths: range, count: int, *, first: bool = False) -> list[int]:
    """The longest suffix first, and of each the latest place before the end, by comparing all.

    The planted fault: ``first`` takes the earliest place, as vLLM does.
    """
    for n in lengths:
        suffix = tokens[len(tokens) - n :]
        ends = [end for end in range(n, len(tokens)) if tokens[end - n : end] == suffix]
        if ends:
            copied = list(tokens)
            for _ in range(count):
                copied.append(copied[(ends[0] if first else ends[-1]) + len(copied) - len(tokens)])
            return copied[len(tokens) :]
    return []


@given(few_tokens, st.integers(1, 3), st.integers(0, 3), st.integers(0, 9))
def test_drafts_are_those_of_a_search(tokens: list[int], min_n: int, more: int, count: int) -> None:
    drafter = drafter_of(tokens, min_n + more, min_n)
    assert drafter.propose(count) == search(tokens, drafter.lengths, count)


def test_a_search_that_takes_the_first_place_is_seen() -> None:
    tokens = [1, 2, 7, 1, 2, 8, 1, 2]
    assert drafter_of(tokens).propose(3) == search(tokens, range(4, 1, -1), 3) == [8, 1, 2]
    assert search(tokens, range(4, 1, -1), 3, first=True) == [7, 1, 2]


@given(few_tokens, st.lists(st.integers(0, 60), max_size=5))
def test_tokens_may_come_in_any_portions(tokens: list[int], cuts: list[int]) -> None:
    drafter = NgramDrafter(len(tokens))
    source = iter(tokens)
    for size in cuts:
        drafter.extend(islice(source, size))
        drafter.propose(3)
    drafter.extend(source)
    assert drafter.propose(5) == drafter_of(tokens).propose(5)


def test_a_loop_is_gone_on_with() -> None:
    assert drafter_of([5, 1, 2, 3, 1, 2, 3, 1, 2]).propose(7) == [3, 1, 2, 3, 1, 2, 3]
    assert drafter_of([9, 9, 9, 9]).propose(3) == [9, 9, 9]


@pytest.mark.parametrize("tokens", [[], [1], [1, 2], [1, 2, 3, 4, 5, 6]])
def test_nothing_is_drafted_where_nothing_came_before(tokens: list[int]) -> None:
    assert drafter_of(tokens).propose(4) == []


def test_memory_is_what_was_said_and_never_grows() -> None:
    capacity = 3000
    drafter = NgramDrafter(capacity, max_n=5, min_n=2)

    def held() -> int:
        arrays = [drafter._tokens, *drafter._tables.values()]
        return sum(sys.getsizeof(one) - sys.getsizeof(one[:0]) for one in arrays)

    assert held() == ngram_index_bytes(capacity, num_lengths=4)
    drafter.extend(i * i % 997 for i in range(capacity))
    assert held() == ngram_index_bytes(capacity, num_lengths=4)


def test_a_full_table_is_searched_in_few_steps() -> None:
    """Half-full tables have short probes: as many places as n-grams, and none lost."""
    capacity = 4000
    drafter = NgramDrafter(capacity, max_n=2, min_n=2)
    tokens = [i * 7919 % 3989 for i in range(capacity)]
    drafter.extend(tokens)
    filled = "".join("x" if place else " " for place in drafter._tables[2])
    assert filled.count("x") == len({tuple(tokens[i : i + 2]) for i in range(capacity - 2)})
    assert max(len(run) for run in filled.split()) < ngram._MOST_PROBES


def probes_of(tokens: list[int], monkeypatch: pytest.MonkeyPatch) -> int:
    """How many n-grams were compared while the tokens were taken in."""
    count = 0
    is_same = NgramDrafter._is_same

    def counted(drafter: NgramDrafter, n: int, end: int, other: int) -> bool:
        nonlocal count
        count += 1
        return is_same(drafter, n, end, other)

    with monkeypatch.context() as patched:
        patched.setattr(NgramDrafter, "_is_same", counted)
        drafter_of(tokens)
    return count


def test_no_text_makes_a_token_cost_more_than_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even one whose n-grams all want the same place, as a hash without a key lets one find."""
    num_tokens = 600
    tokens = list(range(num_tokens))
    assert probes_of(tokens, monkeypatch) < 5 * num_tokens
    monkeypatch.setattr(ngram, "_hash", lambda _: 7)
    bounded = probes_of(tokens, monkeypatch)
    assert bounded <= 3 * ngram._MOST_PROBES * num_tokens
    # The planted fault: without a bound the work grows with the square of the text.
    monkeypatch.setattr(ngram, "_MOST_PROBES", 2 * num_tokens)
    assert probes_of(tokens, monkeypatch) > 2 * bounded


def test_a_place_taken_by_another_gives_no_draft_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ngram, "_hash", lambda _: 7)
    monkeypatch.setattr(ngram, "_MOST_PROBES", 1)
    assert drafter_of([1, 2, 3, 4, 5, 6]).propose(3) == []
    assert drafter_of([9, 9, 9, 9]).propose(2) == [9, 9]


def test_tokens_are_hashed_with_the_key_of_the_process() -> None:
    """Python hashes whole numbers, and tuples of them, alike everywhere; bytes it does not."""
    code = "from array import array; from thinslice.engine.ngram import _hash; "
    code += "print(_hash(array('i', [1, 2, 3]).tobytes()))"
    hashes = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            check=True,
            capture_output=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(hashes) == 2
