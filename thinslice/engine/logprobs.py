"""Log-probabilities of a completion's tokens, a few numbers each and no objects."""

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[Any]


@dataclass(frozen=True)
class TokenLogprobs:
    """Natural log-probabilities where one token was chosen.

    Attributes:
        logprob: of the chosen token under the model's own distribution: before processors,
            temperature and filters.
        drawn_logprob: of the chosen token under the distribution it was drawn from; 0 if greedy.
        top: id and log-probability of the likeliest tokens under the model's own distribution,
            likeliest first, equal ones by id.
    """

    logprob: float
    drawn_logprob: float
    top: tuple[tuple[int, float], ...]


class Logprobs(Sequence[TokenLogprobs]):
    """A list of TokenLogprobs that makes each when it is asked for.

    Every token has the same number of likeliest ones, as one request asks for them.

    Memory: ``bytes_per_token`` for each token; a list of the objects takes ten times that.
    """

    def __init__(self, tokens: Iterable[TokenLogprobs] = ()) -> None:
        self._num_top = 0
        self._chosen = array("d")
        self._drawn = array("d")
        self._top_ids = array("i")
        self._top_values = array("d")
        self.extend(tokens)

    @classmethod
    def of_rows(cls, chosen: Rows, top_ids: Rows, top_values: Rows) -> "Logprobs":
        """Those of tokens that were given and not drawn, from arrays.

        Args:
            chosen: [T] float64, of the tokens.
            top_ids, top_values: [T, most], of the likeliest.
        """
        logprobs = cls()
        logprobs._num_top = top_ids.shape[1]
        logprobs._chosen = array("d", chosen.tobytes())
        logprobs._drawn = array("d", bytes(8 * len(chosen)))
        logprobs._top_ids = array("i", top_ids.astype(np.int32).tobytes())
        logprobs._top_values = array("d", top_values.tobytes())
        return logprobs

    @staticmethod
    def bytes_per_token(num_top: int) -> int:
        """What a token takes at most, with the room that arrays keep to grow into."""
        return (16 + 12 * num_top) * 9 // 8 + 1

    def extend(self, tokens: Iterable[TokenLogprobs]) -> None:
        """Append tokens. Interrupted, it is put right by ``truncate``."""
        if isinstance(tokens, Logprobs):
            if len(tokens):
                self._num_top = tokens._num_top
            self._chosen.extend(tokens._chosen)
            self._drawn.extend(tokens._drawn)
            self._top_ids.extend(tokens._top_ids)
            self._top_values.extend(tokens._top_values)
            return
        for token in tokens:
            self._num_top = len(token.top)
            self._chosen.append(token.logprob)
            self._drawn.append(token.drawn_logprob)
            self._top_ids.extend(token_id for token_id, _ in token.top)
            self._top_values.extend(value for _, value in token.top)

    def truncate(self, num_tokens: int) -> None:
        """Keep the first ``num_tokens``."""
        del self._chosen[num_tokens:]
        del self._drawn[num_tokens:]
        del self._top_ids[num_tokens * self._num_top :]
        del self._top_values[num_tokens * self._num_top :]

    def __len__(self) -> int:
        return len(self._chosen)

    @overload
    def __getitem__(self, index: int) -> TokenLogprobs: ...
    @overload
    def __getitem__(self, index: slice) -> "Logprobs": ...
    def __getitem__(self, index: int | slice) -> "TokenLogprobs | Logprobs":
        if isinstance(index, slice):
            return Logprobs(self[place] for place in range(len(self))[index])
        place = range(len(self))[index]  # raises IndexError
        start, stop = place * self._num_top, (place + 1) * self._num_top
        top = zip(self._top_ids[start:stop], self._top_values[start:stop], strict=True)
        return TokenLogprobs(self._chosen[place], self._drawn[place], tuple(top))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Logprobs):
            return NotImplemented
        return self._parts == other._parts

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Logprobs({[*self]!r})"

    @property
    def _parts(self) -> "tuple[array[float], array[float], array[int], array[float]]":
        return self._chosen, self._drawn, self._top_ids, self._top_values
