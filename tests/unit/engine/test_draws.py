"""A seed's numbers are those that torch draws of it, so that a text stays the same."""

import sys
from types import FrameType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from thinslice.engine.draws import Draws

SEEDS = [0, 1, 5, 624, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**32 + 5, 2**53 + 1, 2**62, 2**63 - 1]
# More than the twister makes at a time: 624 words, of which a number takes two.
COUNT = 1000


def drawn(draws: Draws, count: int) -> list[float]:
    return [draws.next() for _ in range(count)]


def torch_drawn(seed: int, count: int) -> list[float]:
    """One at a time, as the sampler once drew them."""
    generator = torch.Generator().manual_seed(seed)
    return [float(torch.rand((), dtype=torch.float64, generator=generator)) for _ in range(count)]


@pytest.mark.parametrize("seed", SEEDS)
def test_the_numbers_are_torchs(seed: int) -> None:
    draws = Draws(seed)
    assert draws.seed == seed
    numbers = drawn(draws, COUNT)
    assert numbers == torch_drawn(seed, COUNT)
    assert all(0.0 <= one < 1.0 for one in numbers)
    assert len({*numbers}) == COUNT


@given(st.integers(0, 2**63 - 1))
def test_the_numbers_of_any_seed_are_torchs(seed: int) -> None:
    assert drawn(Draws(seed), 8) == torch_drawn(seed, 8)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("before", [0, 1, 311, 312, 313])
def test_restored_draws_give_the_same_numbers_again(seed: int, before: int) -> None:
    draws = Draws(seed)
    expected = torch_drawn(seed, before + 400)[before:]
    drawn(draws, before)
    state = draws.state()
    for count in (1, 400, 400):
        assert drawn(draws, count) == expected[:count]
        draws.restore(state)
    other = Draws(seed + 1)
    other.restore(state)
    assert drawn(other, 400) == expected, "the state holds all of it"


def test_draws_of_one_seed_do_not_disturb_each_other() -> None:
    first, second = Draws(7), Draws(7)
    expected = torch_drawn(7, 20)
    assert [(first.next(), second.next()) for _ in range(20)] == [(one, one) for one in expected]


def test_an_interrupt_at_any_line_takes_no_number_away() -> None:
    """Whoever is interrupted goes back to the state before, as a step does."""
    expected = torch_drawn(7, 80)
    num_lines = interrupted_at(10**9, expected)
    assert num_lines > 200
    for line in range(1, num_lines + 1):
        interrupted_at(line, expected)


def interrupted_at(line: int, expected: list[float]) -> int:
    """Draw, interrupted once at that line of draws.py; returns how many lines ran."""
    count = 0

    def trace(frame: FrameType, event: str, _: object) -> object:
        nonlocal count
        if not frame.f_code.co_filename.endswith("engine/draws.py"):
            return None
        if event == "line":
            count += 1
            if count == line:
                raise KeyboardInterrupt
        return trace

    draws, found = Draws(7), list[float]()
    before = sys.gettrace()
    while len(found) < len(expected):
        state = draws.state()
        sys.settrace(trace)
        try:
            found.append(draws.next())
        except KeyboardInterrupt:
            draws.restore(state)
        finally:
            sys.settrace(before)
    assert found == expected
    return count
