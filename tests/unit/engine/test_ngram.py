"""Prompt lookup against a search through the whole text."""

import sys
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

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
    assert max(len(run) for run in filled.split()) < 60
