"""Draft by prompt lookup: what followed the last few tokens when they came before.

Sources: apoorvumang/prompt-lookup-decoding; vLLM's ngram_proposer.py, which searches the whole
context at each step where this keeps an index, and llama.cpp's ngram-map, which keeps one.
"""

from array import array
from collections.abc import Iterable

from thinslice.plan.cost import ngram_table_size

# Places looked at for one n-gram. At most half of a table is taken, so hardly any n-gram is further
# from its place than this; one that is takes the place of another, and a draft is lost.
_MOST_PROBES = 128


class NgramDrafter:
    """Drafts for one sequence from its own prompt and completion.

    A draft follows the most recent earlier occurrence of the longest suffix that has one. Only
    tokens that are certain are added, so nothing ever has to be taken back.

    Args:
        capacity: the most tokens the sequence can come to hold.
        max_n, min_n: lengths of the suffixes looked up, longest first.

    Memory: ``plan.cost.ngram_index_bytes``, all of it at once.
    Time: O(max_n - min_n + 1), for a token as for a draft, whatever the tokens are: probes are
    bounded, and Python hashes bytes with a key that differs in each process, so that nobody can
    write a text whose n-grams all want the same place.
    """

    def __init__(self, capacity: int, max_n: int = 4, min_n: int = 2) -> None:
        assert 0 < min_n <= max_n, f"n-grams of {min_n}..{max_n} tokens"
        self.lengths = range(max_n, min_n - 1, -1)
        self._tokens = array("i", [0]) * capacity
        self._num_tokens = 0
        # One table for each length: where an n-gram last ended, 0 for none. Open addressing, at
        # most half full; an n-gram is told from others by the tokens before its end.
        self._tables = {n: array("i", [0]) * ngram_table_size(capacity) for n in self.lengths}

    @property
    def num_tokens(self) -> int:
        """Tokens added so far."""
        return self._num_tokens

    def extend(self, token_ids: Iterable[int]) -> None:
        """Add tokens of the prompt, or accepted ones."""
        for token_id in token_ids:
            end = self._num_tokens
            # The n-grams that end here have a follower now, and count from now on.
            for n, table in self._tables.items():
                if n <= end:
                    table[self._place(n, end)] = end
            self._tokens[end] = token_id
            self._num_tokens += 1

    def propose(self, count: int) -> list[int]:
        """``count`` tokens that may come next, or none where no suffix came before.

        Where the earlier occurrence reaches into the suffix, as in a loop, the draft goes on with
        its own first tokens.
        """
        num_tokens = self._num_tokens
        for n, table in self._tables.items():
            end = table[self._place(n, num_tokens)] if n <= num_tokens else 0
            if end and self._is_same(n, end, num_tokens):
                period = num_tokens - end
                return [self._tokens[end + i % period] for i in range(count)]
        return []

    def _is_same(self, n: int, end: int, other: int) -> bool:
        """Whether the same n-gram stands before both places."""
        return self._tokens[end - n : end] == self._tokens[other - n : other]

    def _place(self, n: int, end: int) -> int:
        """Return the slot of the n-gram before ``end`` in the table of length ``n``."""
        table = self._tables[n]
        first = _hash(self._tokens[end - n : end].tobytes()) % len(table)
        for probe in range(_MOST_PROBES):
            place = (first + probe) % len(table)
            other = table[place]
            if not other or self._is_same(n, other, end):
                return place
        return first


def _hash(ngram: bytes) -> int:
    return hash(ngram)
