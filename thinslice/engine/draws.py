"""The random numbers of one sequence."""

from dataclasses import dataclass
from random import Random

_WORD = 0xFFFFFFFF
_NUM_WORDS = 624
_MANTISSA = (1 << 53) - 1
# Numbers made at a time: a state is a place among them, and costs nothing to keep.
_AT_ONCE = 32


@dataclass(slots=True, eq=False)
class _Numbers:
    """Some numbers, and those that follow, once they have been made."""

    values: list[float]
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
        self._twister: Random | None = None
        self._numbers, self._place = _Numbers([]), 0

    def next(self) -> float:
        """The next number."""
        if self._place == len(self._numbers.values):
            if self._numbers.following is None:
                self._numbers.following = self._made()
            self._numbers, self._place = self._numbers.following, 0
        self._place += 1
        return self._numbers.values[self._place - 1]

    def state(self) -> State:
        """What ``restore`` takes."""
        return self._numbers, self._place

    def restore(self, state: State) -> None:
        """Go back to where it was."""
        self._numbers, self._place = state

    def _made(self) -> _Numbers:
        """The next numbers of the twister, two words for each."""
        if self._twister is None:
            self._twister = _twister_of(self.seed)
        words = [self._twister.getrandbits(32) for _ in range(2 * _AT_ONCE)]
        both = zip(words[::2], words[1::2], strict=True)
        return _Numbers([((high << 32 | low) & _MANTISSA) / (_MANTISSA + 1) for high, low in both])


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
