"""The random numbers of one sequence."""

from copy import copy
from dataclasses import dataclass
from random import Random

_WORD = 0xFFFFFFFF
_NUM_WORDS = 624
_MANTISSA = (1 << 53) - 1
# Numbers made at a time: a state is a place among them, and costs nothing to keep.
_AT_ONCE = 32


@dataclass(slots=True, eq=False)
class _Numbers:
    """Some numbers, and those that follow, once they have been made.

    Attributes:
        twister: as it stands behind them. Nobody draws from it, but from copies: whoever is
            interrupted while the next numbers are made has changed nothing.
    """

    values: list[float]
    twister: Random
    following: "_Numbers | None" = None


# Where a sequence of draws stands.
State = tuple[_Numbers, int]


class Draws:
    """Numbers in [0, 1), as float64, from a Mersenne twister: a seed gives those that
    ``torch.rand`` gives in float64 after ``manual_seed``.

    Source: CPUGeneratorImpl.cpp (random64) and TransformationHelper.h (uniform_real) of PyTorch.

    Attributes:
        seed: that they began with.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._numbers: _Numbers | None = None  # greedy sequences draw none
        self._place = 0

    def next(self) -> float:
        """The next number."""
        numbers, place = self.state()
        if place == len(numbers.values):
            if numbers.following is None:
                numbers.following = _numbers_behind(numbers.twister)
            numbers, place = numbers.following, 0
        self.restore((numbers, place + 1))
        return numbers.values[place]

    def state(self) -> State:
        """What ``restore`` takes."""
        if self._numbers is None:
            self._numbers = _numbers_behind(_twister_of(self.seed))
        return self._numbers, self._place

    def restore(self, state: State) -> None:
        """Go back to where it was."""
        self._numbers, self._place = state


def _numbers_behind(twister: Random) -> _Numbers:
    """The next numbers of a twister, which stays as it is; two words for each."""
    twister = copy(twister)
    words = [twister.getrandbits(32) for _ in range(2 * _AT_ONCE)]
    both = zip(words[::2], words[1::2], strict=True)
    values = [((high << 32 | low) & _MANTISSA) / (_MANTISSA + 1) for high, low in both]
    return _Numbers(values, twister)


def _twister_of(seed: int) -> Random:
    """Python's twister in the state that ``init_genrand`` gives: its own seeding is another.

    Source: Matsumoto and Nishimura, mt19937ar.c.
    """
    words = [seed & _WORD]
    for index in range(1, _NUM_WORDS):
        before = words[-1]
        words.append((1812433253 * (before ^ (before >> 30)) + index) & _WORD)
    twister = Random()
    twister.setstate((3, (*words, _NUM_WORDS), None))
    return twister
